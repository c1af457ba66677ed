import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from stepdistill_jax.errors import InputError
from stepdistill_jax.models.sharding import Layout, make_mesh
from stepdistill_jax.models.t5 import T5Config
from stepdistill_jax.runtime.checkpoints.manager import Checkpoints
from stepdistill_jax.training.config import OptimizerConfig, TrainConfig
from stepdistill_jax.training.optimizer import make_optimizer, make_schedule
from stepdistill_jax.training.state import abstract_state


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


@pytest.mark.parametrize(
    "given",
    [
        {},
        {"b1": 0.8, "b2": 0.98, "eps": 0.05, "weight_decay": 0.3, "clip_norm": 2.0},
        {"clip_norm": 8.0},
    ],
    ids=["defaults", "given", "one clipped"],
)
def test_adamw_takes_the_step_that_its_paper_says(given):
    """Two steps by hand: gradients of norm 5 and 10 are clipped above the limit, no weight decay by default."""
    o = {"b1": 0.9, "b2": 0.999, "eps": 1e-8, "weight_decay": 0.0, "clip_norm": 1.0} | given
    tx = make_optimizer(config(**given))
    params = {"w": jnp.array([1.0, -2.0])}
    state, update = tx.init(params), jax.jit(tx.update)
    m, v, w = np.zeros(2), np.zeros(2), np.array([1.0, -2.0])
    for step, grads in enumerate(np.array([[3.0, 4.0], [8.0, -6.0]])):
        updates, state = update({"w": jnp.asarray(grads, jnp.float32)}, state, params)
        params = optax.apply_updates(params, updates)
        g = grads * min(1.0, o["clip_norm"] / np.linalg.norm(grads))
        m, v = o["b1"] * m + (1 - o["b1"]) * g, o["b2"] * v + (1 - o["b2"]) * g**2
        rate = 0.5 * (10 - step) / 10
        m_hat, v_hat = m / (1 - o["b1"] ** (step + 1)), v / (1 - o["b2"] ** (step + 1))
        w = w - rate * (m_hat / (np.sqrt(v_hat) + o["eps"]) + o["weight_decay"] * w)
        np.testing.assert_allclose(params["w"], w, atol=3e-5)  # float32 cancellation


def test_eps_before_the_correction_takes_the_step_of_transformers_adamw():
    """`transformers.AdamW` of 4.24, three steps by hand; 1e-5 is felt next to gradients of 1e-3.

    denom = sqrt(v) + eps; step = rate * sqrt(1 - b2^t) / (1 - b1^t); w -= step * m / denom.
    """
    tx = make_optimizer(config(eps=1e-5, eps_before_correction=True))
    late = make_optimizer(config(eps=1e-5))
    w = np.array([1.0, -2.0])
    params, state, update = {"w": jnp.asarray(w, jnp.float32)}, None, jax.jit(tx.update)
    state, late_state, m, v = tx.init(params), late.init(params), np.zeros(2), np.zeros(2)
    for step, g in enumerate(np.array([[1e-3, 2e-4], [-3e-4, 5e-5], [2e-3, 1e-4]])):
        grads = {"w": jnp.asarray(g, jnp.float32)}
        updates, state = update(grads, state, params)
        late_updates, late_state = late.update(grads, late_state, params)
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g**2
        rate = 0.5 * (10 - step) / 10 * np.sqrt(1 - 0.999 ** (step + 1)) / (1 - 0.9 ** (step + 1))
        np.testing.assert_allclose(updates["w"], -rate * m / (np.sqrt(v) + 1e-5), rtol=2e-4)
        assert np.abs(late_updates["w"] / updates["w"] - 1).max() > 0.1


