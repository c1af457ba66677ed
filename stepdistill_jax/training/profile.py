"""Writes a profile of a few steps, for TensorBoard's profile plugin, XProf and Perfetto."""

import pathlib
import shutil
import tempfile
from collections.abc import Callable

import jax

from stepdistill_jax.runtime.progress import log
from stepdistill_jax.runtime.stores import is_remote, upload

FOLDER = "profile"


class StepProfile:
    """A context that traces a range of steps into `WORKDIR/profile`, on process 0 only.

    The trace is written even if the run ends before the last of these steps.
    """

    def __init__(self, workdir: pathlib.Path, steps: tuple[int, int] | None):
        """Prepares a trace. `steps` is (first step, last step), or None for no trace."""
        self._folder = workdir / FOLDER
        self._steps = steps if jax.process_index() == 0 else None
        self._written: pathlib.Path | None = None  # folder of the trace, while tracing

    def __enter__(self) -> "StepProfile":
        return self

    def __exit__(self, *_) -> None:
        self._stop()

    def step(self, step: int) -> jax.profiler.StepTraceAnnotation:
        """Starts the trace if `step` is to be traced. Returns a context that marks the step in the trace."""
        if self._steps is not None and self._steps[0] <= step <= self._steps[1]:
            self._start()
        return jax.profiler.StepTraceAnnotation("train", step_num=step)

    def ended(self, step: int, flush: Callable[[], None]) -> None:
        """Ends the trace after its last step. `flush` is called first and must wait for the devices."""
        if self._written is not None and self._steps is not None and step == self._steps[1]:
            flush()
            self._stop()

    def _start(self) -> None:
        if self._written is None:
            # the profiler writes local files only
            remote = is_remote(self._folder)
            self._written = pathlib.Path(tempfile.mkdtemp()) if remote else self._folder
            jax.profiler.start_trace(self._written)

    def _stop(self) -> None:
        if self._written is None:
            return
        written, self._written = self._written, None
        jax.profiler.stop_trace()
        if written != self._folder:
            upload(written, self._folder)
            shutil.rmtree(written, ignore_errors=True)
        log(
            f"steps {self._steps} are profiled: run `tensorboard --logdir {self._folder}`, or open the"
            " trace in Perfetto"
        )
