"""Steps whose numbers go wrong: counted, reported with their examples, and when to go back."""

import collections
import contextlib
import math
import os
import statistics
from typing import Any

from stepdistill_jax.errors import InputError
from stepdistill_jax.runtime.checkpoints.manager import Checkpoints, saved_steps
from stepdistill_jax.runtime.metrics import FLAGGED, MetricsWriter, read_flagged, read_metrics
from stepdistill_jax.runtime.progress import log
from stepdistill_jax.training.run import Run

SPIKE_WINDOW = 100  # steps whose median loss is the usual one
SPIKE_LEAST = 10  # fewer say nothing
TEXT = 200  # characters of an input in the report


class RollBack(Exception):
    """Raised after step `step`: the parameters of the last good checkpoint are to go on from there."""

    def __init__(self, step: int):
        super().__init__(step)
        self.step = step


class Guard:
    """Looks at each step's loss and gradient norm.

    Every process has one and comes to the same verdict. What a resume must know is read from
    `flagged_batches.jsonl`, up to the step that it starts from.
    """

    def __init__(self, run: Run, writer: MetricsWriter, *, start: int, speaks: bool):
        """`speaks`: this process writes and prints."""
        self._run, self._writer, self._speaks = run, writer, speaks
        self.skipped, self._in_a_row, self._rolled_back = 0, 0, False
        last = None
        for line in read_flagged(run.workdir):
            if line["step"] > start:
                break
            if line.get("reason") == "nonfinite":
                self.skipped += 1
                self._in_a_row = self._in_a_row + 1 if last == line["step"] - 1 else 1
                last = line["step"]
            elif line.get("reason") == "rolled_back":
                self._rolled_back, last = True, None
        if last != start:
            self._in_a_row = 0
        self._losses: collections.deque[float] = collections.deque(maxlen=SPIKE_WINDOW)
        self._spiking = False
        if start and speaks and run.config.spike_factor:
            with contextlib.suppress(InputError):  # metrics.jsonl was removed
                lines = read_metrics(run.workdir)
                self._losses += [x["loss"] for x in lines if x.get("loss") is not None]

    def count(self, step: int, metrics: dict[str, Any]) -> None:
        """Counts and reports a step, before its line of metrics is written."""
        if not (math.isfinite(metrics["loss"]) and math.isfinite(metrics["grad_norm"])):
            self.skipped += 1
            self._in_a_row += 1
            self._flag(step, "nonfinite", metrics)
            return
        self._in_a_row = 0
        if not (self._speaks and self._run.config.spike_factor):
            return
        usual = statistics.median(self._losses or [math.inf])
        spike = len(self._losses) >= SPIKE_LEAST and (
            metrics["loss"] > self._run.config.spike_factor * usual
        )
        if spike:
            self._flag(step, "spike", metrics)
            if not self._spiking:
                log(
                    f"warning: step {step}: loss {metrics['loss']:.4g}, the median of the last"
                    f" {len(self._losses)} steps is {usual:.4g}; its examples are in {FLAGGED}"
                )
        self._spiking = spike
        self._losses.append(metrics["loss"])

    def enforce(self, step: int, metrics: dict[str, Any]) -> None:
        """What follows from the count, once the step's line is written.

        Raises:
            FloatingPointError: the run is to stop at its first step that is not finite.
            RollBack: too many in a row.
        """
        if not self._in_a_row:
            return
        config = self._run.config
        what = f"step {step}: loss {metrics['loss']}, grad_norm {metrics['grad_norm']}"
        if config.on_nonfinite == "stop":
            raise FloatingPointError(f"{what} (train.on_nonfinite = 'stop')")
        if self._speaks:
            log(
                f"warning: {what}: its update is skipped ({self._in_a_row} in a row,"
                f" {self.skipped} in all); its examples are in {FLAGGED}"
            )
        if self._in_a_row >= config.max_consecutive_nonfinite:
            if self._rolled_back:
                raise FloatingPointError(f"{what}, {self._in_a_row} in a row once more")
            raise RollBack(step)

    def _flag(self, step: int, reason: str, metrics: dict[str, Any]) -> None:
        if not self._speaks:
            return
        losses = {n: v for n, v in metrics.items() if n == "loss" or n.startswith("loss/")}
        self._writer.flag(
            step,
            {
                "reason": reason,
                **losses,
                "grad_norm": metrics["grad_norm"],
                "examples": examples_of(self._run, step),
            },
        )


def examples_of(run: Run, step: int) -> list[dict[str, Any]]:
    """The examples of a step: place in the split as it was tokenised, start of the input, and label."""
    found, data = [], run.data
    drawn = run.batches.examples(step - 1)
    for number, row in zip(drawn.stores.tolist(), drawn.indices.tolist(), strict=True):
        store = data.stores[number]
        text = data.vocabulary.decode(store.rows[0]["inputs"][row].tolist())
        example = {"row": row, "input": text[:TEXT], "label": store.label_texts[row]}
        found.append(example if len(data.stores) == 1 else {"store": number, **example})
    return found


def roll_back(run: Run, step: int, *, speaks: bool) -> None:
    """Saves step `step` anew: the last good checkpoint's parameters and optimizer, at that step.

    The batches in between are left out, as PaLM did (Chowdhery et al. 2022, section 5.1): gone
    through again in the same order, they would end in the same place. A resume finds a checkpoint
    like any other.

    Good is the newest multiple of `checkpoint_every` whose next step was finite. A step that is
    saved for another reason (a stop signal) is not taken: a run that nobody stopped has none.

    Raises:
        FloatingPointError: it is not there.
    """
    in_a_row, every = run.config.max_consecutive_nonfinite, run.config.checkpoint_every
    good = (step - in_a_row - 1) // every * every
    with contextlib.closing(Checkpoints(run.workdir)) as checkpoints:
        if good not in saved_steps(run.workdir):
            what = f"steps {step - in_a_row + 1} to {step}: loss or gradient not finite"
            raise FloatingPointError(
                f"{what}, and no checkpoint of step {good} to go back to"
                if good > 0
                else f"{what}, and no checkpoint was due before"
            )
        if speaks:
            log(
                f"warning: steps {step - in_a_row + 1} to {step} were not finite: back to the"
                f" parameters of step {good}; the batches up to step {step} are left out"
            )
        abstract = run.abstract
        params, rest = checkpoints.restore(good, abstract.params, abstract.replace(params=None))
        # first: a line of a step that is not saved is cut off by the resume
        writer = MetricsWriter(run.workdir, start_step=step, active=speaks)
        with contextlib.closing(writer):
            writer.flag(step, {"reason": "rolled_back", "to_step": good})
        # a new array of the same placement: `step` is all that differs
        rest = rest.replace(step=rest.step + (step - good))
        checkpoints.save(step, params, rest, {"step": step, "validated": False})


def advice(run: Run, what: FloatingPointError) -> FloatingPointError:
    """The error with what a user can do; called when no save is under way any more."""
    saved = max(saved_steps(run.workdir), default=None)
    return FloatingPointError(
        f"{what}; {'nothing is saved yet' if saved is None else f'step {saved} is saved'}; the"
        f" examples are in {os.fspath(run.workdir / FLAGGED)}: look at them, or take a lower"
        " LEARNING_RATE in a new workdir"
    )
