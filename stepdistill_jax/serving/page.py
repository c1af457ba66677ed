"""Loads the web page at `/`, and makes HTTP headers that allow only the page's own script and style."""

import base64
import hashlib
import importlib.resources
import re

HTML = (
    importlib.resources.files("stepdistill_jax.serving")
    .joinpath("templates", "page.html")
    .read_text(encoding="utf-8")
)


def _digest(tag: str) -> str:
    (text,) = re.findall(f"<{tag}>(.*?)</{tag}>", HTML, re.DOTALL)
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


HEADERS = {
    "Content-Security-Policy": "default-src 'none'; connect-src 'self'; base-uri 'none';"
    " form-action 'none'; frame-ancestors 'none';"
    f" script-src {_digest('script')}; style-src {_digest('style')}",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}
