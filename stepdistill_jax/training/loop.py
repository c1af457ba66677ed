"""The training loop, from top to bottom: next batch, step, record, save."""

import contextlib
import os
import time
from typing import Any

import jax

from stepdistill_jax.batches.batch import filled_rows
from stepdistill_jax.models.encoder_decoder import EncoderDecoder
from stepdistill_jax.models.sharding import batch_shards
from stepdistill_jax.runtime.checkpoints.manager import resolve_step, saved_steps
from stepdistill_jax.runtime.metrics import last_step_metrics
from stepdistill_jax.runtime.progress import log
from stepdistill_jax.runtime.signals import UNWIND_SECS, StopSignals
from stepdistill_jax.tasks.task_data import shares_in_words
from stepdistill_jax.training.config import TrainConfig
from stepdistill_jax.training.data import on_this_host, placed
from stepdistill_jax.training.memory import out_of_memory_explained
from stepdistill_jax.training.optimizer_function import OptimizerFunction
from stepdistill_jax.training.profile import StepProfile
from stepdistill_jax.training.provenance import claim_workdir, describe
from stepdistill_jax.training.run import Run, assemble
from stepdistill_jax.training.startup import StartUp
from stepdistill_jax.training.step import jit_train_step
from stepdistill_jax.training.supervisor import Supervisor, leave_at_start, supervised
from stepdistill_jax.training.workdir import locked_workdir


def train(
    config: TrainConfig,
    *,
    workdir: os.PathLike | str,
    data_dir: os.PathLike | str | None = None,
    config_text: str | None = None,
    began: float | None = None,
) -> dict[str, Any]:
    """Trains a model in `workdir`, or continues where an earlier start of the same run stopped.

    Args:
        workdir: folder of checkpoints, metrics and model files; created if absent.
        data_dir: folder of prepared datasets; None means the default folder.
        config_text: gin text to write as `config.gin`.
        began: `time.monotonic()` at the start of the command, for the logged start-up time; None means now.

    Returns:
        The last step's metrics: `step`, `loss`, `loss/<objective>`, ...
        `examples_per_second`: mean over the steps of this call, or 0 if all steps were already done.
        `best_step`, and its metrics `eval/validation/...`.
        `majority_baseline`: accuracy of always answering the most frequent label; only with a validation
            split.

    Raises:
        InputError: a setting, the dataset or the workdir cannot be used. Raised before a step is compiled.
        SystemExit: status 75, after a signal has stopped the run and its last step is saved.
        FloatingPointError: non-finite steps ended the run (see `on_nonfinite`).
        MemoryError: a step does not fit into a device's memory. The message names settings that reduce it.
    """
    startup = StartUp(began)
    startup.done("imports")
    several = jax.process_count() > 1
    with StopSignals(leave_at_start, limit_secs=UNWIND_SECS, several=several) as stop:
        run = assemble(config, workdir, data_dir)
        stop.act_if_agreed()
        with locked_workdir(run.workdir), out_of_memory_explained(config):
            described = describe(run)
            claim_workdir(run, described, config_text)
            if jax.process_index() == 0:
                _introduce(run, described)
            startup.done("data")
            return supervised(run, lambda: _train(run, stop, startup))


def _train(run: Run, stop: StopSignals, startup: StartUp) -> dict[str, Any]:
    config, began = run.config, time.monotonic()
    with contextlib.ExitStack() as closing:
        supervisor = Supervisor(run, stop)
        start, state = supervisor.begin(closing)
        profile = closing.enter_context(StepProfile(run.workdir, config.profile_steps))
        step_fn = jit_train_step(
            run.abstract,
            run.mesh,
            model=EncoderDecoder(run.model),
            tx=run.tx,
            objective_weights=tuple(o.weight for o in run.data.objectives),
            num_microbatches=config.num_microbatches,
            extra_loss=config.extra_loss,
            num_tasks=len(run.data.parts),
        )
        source = on_this_host(run.batches, start, config.train_steps, run.mesh)
        startup.done("state")
        for step in range(start + 1, config.train_steps + 1):
            with profile.step(step):
                asked = time.monotonic()
                # the step is asynchronous: the next batch is made, and the previous step's metrics are
                # read, while the device computes
                batch = next(source)
                waited = time.monotonic() - asked
                state, device_metrics = step_fn(state, placed(batch, run.mesh))
                startup.first_step(device_metrics)
                supervisor.record(step, batch, device_metrics, waited)
            profile.ended(step, supervisor.flush)
            # saved before the next step, which reuses the memory of this state
            supervisor.save(step, state)
        supervisor.flush()
    rate = (config.train_steps - start) * config.batch_size / (time.monotonic() - began)
    return _summary(run, supervisor.last, rate)


