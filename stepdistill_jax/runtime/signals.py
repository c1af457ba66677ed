"""SIGTERM and SIGINT: the step is finished, saved, and the process leaves with 75."""

import contextlib
import itertools
import os
import select
import signal
import threading
import time
from collections.abc import Iterator
from typing import NoReturn

import jax

from stepdistill_jax.errors import EXIT_STOPPED
from stepdistill_jax.runtime.progress import log

START_UP_SECS = 2.0  # for Python to unwind, where nothing is lost without it
# JAX's protocol wants numbers that count up by one, the same in every process, for a process's life
_asked = itertools.count(1)


class Told(Exception):
    """A stop signal met work that a resume can do again."""


class StopSignals:
    """While entered, notes the signals instead of dying from them; a second one stops at once.

    Until `started` a signal ends the process with 75 at once: there is nothing to save. From then on
    the loop asks `agreed` after each step, and a validation `interrupt` after each batch.

    Python runs a handler only between its own instructions, not in a long compile. So a thread
    reads the signals, too: it ends the process at a second one, and where the time is over.

    With several processes `jax.distributed` catches SIGTERM itself and tells all of them at the same
    point, so SIGTERM is left to it and SIGINT is passed on as one.
    """

    def __init__(self, grace_secs: float = 0.0):
        """`grace_secs` after the signal the process ends, saved or not; 0 is no limit."""
        self._grace_secs = grace_secs
        self.received: str | None = None
        self._told_at: float | None = None
        self._at_once = True
        self._handlers: dict = {}
        self._several = jax.process_count() > 1

    def __enter__(self) -> "StopSignals":
        self._reads, self._writes = os.pipe()
        os.set_blocking(self._writes, False)
        if threading.current_thread() is threading.main_thread():
            numbers = (signal.SIGINT,) if self._several else (signal.SIGINT, signal.SIGTERM)
            self._handlers = {s: signal.signal(s, self._note) for s in numbers}
            self._fd_before = signal.set_wakeup_fd(self._writes, warn_on_full_buffer=False)
        threading.Thread(target=self._watch, name="stop signals", daemon=True).start()
        return self

    def __exit__(self, *_) -> None:
        if self._handlers:
            signal.set_wakeup_fd(self._fd_before)
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        os.close(self._writes)  # ends the thread

    def _note(self, number, _frame) -> None:
        self.received = signal.Signals(number).name
        if self._several:
            os.kill(os.getpid(), signal.SIGTERM)
        elif self._at_once:
            self.leave("stopped before the first step, nothing was to be saved")

    def _watch(self) -> None:
        """Reads the numbers of signals, as they come; 0 is a stop that another process was told."""
        ends = None
        with os.fdopen(self._reads, "rb", buffering=0) as told:
            while True:
                left = None if ends is None else max(0.0, ends - time.monotonic())
                if not select.select([told], [], [], left)[0]:
                    log(
                        f"stopped {self.seconds():.1f} s after the signal without a save; start again"
                    )
                    os._exit(EXIT_STOPPED)
                if not (data := told.read(1)):
                    return
                number = data[0]
                if self._told_at is not None and number in self._handlers:
                    log(f"{signal.Signals(number).name}: a second signal, stopped at once")
                    os._exit(128 + number)
                if self._told_at is None and (number == 0 or number in self._handlers):
                    self._told_at = time.monotonic()
                    grace = START_UP_SECS if self._at_once and number else self._grace_secs
                    ends = self._told_at + grace if grace else None

    def seconds(self) -> float:
        """Since the first signal."""
        return time.monotonic() - self._told_at if self._told_at is not None else 0.0

    def agreed(self) -> bool:
        """Whether to stop here; all processes ask at the same points and get the same answer."""
        if not self._several:
            return self.received is not None
        from jax.experimental import multihost_utils

        if self.received != "all" and multihost_utils.reached_preemption_sync_point(next(_asked)):
            self.received = "all"
            os.write(self._writes, b"\0")
        return self.received == "all"

    def interrupt(self) -> None:
        """Called in the middle of what a resume can do again.

        Raises:
            Told: to stop.
        """
        if self.agreed():
            raise Told

    def started(self) -> None:
        """From here on there is something to save."""
        self._at_once = False

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """In start-up, around what must not be cut in two: a signal waits for its end."""
        self._at_once = False
        with contextlib.suppress(Told):
            yield
        self._at_once = True
        self.leave_if_told()

    def leave_if_told(self) -> None:
        """In start-up, between its parts: the only places where several processes can stop."""
        if self.agreed():
            self.leave("stopped before the first step, nothing was to be saved")

    def leave(self, what: str) -> NoReturn:
        """Ends the process with 75.

        Args:
            what: was done; said with the time that it took.
        """
        name = self.received if self.received not in (None, "all") else "stopped"
        log(f"{name}: {what}; {self.seconds():.1f} s after the signal; start again to go on")
        raise SystemExit(EXIT_STOPPED)
