"""Supervises a run: records steps, saves, stops on signals, rolls back, and ends a stuck run.

Every process has a supervisor, and all supervisors make the same decisions. The loop passes each step to
`record` and `save`.

The run is in one of four states. Their time limits depend on two durations:

    min_secs  the setting `watchdog_min_secs`
    usual     `watchdog_medians` times the median time of recent steps

    state       duration                   time limit             effect of a stop signal
    STARTING    until the first step ends  12 x min_secs          the process ends without saving
    STEPPING    until the next step ends   max(usual, min_secs),  the step ends and is saved
                                           at first 12 x min_secs
    SAVING      between two steps          12 x min_secs          one more step runs and is saved
    VALIDATING  during SAVING, or during   12 x min_secs          the validation is interrupted, the
                STARTING if a stop                                step is saved, and the next start
                postponed the validation                          validates it

These events change the state, skip an update or end the run:

    STARTING, STEPPING -> SAVING    a step has ended
    SAVING -> VALIDATING -> SAVING  every `eval_every` steps and at the last one
    SAVING -> STEPPING              the step has been saved, if it is the best so far or a multiple of
                                    `checkpoint_every`
    any -> same state               a step's loss or gradient is not finite: its update is skipped
    any -> STARTING                 `max_consecutive_nonfinite` steps in a row were not finite, for the
                                    first time: the run rolls back to an older checkpoint's parameters
    any -> failed (exit 1)          a step is not finite, and `on_nonfinite` is "stop"
    any -> failed (exit 1)          a second rollback is due, or there is no checkpoint for the first
    any -> stuck (exit 134)         the state lasts longer than its time limit
    any -> stopped (exit 75)        `grace_secs` have passed since a signal
    any -> stopped (exit 128 + n)   a second signal arrives; its number is n
    SAVING -> stopped (exit 75)     the step that was running at a signal is saved
    SAVING -> done (exit 0)         the last step is saved
"""

import collections
import contextlib
import enum
import faulthandler
import math
import os
import statistics
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from stepdistill_jax.batches.host import HostBatch
from stepdistill_jax.data.schedules import Schedule
from stepdistill_jax.errors import InputError
from stepdistill_jax.inference.answer_files import write_answers
from stepdistill_jax.runtime.checkpoints.manager import Checkpoints, rank, saved_steps
from stepdistill_jax.runtime.metrics import FLAGGED, MetricsWriter, read_flagged, read_metrics
from stepdistill_jax.runtime.progress import log, progress
from stepdistill_jax.runtime.signals import UNWIND_SECS, StopSignals, leave
from stepdistill_jax.training.data import VALIDATION
from stepdistill_jax.training.loss import means_of_tasks
from stepdistill_jax.training.optimizer import make_schedule
from stepdistill_jax.training.run import Run
from stepdistill_jax.training.state import TrainState
from stepdistill_jax.training.throughput import Throughput

SPIKE_WINDOW = 100  # number of recent losses whose median is the usual loss
SPIKE_LEAST = 10  # number of losses below which no step is flagged
SILENT_STEPS = 20  # steps without a target token after which an objective gets a warning
TEXT = 200  # characters of an input in the list of flagged steps
EXIT_STUCK = (
    134  # as after SIGABRT, by which JAX ends the peers of a dead process: launchers restart
)
SLOW_FACTOR = 12  # limit of every state but STEPPING, in units of `min_secs`
RECENT = 32  # number of step times for the median

State = enum.Enum("State", "STARTING STEPPING SAVING VALIDATING")


class _TooManyBadSteps(Exception):
    """Raised when too many steps in a row have a loss or gradient that is not finite.

    `step` is the last of these steps. `supervised` catches the exception and rolls the run back.
    """

    def __init__(self, step: int):
        super().__init__(step)
        self.step = step


class _BrokenOff(Exception):
    """Raised between two batches to interrupt a validation after a stop signal."""


