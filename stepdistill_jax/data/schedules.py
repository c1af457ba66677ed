"""Weight schedules as plain values, which configs, `run.json` and model directories can store."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from stepdistill_jax.errors import InputError
from stepdistill_jax.runtime.checks import INT32, keep, number, one_of, whole

SHAPES = ("linear", "cosine")


@dataclasses.dataclass(frozen=True)
class Schedule:
    """A weight that depends on the step. The first update is step 0, as for the learning rate.

    The fields have the names and meanings of the arguments of `optax.linear_schedule`.
    `training.optimizer.weights_at` computes the weight of a step.

    Example: `Schedule("linear", 1.0, 0.0, 1000)` is 1 at step 0, 0.5 at 500, and 0 from 1000 on.

    Attributes:
        shape: `linear`, or `cosine` (half a wave, flat at both ends).
        init_value: weight until `transition_begin`; at least 0.
        end_value: weight from `transition_begin` + `transition_steps` on; at least 0.
        transition_steps: length of the change, in steps; at least 1.
        transition_begin: step at which the change begins.

    Raises:
        InputError: a field is invalid, or both values are 0.
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
        """Returns the schedule with the given fields, as `dataclasses.asdict` returns them.

        Raises:
            InputError: fields are missing or unknown.
        """
        names = {f.name for f in dataclasses.fields(cls)}
        if raw.keys() != names:
            raise InputError(
                f"a schedule must have the fields {', '.join(sorted(names))}, got {raw!r:.200}"
            )
        return cls(**raw)

    def __format__(self, spec: str) -> str:
        """Returns a description such as `linear 1 to 0 over steps 0 to 1000`; `spec` formats the two weights."""
        values = f"{self.init_value:{spec}} to {self.end_value:{spec}}"
        end = self.transition_begin + self.transition_steps
        return f"{self.shape} {values} over steps {self.transition_begin} to {end}"

    def __str__(self) -> str:
        return f"{self:g}"


Weight = float | Schedule


def linear_schedule(
    init_value: float, end_value: float, transition_steps: int, transition_begin: int = 0
) -> Schedule:
    """Returns a weight that changes linearly from `init_value` to `end_value`."""
    return Schedule("linear", init_value, end_value, transition_steps, transition_begin)


def cosine_schedule(
    init_value: float, end_value: float, transition_steps: int, transition_begin: int = 0
) -> Schedule:
    """Returns a weight that changes along half a cosine wave, up or down."""
    return Schedule("cosine", init_value, end_value, transition_steps, transition_begin)


def check_weight(name: str, weight: Any) -> None:
    """Raises InputError unless `weight` is a schedule, or a number of at least 0 that fits a float32."""
    if not isinstance(weight, Schedule):
        number(name, weight, least=0)


def end_value(weight: Weight) -> float:
    """Returns the final weight, which validation uses at every step so that its losses are comparable."""
    return weight.end_value if isinstance(weight, Schedule) else weight


def described(weight: Weight) -> float | str:
    """Returns a number unchanged, and a schedule in words."""
    return str(weight) if isinstance(weight, Schedule) else weight
