"""Runs a server that imitates a teacher, to try `annotate` without a model or a key.

`python -m stepdistill_jax.teacher.stub_server` listens at http://127.0.0.1:8399/v1. In tests, the server
also sends errors, slow replies and broken replies.
"""

import argparse
import asyncio
import contextlib
import dataclasses
import json
import re
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

from stepdistill_jax.runtime.fingerprints import hash64

PORT = 8399
_LETTERED = re.compile(r"^\((\w)\) (.*)$", re.MULTILINE)
_LISTED = re.compile(r"^- (.*)$", re.MULTILINE)
_GIVEN = re.compile(r"^Right \w+: (.*)$", re.MULTILINE)


@dataclasses.dataclass
class Reply:
    """A reply of the server.

    Attributes:
        text: content of the answer.
        headers: additional HTTP headers.
        body: the complete body; None means a completion with `text`.
        delay: seconds to wait before the reply.
        cut: number of the body's bytes to send before the connection is closed; None sends all.
        drip: seconds to wait after each byte of the body; 0 sends it in one piece.
        endless: whether to repeat the body, in chunks, until the client disconnects.
        tokens: (prompt tokens, answer tokens) to report; None means about one token per 4 characters.
    """

    text: str = ""
    finish_reason: str = "stop"
    status: int = 200
    headers: dict[str, str] = dataclasses.field(default_factory=dict)
    body: bytes | None = None
    delay: float = 0.0
    cut: int | None = None
    drip: float = 0.0
    endless: bool = False
    tokens: tuple[int, int] | None = None


def by_rule(request: dict[str, Any]) -> Reply:
    """Returns a well-formed answer to the last question of a prompt.

    If the question states the right label, the answer repeats it. Otherwise, the label may be wrong.
    """
    prompt = request["messages"][-1]["content"]
    is_pair = prompt.rstrip().endswith("Explanation:")
    question = re.split(r"^Premise:|^Q:", prompt, flags=re.MULTILINE)[-1].strip()
    number = hash64(question) >> 32
    about = " ".join(question.split()[:8]).rstrip(".?,:")
    given = _GIVEN.search(question)
    choices = [f"({x}) {c}" for x, c in _LETTERED.findall(question)] or _LISTED.findall(question)
    if given:
        label = given[1]
    elif is_pair:
        label = ("entailment", "neutral", "contradiction")[number % 3]
    elif choices:
        label = choices[number % len(choices)]
    else:
        label = f"({' + '.join(re.findall(r'[0-9]+', question)[:2] or ['1'])})"
    if is_pair and "Answer:" in prompt:
        return Reply(f"This is about {about}. Answer: {label}")
    if "EQUATION" in prompt:
        return Reply(f"This is about {about}. The answer is {label}.")
    return Reply(f"This is about {about}. So the answer is {label}.")


class StubServer:
    """A server of `chat/completions` that runs in its own thread.

    Attributes:
        requests: count of requests so far.
        most_at_once: largest count of simultaneous requests so far.
        last_head: request line and headers of the latest request.
    """

    def __init__(self, reply: Callable[[dict[str, Any]], Reply] = by_rule, port: int = 0):
        """Sets the function that makes replies, and the port to listen on. Port 0 means any free port."""
        self._reply, self._port = reply, port
        self.requests = self.most_at_once = self._open = 0
        self.last_head = ""
        self._loop: asyncio.AbstractEventLoop | None = None

    @property
    def url(self) -> str:
        """URL of the server, for the setting `base_url`."""
        return f"http://127.0.0.1:{self._port}/v1"

    @contextlib.contextmanager
    def serve(self) -> Iterator["StubServer"]:
        """Answers requests during the `with` block."""
        ready = threading.Event()
        thread = threading.Thread(target=lambda: asyncio.run(self._run(ready)), daemon=True)
        thread.start()
        if not ready.wait(10) or self._loop is None:
            raise OSError(f"the server cannot listen on port {self._port}")
        try:
            yield self
        finally:
            self._loop.call_soon_threadsafe(self._end.set)
            thread.join(10)

    async def _run(self, ready: threading.Event) -> None:
        self._end = asyncio.Event()
        server = await asyncio.start_server(self._connection, "127.0.0.1", self._port, backlog=512)
        self._port = server.sockets[0].getsockname()[1]
        self._loop = asyncio.get_running_loop()
        ready.set()
        await self._end.wait()
        server.close()

    async def _connection(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while await self._one(reader, writer):
                pass
        except (ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError):
            pass  # the client has disconnected, or the server is ending
        finally:
            writer.close()

    async def _one(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        """Answers one request on a connection, and returns whether the connection stays open."""
        head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
        length = re.search(r"^content-length: *(\d+)", head, re.IGNORECASE | re.MULTILINE)
        request = json.loads(await reader.readexactly(int(length[1])) if length else b"{}")
        self.last_head = head
        self.requests += 1
        self._open += 1
        self.most_at_once = max(self.most_at_once, self._open)
        try:
            reply = self._reply(request)
            if reply.delay:
                await asyncio.sleep(reply.delay)
            body = _completion(request, reply) if reply.body is None else reply.body
            size = {"Content-Length": len(body)}
            if reply.endless:
                size = {"Transfer-Encoding": "chunked"}
            headers = {"Content-Type": "application/json", **size, **reply.headers}
            lines = [f"{name}: {value}\r\n" for name, value in headers.items()]
            start = f"HTTP/1.1 {reply.status} {'OK' if reply.status == 200 else 'No'}\r\n"
            writer.write(f"{start}{''.join(lines)}\r\n".encode())
            async for part in _parts(body[: reply.cut], reply):
                writer.write(part)
                await writer.drain()
            return reply.cut is None
        finally:
            self._open -= 1


async def _parts(body: bytes, reply: Reply) -> AsyncIterator[bytes]:
    while reply.endless:
        yield b"%x\r\n%s\r\n" % (len(body), body)
    if not reply.drip:
        yield body
        return
    for at in range(len(body)):
        yield body[at : at + 1]
        await asyncio.sleep(reply.drip)


def _completion(request: dict[str, Any], reply: Reply) -> bytes:
    prompt = request["messages"][-1]["content"]
    used = reply.tokens or (len(prompt) // 4, len(reply.text) // 4 + 1)
    message = {"role": "assistant", "content": reply.text}
    body = {
        "id": "stub",
        "object": "chat.completion",
        "created": 0,
        "model": request.get("model"),
        "choices": [{"index": 0, "message": message, "finish_reason": reply.finish_reason}],
        "usage": {
            "prompt_tokens": used[0],
            "completion_tokens": used[1],
            "total_tokens": sum(used),
        },
    }
    return json.dumps(body).encode()


def main() -> None:
    """Serves until it is interrupted."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--port", type=int, default=PORT)
    server = StubServer(port=parser.parse_args().port)
    with server.serve(), contextlib.suppress(KeyboardInterrupt):
        print(f"listening at {server.url}", flush=True)
        threading.Event().wait()


if __name__ == "__main__":
    main()
