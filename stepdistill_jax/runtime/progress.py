"""Shows progress on standard error: a bar with rate and remaining time on a terminal, lines elsewhere."""

import contextlib
import math
import sys
import time
from collections.abc import Callable, Iterator
from typing import Protocol

from stepdistill_jax.errors import escaped

LINE_EVERY_SECS = 10.0
RECENT_SECS = 30.0  # an update that is this old counts 1/e of a new one in the rate
_written: Callable[[str], str] = str


class Bar(Protocol):
    """The object that `progress` yields."""

    def update(self, advance: int = 1, **values: float) -> None:
        """Advances by `advance` units, and shows `values`, such as `loss=1.23`."""
        ...


def translate_names(by: Callable[[str], str]) -> None:
    """Sets the function that replaces names of parameters in messages with the command's flags."""
    global _written
    _written = by


def translated(message: str) -> str:
    """Returns `message` with names of parameters replaced by the running command's flags."""
    return _written(message)


def log(message: str) -> None:
    """Prints a line on standard error, with control characters escaped."""
    print(escaped(translated(message)), file=sys.stderr, flush=True)


def format_values(values: dict[str, float]) -> str:
    """Formats values, such as "loss 1.234  lr 5e-05"."""
    return "  ".join(f"{name} {value:.4g}" for name, value in values.items())


class _Pace:
    """Counts units and measures their rate from the first update on.

    Attributes:
        done: count of finished units, including those of an earlier run.
        updated: time of the last update that finished units, or of the start.
    """

    def __init__(self, total: int | None, done: int):
        self.done, self.updated = done, time.monotonic()
        self._total, self._is_first = total, True
        # units and seconds after the first update: all of them, and those that fade with age
        self._all = self._recent = (0.0, 0.0)

    def advance(self, count: int) -> None:
        if not count:
            return
        now = time.monotonic()
        seconds, self.updated = now - self.updated, now
        self.done += count
        if self._is_first:  # its time includes start-up and compilation
            self._is_first = False
            return
        fade = math.exp(-seconds / RECENT_SECS)
        self._all = self._all[0] + count, self._all[1] + seconds
        self._recent = self._recent[0] * fade + count, self._recent[1] * fade + seconds

    def texts(self) -> tuple[str, str]:
        """Returns the rate and the remaining time.

        Both texts are empty until the second update. The remaining time is also empty if the total is unknown.
        """
        # a mean over recent updates, or over all updates once the total is reached
        units, seconds = self._all if self.done == self._total else self._recent
        if not units:
            return "", ""
        each = max(seconds, 1e-9) / units
        rate = f"{1 / each:.1f}/s" if each <= 1 else f"{each:.1f} s each"
        left = (
            "" if self._total is None else f"ETA {_clock(max(self._total - self.done, 0) * each)}"
        )
        return rate, left


class _Lines:
    """Prints a line of progress every ten seconds and at the end, for log files."""

    def __init__(self, total: int | None, description: str, done: int):
        self._total, self._description, self._first = total, description, done
        self._pace = _Pace(total, done)
        self._written = self._pace.updated
        self._values: dict[str, float] = {}

    def update(self, advance: int = 1, **values: float) -> None:
        pace = self._pace
        pace.advance(advance)
        self._values |= values
        # `end` writes the last line, since values may still arrive after the last unit
        if pace.updated - self._written >= LINE_EVERY_SECS and pace.done != self._total:
            self._written = pace.updated
            self._write()

    def end(self) -> None:
        if self._first < self._pace.done == self._total:
            self._write()

    def _write(self) -> None:
        of = "" if self._total is None else f"/{self._total}"
        parts = (f"{self._pace.done}{of}", *self._pace.texts(), format_values(self._values))
        log(f"{self._description}: {'  '.join(filter(None, parts))}")


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}"


@contextlib.contextmanager
def progress(total: int | None, description: str, *, done: int = 0) -> Iterator[Bar]:
    """Shows the progress of a long task, and yields a `Bar`.

    Args:
        total: number of units of work; None if unknown.
        description: text to show before the number of finished units.
        done: number of units that an earlier run has finished.
    """
    if not sys.stderr.isatty():
        lines = _Lines(total, description, done)
        yield lines
        lines.end()
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
    )

    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]}"),
        TextColumn("{task.fields[left]}"),
        TextColumn("{task.fields[values]}"),
    )
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task(
            escaped(description), total=total, completed=done, rate="", left="", values=""
        )
        pace, shown = _Pace(total, done), {}

        class Rich:
            def update(self, advance: int = 1, **values: float) -> None:
                pace.advance(advance)
                shown.update(values)
                rate, left = pace.texts()
                bar.update(task, advance=advance, rate=rate, left=left, values=format_values(shown))

        yield Rich()