def leave_at_start(signal_name: str) -> None:
    """Ends the process with status 75 after a signal before the first step. Saves nothing."""
    leave(signal_name, "stopped before the first step; there was nothing to save")


def supervised(run: Run, life: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Returns the result of `life()`. If the run must roll back, rolls it back and calls `life()` again.

    Raises:
        FloatingPointError: raised by `life`; advice is added to its message.
    """
    while True:
        try:
            try:
                return life()
            except _TooManyBadSteps as error:
                step = error.step
            # outside `except`: while the error lives, its frames keep a state in device memory
            _roll_back(run, step)
        except FloatingPointError as error:  # no save is running any more
            saved = max(saved_steps(run.workdir), default=None)
            raise FloatingPointError(
                f"{error}; {'nothing is saved yet' if saved is None else f'step {saved} is saved'};"
                f" the examples are in {os.fspath(run.workdir / FLAGGED)}: look at them, or use a"
                " lower LEARNING_RATE in a new workdir"
            ) from None


class Supervisor:
    """Supervises a run from its newest checkpoint on. `last` contains the metrics of the newest step."""

    def __init__(self, run: Run, stop: StopSignals):
        """Starts in the state STARTING. `stop` must be an entered context."""
        config = run.config
        self._run, self._stop = run, stop
        self._watchdog = Watchdog(config.watchdog_medians, config.watchdog_min_secs)
        self._enter(State.STARTING)
        # the rates of all steps at once, since an operation at each step would wait for the running step
        learning_rate_fn, steps = make_schedule(config), np.arange(config.train_steps)
        rates = None if learning_rate_fn is None else np.asarray(learning_rate_fn(steps))
        self._learning_rates = rates if rates is None else np.broadcast_to(rates, steps.shape)
        self._names = [o.name for o in run.data.objectives]
        self._tasks = [part.name for part in run.data.parts]
        extra = [config.extra_loss] if config.extra_loss else []
        self._weights = {term.name: term.weight for term in (*run.data.objectives, *extra)}
        self._pending: tuple[int, HostBatch, dict, float, float | None] | None = None
        self.last: dict[str, Any] = {}
        self._silent = dict.fromkeys(self._names, 0)  # consecutive steps without a target token
        self._zero_steps, self._spiking = 0, False
        self._losses: collections.deque[float] = collections.deque(maxlen=SPIKE_WINDOW)
        # steps that were not finite: all and the latest in a row, and whether the run has rolled back
        self._skipped, self._in_a_row, self._gone_back = 0, 0, False

    def begin(self, closing: contextlib.ExitStack) -> tuple[int, TrainState]:
        """Opens the workdir, and returns the step and state of the newest checkpoint, or 0 and a new state.

        When the caller closes `closing`, the checkpoints, the metrics file, the watchdog and the progress bar are
        closed. This method may return before a new state has been computed.
        """
        run, config = self._run, self._run.config
        self._checkpoints = checkpoints = Checkpoints(run.workdir)
        closing.enter_context(contextlib.closing(checkpoints))
        closing.enter_context(self._watchdog)
        if (start := checkpoints.latest_step() or 0) > 0:
            rest = run.abstract.replace(params=None)
            params, rest = checkpoints.restore(start, run.abstract.params, rest)
            state = rest.replace(params=params)
        else:
            state = run.initial_state()
        first, saved = jax.process_index() == 0, saved_steps(run.workdir)
        self._best = max(map(rank, saved.values()), default=None)
        validated = saved.get(start, {}).get("validated", True)
        if start == config.train_steps and (validated or run.validator is None):
            log(f"{run.workdir} is finished: step {start} of {start} is saved")
        elif start > 0:
            log(f"resumed {run.workdir} from step {start}")
        self._writer = MetricsWriter(
            run.workdir, start_step=start, validated=validated, active=first
        )
        closing.enter_context(contextlib.closing(self._writer))
        shown = progress(config.train_steps, "train", done=start) if first else None
        self._bar = closing.enter_context(shown) if shown else None  # None: another process prints
        self._remember(start)
        self._throughput = Throughput(run.model, batch_size=config.batch_size)
        self._stop.act_if_agreed()
        if not validated and self._validation_due(start):
            if metrics := self._validate(start, state):
                self._best = max(rank(metrics), self._best or rank(metrics))
                self._writer.sync()
                checkpoints.set_metrics(start, metrics)
            self._enter(State.STARTING)
            self._stop.act_if_agreed()
        return start, state

    def _remember(self, start: int) -> None:
        """Reads the run's losses and non-finite steps up to `start`, and whether it was rolled back, from its files."""
        if start and self._bar is not None and self._run.config.spike_factor:
            with contextlib.suppress(InputError):  # metrics.jsonl was removed
                lines = read_metrics(self._run.workdir)
                self._losses += [x["loss"] for x in lines if x.get("loss") is not None]
        last = None
        for line in read_flagged(self._run.workdir):
            if line["step"] > start:
                break
            # flagged steps 7, 8, 9 and start 9: three in a row; with start 10, step 10 was finite, so none
            if line.get("reason") == "nonfinite":
                self._skipped += 1
                self._in_a_row = self._in_a_row + 1 if last == line["step"] - 1 else 1
                last = line["step"]
            elif line.get("reason") == "rolled_back":
                self._gone_back, last = True, None
        if last != start:
            self._in_a_row = 0

    def _enter(self, state: State) -> None:
        starting = state is State.STARTING
        self._stop.act = leave_at_start if starting else None
        self._stop.limit_secs = UNWIND_SECS if starting else self._run.config.grace_secs
        self._watchdog.enter(state)

    # --- recording

    def record(self, step: int, batch: HostBatch, device_metrics: dict, waited: float) -> None:
        """Keeps a step's metrics for the next call, and writes the metrics of the previous step.

        Reading a step's metrics waits until the step has ended. By then the next step is queued, so the devices do
        not wait.
        `waited` is how long the loop waited for the batch, in seconds. Raises the errors of `flush`.
        """
        # the end of a step that has already ended is measured here, since `flush` runs later
        ended = self._throughput.now() if device_metrics["loss"].is_ready() else None
        self.flush(before=ended)
        self._pending = step, batch, device_metrics, waited, ended

    def flush(self, before: float | None = None) -> None:
        """Writes the metrics that `record` has kept, if there are any.

        Args:
            before: current time if the step after the kept one has already ended; otherwise None. If `record` did
                not see the kept step end, the time of its end is estimated from `before`.

        Raises:
            FloatingPointError: the step's loss or gradient is not finite, and the run must end.
        """
        if self._pending is None:
            return
        (step, batch, device_metrics, waited, ended), self._pending = self._pending, None
        got = jax.tree.map(np.asarray, device_metrics)  # waits until the step has ended
        throughput = self._throughput
        # an unknown end lies between the previous end and `before`: the midpoint is the estimate
        if ended is None:
            ended = throughput.now() if before is None else throughput.halfway(before)
        metrics = self._numbers(step, batch, got) | throughput.of_step(batch, ended)
        metrics["timing/seconds_waiting_for_data"] = waited
        if math.isfinite(metrics["loss"]) and math.isfinite(metrics["grad_norm"]):
            self._in_a_row = 0
            self._look_for_spike(step, metrics)
        else:
            self._skipped += 1
            self._in_a_row += 1
            self._flag(step, "nonfinite", metrics)
        metrics["skipped_steps"] = self._skipped
        self._writer.write(step, metrics)
        self.last = {"step": step, **metrics}
        if self._bar is not None:
            self._warn(step, metrics)
            skipped = {"skipped steps": self._skipped} if self._skipped else {}
            self._bar.update(1, **_losses_of(metrics), **skipped)
        if self._in_a_row:
            self._enforce(step, metrics)

    def _numbers(self, step: int, batch: HostBatch, got: dict[str, Any]) -> dict[str, float]:
        by_task = got["sums"]
        sums = by_task.over_tasks(len(self._names), len(self._tasks))
        metrics = {"loss": float(got["loss"]), "grad_norm": float(got["grad_norm"])}
        for i, (name, weight) in enumerate(self._weights.items()):
            of_tokens = name in self._names  # an extra loss has no target tokens
            if of_tokens:
                metrics[f"target_tokens/{name}"] = float(batch.objective_tokens[i])
            if sums.count[i] > 0:
                metrics[f"loss/{name}"] = float(sums.loss[i] / sums.count[i])
                if of_tokens:
                    metrics[f"accuracy/{name}"] = float(sums.correct[i] / sums.count[i])
            if isinstance(weight, Schedule):
                metrics[f"loss_weight/{name}"] = float(got["weights"][i])
        if len(self._tasks) > 1:
            metrics |= means_of_tasks(by_task, self._tasks, self._names)
        if self._learning_rates is not None:
            metrics["learning_rate"] = float(self._learning_rates[step - 1])
        return metrics

    def _warn(self, step: int, metrics: dict[str, float]) -> None:
        self._zero_steps = self._zero_steps + 1 if metrics["loss"] == 0.0 else 0
        if self._zero_steps == 1:
            log(f"warning: step {step}: the loss is exactly 0, so nothing is learned")
        for name in self._names:
            silent = self._silent[name] + 1 if not metrics[f"target_tokens/{name}"] else 0
            self._silent[name] = silent
            if silent == SILENT_STEPS:
                log(
                    f"warning: objective {name} had no target token in {SILENT_STEPS} steps;"
                    " check that the dataset has the objective's target field"
                )

    def _look_for_spike(self, step: int, metrics: dict[str, float]) -> None:
        loss, factor = metrics["loss"], self._run.config.spike_factor
        if self._bar is None or not factor:
            return
        usual = statistics.median(self._losses or [math.inf])
        spike = len(self._losses) >= SPIKE_LEAST and loss > factor * usual
        if spike:
            self._flag(step, "spike", metrics)
            if not self._spiking:
                log(
                    f"warning: step {step}: the loss is {loss:.4g}, but the median of the last"
                    f" {len(self._losses)} steps is {usual:.4g}; the step's examples are in {FLAGGED}"
                )
        self._spiking = spike
        self._losses.append(loss)

    def _flag(self, step: int, reason: str, metrics: dict[str, float]) -> None:
        if self._bar is None:
            return
        entry = {"reason": reason, **_losses_of(metrics), "grad_norm": metrics["grad_norm"]}
        self._writer.flag(step, entry | {"examples": _examples_of(self._run, step)})

    def _enforce(self, step: int, metrics: dict[str, float]) -> None:
        """Handles a step whose loss or gradient is not finite: logs a warning, rolls back, or ends the run."""
        config = self._run.config
        what = f"step {step}: loss {metrics['loss']}, grad_norm {metrics['grad_norm']}"
        if config.on_nonfinite == "stop":
            raise FloatingPointError(f"{what} (train.on_nonfinite = 'stop')")
        if self._bar is not None:
            log(
                f"warning: {what}: its update is skipped ({self._in_a_row} in a row,"
                f" {self._skipped} in total); its examples are in {FLAGGED}"
            )
        if self._in_a_row >= config.max_consecutive_nonfinite:
            if self._gone_back:
                raise FloatingPointError(
                    f"{what}; for the second time, {self._in_a_row} steps in a row have a loss or gradient that"
                    " is not finite"
                )
            raise _TooManyBadSteps(step)

    # --- validating and saving

    def save(self, step: int, state: TrainState) -> None:
        """Validates and saves after a step, if this is due, and exits after a stop signal.

        Raises:
            SystemExit: status 75, after the step is saved.
            FloatingPointError: raised by `flush`, before the step is saved.
        """
        self._watchdog.last_step = step
        self._enter(State.SAVING)
        last, validation_due = step == self._run.config.train_steps, self._validation_due(step)
        stopping, metrics = self._stop.agreed(), None
        if validation_due and not stopping:
            metrics = self._validate(step, state)
            stopping = metrics is None
            self._enter(State.SAVING)
        better = False
        if metrics and self._is_better(metrics):
            better, self._best = True, rank(metrics)
        if better or stopping or last or step % self._run.config.checkpoint_every == 0:
            self.flush()
            self._writer.sync()  # a resume from this checkpoint reads the metrics up to its step
            metrics = metrics or {"step": step, "validated": False}
            self._checkpoints.save(step, state.params, state.replace(params=None), metrics)
            self._throughput.pause()
        if stopping and (validation_due or not last):
            self._checkpoints.wait()
            seconds = f"{self._stop.seconds():.1f} s after the signal"
            leave(self._stop.received, f"saved step {step}; {seconds}")
        self._enter(State.STEPPING)

    def _validation_due(self, step: int) -> bool:
        config = self._run.config
        due = step % config.eval_every == 0 or step == config.train_steps
        return due and self._run.validator is not None

    def _validate(self, step: int, state: TrainState) -> dict[str, Any] | None:
        """Validates a step, and writes its metrics and answers.

        Returns:
            The metrics for the checkpoint, or None if a signal interrupted the validation.
        """
        validator = self._run.validator
        assert validator is not None
        self._enter(State.VALIDATING)
        self.flush()
        answers: list[dict[str, Any]] = []
        try:
            found = validator.compute(state.params, on_batch=self._break_off, keep=answers.append)
        except _BrokenOff:
            return None
        self._writer.write(step, found)
        accuracy = found[f"eval/{VALIDATION}/label_accuracy"]
        if self._bar is not None:
            self._bar.update(0, **{"validation accuracy": accuracy})
        self._throughput.pause()
        label = self._run.data.objectives[0].name  # the objective whose output is served
        ranked = {
            "label_accuracy": accuracy,
            "label_loss": found[f"eval/{VALIDATION}/loss/{label}"],
            "rank": validator.ranking(found, self._run.config.best_metric),
        }
        metrics = {"step": step, "validated": True, **ranked, **found}
        if self._bar is not None:
            rows = [{"step": step, **answer} for answer in answers]
            for kind in ("last", "best")[: 1 + self._is_better(metrics)]:
                write_answers(
                    self._run.workdir, f"{self._run.config.task}-{VALIDATION}-{kind}", rows
                )
        return metrics

    def _is_better(self, metrics: dict[str, Any]) -> bool:
        return self._best is None or rank(metrics) > self._best

    def _break_off(self) -> None:
        if self._stop.agreed():
            raise _BrokenOff


def _losses_of(metrics: dict[str, float]) -> dict[str, float]:
    """Returns the loss and the losses of the objectives, but not the losses of single tasks."""
    of_objective = {n: v for n, v in metrics.items() if n.startswith("loss/") and n.count("/") == 1}
    return {"loss": metrics["loss"]} | of_objective


def _examples_of(run: Run, step: int) -> list[dict[str, Any]]:
    """Returns an entry for each example of a step.

    An entry has `row` (index in the tokenised split), `input` (the start of the input), `label` and, for a
    mixture, `task`.
    """
    found, data = [], run.data
    drawn = run.batches.examples(step - 1)
    for number, row in zip(drawn.stores.tolist(), drawn.indices.tolist(), strict=True):
        store = data.stores[number]
        text = data.vocabulary.decode(store.rows[0]["inputs"][row].tolist())
        example = {"row": row, "input": text[:TEXT], "label": store.label_texts[row]}
        part = {} if len(data.parts) == 1 else {"task": data.parts[number].name}
        found.append({**part, **example})
    return found


def _roll_back(run: Run, step: int) -> None:
    """Saves step `step` with the parameters and optimizer of a checkpoint from before the non-finite steps.

    The batches from that checkpoint to `step` are skipped, as in PaLM (Chowdhery et al. 2022, section 5.1).

    Raises:
        FloatingPointError: there is no such checkpoint.
    """
    in_a_row, every = run.config.max_consecutive_nonfinite, run.config.checkpoint_every
    # only multiples of `every`: a stop signal may save any other step, and must not change the result
    # steps 96 to 100 were not finite (5 in a row), saved every 10: 94 // 10 * 10 = 90. With bad steps 91 to
    # 95 it is 80: step 91 started from the parameters of step 90, which may be the fault.
    good = (step - in_a_row - 1) // every * every
    bad = f"steps {step - in_a_row + 1} to {step}"
    first = jax.process_index() == 0
    with contextlib.closing(Checkpoints(run.workdir)) as checkpoints:
        if good not in saved_steps(run.workdir):
            none = f"of step {good} exists to roll back to" if good > 0 else "was due before"
            raise FloatingPointError(
                f"{bad}: the loss or the gradient is not finite, and no checkpoint {none}"
            )
        if first:
            log(
                f"warning: {bad} were not finite: rolled back to the parameters of step {good}; the"
                f" batches up to step {step} are skipped"
            )
        abstract = run.abstract
        params, rest = checkpoints.restore(good, abstract.params, abstract.replace(params=None))
        # before the save, since a resume removes the lines of steps that are not saved
        writer = MetricsWriter(run.workdir, start_step=step, active=first)
        with contextlib.closing(writer):
            writer.flag(step, {"reason": "rolled_back", "to_step": good})
        # a new array with the same placement: only `step` differs
        rest = rest.replace(step=rest.step + (step - good))
        checkpoints.save(step, params, rest, {"step": step, "validated": False})


class Watchdog:
    """A context that ends the process with status 134 if the run stays in one `State` too long.

    First, it writes the stacks of all threads. Time in which the process is suspended does not count.
    """

    def __init__(self, medians: float, min_secs: float):
        """Sets the time limits, as the module docstring describes. If `medians` is 0, there are no limits."""
        self.last_step: int | None = None  # for the message
        self._medians, self._min_secs = medians, min_secs
        self._interval = min(1.0, min_secs / 10)
        self._seconds: collections.deque[float] = collections.deque(maxlen=RECENT)
        self._state, self._began = State.STARTING, time.monotonic()
        self._ran = self._mark = 0.0  # seconds that the process ran: in total, and until this state
        self._end = threading.Event()

    def __enter__(self) -> "Watchdog":
        if self._medians:
            threading.Thread(target=self._watch, name="watchdog", daemon=True).start()
        return self

    def __exit__(self, *_) -> None:
        self._end.set()

    def enter(self, state: State) -> None:
        """Ends the current state and begins `state`."""
        now = time.monotonic()
        if self._state is State.STEPPING:
            self._seconds.append(now - self._began)
        self._state, self._began, self._mark = state, now, self._ran

    def limit_secs(self) -> float:
        """Returns how long the current state may last, in seconds."""
        if self._state is not State.STEPPING or not self._seconds:
            return SLOW_FACTOR * self._min_secs
        return max(self._min_secs, self._medians * statistics.median(list(self._seconds)))

    def _watch(self) -> None:
        last = time.monotonic()
        while not self._end.wait(self._interval):
            now = time.monotonic()
            # time in which the process was suspended does not count
            self._ran += min(now - last, 2 * self._interval)
            last = now
            if self._ran - self._mark > self.limit_secs():
                self._bark()

    def _bark(self) -> None:
        step, secs = self.last_step, self._ran - self._mark
        where = "before the first step" if step is None else f"after step {step}"
        usual = f", a step takes {statistics.median(self._seconds):.3g} s" if self._seconds else ""
        log(f"stuck: no progress for {secs:.0f} s {where}{usual}; the stacks of all threads:")
        faulthandler.dump_traceback(file=sys.__stderr__ or sys.stderr, all_threads=True)
        log(
            f"stepdistill: failed: stuck {where}; start the same command again to continue from the last"
            " saved step (train.watchdog_medians = 0 turns off this check)"
        )
        os._exit(EXIT_STUCK)
