"""Builds update rules, learning rates and schedules of loss weights from a config."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from stepdistill_jax.data.schedules import Schedule, Weight
from stepdistill_jax.training.config import OptimizerConfig, TrainConfig
from stepdistill_jax.training.optimizer_function import OptimizerFunction


def make_schedule(config: TrainConfig) -> optax.Schedule | None:
    """Returns the learning rate as a function of the 0-based step; None if the rate is unknown."""
    rate = config.optimizer.rate
    return rate and rate.schedule(config.learning_rate, config.train_steps)


def weights_at(weights: Sequence[Weight], step: jax.Array | int) -> jax.Array:
    """Returns the values of the loss weights after `step` updates, [weights] float32."""
    # constants stay constants of the compiled program
    if not any(isinstance(weight, Schedule) for weight in weights):
        return jnp.asarray(weights, jnp.float32)
    now = [weight_schedule(w)(step) if isinstance(w, Schedule) else w for w in weights]
    return jnp.stack([jnp.asarray(w, jnp.float32) for w in now])


def weight_schedule(s: Schedule) -> Callable[[Any], jax.Array]:
    """Returns a `Schedule` as a function from the step to the weight."""
    changing: Callable[[Any], Any]
    if s.shape == "linear":
        changing = optax.linear_schedule(
            s.init_value, s.end_value, s.transition_steps, s.transition_begin
        )
    else:
        # optax's cosine falls to a share of its initial value; here the initial value may be 0
        fall = optax.cosine_decay_schedule(1.0, s.transition_steps)

        def wave(step):
            share = fall(jnp.maximum(step - s.transition_begin, 0))
            return s.end_value + (s.init_value - s.end_value) * share

        changing = wave

    # at the end exactly the end value: rounding could give -1e-7 instead of 0
    end = s.transition_begin + s.transition_steps
    return lambda step: jnp.where(step >= end, s.end_value, changing(step))


def make_optimizer(config: TrainConfig) -> optax.GradientTransformation:
    """Returns a config's optimizer: clipping followed by AdamW or Adafactor, or a user's transformation.

    Adafactor has T5X's settings. Equal settings return the same object.

    Raises:
        InputError: the user's function raises, or does not return a transformation.
    """
    return _optimizer(config.optimizer, config.learning_rate, config.train_steps)


@functools.lru_cache(maxsize=8)
def _optimizer(
    o: OptimizerConfig | OptimizerFunction, peak: float, train_steps: int
) -> optax.GradientTransformation:
    if isinstance(o, OptimizerFunction):
        return o.transformation(peak, train_steps)
    learning_rate_fn = o.rate.schedule(peak, train_steps)
    # the rule comes after the clip, so moments are averages of clipped gradients
    if o.name == "adafactor":
        rule = optax.adafactor(
            learning_rate_fn,
            decay_rate=0.8,
            multiply_by_parameter_scale=True,
            weight_decay_rate=o.weight_decay or None,
        )
    else:
        adam = _adam_of_transformers if o.eps_before_correction else optax.scale_by_adam
        rule = optax.chain(  # optax.adamw
            adam(o.b1, o.b2, o.eps, mu_dtype=o.mu_dtype),
            optax.add_decayed_weights(o.weight_decay),
            optax.scale_by_learning_rate(learning_rate_fn),
        )
    return optax.chain(_clip_by_global_norm(o.clip_norm), rule)


def _clip_by_global_norm(max_norm: float) -> optax.GradientTransformation:
    """Clips gradients like `optax.clip_by_global_norm`, but multiplies by a factor instead of dividing by the norm.

    If they were divided, XLA's CPU backend would write the clipped gradients to memory.
    """

    def clipped(updates, _):
        norm = optax.global_norm(updates)
        factor = jnp.where(norm < max_norm, 1.0, max_norm / norm)
        return jax.tree.map(lambda x: x * factor.astype(x.dtype), updates)

    return optax.stateless(clipped)


def _adam_of_transformers(
    b1: float, b2: float, eps: float, mu_dtype: str | None
) -> optax.GradientTransformation:
    """Returns `optax.scale_by_adam`, but with `eps` added to the root before the bias correction.

    With c = 1 - b2^count, (sqrt(v) + eps) / sqrt(c) = sqrt(v / c) + eps / sqrt(c), so optax gets eps /
    sqrt(c).
    """

    def update(updates, state, params=None):
        corrected = eps / jnp.sqrt(1 - b2 ** (state.count + 1))
        return optax.scale_by_adam(b1, b2, corrected, mu_dtype=mu_dtype).update(
            updates, state, params
        )

    return optax.GradientTransformation(optax.scale_by_adam(b1, b2, mu_dtype=mu_dtype).init, update)
