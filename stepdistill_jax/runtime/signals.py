"""Handles SIGTERM and Ctrl-C in every command: the first signal stops the work, the second ends the process."""

import itertools
import os
import select
import signal
import threading
import time
from collections.abc import Callable, Mapping
from typing import NoReturn

from stepdistill_jax.errors import EXIT_STOPPED
from stepdistill_jax.runtime.progress import log

UNWIND_SECS = 2.0  # time that a command with nothing to save has to end after a signal
STOPPED: dict[int, int] = {signal.SIGTERM: EXIT_STOPPED, signal.SIGINT: EXIT_STOPPED}
# JAX's protocol needs consecutive numbers, which are the same in every process and are never used twice
_asked = itertools.count(1)


def leave(signal_name: str, what: str) -> NoReturn:
    """Logs why the process ends early, and exits with status 75."""
    log(f"{signal_name}: {what}; start again to continue")
    raise SystemExit(EXIT_STOPPED)


def agreed() -> bool:
    """Returns whether all processes must stop here because one of them has received a SIGTERM.

    All processes must call this function at the same points, and never again after it has returned True.
    """
    from jax.experimental import multihost_utils

    return multihost_utils.reached_preemption_sync_point(next(_asked))


class StopSignals:
    """A context that handles stop signals: the first calls `act`, the second ends the process.

    The second signal ends the process with status 128 + the number of that signal.

    With several processes, the first signal does not call `act`: all processes must stop at the same point, so
    `act_if_agreed` calls it. A process that gets SIGINT sends itself SIGTERM, on which JAX informs the others.

    Attributes:
        act: function that the main thread calls with the first signal's name. None means to set only
            `received`.
        limit_secs: seconds that the process may still run after the first signal; 0 means no limit.
        received: name of the first signal, "another process's signal", or "".
    """

    def __init__(
        self,
        act: Callable[[str], object] | None,
        *,
        codes: Mapping[int, int] = STOPPED,
        limit_secs: float = 0.0,
        several: bool = False,
    ):
        """Prepares the context. Signals are caught only inside it.

        Args:
            act, limit_secs: see the class.
            codes: {signal to catch: exit status if the process is ended because `limit_secs` have passed}.
            several: whether the job has several processes.
        """
        self.act, self.limit_secs = act, limit_secs
        self.received = ""
        self._codes, self._several, self._all_stop = codes, several, False
        self._since: float | None = None
        self._handlers: dict = {}

    def __enter__(self) -> "StopSignals":
        self._reads, self._writes = os.pipe()
        os.set_blocking(self._writes, False)
        if threading.current_thread() is threading.main_thread():
            # with several processes, `jax.distributed` catches SIGTERM and stops all at the same point
            caught = self._codes.keys() - ({signal.SIGTERM} if self._several else set())
            self._handlers = {s: signal.signal(s, self._handle) for s in caught}
            self._fd_before = signal.set_wakeup_fd(self._writes, warn_on_full_buffer=False)
        # a thread reads the signals, since Python runs no signal handler during a long compilation
        threading.Thread(target=self._watch, name="stop signals", daemon=True).start()
        return self

    def __exit__(self, *_) -> None:
        if self._handlers:
            signal.set_wakeup_fd(self._fd_before)
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        os.close(self._writes)  # ends the thread

    def _handle(self, number, _frame) -> None:
        if self.received:
            return  # the thread ends the process
        self.received = signal.Signals(number).name
        if self._several:
            os.kill(os.getpid(), signal.SIGTERM)
        elif self.act is not None:
            self.act(self.received)

    def _watch(self) -> None:
        """Reads signal numbers from the pipe. The number 0 means that another process received a signal."""
        first, ends = 0, None
        with os.fdopen(self._reads, "rb", buffering=0) as numbers:
            while True:
                left = None if ends is None else max(0.0, ends - time.monotonic())
                if not select.select([numbers], [], [], left)[0]:
                    log(
                        f"stopped {self.seconds():.1f} s after the signal, without a save; start again"
                    )
                    os._exit(self._codes.get(first, EXIT_STOPPED))
                if not (data := numbers.read(1)):
                    return
                number = data[0]
                if number and number not in self._handlers:
                    continue
                if self._since is None:
                    first, self._since = number, time.monotonic()
                    ends = self._since + self.limit_secs if self.limit_secs else None
                elif number:
                    log(f"{signal.Signals(number).name}: second signal, stopped at once")
                    os._exit(128 + number)

    def seconds(self) -> float:
        """Returns the seconds since the first signal, or 0 if there was none."""
        return time.monotonic() - self._since if self._since is not None else 0.0

    def agreed(self) -> bool:
        """Returns whether to stop here.

        All processes must call this method at the same points. All get the same answer.
        """
        if not self._several:
            return bool(self.received)
        if not self._all_stop and agreed():
            self._all_stop, self.received = True, self.received or "another process's signal"
            if self.act is None:  # with `act` there is nothing to save, and the caller exits
                os.write(self._writes, b"\0")
        return self._all_stop

    def act_if_agreed(self) -> None:
        """Calls `act` if `agreed` returns True.

        With several processes, nothing else calls `act` (see the class).
        """
        if self.agreed() and self.act is not None:
            self.act(self.received)
