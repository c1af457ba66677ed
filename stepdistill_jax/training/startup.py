"""Where the time from a command to its first step went."""

import time


class StartUp:
    """A stopwatch with named laps.

    >>> startup = StartUp(began=time.monotonic() - 3.0)
    >>> startup.done("imports")
    >>> startup.line()
    'first step after 3.0 s: imports 3.0'
    """

    def __init__(self, began: float | None = None):
        """Counts from `began`, of `time.monotonic()`; None is now."""
        self._began = self._last = time.monotonic() if began is None else began
        self._laps: dict[str, float] = {}

    def done(self, part: str) -> None:
        """Ends a lap."""
        now = time.monotonic()
        self._laps[part] = now - self._last
        self._last = now

    def line(self) -> str:
        """What is logged, in seconds."""
        parts = ", ".join(f"{part} {seconds:.1f}" for part, seconds in self._laps.items())
        return f"first step after {self._last - self._began:.1f} s: {parts}"
