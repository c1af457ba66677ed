import jax.numpy as jnp
import numpy as np
import optax
import pytest

from stepdistill_jax.errors import InputError
from stepdistill_jax.training.config import OptimizerConfig, TrainConfig
from stepdistill_jax.training.optimizer import make_optimizer, make_schedule


def config(**optimizer):
    return TrainConfig(
        task="delivery",
        train_steps=10,
        learning_rate=0.5,
        optimizer=OptimizerConfig(**optimizer),
    )


@pytest.mark.parametrize("warmup_steps", [0, 1, 4])
def test_the_linear_schedule_is_that_of_transformers(warmup_steps):
    """transformers.get_linear_schedule_with_warmup, written out."""
    learning_rate_fn = make_schedule(config(warmup_steps=warmup_steps))
    for step in range(11):
        if step < warmup_steps:
            expected = 0.5 * step / warmup_steps
        else:
            expected = 0.5 * (10 - step) / (10 - warmup_steps)
        np.testing.assert_allclose(learning_rate_fn(step), expected, atol=1e-7)


def test_the_constant_schedule_stays_at_its_peak():
    learning_rate_fn = make_schedule(config(schedule="constant", warmup_steps=2))
    np.testing.assert_allclose([learning_rate_fn(s) for s in (0, 1, 2, 9)], [0, 0.25, 0.5, 0.5])


def test_adamw_takes_the_step_that_its_paper_says():
    """Two steps by hand: gradients of norm 5 are clipped to 1, no weight decay by default."""
    tx = make_optimizer(config())
    params = {"w": jnp.array([1.0, -2.0])}
    state = tx.init(params)
    m, v, w = np.zeros(2), np.zeros(2), np.array([1.0, -2.0])
    for step in range(2):
        grads = np.array([3.0, 4.0])
        updates, state = tx.update({"w": jnp.asarray(grads)}, state, params)
        params = optax.apply_updates(params, updates)
        g = grads / 5
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g**2
        rate = 0.5 * (10 - step) / 10
        w = w - rate * (m / (1 - 0.9 ** (step + 1))) / (
            np.sqrt(v / (1 - 0.999 ** (step + 1))) + 1e-8
        )
        np.testing.assert_allclose(params["w"], w, atol=3e-5)  # float32 cancellation


@pytest.mark.parametrize("name", ["adamw", "adafactor"])
def test_each_optimizer_lowers_a_simple_loss(name):
    tx = make_optimizer(
        TrainConfig(
            task="delivery",
            train_steps=200,
            learning_rate=0.05,
            optimizer=OptimizerConfig(name=name),
        )
    )
    params = jnp.array([3.0, -2.0])
    state = tx.init(params)
    for _ in range(100):
        updates, state = tx.update(2 * params, state, params)
        params = optax.apply_updates(params, updates)
    assert float(jnp.sum(params**2)) < 1.0


def test_an_unknown_optimizer_names_the_nearest():
    with pytest.raises(InputError, match="did you mean 'adamw'"):
        OptimizerConfig(name="adamW")
