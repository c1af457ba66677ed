"""Makes an HTTP client that limits the size of responses. Import it only where httpx is needed."""

import ssl
from collections.abc import AsyncIterator

import httpx

MOST_BYTES = (
    4 * 2**20
)  # of a response's body; the longest answers of current models are below 1 MiB
UNCOMPRESSED = "identity"


def bounded_client(timeout: float, verify: ssl.SSLContext) -> httpx.AsyncClient:
    """Returns a client with one connection that refuses compressed and endless responses.

    It requests no compression, so one limit applies to the bytes on the wire and in memory. The limit
    covers the bodies of redirects and errors, which httpx reads itself. It is a hook, not a transport:
    a client with its own transport ignores the proxies of the environment.

    Args:
        timeout: seconds for each read or write. Connecting gets half of it: the caller ends the request
            after `timeout`, and then still knows whether anything was sent.
        verify: TLS settings.
    """
    return httpx.AsyncClient(
        limits=httpx.Limits(max_connections=1, max_keepalive_connections=1),
        timeout=httpx.Timeout(timeout, connect=timeout / 2),
        headers={"Accept-Encoding": UNCOMPRESSED},
        follow_redirects=True,
        verify=verify,
        event_hooks={"response": [_bound]},
    )


async def _bound(response: httpx.Response) -> None:
    encoding = response.headers.get("Content-Encoding", UNCOMPRESSED).strip().lower()
    if encoding not in ("", UNCOMPRESSED):
        raise httpx.ReadError(
            f"the response is compressed ({encoding[:40]}), which was not requested"
        )
    response.stream = _BoundedStream(response.stream)


class _BoundedStream(httpx.AsyncByteStream):
    def __init__(self, stream: httpx.SyncByteStream | httpx.AsyncByteStream):
        assert isinstance(stream, httpx.AsyncByteStream)
        self._stream = stream

    async def __aiter__(self) -> AsyncIterator[bytes]:
        count = 0
        async for chunk in self._stream:
            count += len(chunk)
            if count > MOST_BYTES:
                raise httpx.ReadError(f"the response is longer than {MOST_BYTES // 2**20} MiB")
            yield chunk

    async def aclose(self) -> None:
        await self._stream.aclose()
