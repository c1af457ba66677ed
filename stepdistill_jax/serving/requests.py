"""Reads requests up to a size limit, and detects clients that disconnect."""

import asyncio
from typing import Any

from starlette.requests import ClientDisconnect, Request
from starlette.types import Scope

from stepdistill_jax.errors import InputError

MAX_HEAD_BYTES = 2**14
MAX_BODY_BYTES = 2**20


class Refused(Exception):
    """Raised to refuse a request."""

    def __init__(self, status: int, reason: str, **headers: str):
        """Sets the response. `reason` is the message for the client."""
        super().__init__(reason)
        self.status, self.headers = status, headers


def head_bytes(scope: Scope) -> int:
    """Returns the size of a request's head in bytes, without the spaces around header values."""
    query = scope["query_string"]
    line = [
        scope["method"].encode(),
        scope["raw_path"],
        b"?" + query if query else b"",
        b"HTTP/1.1",
    ]
    headers = sum(len(name) + len(value) + len(":\r\n") for name, value in scope["headers"])
    return sum(map(len, line)) + len("  \r\n") + headers + len("\r\n")


async def read_body(request: Request) -> bytes:
    """Returns the body of a request.

    Raises:
        Refused: the body is too large.
        ClientDisconnect: the client disconnects before the end of the body.
    """
    parts, size = [], 0
    async for part in request.stream():
        size += len(part)
        if size > MAX_BODY_BYTES:
            raise Refused(
                413, f"expected a body of at most {MAX_BODY_BYTES} bytes; send fewer rows"
            )
        parts.append(part)
    return b"".join(parts)


def rows_of(body: dict[str, Any]) -> tuple[list[dict[str, Any]], bool]:
    """Returns the rows in a body, and whether the body is a single row instead of a list.

    Raises:
        InputError: the body is neither a row nor {"rows": [...]}.
    """
    if "rows" not in body:
        return [body], True
    rows = body["rows"]
    if len(body) > 1 or not isinstance(rows, list):
        raise InputError('expected one row {"input": ...} or {"rows": [...]}, and nothing else')
    for number, row in enumerate(rows, 1):
        if not isinstance(row, dict):
            raise InputError(f"row {number}: expected a JSON object, got {type(row).__name__}")
    return rows, False


async def unless_left(request: Request, answered: asyncio.Future) -> Any:
    """Returns the result of `answered`. Cancels `answered` if the client disconnects.

    Raises:
        ClientDisconnect: the client has disconnected.
    """
    # always retrieves the exception, since asyncio logs exceptions that nobody retrieves
    answered.add_done_callback(lambda done: done.cancelled() or done.exception())
    left = asyncio.create_task(_disconnected(request))
    try:
        await asyncio.wait({answered, left}, return_when=asyncio.FIRST_COMPLETED)
        if not answered.done():
            raise ClientDisconnect
    finally:
        left.cancel()
        answered.cancel()  # cancels each waiting future in it
    return answered.result()


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
