"""Ten steps on each layout are ten steps on one device, and a checkpoint goes from any to any."""

import dataclasses
import functools
import os
import subprocess
import sys

import jax
import numpy as np
import pytest

from stepdistill_jax.batches.batch import Batches
from stepdistill_jax.models.sharding import LAYOUTS, Layout, make_mesh
from stepdistill_jax.models.t5 import T5Config
from stepdistill_jax.runtime.checkpoints.manager import Checkpoints
from stepdistill_jax.training.config import OptimizerConfig, TrainConfig
from stepdistill_jax.training.optimizer import make_optimizer
from stepdistill_jax.training.state import abstract_state

MODEL = T5Config(
    vocab_size=128,
    emb_dim=64,
    num_heads=8,
    head_dim=8,
    mlp_dim=128,
    num_encoder_layers=1,
    num_decoder_layers=1,
    dropout_rate=0.0,
)
# wide enough that Adafactor factors its moments
WIDE = T5Config(
    vocab_size=128,
    emb_dim=128,
    num_heads=8,
    head_dim=16,
    mlp_dim=256,
    num_encoder_layers=1,
    num_decoder_layers=1,
)
WEIGHTS = (1.0, 0.7)
STEPS = 10
ALL = LAYOUTS | {"hybrid": Layout(dcn_data=2, fsdp=-1)}  # eight virtual devices are one slice


@pytest.fixture(scope="module")
def batches(data) -> list:
    """Ten batches; rows differ much in their tokens of label and rationale."""
    made = Batches(data, 16, 64, 64, seed=0, row_multiple=16)
    return [made(step) for step in range(STEPS)]


def optimizer(name):
    return make_optimizer(
        TrainConfig(
            task="synthetic",
            train_steps=STEPS,
            learning_rate=1e-3,
            optimizer=OptimizerConfig(name=name),
        )
    )


@pytest.fixture(scope="module")
def run(batches, take_steps):
    """`run(layout, ...)`: (state, losses) of ten steps from the same seed."""

    def ran(layout, devices=8, *, optimizer_name="adamw", **settings):
        settings |= {"tx": optimizer(optimizer_name), "weights": WEIGHTS}
        state, found = take_steps(MODEL, batches, layout, devices, **settings)
        return state, [float(metrics["loss"]) for metrics in found]

    return ran


@pytest.fixture(scope="module")
def one_device(run):
    """(losses, params) of one device by the optimizer's name, each run when it is asked for."""

    @functools.cache
    def found(optimizer_name):
        state, losses = run(Layout(), 1, optimizer_name=optimizer_name)
        return losses, jax.tree.map(np.array, state.params)

    return found


@pytest.mark.parametrize(
    ("layout", "settings"),
    [
        pytest.param("fsdp_tensor", {"num_microbatches": 2}, marks=pytest.mark.slow),
        pytest.param("data", {}, marks=pytest.mark.slow),
        pytest.param("fsdp", {"optimizer_name": "adafactor"}, marks=pytest.mark.slow),
        pytest.param("tensor", {}, marks=pytest.mark.slow),
        pytest.param("hybrid", {}, marks=pytest.mark.slow),
    ],
)
def test_ten_steps_on_eight_devices_are_those_of_one(run, one_device, layout, settings):
    assert jax.device_count() == 8
    state, losses = run(ALL[layout], **settings)
    expected_losses, expected = one_device(settings.get("optimizer_name", "adamw"))
    np.testing.assert_allclose(losses, expected_losses, rtol=2e-6)  # measured 5e-7
    assert losses[-1] < losses[0] - 0.1
    gaps = jax.tree.map(
        lambda a, b: np.linalg.norm(np.array(a) - b) / np.linalg.norm(b), state.params, expected
    )
    assert max(jax.tree.leaves(gaps)) < 1e-5  # measured 2e-6


@pytest.mark.slow
@pytest.mark.parametrize("dropout_rate", [0.0, 0.1])
@pytest.mark.parametrize("layout", ["data", "fsdp_tensor"])
def test_ten_steps_with_the_kernel_on_eight_devices_are_those_of_plain_operations(
    batches, take_steps, layout, dropout_rate
):
    model = dataclasses.replace(MODEL, num_heads=4, head_dim=64, dropout_rate=dropout_rate)

    def ran(layout, devices, attention):
        kernel = dataclasses.replace(model, attention=attention)
        settings = {"tx": optimizer("adamw"), "weights": WEIGHTS}
        state, found = take_steps(kernel, batches, layout, devices, **settings)
        return jax.tree.map(np.array, state.params), [float(m["loss"]) for m in found]

    expected, expected_losses = ran(Layout(), 1, "xla")
    params, losses = ran(ALL[layout], 8, "pallas")
    np.testing.assert_allclose(losses, expected_losses, rtol=2e-6)
    assert losses[-1] < losses[0] - 0.1
    gaps = jax.tree.map(lambda a, b: np.linalg.norm(a - b) / np.linalg.norm(b), params, expected)
    assert max(jax.tree.leaves(gaps)) < 1e-5


