"""The training loop, read from top to bottom: next batch, step, validate, save, write."""

import math
import os
import time
from typing import Any

import jax
import numpy as np

from stepdistill_jax.checkpoints.manager import Checkpoints, rank, saved_steps
from stepdistill_jax.models.t5 import T5
from stepdistill_jax.progress import Bar, log, progress
from stepdistill_jax.training.batches import Batch, iterate
from stepdistill_jax.training.config import TrainConfig
from stepdistill_jax.training.feed import place
from stepdistill_jax.training.optimizer import make_schedule
from stepdistill_jax.training.run import VALIDATION, Run, assemble, claim_workdir, describe
from stepdistill_jax.training.state import TrainState
from stepdistill_jax.training.step import jit_train_step
from stepdistill_jax.training.stopping import EXIT_STOPPED, StopSignals
from stepdistill_jax.training.throughput import Throughput
from stepdistill_jax.training.writers import MetricsWriter, read_metrics

SILENT_STEPS = 20  # an objective without a target token for so long is worth a warning


def train(
    config: TrainConfig,
    *,
    workdir: os.PathLike | str,
    data_dir: os.PathLike | str | None = None,
    config_text: str | None = None,
) -> dict[str, Any]:
    """Trains `config` in `workdir`, or goes on where an earlier life of the same run stopped.

    Args:
        config: the run.
        workdir: folder of checkpoints, metrics and model files; made if absent.
        data_dir: where `prepare` put the dataset.
        config_text: gin text to keep as `config.gin`.

    Returns:
        The last step's metrics: `step`, `loss`, `loss/<objective>`, ..., `examples_per_second` (mean
        over this life), `best_step`, and the best step's `eval/validation/...`.

    Raises:
        InputError: a setting, dataset or workdir that does not fit; before anything is compiled.
        SystemExit: 75, stopped by a signal after a clean save.
        FloatingPointError: the loss is not finite; names the step.
    """
    with StopSignals() as stop:
        run = assemble(config, workdir, data_dir)
        claim_workdir(run, config_text)
        _introduce(run)
        return _train(run, stop)


def _train(run: Run, stop: StopSignals) -> dict[str, Any]:
    config = run.config
    checkpoints = Checkpoints(run.workdir)
    state = _start(run, checkpoints)
    start = int(state.step)
    writer = MetricsWriter(run.workdir, start_step=start, active=jax.process_index() == 0)
    step_fn = jit_train_step(
        run.abstract,
        run.mesh,
        model=T5(run.model),
        tx=run.tx,
        objective_weights=tuple(o.weight for o in run.data.objectives),
        num_microbatches=config.num_microbatches,
    )
    best = max((rank(m) for m in saved_steps(run.workdir).values()), default=None)
    began = time.monotonic()
    with progress(config.train_steps, "train", done=start) as bar:
        record = StepRecorder(run, writer, bar)
        source = iterate(run.batches, start, config.train_steps)
        for step in range(start + 1, config.train_steps + 1):
            asked = time.monotonic()
            batch = next(source)
            waited = time.monotonic() - asked
            state, device_metrics = step_fn(state, place(batch, run.mesh))
            record.note(step, batch, device_metrics, waited)

            last, stopping = step == config.train_steps, stop.agreed(step)
            metrics: dict[str, Any] = {"step": step, "validated": False}
            if run.validator and (step % config.eval_every == 0 or last) and not stopping:
                record.flush()
                validation = run.validator.compute(state.params)
                record.validation(step, validation)
                metrics |= {
                    "validated": True,
                    "label_accuracy": validation[f"eval/{VALIDATION}/label_accuracy"],
                    "label_loss": validation[f"eval/{VALIDATION}/loss/{_label(run)}"],
                }
            better = metrics["validated"] and (best is None or rank(metrics) > best)
            if better:
                best = rank(metrics)
            if better or last or stopping or step % config.checkpoint_every == 0:
                record.flush()  # a loss that is not finite must not be saved
                checkpoints.save(step, state.params, state.replace(params=None), metrics)
                record.throughput.pause()
            if stopping:
                break
        record.flush()
    checkpoints.close()
    writer.close()
    if int(state.step) < config.train_steps:
        log(
            f"{stop.received or 'a stop signal'}: saved step {int(state.step)};"
            " run the same command again to go on"
        )
        raise SystemExit(EXIT_STOPPED)
    return _summary(run, seconds=time.monotonic() - began, steps=config.train_steps - start)


def _start(run: Run, checkpoints: Checkpoints) -> TrainState:
    """The newest checkpoint's state, or a new one."""
    step = checkpoints.latest_step()
    if step is None:
        return run.initial_state()
    rest = run.abstract.replace(params=None)
    params, rest = checkpoints.restore(step, run.abstract.params, rest)
    log(f"resumed {run.workdir} from step {step}")
    return rest.replace(params=params)


