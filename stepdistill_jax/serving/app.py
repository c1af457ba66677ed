"""Implements the HTTP service: its routes, its answers to requests, and its answers to errors."""

import asyncio
import contextlib
import dataclasses
import time
import traceback
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.routing import Route
from starlette.types import Message, Receive, Scope, Send

from stepdistill_jax.errors import InputError, printable
from stepdistill_jax.runtime.files import parse_json_line
from stepdistill_jax.runtime.progress import log
from stepdistill_jax.serving import metrics, page
from stepdistill_jax.serving.answerer import Answerer, Question
from stepdistill_jax.serving.batcher import Batcher, QueueFull
from stepdistill_jax.serving.requests import (
    MAX_BODY_BYTES,
    MAX_HEAD_BYTES,
    Refused,
    head_bytes,
    read_body,
    rows_of,
    unless_left,
)

# If a connection closes while its client is still sending, the client sees a broken connection instead of
# the answer. So the rest of a refused body is read and discarded, up to this size in total.
MOST_READ_BYTES = 16 * MAX_BODY_BYTES
LEFT = 499  # nginx's status for a request whose client has disconnected; nobody receives it
WARM_UP_LOG_SECS = 10.0
STARTING, READY, STOPPING = "warming up", "ready", "stopping"


@dataclasses.dataclass(frozen=True)
class Limits:
    """Limits that protect the service from its clients.

    Attributes:
        max_wait_secs: longest wait of a row for other rows while the engine is idle.
        max_queue: largest number of unanswered rows. The number of open requests has the same limit.
        timeout_secs: longest time from a request's head to its answer.
    """

    max_wait_secs: float
    max_queue: int
    timeout_secs: float


