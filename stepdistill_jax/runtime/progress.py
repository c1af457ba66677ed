"""Shows progress on standard error: a bar with rate and remaining time on a terminal, lines elsewhere."""

import contextlib
import sys
import time
from collections.abc import Callable, Iterator
from typing import Protocol

from stepdistill_jax.errors import escaped

LINE_EVERY_SECS = 10.0
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


class _Lines:
    """Prints a line of progress every ten seconds and at the end, for log files."""

    def __init__(self, total: int | None, description: str, done: int):
        self._total, self._description = total, description
        self._first, self._done = done, done
        self._start = self._last = self._advanced = time.monotonic()
        self._values: dict[str, float] = {}

    def update(self, advance: int = 1, **values: float) -> None:
        self._done += advance
        self._values |= values
        if not advance:
            return
        self._advanced = time.monotonic()
        # `end` writes the last line, since values may still arrive after the last unit
        if self._advanced - self._last >= LINE_EVERY_SECS and self._done != self._total:
            self._last = self._advanced
            self._write()

    def end(self) -> None:
        if self._first < self._done == self._total:
            self._write()

    def _write(self) -> None:
        # this process's rate: it excludes the units that an earlier run finished
        count, seconds = self._done - self._first, self._advanced - self._start
        of, left = "", ""
        if self._total is not None:
            of = f"/{self._total}"
            left = f"  ETA {_clock((self._total - self._done) * seconds / count)}"
        log(
            f"{self._description}: {self._done}{of}  {_rate(count, seconds)}{left}"
            f"  {format_values(self._values)}".rstrip()
        )


def _rate(count: int, seconds: float) -> str:
    """Returns a rate such as "12.3/s" or, for slow units, "4.5 s each", or "" if `count` is 0."""
    if not count:
        return ""
    each = max(seconds, 1e-9) / count
    return f"{1 / each:.1f}/s" if each <= 1 else f"{each:.1f} s each"


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}"


@contextlib.contextmanager
def progress(total: int | None, description: str, *, done: int = 0) -> Iterator[Bar]:
    """Shows the progress of a long task, and yields a `Bar`.

    Args:
        total: count of units; None if unknown.
        description: text before the count.
        done: count of units that an earlier run has finished.
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
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]}"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[values]}"),
    )
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task(escaped(description), total=total, completed=done, rate="", values="")
        start, shown, count = time.monotonic(), {}, 0

        class Rich:
            def update(self, advance: int = 1, **values: float) -> None:
                nonlocal count
                count += advance
                shown.update(values)
                rate = _rate(count, time.monotonic() - start)
                bar.update(task, advance=advance, rate=rate, values=format_values(shown))

        yield Rich()
