"""A step's numbers, from the device to files and the progress bar."""

from typing import Any

import jax
import numpy as np

from stepdistill_jax.batches.batch import Batch
from stepdistill_jax.data.schedules import Schedule
from stepdistill_jax.runtime.metrics import MetricsWriter
from stepdistill_jax.runtime.progress import Bar, log
from stepdistill_jax.training.guard import Guard
from stepdistill_jax.training.optimizer import make_schedule
from stepdistill_jax.training.run import VALIDATION, Run
from stepdistill_jax.training.throughput import Throughput

SILENT_STEPS = 20  # an objective without a target token for so long is worth a warning


class StepRecorder:
    """Writes a step's metrics one step late, so that reading them never holds up the devices."""

    def __init__(self, run: Run, writer: MetricsWriter, bar: Bar | None, *, start: int):
        """`last` is the newest line that was written.

        Args:
            run: the run.
            writer: of the lines.
            bar: of the progress; without one another process does the talking.
            start: step that the run goes on from.
        """
        self._writer, self._bar = writer, bar
        self._guard = Guard(run, writer, start=start, speaks=bar is not None)
        # all at once: an operation of its own would wait in the device's queue for the running step
        rates = make_schedule(run.config)(np.arange(run.config.train_steps))
        self._learning_rates = np.broadcast_to(np.asarray(rates), run.config.train_steps)
        self._names = [o.name for o in run.data.objectives]
        extra = [run.config.extra_loss] if run.config.extra_loss else []
        self._weights = {term.name: term.weight for term in (*run.data.objectives, *extra)}
        self._silent = dict.fromkeys(self._names, 0)
        self._zero_steps = 0
        self._pending: tuple[int, Batch, dict, float, float | None] | None = None
        self.last: dict[str, Any] = {}
        self.throughput = Throughput(run.model, batch_size=run.config.batch_size)

    def note(self, step: int, batch: Batch, device_metrics: dict, waited: float) -> None:
        """Keeps this step for later and writes the one before it."""
        # where the call returned after the step's end, `flush` would see it too late
        ended = self.throughput.now() if device_metrics["loss"].is_ready() else None
        self.flush(before=ended)
        self._pending = step, batch, device_metrics, waited, ended

    def validation(self, step: int, metrics: dict[str, float]) -> None:
        """Writes a validation on a line of its own."""
        self._writer.write(step, metrics)
        shown = metrics[f"eval/{VALIDATION}/label_accuracy"]
        if self._bar is not None:
            self._bar.update(0, **{"validation accuracy": shown})
        self.throughput.pause()

    def sync(self) -> None:
        """Before a checkpoint: what is written is then where a resume from it looks."""
        self._writer.sync()

    def flush(self, before: float | None = None) -> None:
        """Writes the step that is kept.

        Args:
            before: when the step after it ended, if it has.

        Raises:
            FloatingPointError, RollBack: its loss or gradient is not finite, see `Guard.enforce`; its
                line is written all the same.
        """
        if self._pending is None:
            return
        step, batch, device_metrics, waited, ended = self._pending
        self._pending = None
        got = jax.tree.map(np.asarray, device_metrics)  # waits until the step has ended
        if ended is None:
            ended = self.throughput.now() if before is None else self.throughput.halfway(before)
        sums = got["sums"]
        metrics = {"loss": float(got["loss"]), "grad_norm": float(got["grad_norm"])}
        for i, (name, weight) in enumerate(self._weights.items()):
            of_tokens = name in self._names  # an extra loss has no target tokens
            if of_tokens:
                metrics[f"target_tokens/{name}"] = float(
                    sum(int((g["decoder_objective_ids"] == i + 1).sum()) for g in batch)
                )
            if sums.count[i] > 0:
                metrics[f"loss/{name}"] = float(sums.loss[i] / sums.count[i])
                if of_tokens:
                    metrics[f"accuracy/{name}"] = float(sums.correct[i] / sums.count[i])
            if isinstance(weight, Schedule):
                metrics[f"loss_weight/{name}"] = float(got["weights"][i])
        metrics["learning_rate"] = float(self._learning_rates[step - 1])
        metrics |= self.throughput.of_step(batch, ended)
        metrics["timing/seconds_waiting_for_data"] = waited
        self._guard.count(step, metrics)
        metrics["skipped_steps"] = self._guard.skipped
        self._writer.write(step, metrics)
        self.last = {"step": step, **metrics}
        if self._bar is not None:
            self._warn(step, metrics)
            shown = {n: v for n, v in metrics.items() if n == "loss" or n.startswith("loss/")}
            if self._guard.skipped:
                shown["skipped steps"] = self._guard.skipped
            self._bar.update(1, **shown)
        self._guard.enforce(step, metrics)

    def _warn(self, step: int, metrics: dict[str, float]) -> None:
        self._zero_steps = self._zero_steps + 1 if metrics["loss"] == 0.0 else 0
        if self._zero_steps == 1:
            log(f"warning: step {step}: the loss is exactly 0, nothing is learned")
        for name in self._names:
            silent = self._silent[name] + 1 if not metrics[f"target_tokens/{name}"] else 0
            self._silent[name] = silent
            if silent == SILENT_STEPS:
                log(
                    f"warning: objective {name} had no target token in {SILENT_STEPS} steps;"
                    " does the dataset have its target field?"
                )
