"""Update rules and schedules."""

import functools

import optax

from stepdistill_jax.training.config import OptimizerConfig, TrainConfig


def make_schedule(config: TrainConfig) -> optax.Schedule:
    """learning_rate_fn(step), step counted from 0; linear reaches 0 at `train_steps`.

    The same values as the linear schedule of `transformers`, which the paper's code uses.
    """
    return _schedule(config.optimizer, config.learning_rate, config.train_steps)


def _schedule(o: OptimizerConfig, peak: float, train_steps: int) -> optax.Schedule:
    rise = optax.linear_schedule(0.0, peak, max(o.warmup_steps, 1))
    if o.schedule == "constant":
        after = optax.constant_schedule(peak)
    else:
        after = optax.linear_schedule(peak, 0.0, max(train_steps - o.warmup_steps, 1))
    return optax.join_schedules([rise, after], [o.warmup_steps]) if o.warmup_steps else after


def make_optimizer(config: TrainConfig) -> optax.GradientTransformation:
    """Clip, then AdamW (the paper) or Adafactor (T5X's habit: decay 0.8, scaled by the parameter).

    The same object for the same settings: runs of one process share what is compiled with it.
    """
    return _optimizer(config.optimizer, config.learning_rate, config.train_steps)


@functools.lru_cache(maxsize=8)
def _optimizer(o: OptimizerConfig, peak: float, train_steps: int) -> optax.GradientTransformation:
    learning_rate_fn = _schedule(o, peak, train_steps)
    if o.name == "adafactor":
        rule = optax.adafactor(
            learning_rate_fn,
            decay_rate=0.8,
            multiply_by_parameter_scale=True,
            weight_decay_rate=o.weight_decay or None,
        )
    else:
        rule = optax.adamw(
            learning_rate_fn,
            b1=o.b1,
            b2=o.b2,
            eps=o.eps,
            weight_decay=o.weight_decay,
            mu_dtype=o.mu_dtype,
        )
    return optax.chain(optax.clip_by_global_norm(o.clip_norm), rule)
