"""Weights that change along a run, as plain values: configs, `run.json` and model directories hold them."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from stepdistill_jax.errors import InputError

SHAPES = ("linear", "cosine")
FLOAT32, INT32 = 3.4e38, 2**31 - 1


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
        transition_steps: how many steps the change takes; at least 1.
        transition_begin: the step that it begins at.

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
        if self.shape not in SHAPES:
            raise InputError(f"schedule: one of {', '.join(SHAPES)} is wanted, got {self.shape!r}")
        where = f"{self.shape}_schedule"
        for name in ("init_value", "end_value"):
            value = getattr(self, name)
            if not is_weight(value):
                raise InputError(f"{where}.{name}: a number from 0 is wanted, got {value!r}")
        for name, least in (("transition_steps", 1), ("transition_begin", 0)):
            value = getattr(self, name)
            if type(value) is not int or not least <= value <= INT32:
                raise InputError(
                    f"{where}.{name}: a whole number from {least} is wanted, got {value!r}"
                )
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


def is_weight(value: Any) -> bool:
    """Whether it is a number from 0 that float32 holds; True and False are none."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return number and 0 <= value <= FLOAT32


def end_value(weight: Weight) -> float:
    """The weight that it ends with, which validations take: their losses then compare."""
    return weight.end_value if isinstance(weight, Schedule) else weight


def described(weight: Weight) -> float | str:
    """A plain value for people: the number, or the schedule in words."""
    return str(weight) if isinstance(weight, Schedule) else weight