class Service:
    """The application that uvicorn runs. At its start, it warms the model up.

    Attributes:
        state: `warming up`, `ready` or `stopping`.
        answered: count of answered rows.
        open: count of requests in progress.
        unanswered: count of requests still in progress when the grace time ended.
        failure: the error that ended the service, or None.
        on_failure: function to call when an error ends the service.
    """

    def __init__(self, answerer: Answerer, limits: Limits):
        """Sets up the routes and the queue."""
        self.state = STARTING
        self.answered = self.open = self.unanswered = 0
        self.failure: Exception | None = None
        self.on_failure: Callable[[], None] = lambda: None
        self._warm = False
        self._explaining = asyncio.Lock()
        self._answerer, self._limits = answerer, limits
        self.batcher = Batcher(
            answerer.answers,
            length=lambda question: question.length,
            batch_size=answerer.batch_size,
            max_wait_secs=limits.max_wait_secs,
            max_queue=limits.max_queue,
            on_batch=self._count_batch,
        )
        self._metrics = metrics.Metrics(lambda: self.batcher.rows, lambda: self.state == READY)
        self._routes = Starlette(
            routes=[
                Route("/", self._page),
                Route("/predict", self._predict, methods=["POST"]),
                Route("/explain", self._explain, methods=["POST"]),
                Route("/health", self._health),
                Route("/ready", self._ready),
                Route("/metrics", self._show_metrics),
                Route("/info", self._info),
            ],
            exception_handlers={HTTPException: _plain_error},  # 404 and 405
            lifespan=self._life,
        )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers one request, or runs the service during uvicorn's lifespan.

        The answer is sent after the request's body has arrived. If the body is longer than `MOST_READ_BYTES`,
        if `timeout_secs` have passed, or if the server is stopping, the answer is sent at once and the
        connection is closed.
        """
        if scope["type"] != "http":
            return await self._routes(scope, receive, send)
        deadline = asyncio.get_running_loop().time() + self._limits.timeout_secs
        size, ended = 0, False

        async def received() -> Message:
            nonlocal size, ended
            message = await receive()
            size += len(message.get("body", b""))
            ended = not message.get("more_body", False)
            return message

        async def answer(message: Message) -> None:
            if message["type"] == "http.response.start":
                # a cancelled request has no time left, so its answer is sent at once
                with contextlib.suppress(TimeoutError, asyncio.CancelledError):
                    async with asyncio.timeout_at(deadline):
                        while not ended and size <= MOST_READ_BYTES and self.state != STOPPING:
                            await received()
                if not ended or self.state == STOPPING:
                    message["headers"] = [*message["headers"], (b"connection", b"close")]
            await send(message)

        if head_bytes(scope) > MAX_HEAD_BYTES:
            refusal = _error(431, f"expected a request head of at most {MAX_HEAD_BYTES} bytes")
            return await refusal(scope, received, answer)
        return await self._routes(scope, received, answer)

    @contextlib.asynccontextmanager
    async def _life(self, _app: Starlette) -> AsyncIterator[None]:
        work = asyncio.create_task(self._work())
        try:
            yield
        finally:
            work.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await work

    async def _work(self) -> None:
        began = time.perf_counter()
        try:
            pieces = list(self._answerer.warm_up())
            logged = began
            for done, piece in enumerate(pieces, 1):
                await self.batcher.in_thread(piece)
                if self.state == STOPPING:
                    return
                if time.perf_counter() - logged > WARM_UP_LOG_SECS:
                    logged = time.perf_counter()
                    log(f"warming up: {done} of {len(pieces)} batch shapes are compiled")
            self.state, self._warm = READY, True
            log(f"ready after {time.perf_counter() - began:.1f} s")
            await self.batcher.run()
        except Exception as error:
            # every request would fail in the same way: end the process, so that its supervisor sees it
            self.failure, self.state = error, STOPPING
            self.on_failure()

    def _count_batch(self, rows: int, seconds: float) -> None:
        self._metrics.batch_rows.observe(rows)
        self._metrics.batch_seconds.observe(seconds)

    async def _predict(self, request: Request) -> Response:
        began = time.perf_counter()
        response = await self._response(request, self._answer)
        self._metrics.requests.labels(str(response.status_code)).inc()
        if response.status_code == 200:
            self._metrics.request_seconds.observe(time.perf_counter() - began)
        return response

    async def _explain(self, request: Request) -> Response:
        return await self._response(request, self._explanation)

    async def _response(
        self, request: Request, answer: Callable[[Request, bytes], Awaitable[dict[str, Any]]]
    ) -> Response:
        self.open += 1
        try:
            async with asyncio.timeout(self._limits.timeout_secs):
                return JSONResponse(await answer(request, await self._body(request)))
        except Refused as error:
            return _error(error.status, str(error), error.headers)
        except InputError as error:
            return _error(400, str(error))
        except TimeoutError:
            return _error(504, f"no answer within {self._limits.timeout_secs:g} s")
        except ClientDisconnect:
            return Response(status_code=LEFT)
        except asyncio.CancelledError:
            if self.state != STOPPING:
                raise
            self.unanswered += 1
            return _error(503, "the server has stopped")
        except Exception:
            log(f"a request failed:\n{traceback.format_exc()}")
            return _error(500, "the server failed; its log has the error")
        finally:
            self.open -= 1

    async def _body(self, request: Request) -> bytes:
        """Returns the body of a request.

        Raises:
            Refused: the model is warming up, too many requests are open, or the body is too large.
            ClientDisconnect: the client disconnects before the end of the body.
        """
        if not self._warm:
            raise Refused(503, "the model is warming up", **{"Retry-After": "5"})
        if self.open > self._limits.max_queue:
            raise self._queue_full()
        return await read_body(request)

    async def _answer(self, request: Request, body: bytes) -> dict[str, Any]:
        # in a thread: tokenising the longest text takes a third of a second, which would block all clients
        questions, alone = await asyncio.to_thread(self._questions, body)
        answers = await self._answers(request, questions)
        self.answered += len(answers)
        self._metrics.rows.inc(len(answers))
        return answers[0] if alone else {"rows": answers}

    async def _explanation(self, request: Request, body: bytes) -> dict[str, Any]:
        if not self._answerer.explains:
            raise Refused(
                404, "this model was not trained to write a rationale apart from the label"
            )
        rows, alone = rows_of(parse_json_line(body))
        if not alone:
            raise InputError('expected a single row {"input": ...}; send one request for each row')
        question = await asyncio.to_thread(self._answerer.rationale_question, rows[0])
        return await unless_left(request, asyncio.ensure_future(self._explained(question)))

    async def _explained(self, question: Question) -> dict[str, Any]:
        # one at a time, so that batches of labels run between rationales
        async with self._explaining:
            return await self.batcher.in_thread(self._answerer.explanation, question)

    def _questions(self, body: bytes) -> tuple[list[Question], bool]:
        """Returns the questions in a body, and whether the body is a single row instead of a list."""
        rows, alone = rows_of(parse_json_line(body))
        if len(rows) > self._limits.max_queue:
            raise Refused(
                413, f"expected at most {self._limits.max_queue} rows in a request, got {len(rows)}"
            )
        return [self._answerer.question(row, i) for i, row in enumerate(rows, 1)], alone

    async def _answers(self, request: Request, questions: list[Question]) -> list[dict[str, Any]]:
        """Waits for the answers. If the client disconnects, its rows leave the queue."""
        if not questions:
            return []
        try:
            futures = self.batcher.submit(questions)
        except QueueFull:
            raise self._queue_full() from None
        answered = asyncio.gather(*futures)
        answers = await unless_left(request, answered)
        for number, answer in enumerate(answers, 1):
            if isinstance(answer, InputError):
                raise InputError(f"row {number}: {answer}")
            if isinstance(answer, Exception):
                raise answer
        return answers

    def _queue_full(self) -> Refused:
        return Refused(503, "too many rows are waiting; try again later", **{"Retry-After": "1"})

    async def _page(self, _request: Request) -> Response:
        return HTMLResponse(page.HTML, headers=page.HEADERS)

    async def _health(self, _request: Request) -> Response:
        return JSONResponse({"status": "ok"})

    async def _ready(self, _request: Request) -> Response:
        return JSONResponse({"status": self.state}, 200 if self.state == READY else 503)

    async def _show_metrics(self, _request: Request) -> Response:
        return Response(self._metrics.text(), media_type=metrics.CONTENT_TYPE)

    async def _info(self, _request: Request) -> Response:
        return JSONResponse(self._answerer.info())


def _error(status: int, reason: str, headers: dict[str, str] | None = None) -> Response:
    return JSONResponse({"error": printable(reason)}, status, headers)


async def _plain_error(_request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return _error(error.status_code, error.detail, dict(error.headers or {}))
