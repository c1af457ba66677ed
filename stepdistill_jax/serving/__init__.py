"""Labels over HTTP.

`run` has `serve`; `server` is uvicorn and signals, `app` HTTP, `requests` what is read of one, `page` what a
browser shows, `batcher` gathers rows, `answerer` asks the model. Starlette, uvicorn and prometheus_client come with the extra `[serve]`: `serve` imports them.
"""

from stepdistill_jax.serving.run import serve

__all__ = ["serve"]
