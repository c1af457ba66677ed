"""Gathers the rows of many clients into batches. A separate thread decodes the batches one by one."""

import asyncio
import concurrent.futures
import dataclasses
import traceback
from collections.abc import Callable, Sequence
from typing import Any

from stepdistill_jax.errors import InputError
from stepdistill_jax.runtime.progress import log

SHORTEST_LANE = 32


def lane_length(length: int) -> int:
    """Returns the smallest of 32, 64, 96, 128, 192, 256, 384, ... that is at least `length`.

    Example: the lane length of 65 to 96 ids is 96.
    """
    # rows with the same lane length share batches, so that batches fill up and few shapes are compiled
    power = SHORTEST_LANE
    while power < length:
        if power > SHORTEST_LANE and power * 3 // 2 >= length:
            return power * 3 // 2
        power *= 2
    return power


class QueueFull(Exception):
    """Raised when the queue has no room for the submitted rows."""


@dataclasses.dataclass(eq=False)
class _Waiting:
    """A waiting row, its time of arrival, and the future of its answer."""

    row: Any
    arrived: float
    answer: asyncio.Future


@dataclasses.dataclass(eq=False)
class _Lane:
    """The waiting rows of one `lane_length`, in order of arrival.

    Attributes:
        seconds: engine time that the lane has used. The lane with the least is served next. When an empty lane
            gets a row, `seconds` is raised to at least `Batcher._time`.
    """

    waiting: dict[int, _Waiting] = dataclasses.field(default_factory=dict)  # by `id`
    seconds: float = 0.0

    @property
    def first(self) -> _Waiting:
        return next(iter(self.waiting.values()))


class Batcher:
    """Decodes submitted rows in batches of similar length.

    An idle engine starts a batch as soon as the batch is full or a row has waited for `max_wait_secs`. Rows
    with the same `lane_length` form a lane, and a batch has rows of only one lane. The next batch comes from the lane
    that has used the least engine time (start-time fair queueing, Goyal et al. 1996).

    Attributes:
        rows: count of rows that are neither answered nor cancelled.
    """

    def __init__(
        self,
        decode: Callable[[list[Any]], Sequence[Any]],
        *,
        length: Callable[[Any], int] = len,
        batch_size: int,
        max_wait_secs: float,
        max_queue: int,
        on_batch: Callable[[int, float], None] = lambda rows, seconds: None,
    ):
        """Creates an empty queue. `submit` adds rows to it, and `run` decodes them.

        Args:
            decode: returns the answers to rows, in order; called from a single thread. After an InputError,
                each row of the batch is decoded alone. Any other error becomes the answer to all rows.
            length: returns the number of ids in a row's input.
            max_wait_secs: if no batch is being decoded, how long a row waits for others to fill its batch.
            max_queue: largest number of unanswered rows.
            on_batch: called after each batch with its row count and its seconds.
        """
        self.max_queue = max_queue
        self.rows = 0
        self._decode, self._length, self._on_batch = decode, length, on_batch
        self._batch_size, self._max_wait = batch_size, max_wait_secs
        self._lanes: dict[int, _Lane] = {}
        # Virtual time: `seconds` of the lane served last, at the start of its batch. A lane that was
        # empty starts from here, so it gets no credit for its pause.
        self._time = 0.0
        self._changed = asyncio.Event()
        self._thread = concurrent.futures.ThreadPoolExecutor(1, "engine")
        self._working: concurrent.futures.Future | None = None

    def submit(self, rows: Sequence[Any]) -> list[asyncio.Future]:
        """Queues all rows, or none of them if there is not enough room.

        Returns:
            A future for each row, whose result is the answer or an exception. Cancelling it removes the row.

        Raises:
            QueueFull: there would be more than `max_queue` unanswered rows.
        """
        if self.rows + len(rows) > self.max_queue:
            raise QueueFull
        loop = asyncio.get_running_loop()
        futures = []
        for row in rows:
            lane = self._lanes.setdefault(lane_length(self._length(row)), _Lane())
            if not lane.waiting:
                lane.seconds = max(lane.seconds, self._time)
            one = _Waiting(row, loop.time(), loop.create_future())
            lane.waiting[id(one)] = one
            self.rows += 1
            one.answer.add_done_callback(lambda _, lane=lane, one=one: self._leave(lane, one))
            futures.append(one.answer)
        self._changed.set()
        return futures

    def _leave(self, lane: _Lane, one: _Waiting) -> None:
        self.rows -= 1
        lane.waiting.pop(id(one), None)  # still in the lane if its client has disconnected

    async def in_thread(self, work: Callable[..., Any], *args: Any) -> Any:
        """Runs `work` in the engine's thread, between batches."""
        self._working = self._thread.submit(work, *args)
        return await asyncio.wrap_future(self._working)

    async def run(self) -> None:
        """Decodes batches until this coroutine is cancelled."""
        while True:
            lane = await self._next_lane()
            batch = list(lane.waiting.values())[: self._batch_size]
            for one in batch:  # `rows` still counts them, until they are answered
                del lane.waiting[id(one)]
            self._time = lane.seconds
            answers, seconds = await self._decoded([one.row for one in batch])
            lane.seconds += seconds
            self._on_batch(len(batch), seconds)
            # `done`: cancelled, since its client has disconnected
            for one, answer in zip(batch, answers, strict=True):
                if not one.answer.done():
                    one.answer.set_result(answer)

    async def _next_lane(self) -> _Lane:
        """Waits until a batch may start, and returns the lane to serve."""
        loop = asyncio.get_running_loop()
        while True:
            self._changed.clear()
            lanes = [lane for lane in self._lanes.values() if lane.waiting]
            start = min(map(self._starts, lanes), default=None)
            if start is not None and start <= loop.time():
                # choose among all lanes, even if their batches are not full: the next one may take long
                return min(lanes, key=lambda lane: (lane.seconds, lane.first.arrived))
            try:
                async with asyncio.timeout_at(start):
                    await self._changed.wait()
            except TimeoutError:
                pass

    def _starts(self, lane: _Lane) -> float:
        """Returns the event loop's time at which the lane's next batch may start; 0 for a full batch."""
        full = len(lane.waiting) >= self._batch_size
        return 0.0 if full else lane.first.arrived + self._max_wait

    async def _decoded(self, rows: list[Any]) -> tuple[Sequence[Any], float]:
        """Decodes a batch, and returns the answers and the seconds that decoding took."""
        loop = asyncio.get_running_loop()
        began = loop.time()
        try:
            answers = await self.in_thread(self._decode_each, rows)
        except Exception as error:
            log(f"a batch of {len(rows)} rows failed:\n{traceback.format_exc()}")
            answers = [error] * len(rows)
        return answers, loop.time() - began

    def _decode_each(self, rows: list[Any]) -> Sequence[Any]:
        """Decodes rows together. After an InputError, decodes each row alone."""
        try:
            return self._decode(rows)
        except InputError as error:
            if len(rows) == 1:
                return [error]
            return [answer for row in rows for answer in self._decode_each([row])]

    def close(self) -> bool:
        """Stops accepting work, and returns whether the engine's thread is still working."""
        self._thread.shutdown(wait=False, cancel_futures=True)
        return self._working is not None and not self._working.done()
