"""Serves labels over HTTP.

The module `run` defines the function `serve`. `server` runs uvicorn and handles signals. `requests` reads
HTTP requests, and `app` answers them. `page` contains the web page. `batcher` gathers rows into batches,
and `answerer` runs the model. Starlette, uvicorn and prometheus_client are installed with the extra
`[serve]`, and are imported only when `serve` is called.
"""

from stepdistill_jax.serving.run import serve

__all__ = ["serve"]