@pytest.mark.parametrize("weight_decay", [0.0, 0.02])
def test_adafactor_takes_the_step_that_its_paper_says(weight_decay):
    """Three steps by hand (Shazeer and Stern 2018, algorithm 4): of a vector, so nothing is factored.

    Each step is relative to the parameter's root mean square, at least 1e-3, and the second moment
    decays by 1 - t^-0.8. Weight decay, which is not in the paper, is no multiple of the rate.
    """

    def rms(x):
        return np.sqrt(np.mean(x**2))

    tx = make_optimizer(config(name="adafactor", clip_norm=100.0, weight_decay=weight_decay))
    w, v = np.array([30.0, -0.5]), np.zeros(2)
    params = {"w": jnp.asarray(w, jnp.float32)}
    state, update = tx.init(params), jax.jit(tx.update)
    for step, grads in enumerate(np.array([[3.0, 4.0], [0.5, -2.0], [1.0, 8.0]])):
        updates, state = update({"w": jnp.asarray(grads, jnp.float32)}, state, params)
        params = optax.apply_updates(params, updates)
        decay = 1 - (step + 1) ** -0.8
        v = decay * v + (1 - decay) * grads**2
        moved = grads / np.sqrt(v)
        moved /= max(1.0, rms(moved))
        w = w - 0.5 * (10 - step) / 10 * max(1e-3, rms(w)) * moved - weight_decay * w
        np.testing.assert_allclose(params["w"], w, rtol=1e-5)


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
    state, update = tx.init(params), jax.jit(tx.update)
    for _ in range(100):
        updates, state = update(2 * params, state, params)
        params = optax.apply_updates(params, updates)
    assert float(jnp.sum(params**2)) < 1.0


def test_an_unknown_optimizer_names_the_nearest():
    with pytest.raises(InputError, match="did you mean 'adamw'"):
        OptimizerConfig(name="adamW")


def regression(mu_dtype):
    """Losses of 200 steps on a least-squares problem of 64 unknowns."""
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(256, 64)), jnp.float32)
    y = x @ jnp.asarray(rng.normal(size=64), jnp.float32)
    optimizer = OptimizerConfig(mu_dtype=mu_dtype, schedule="constant")
    tx = make_optimizer(TrainConfig(task="delivery", learning_rate=0.02, optimizer=optimizer))

    @jax.jit
    def step(w, state):
        loss, gradient = jax.value_and_grad(lambda w: jnp.mean((x @ w - y) ** 2))(w)
        updates, state = tx.update(gradient, state, w)
        return optax.apply_updates(w, updates), state, loss

    w, losses = jnp.zeros(64), []
    state = tx.init(w)
    for _ in range(200):
        w, state, loss = step(w, state)
        losses.append(float(loss))
    return np.array(losses), state


def test_a_bfloat16_first_moment_trains_as_the_float32_one():
    exact, _ = regression("float32")
    rounded, state = regression("bfloat16")
    adam = state[1][0]
    assert (adam.mu.dtype, adam.nu.dtype) == (jnp.bfloat16, jnp.float32)
    assert exact[-1] < 0.01 * exact[0]
    assert not np.array_equal(exact, rounded)
    # of the first loss; measured 3.2e-3
    np.testing.assert_allclose(rounded, exact, atol=1e-2 * exact[0])


def test_adafactor_has_no_first_moment_to_keep():
    with pytest.raises(InputError, match="adafactor, which has no first moment"):
        OptimizerConfig(name="adafactor", mu_dtype="bfloat16")
    with pytest.raises(
        InputError, match="must be False for adafactor, which has no bias correction"
    ):
        OptimizerConfig(name="adafactor", eps_before_correction=True)
    with pytest.raises(InputError, match="one of float32, bfloat16, not 'float16'"):
        OptimizerConfig(mu_dtype="float16")


def test_the_moments_keep_their_types_through_a_checkpoint(tmp_path):
    model = T5Config(
        vocab_size=128,
        emb_dim=16,
        num_heads=2,
        head_dim=8,
        mlp_dim=32,
        num_encoder_layers=1,
        num_decoder_layers=1,
    )
    tx, mesh = make_optimizer(config(mu_dtype="bfloat16")), make_mesh(Layout(fsdp=8))
    abstract = abstract_state(model, tx, mesh)

    def value(x):
        """A number that bfloat16 holds and that differs from leaf to leaf."""
        if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key):
            return jax.random.key(0)
        return jax.device_put(np.full(x.shape, x.size, x.dtype), x.sharding)

    state = jax.tree.map(value, abstract)
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, state.params, state.replace(params=None), {"step": 1, "validated": False})
    checkpoints.wait()
    _, rest = checkpoints.restore(1, abstract.params, abstract.replace(params=None))
    checkpoints.close()
    adam = rest.opt_state[1][0]
    assert {x.dtype for x in jax.tree.leaves(adam.mu)} == {jnp.dtype(jnp.bfloat16)}
    assert {x.dtype for x in jax.tree.leaves(adam.nu)} == {jnp.dtype(jnp.float32)}
    jax.tree.map(np.testing.assert_array_equal, rest.opt_state, state.opt_state)
