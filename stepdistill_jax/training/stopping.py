"""SIGTERM and SIGINT: the step is finished, saved, and the process leaves with 75."""

import os
import signal
import threading

import jax


class StopSignals:
    """While entered, notes the signals instead of dying from them; a second one stops at once.

    With several processes `jax.distributed` catches SIGTERM itself and tells all of them at the same
    step, so SIGTERM is left to it and SIGINT is passed on as one.
    """

    def __enter__(self) -> "StopSignals":
        self.received: str | None = None
        self._several = jax.process_count() > 1
        self._before = {}
        if threading.current_thread() is threading.main_thread():
            numbers = (signal.SIGINT,) if self._several else (signal.SIGINT, signal.SIGTERM)
            self._before = {s: signal.signal(s, self._note) for s in numbers}
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number, _frame) -> None:
        self.received = signal.Signals(number).name
        for s in self._before:
            signal.signal(s, signal.SIG_DFL)
        if self._several:
            os.kill(os.getpid(), signal.SIGTERM)

    def agreed(self, step: int) -> bool:
        """Whether to stop after `step`; the same answer in every process."""
        if not self._several:
            return self.received is not None
        from jax.experimental import multihost_utils

        return multihost_utils.reached_preemption_sync_point(step)
