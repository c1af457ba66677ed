"""Learning rates as functions of the step. Plain values describe them in configs and in `run.json`."""

import dataclasses

import jax.numpy as jnp
import optax

from stepdistill_jax.errors import InputError
from stepdistill_jax.runtime.checks import keep, number, one_of, whole

FALLING = ("linear", "cosine")  # rates that fall to an end value at the last step, so depend on it
SHAPES = (*FALLING, "rsqrt", "constant")
T5_WARMUP_STEPS = 10_000


@dataclasses.dataclass(frozen=True, repr=False)
class LearningRate:
    """A learning rate as a function of the step, which counts updates from 0.

    P is the peak `learning_rate`, W is `warmup_steps`, E is `end_value` and N is `train_steps`:

        constant    rises from 0 to P in W steps, then stays at P
        linear      rises from 0 to P in W steps, then falls in a straight line to E at N
        cosine      rises from 0 to P in W steps, then falls along half a cosine to E at N
        rsqrt       stays at P for W steps, then is P x sqrt(W / step), as in T5 (Raffel et al. 2020,
                    section 3.1.2)

    After step N, `linear` and `cosine` stay at E.

    Attributes:
        shape: one of these four names.
        warmup_steps (steps): length of the rise from 0 to the peak.
        end_value: learning rate at the end of the fall and after it, at least 0.
        learning_rate: the peak; None means the run's `learning_rate`.
        train_steps (steps): step at which the fall ends; None means the run's `train_steps`.

    Raises:
        InputError: the shape is unknown, or a value is out of range.
    """

    shape: str
    warmup_steps: int = 0
    end_value: float = 0.0
    learning_rate: float | None = None
    train_steps: int | None = None

    def __post_init__(self):
        one_of("LearningRate.shape", self.shape, SHAPES)
        of, least = f"{self.shape}.", 1 if self.shape == "rsqrt" else 0
        keep(self, whole, "warmup_steps", of=of, least=least)
        keep(self, number, "end_value", of=of, least=0)
        if self.learning_rate is not None:
            keep(self, number, "learning_rate", of=of, above=0)
        if self.train_steps is not None:
            keep(self, whole, "train_steps", of=of, least=1)
        if self.shape not in FALLING and (self.end_value or self.train_steps is not None):
            raise InputError(f"`LearningRate`: {self.shape} takes no end_value and no train_steps")

    def __repr__(self) -> str:
        """Returns the call that creates this learning rate in a config, such as `cosine(warmup_steps=50)`."""
        given = (f for f in dataclasses.fields(self) if getattr(self, f.name) != f.default)
        arguments = [f"{f.name}={getattr(self, f.name)!r}" for f in given if f.name != "shape"]
        return f"{self.shape}({', '.join(arguments)})"

    def schedule(self, learning_rate: float, train_steps: int) -> optax.Schedule:
        """Returns the rate as a function of the step, for a run with this peak and number of steps.

        `linear` equals the linear schedule of `transformers`, which the paper's code uses.
        """
        warmup_steps = self.warmup_steps
        peak = learning_rate if self.learning_rate is None else self.learning_rate
        last = train_steps if self.train_steps is None else self.train_steps
        if self.shape == "rsqrt":
            return lambda step: peak * jnp.sqrt(warmup_steps / jnp.maximum(step, warmup_steps))
        # the fall counts its steps from the end of the warm-up (`join_schedules`)
        falling_steps = max(last - warmup_steps, 1)
        if self.shape == "constant":
            after = optax.constant_schedule(peak)
        elif self.shape == "linear":
            after = optax.linear_schedule(peak, self.end_value, falling_steps)
        else:
            # optax takes the end value as a share of the peak
            after = optax.cosine_decay_schedule(peak, falling_steps, alpha=self.end_value / peak)
        rise = optax.linear_schedule(0.0, peak, max(warmup_steps, 1))
        return optax.join_schedules([rise, after], [warmup_steps]) if warmup_steps else after


def linear(
    warmup_steps: int = 0,
    end_value: float = 0.0,
    learning_rate: float | None = None,
    train_steps: int | None = None,
) -> LearningRate:
    """Returns a learning rate that rises from 0 to a peak, then falls in a straight line."""
    return LearningRate("linear", warmup_steps, end_value, learning_rate, train_steps)


def cosine(
    warmup_steps: int = 0,
    end_value: float = 0.0,
    learning_rate: float | None = None,
    train_steps: int | None = None,
) -> LearningRate:
    """Returns a learning rate that rises from 0 to a peak, then falls along half a cosine."""
    return LearningRate("cosine", warmup_steps, end_value, learning_rate, train_steps)


def rsqrt(warmup_steps: int = T5_WARMUP_STEPS, learning_rate: float | None = None) -> LearningRate:
    """Returns T5's pre-training rate, first constant, then proportional to 1 / sqrt(step).

    Args:
        warmup_steps (steps): number of steps at the peak, at least 1.
        learning_rate: the peak; None means the run's `learning_rate`.
    """
    return LearningRate("rsqrt", warmup_steps, learning_rate=learning_rate)


def constant(warmup_steps: int = 0, learning_rate: float | None = None) -> LearningRate:
    """Returns a learning rate that rises from 0 to a peak, then stays there."""
    return LearningRate("constant", warmup_steps, learning_rate=learning_rate)
