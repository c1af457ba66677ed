"""Serves labels over HTTP.

`run` defines `serve`. `server` runs uvicorn and obeys signals, `app` answers HTTP requests, `requests` reads
them, `page` is the web page, `batcher` gathers rows into batches, and `answerer` runs the model. Starlette,
uvicorn and prometheus_client come with the extra `[serve]`; they are imported only when `serve` is called.
"""

from stepdistill_jax.serving.run import serve

__all__ = ["serve"]