def _introduce(run: Run, described: dict[str, Any]) -> None:
    """Logs a short description of the run."""
    extra = [run.config.extra_loss] if run.config.extra_loss else []
    weights = ", ".join(f"{o.name} {o.weight:g}" for o in (*run.data.objectives, *extra))
    devices = jax.device_count()
    log(f"{devices} device{'s' * (devices > 1)} ({described['device']}), mesh {described['mesh']}")
    if run.config.pack:
        inputs, targets = run.batches.row_lengths
        log(f"packed rows of {inputs} input and {targets} target tokens")
    log(
        f"{run.config.task}: {run.batches.num_examples} examples,"
        f" {run.batches.steps_per_epoch:.1f} steps an epoch; model of"
        f" {described['parameters']:,} parameters; objective weights: {weights}"
    )
    for line in shares_in_words(run.data.shares()) if run.data.is_mixed else ():
        log(line)
    if isinstance(optimizer := run.config.optimizer, OptimizerFunction):
        log(f"optimizer: {optimizer}")
        if not optimizer.takes(run.config.learning_rate):
            log("warning: `learning_rate` has no effect, since the optimizer does not take it")
    elif (rate := optimizer.rate).shape != "rsqrt" and rate.warmup_steps >= run.config.train_steps:
        log(
            f"warning: the learning rate never reaches its peak, since its warm-up takes {rate.warmup_steps} steps and"
            f" the run has {run.config.train_steps} steps; set fewer warm-up steps"
            " (see `stepdistill settings warmup_steps`)"
        )
    if described["trained_parameters"] != described["parameters"]:
        log(
            f"LoRA: {described['trained_parameters']:,} parameters are trained"
            f" ({described['trained_parameters'] / described['parameters']:.2%})"
        )
    if (empty := empty_rows(run)) is not None:
        log(f"warning: {empty}")
    for split, objectives in described["cut"].items():
        for name, counts in objectives.items():
            for feature, count in counts.items():
                if count:
                    log(
                        f"warning: {count} {feature} of {name} in {split} are longer than the"
                        " config's length and are truncated; `stepdistill inspect` shows all lengths"
                    )


def empty_rows(run: Run) -> str | None:
    """Returns a warning if the layout leaves most rows of a batch empty, otherwise None."""
    groups = run.batches(1)
    rows = sum(g["encoder_segment_ids"].shape[0] for g in groups)
    full = filled_rows(groups)
    if 2 * full >= rows:
        return None
    shards, slices = batch_shards(run.mesh), run.config.num_microbatches
    return (
        f"{1 - full / rows:.0%} of a batch's rows are empty: {run.config.batch_size} examples fill"
        f" {full} rows, but the row count must be a multiple of {shards * slices} ({shards} batch"
        f" shards x {slices} microbatches). Use a larger BATCH_SIZE, fewer microbatches, or a LAYOUT"
        " with fewer batch shards (fsdp_tensor, tensor)"
    )


def _summary(run: Run, last: dict[str, Any], examples_per_second: float) -> dict[str, Any]:
    """Returns the metrics of the last step and the validation metrics of the best step."""
    if not last:  # no step was left
        last, examples_per_second = last_step_metrics(run.workdir), 0.0
    best = resolve_step(run.workdir, "best")
    validation = saved_steps(run.workdir)[best]
    baseline = {"majority_baseline": run.validator.majority_baseline()} if run.validator else {}
    return {
        **{n: v for n, v in last.items() if not n.startswith("timing/")},
        "examples_per_second": examples_per_second,
        "best_step": best,
        **{n: v for n, v in validation.items() if n.startswith("eval/")},
        **baseline,
    }