def _label(run: Run) -> str:
    """The objective whose output is served: the first."""
    return run.data.objectives[0].name


class StepRecorder:
    """Writes a step's metrics one step late, so that reading them never holds up the devices."""

    def __init__(self, run: Run, writer: MetricsWriter, bar: Bar):
        self._run, self._writer, self._bar = run, writer, bar
        self._learning_rate = make_schedule(run.config)
        self._names = [o.name for o in run.data.objectives]
        self._silent = dict.fromkeys(self._names, 0)
        self._pending: tuple[int, Batch, dict, float] | None = None
        self.throughput = Throughput(run.model, batch_size=run.config.batch_size)

    def note(self, step: int, batch: Batch, device_metrics: dict, waited: float) -> None:
        """Keeps this step for later and writes the one before it."""
        self.flush()
        self._pending = step, batch, device_metrics, waited

    def validation(self, step: int, metrics: dict[str, float]) -> None:
        """Writes a validation on a line of its own."""
        self._writer.write(step, metrics)
        shown = metrics[f"eval/{VALIDATION}/label_accuracy"]
        self._bar.update(0, **{"validation accuracy": shown})
        self.throughput.pause()

    def flush(self) -> None:
        """Writes the step that is kept.

        Raises:
            FloatingPointError: its loss or gradient is not finite.
        """
        if self._pending is None:
            return
        step, batch, device_metrics, waited = self._pending
        self._pending = None
        got = jax.tree.map(np.asarray, device_metrics)
        sums = got["sums"]
        metrics = {"loss": float(got["loss"]), "grad_norm": float(got["grad_norm"])}
        if not (math.isfinite(metrics["loss"]) and math.isfinite(metrics["grad_norm"])):
            raise FloatingPointError(
                f"step {step}: loss {metrics['loss']}, grad_norm {metrics['grad_norm']}; the last"
                f" checkpoint in {self._run.workdir} is whole; try a lower LEARNING_RATE"
            )
        for i, name in enumerate(self._names):
            metrics[f"target_tokens/{name}"] = float(
                sum(int((g["decoder_objective_ids"] == i + 1).sum()) for g in batch)
            )
            if sums.count[i] > 0:
                metrics[f"loss/{name}"] = float(sums.loss[i] / sums.count[i])
                metrics[f"accuracy/{name}"] = float(sums.correct[i] / sums.count[i])
        self._warn(step, metrics)
        metrics["learning_rate"] = float(np.asarray(self._learning_rate(step - 1)))
        metrics |= self.throughput.of_step(batch)
        metrics["timing/seconds_waiting_for_data"] = waited
        self._writer.write(step, metrics)
        losses = {n: v for n, v in metrics.items() if n == "loss" or n.startswith("loss/")}
        self._bar.update(1, **losses)

    def _warn(self, step: int, metrics: dict[str, float]) -> None:
        if metrics["loss"] == 0.0:
            log(f"warning: step {step}: the loss is exactly 0, nothing is learned")
        for name in self._names:
            silent = self._silent[name] + 1 if not metrics[f"target_tokens/{name}"] else 0
            self._silent[name] = silent
            if silent == SILENT_STEPS:
                log(
                    f"warning: objective {name} had no target token in {SILENT_STEPS} steps;"
                    " does the dataset have its target field?"
                )


def _introduce(run: Run) -> None:
    """What will be trained, in a few lines."""
    described = describe(run)
    weights = ", ".join(f"{name} {weight:g}" for name, weight in described["weights"].items())
    log(
        f"process {jax.process_index() + 1}/{jax.process_count()}, "
        f"{jax.local_device_count()} of {jax.device_count()} devices ({described['device']}),"
        f" mesh {described['mesh']}"
    )
    log(
        f"{run.config.task}: {run.batches.num_examples} examples,"
        f" {run.batches.steps_per_epoch:.1f} steps an epoch; model of"
        f" {described['parameters']:,} parameters; objective weights: {weights}"
    )
    for name, counts in described["cut"].items():
        for feature, count in counts.items():
            if count:
                log(
                    f"warning: {count} {feature} of {name} are longer than the config's length, cut"
                )


def _summary(run: Run, *, seconds: float, steps: int) -> dict[str, Any]:
    """The last step's losses with the best step's validation."""
    lines = read_metrics(run.workdir)
    last = next(line for line in reversed(lines) if "loss" in line)
    saved = saved_steps(run.workdir)
    best = max(saved, key=lambda s: rank(saved[s]))
    validation = next(
        (x for x in lines if x["step"] == best and f"eval/{VALIDATION}/loss" in x), {}
    )
    kept = {n: v for n, v in last.items() if not n.startswith("timing/")}
    return {
        **kept,
        "examples_per_second": run.config.batch_size * steps / seconds if steps else 0.0,
        "best_step": best,
        **{n: v for n, v in validation.items() if n != "step"},
    }
