"""Weights that change along a run, as plain values: configs, `run.json` and model directories hold them."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from stepdistill_jax.errors import InputError
from stepdistill_jax.runtime.checks import INT32, keep, number, one_of, whole

SHAPES = ("linear", "cosine")


@dataclasses.dataclass(frozen=True)
class Schedule:
    """A weight as a function of the step, which counts updates from 0 as the learning rate's does.

    The names of the fields are those of `optax.linear_schedule`; `training.optimizer.weights_at`
    computes the values.

    Example: `Schedule("linear", 1.0, 0.0, 1000)` is 1 at step 0, 0.5 at 500, and 0 from 1000 on.

    Attributes:
        shape: `linear`, or `cosine` (half a wave, flat at both ends).
        init_value: the weight until `transition_begin`; at least 0.
        end_value: the weight from `transition_begin + transition_steps` on; at least 0.
        transition_steps (steps): how many the change takes; at least 1.
        transition_begin (steps): after which it begins.

    Raises:
        InputError: another shape, a value that is no number from 0, steps that are no whole numbers,
            or both values 0.
    """

    shape: str
    init_value: float
    end_value: float
    transition_steps: int
    transition_begin: int = 0

    def __post_init__(self):
        one_of("Schedule.shape", self.shape, SHAPES)
        where = f"{self.shape}_schedule"
        keep(self, number, "init_value", "end_value", of=f"{where}.", least=0)
        keep(self, whole, "transition_steps", of=f"{where}.", least=1)
        keep(self, whole, "transition_begin", of=f"{where}.", least=0)
        if self.transition_begin + self.transition_steps > INT32:
            raise InputError(f"{where}: transition_begin + transition_steps is over {INT32}")
        if not (self.init_value or self.end_value):
            raise InputError(f"{where}: init_value and end_value are both 0")

    @classmethod
    def from_json(cls, raw: Mapping[str, Any]) -> "Schedule":
        """The inverse of `dataclasses.asdict`; InputError where fields are missing or unknown."""
        names = {f.name for f in dataclasses.fields(cls)}
        if raw.keys() != names:
            raise InputError(f"a schedule must have {', '.join(sorted(names))}, got {raw!r:.200}")
        return cls(**raw)

    def __format__(self, spec: str) -> str:
        """In words; `spec` is that of the two values: `linear 1 to 0 over steps 0 to 1000`."""
        values = f"{self.init_value:{spec}} to {self.end_value:{spec}}"
        end = self.transition_begin + self.transition_steps
        return f"{self.shape} {values} over steps {self.transition_begin} to {end}"

    def __str__(self) -> str:
        return f"{self:g}"


Weight = float | Schedule


def linear_schedule(
    init_value: float, end_value: float, transition_steps: int, transition_begin: int = 0
) -> Schedule:
    """A weight that goes along a straight line."""
    return Schedule("linear", init_value, end_value, transition_steps, transition_begin)


def cosine_schedule(
    init_value: float, end_value: float, transition_steps: int, transition_begin: int = 0
) -> Schedule:
    """A weight that goes along half a cosine wave, up or down."""
    return Schedule("cosine", init_value, end_value, transition_steps, transition_begin)


def check_weight(name: str, weight: Any) -> None:
    """Raises InputError where it is neither a schedule nor a number from 0 that float32 holds."""
    if not isinstance(weight, Schedule):
        number(name, weight, least=0)


def end_value(weight: Weight) -> float:
    """The weight that it ends with, which validations take: their losses then compare."""
    return weight.end_value if isinstance(weight, Schedule) else weight


def described(weight: Weight) -> float | str:
    """A plain value for people: the number, or the schedule in words."""
    return str(weight) if isinstance(weight, Schedule) else weight