def random_values(abstract, seed):
    """A state's numbers, as on one host; keys as their data."""
    rng = np.random.default_rng(seed)

    def value(x):
        if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key):
            return jax.random.key(seed)
        if np.issubdtype(x.dtype, np.integer):
            return np.asarray(rng.integers(1, 1000, x.shape), x.dtype)
        return rng.standard_normal(x.shape).astype(x.dtype)

    return jax.tree.map(value, abstract)


def plain(tree):
    def numbers(x):
        is_key = jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key)
        return np.asarray(jax.random.key_data(x) if is_key else x)

    return jax.tree.map(numbers, tree)


@pytest.mark.parametrize(
    ("optimizer_name", "pairs"),
    [
        pytest.param("adafactor", "all", marks=pytest.mark.slow),
        pytest.param("adamw", "neighbours", marks=pytest.mark.slow),
    ],
)
def test_a_checkpoint_of_any_layout_restores_on_any_other(tmp_path, optimizer_name, pairs):
    """One device among them: parameters, moments, step and key, bitwise."""
    tx = optimizer(optimizer_name)
    places = {name: make_mesh(layout) for name, layout in ALL.items()}
    places["one_device"] = make_mesh(Layout(), jax.devices()[:1])
    abstract = {name: abstract_state(WIDE, tx, mesh) for name, mesh in places.items()}
    names = list(places)
    for number, saved_on in enumerate(names):
        values = random_values(abstract[saved_on], number)
        placed = jax.tree.map(
            lambda v, x: jax.device_put(v, x.sharding), values, abstract[saved_on]
        )
        checkpoints = Checkpoints(tmp_path / saved_on)
        metrics = {"step": 1, "validated": False}
        checkpoints.save(1, placed.params, placed.replace(params=None), metrics)
        checkpoints.wait()
        for name in names if pairs == "all" else [names[number - 1]]:
            target = abstract[name]
            params, rest = checkpoints.restore(1, target.params, target.replace(params=None))
            restored = rest.replace(params=params)
            jax.tree.map(np.testing.assert_array_equal, plain(restored), plain(values))
            for x, aim in zip(jax.tree.leaves(restored), jax.tree.leaves(target), strict=True):
                assert x.sharding.is_equivalent_to(aim.sharding, x.ndim), (saved_on, name)
        checkpoints.close()


COMPILE = """
import functools, sys
import flax.linen as nn
import jax, jax.numpy as jnp, optax
from stepdistill_jax.models.t5 import T5Config
from stepdistill_jax.models.encoder_decoder import EncoderDecoder
from stepdistill_jax.models.sharding import LAYOUTS, Layout, batch_sharding, make_mesh
from stepdistill_jax.batches.packing import empty_group
from stepdistill_jax.training.state import abstract_state
from stepdistill_jax.training.step import in_mesh, jit_eval_step, jit_train_step

model, tx = T5Config(vocab_size=128, emb_dim=64, num_heads=8, head_dim=8, mlp_dim=128, num_encoder_layers=2, num_decoder_layers=2), optax.adamw(1e-3)

def compile_step(name, layout):
    print("LAYOUT", name, file=sys.stderr, flush=True)
    mesh = make_mesh(layout)
    abstract = abstract_state(model, tx, mesh)
    place = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=batch_sharding(mesh))
    batch = (jax.tree.map(place, empty_group(16, 32, 32)),)
    static = {"model": EncoderDecoder(model), "tx": tx, "objective_weights": (1.0, 1.0), "num_microbatches": 2}
    step = jit_train_step(abstract, mesh, **static).__wrapped__
    in_mesh(step.lower, mesh)(abstract, batch).compile()
    evaluate = jit_eval_step(abstract, mesh, model=EncoderDecoder(model), num_objectives=2).__wrapped__
    in_mesh(evaluate.lower, mesh)(abstract.params, batch).compile()

layouts = LAYOUTS | {"hybrid": Layout(dcn_data=2, fsdp=-1)}
for name, layout in layouts.items():
    compile_step(name, layout)
# the same program without the table's constraint: that the compiler would say it
T5._embed = lambda self, ids: jnp.take(self.token_embedder, ids, axis=0)
jax.clear_caches()  # the step of these arguments was traced before
compile_step("control", layouts["hybrid"])
"""


@pytest.mark.slow  # a dozen compiles
def test_no_layout_makes_the_compiler_rematerialise_an_array():
    """XLA says so where it can move an array to its next sharding only by way of the whole."""
    environment = {"TF_CPP_MIN_LOG_LEVEL": "0", "JAX_ENABLE_COMPILATION_CACHE": "false"}
    done = subprocess.run(
        [sys.executable, "-c", COMPILE],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    said = dict(part.split("\n", 1) for part in done.stderr.split("LAYOUT ")[1:])
    warned = [name for name, text in said.items() if "Involuntary full remat" in text]
    assert list(said) == [*LAYOUTS, "control"]
    assert warned == ["control"]
