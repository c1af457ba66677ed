"""Serves labels over HTTP.

Starlette, uvicorn and prometheus_client (the extra `[serve]`) are imported only when `run.serve` is called.
"""

from stepdistill_jax.serving.run import serve

__all__ = ["serve"]
