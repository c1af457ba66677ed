"""When a run is validated and saved."""

from typing import Any

from stepdistill_jax.runtime.checkpoints.manager import Checkpoints, rank, saved_steps
from stepdistill_jax.training.recorder import StepRecorder
from stepdistill_jax.training.run import VALIDATION, Run
from stepdistill_jax.training.state import TrainState


class Milestones:
    """Validates every `eval_every` steps; saves better steps, every `checkpoint_every`-th, the last."""

    def __init__(self, run: Run, checkpoints: Checkpoints, record: StepRecorder):
        """Knows from the saved steps what the best so far is."""
        self._run, self._checkpoints, self._record = run, checkpoints, record
        self._best = max((rank(m) for m in saved_steps(run.workdir).values()), default=None)

    def validation_due(self, step: int) -> bool:
        """Whether this step is one of those that are validated."""
        config = self._run.config
        last = step == config.train_steps
        return self._run.validator is not None and (step % config.eval_every == 0 or last)

    def reached(self, step: int, state: TrainState, *, stopping: bool) -> None:
        """What is due after a step. A stop saves at once and leaves the validation to the resume."""
        config = self._run.config
        metrics: dict[str, Any] = {"step": step, "validated": False}
        if self.validation_due(step) and not stopping:
            metrics = self._validate(step, state)
        better = metrics["validated"] and (self._best is None or rank(metrics) > self._best)
        if better:
            self._best = rank(metrics)
        due = step == config.train_steps or step % config.checkpoint_every == 0
        if better or stopping or due:
            self._save(step, state, metrics)

    def settle(self, step: int, state: TrainState) -> None:
        """On a resume: the validation of `step` that a stop signal put off."""
        if self.validation_due(step) and not saved_steps(self._run.workdir)[step]["validated"]:
            metrics = self._validate(step, state)
            self._best = max(rank(metrics), self._best or rank(metrics))
            self._record.flush()
            self._record.sync()
            self._checkpoints.set_metrics(step, metrics)

    def _validate(self, step: int, state: TrainState) -> dict[str, Any]:
        validator = self._run.validator
        assert validator is not None
        self._record.flush()
        validation = validator.compute(state.params)
        self._record.validation(step, validation)
        label = self._run.data.objectives[0].name  # the objective whose output is served
        return {
            "step": step,
            "validated": True,
            "label_accuracy": validation[f"eval/{VALIDATION}/label_accuracy"],
            "label_loss": validation[f"eval/{VALIDATION}/loss/{label}"],
            **validation,
        }

    def _save(self, step: int, state: TrainState, metrics: dict[str, Any]) -> None:
        self._record.flush()  # raises where too many steps were not finite, before the step is saved
        self._record.sync()
        self._checkpoints.save(step, state.params, state.replace(params=None), metrics)
        self._record.throughput.pause()
