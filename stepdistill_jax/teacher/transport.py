"""Makes an HTTP client that limits the size of responses. This module imports httpx."""

import ssl
from collections.abc import AsyncIterator

import httpx

MOST_BYTES = (
    4 * 2**20
)  # of a response's body; the longest answers of current models are below 1 MiB
UNCOMPRESSED = "identity"


def bounded_client(timeout: float, verify: ssl.SSLContext) -> httpx.AsyncClient:
    """Returns a client with a single connection, which refuses responses that are compressed or over 4 MiB.

    Args:
        timeout: time limit of each read or write, in seconds. The limit for connecting is half of it.
    """
    return httpx.AsyncClient(
        limits=httpx.Limits(max_connections=1, max_keepalive_connections=1),
        # half, to report a failed connection before the caller ends the request after `timeout` seconds
        timeout=httpx.Timeout(timeout, connect=timeout / 2),
        headers={"Accept-Encoding": UNCOMPRESSED},
        follow_redirects=True,
        verify=verify,
        # A hook also limits redirects and errors, which httpx reads itself. With a custom transport, httpx
        # would ignore the proxies that environment variables set.
        event_hooks={"response": [_bound]},
    )


async def _bound(response: httpx.Response) -> None:
    encoding = response.headers.get("Content-Encoding", UNCOMPRESSED).strip().lower()
    if encoding not in ("", UNCOMPRESSED):  # it could be larger in memory
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
