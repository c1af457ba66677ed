"""Rows of many clients, gathered into batches: one thread decodes, the event loop stays free."""

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
    """Rows up to this length share batches: 32, 64, 96, 128, 192, 256, 384, ...

    Fewer than the engine's own padded lengths, so that batches fill, and few shapes are to be warm.
    """
    power = SHORTEST_LANE
    while power < length:
        if power > SHORTEST_LANE and power * 3 // 2 >= length:
            return power * 3 // 2
        power *= 2
    return power


class QueueFull(Exception):
    """There is no place for these rows."""


@dataclasses.dataclass(eq=False)
class _Waiting:
    """A row that waits, when it came, and the future of its answer."""

    row: Any
    arrived: float
    answer: asyncio.Future


@dataclasses.dataclass(eq=False)
class _Lane:
    """Rows of one `lane_length`, in order of arrival, and how much of the engine's time they have had."""

    waiting: dict[int, _Waiting] = dataclasses.field(default_factory=dict)  # by `id`
    seconds: float = 0.0

    @property
    def first(self) -> _Waiting:
        return next(iter(self.waiting.values()))


class Batcher:
    """Decodes what is submitted in batches of like length.

    The idle engine starts once there is a full batch, or a row has waited for `max_wait_secs`; while one
    batch runs, the next one gathers. Each `lane_length` has a lane of its own, and the lanes share the
    engine's time (start-time fair queueing, Goyal et al. 1996): the one that has had least of it goes
    next, and who comes back after a pause is not owed for the pause. So a short row among hundreds of
    long ones waits for the batch that runs, not for all of them.

    Attributes:
        rows: submitted and not yet answered or given up.
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
        """Starts nothing yet.

        Args:
            decode: answers of rows, in their order; called from one thread. What it raises is the
                answer of all its rows; an InputError is only that of the rows that raise it alone.
            length: ids of a row's input.
            batch_size: most rows of a batch.
            max_wait_secs: how long a row waits for others while the engine is idle.
            max_queue: most `rows`.
            on_batch: told the rows and the seconds of each batch.
        """
        self.max_queue = max_queue
        self.rows = 0
        self._decode, self._length, self._on_batch = decode, length, on_batch
        self._batch_size, self._max_wait = batch_size, max_wait_secs
        self._lanes: dict[int, _Lane] = {}
        self._time = 0.0  # of the lane that was served last, before that
        self._changed = asyncio.Event()
        self._thread = concurrent.futures.ThreadPoolExecutor(1, "engine")
        self._working: concurrent.futures.Future | None = None

    def submit(self, rows: Sequence[Any]) -> list[asyncio.Future]:
        """Puts all of `rows` into the queue, or none.

        Returns:
            A future for each, of its answer or of the exception that it met. One that is cancelled
            leaves the queue.

        Raises:
            QueueFull: there would be more than `max_queue`.
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
        lane.waiting.pop(id(one), None)  # it is still there if its client gave up

    async def in_thread(self, work: Callable[..., Any], *args: Any) -> Any:
        """Runs `work` in the thread of the engine, between batches."""
        self._working = self._thread.submit(work, *args)
        return await asyncio.wrap_future(self._working)

    async def run(self) -> None:
        """Decodes until it is cancelled."""
        while True:
            lane = await self._next_lane()
            batch = list(lane.waiting.values())[: self._batch_size]
            for one in batch:
                del lane.waiting[id(one)]
            self._time = lane.seconds
            answers, seconds = await self._decoded([one.row for one in batch])
            lane.seconds += seconds
            self._on_batch(len(batch), seconds)
            for one, answer in zip(batch, answers, strict=True):
                if not one.answer.done():
                    one.answer.set_result(answer)

    async def _next_lane(self) -> _Lane:
        """Waits until a batch is to start; the lane that has its turn."""
        loop = asyncio.get_running_loop()
        while True:
            self._changed.clear()
            lanes = [lane for lane in self._lanes.values() if lane.waiting]
            start = min(map(self._starts, lanes), default=None)
            if start is not None and start <= loop.time():
                # of all, also those that would still gather: the next batch may be a long one
                return min(lanes, key=lambda lane: (lane.seconds, lane.first.arrived))
            try:
                async with asyncio.timeout_at(start):
                    await self._changed.wait()
            except TimeoutError:
                pass

    def _starts(self, lane: _Lane) -> float:
        """When its batch may start."""
        full = len(lane.waiting) >= self._batch_size
        return 0.0 if full else lane.first.arrived + self._max_wait

    async def _decoded(self, rows: list[Any]) -> tuple[Sequence[Any], float]:
        """Answers, and the seconds that they took."""
        loop = asyncio.get_running_loop()
        began = loop.time()
        try:
            answers = await self.in_thread(self._decode_each, rows)
        except Exception as error:
            log(f"a batch of {len(rows)} rows failed:\n{traceback.format_exc()}")
            answers = [error] * len(rows)
        return answers, loop.time() - began

    def _decode_each(self, rows: list[Any]) -> Sequence[Any]:
        """In the thread: one row that cannot be asked does not take the others along."""
        try:
            return self._decode(rows)
        except InputError as error:
            if len(rows) == 1:
                return [error]
            return [answer for row in rows for answer in self._decode_each([row])]

    def close(self) -> bool:
        """Takes no more work; whether the thread is still at the last one."""
        self._thread.shutdown(wait=False, cancel_futures=True)
        return self._working is not None and not self._working.done()
