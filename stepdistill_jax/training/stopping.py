"""SIGTERM and SIGINT: the step is finished, saved, and the process leaves with 75."""

import signal
import threading

import jax

EXIT_STOPPED = 75  # EX_TEMPFAIL: start the same command again to go on


class StopSignals:
    """While entered, notes the signals instead of dying from them; a second one stops at once."""

    SIGNALS = (signal.SIGTERM, signal.SIGINT)

    def __enter__(self) -> "StopSignals":
        self.received: str | None = None
        self._before = {}
        if threading.current_thread() is threading.main_thread():
            self._before = {s: signal.signal(s, self._note) for s in self.SIGNALS}
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number, _frame) -> None:
        self.received = signal.Signals(number).name
        for s in self._before:
            signal.signal(s, signal.SIG_DFL)

    def agreed(self, step: int) -> bool:
        """Whether to stop after `step`; processes agree on it, whichever of them was told."""
        if jax.process_count() == 1:
            return self.received is not None
        from jax.experimental import multihost_utils

        # jax.distributed notices SIGTERM itself and tells all processes at the same step
        return multihost_utils.reached_preemption_sync_point(step)
