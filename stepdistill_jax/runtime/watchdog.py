"""Ends a process whose steps have stopped, so that a stuck job is started again and not paid for."""

import collections
import contextlib
import faulthandler
import os
import statistics
import sys
import threading
import time
from collections.abc import Iterator

from stepdistill_jax.runtime.progress import log

EXIT_STUCK = 134  # as by SIGABRT, by which JAX ends the peers of a dead process: start again
SLOW_FACTOR = 12  # what a first step, a validation or a save may take, in units of `min_secs`
RECENT = 32  # step times whose median counts


class Watchdog:
    """While entered: no step for too long writes all threads' stacks and ends the process with 134.

    Too long is `medians` times the median of the recent step times, and at least `min_secs`. What is
    slow without being stuck has `SLOW_FACTOR * min_secs`: the time up to the first step, which compiles,
    and what runs inside `slow`.

    Time in which the whole process does not run (a suspended laptop, Ctrl-Z) does not count: the
    thread adds up its own short sleeps.
    """

    def __init__(self, medians: float, min_secs: float):
        """`medians` 0 turns it off."""
        self._medians, self._min_secs = medians, min_secs
        self._interval = min(1.0, min_secs / 10)
        self._seconds: collections.deque[float] = collections.deque(maxlen=RECENT)
        self._last_step: int | None = None
        self._began = time.monotonic()
        self._ran = self._mark = (
            0.0  # seconds that the process ran: in all, and at the last sign of life
        )
        self._slow = True
        self._end = threading.Event()

    def __enter__(self) -> "Watchdog":
        if self._medians:
            threading.Thread(target=self._watch, name="watchdog", daemon=True).start()
        return self

    def __exit__(self, *_) -> None:
        self._end.set()

    def step(self, step: int) -> None:
        """A step has ended."""
        if not self._slow:
            self._seconds.append(time.monotonic() - self._began)
        self._last_step = step
        self._sign_of_life(slow=False)

    @contextlib.contextmanager
    def slow(self) -> Iterator[None]:
        """Around what is no step: a validation, a save."""
        self._sign_of_life(slow=True)
        try:
            yield
        finally:
            self._sign_of_life(slow=False)

    def _sign_of_life(self, *, slow: bool) -> None:
        self._began, self._mark, self._slow = time.monotonic(), self._ran, slow

    def limit_secs(self) -> float:
        """How long what is under way may take."""
        if self._slow or not self._seconds:
            return SLOW_FACTOR * self._min_secs
        return max(self._min_secs, self._medians * statistics.median(list(self._seconds)))

    def _watch(self) -> None:
        last = time.monotonic()
        while not self._end.wait(self._interval):
            now = time.monotonic()
            self._ran += min(now - last, 2 * self._interval)
            last = now
            if self._ran - self._mark > self.limit_secs():
                self._bark()

    def _bark(self) -> None:
        where = (
            "before the first step" if self._last_step is None else f"after step {self._last_step}"
        )
        usual = f", a step takes {statistics.median(self._seconds):.3g} s" if self._seconds else ""
        log(
            f"stuck: nothing for {self._ran - self._mark:.0f} s {where}{usual}; the stacks of all threads:"
        )
        faulthandler.dump_traceback(file=sys.__stderr__ or sys.stderr, all_threads=True)
        log(
            f"stepdistill: failed: stuck {where}; start the same command again to go on from the last"
            " saved step (train.watchdog_medians = 0 turns this off)"
        )
        os._exit(EXIT_STUCK)
