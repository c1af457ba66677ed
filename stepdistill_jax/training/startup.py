"""Measures how the time from the start of a command to its first step is spent."""

import time
from typing import Any

import jax

from stepdistill_jax.runtime.progress import log


class StartUp:
    """A stopwatch with named laps.

    >>> startup = StartUp(began=time.monotonic() - 3.0)
    >>> startup.done("imports")
    >>> startup.line()
    'first step after 3.0 s: imports 3.0'
    """

    def __init__(self, began: float | None = None):
        """Starts at `began`, a time of `time.monotonic()`; None means now."""
        self._began = self._last = time.monotonic() if began is None else began
        self._laps: dict[str, float] = {}
        self._over = False

    def done(self, part: str) -> None:
        """Ends the current lap and names it `part`."""
        now = time.monotonic()
        self._laps[part] = now - self._last
        self._last = now

    def first_step(self, result: Any) -> None:
        """Waits until the first step's `result` is computed, ends the last lap and logs all laps."""
        if self._over:
            return
        self._over = True
        self.done("compiling")
        jax.block_until_ready(result)
        self.done("step")
        if jax.process_index() == 0:
            log(self.line())

    def line(self) -> str:
        """Returns the line to log, with times in seconds."""
        parts = ", ".join(f"{part} {seconds:.1f}" for part, seconds in self._laps.items())
        return f"first step after {self._last - self._began:.1f} s: {parts}"
