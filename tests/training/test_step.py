"""The step gives the same update however the batch is cut: devices, slices, packing."""

import dataclasses
import functools

import jax
import numpy as np
import optax
import pytest

from stepdistill_jax.models.config import t5_config
from stepdistill_jax.models.t5 import T5
from stepdistill_jax.objectives import label_only
from stepdistill_jax.sharding import Layout, make_mesh, place_rows
from stepdistill_jax.training.batches import Batches
from stepdistill_jax.training.state import abstract_state, init_state
from stepdistill_jax.training.step import jit_train_step

MODEL = dataclasses.replace(t5_config("t5_v1_1", "tiny", vocab_size=128), dropout_rate=0.0)
WEIGHTS = (1.0, 0.7)


def batches(data, **changes):
    settings = {
        "batch_size": 32,
        "input_length": 64,
        "target_length": 64,
        "seed": 0,
        "row_multiple": 32,
    }
    return Batches(data, **settings | changes)


ONE = Layout()


def updates(batch, layout=ONE, devices=1, *, weights=WEIGHTS, num_microbatches=1, steps=1):
    """(losses, gradient of the first step) of some steps on the same batch."""
    mesh = make_mesh(layout, jax.devices()[:devices])
    tx = optax.sgd(1e-2, momentum=0.9)  # its trace after one step is the gradient itself
    abstract = abstract_state(MODEL, tx, mesh)
    step = jit_train_step(
        abstract,
        mesh,
        model=T5(MODEL),
        tx=tx,
        objective_weights=weights,
        num_microbatches=num_microbatches,
    )
    state = init_state(MODEL, tx, abstract, seed=3)
    losses, gradient = [], None
    for _ in range(steps):
        state, metrics = step(state, place_rows(batch, mesh))
        losses.append(float(metrics["loss"]))
        if gradient is None:
            gradient = jax.tree.map(np.array, state.opt_state[0].trace)
    return losses, gradient


@pytest.fixture(scope="module")
def one_device(data):
    return updates(batches(data)(0), steps=3)


def largest_gap(gradient, expected):
    """Norm of the difference, relative, of the leaf where it is largest."""
    gaps = jax.tree.map(lambda a, b: np.linalg.norm(a - b) / np.linalg.norm(b), gradient, expected)
    return max(jax.tree.leaves(gaps))


def test_eight_devices_give_the_update_of_one(data, one_device):
    """Cut in every way at once; `test_layouts.py` takes ten steps on each layout."""
    layout = Layout(data=2, fsdp=2, tensor=2)
    losses, gradient = updates(batches(data)(0), layout, devices=8, steps=3)
    np.testing.assert_allclose(losses, one_device[0], rtol=1e-6)  # measured 2e-7
    assert largest_gap(gradient, one_device[1]) < 1e-5  # measured 2e-6


@pytest.mark.parametrize("devices", [1, pytest.param(8, marks=pytest.mark.slow)])
def test_four_slices_give_the_update_of_one(data, one_device, devices):
    layout = Layout(data=devices)
    losses, gradient = updates(batches(data)(0), layout, devices, num_microbatches=4, steps=3)
    np.testing.assert_allclose(losses, one_device[0], rtol=1e-6)
    assert largest_gap(gradient, one_device[1]) < 1e-5


def test_padded_rows_give_the_update_of_packed_ones(data, one_device):
    padded = batches(data, pack=False)(0)
    assert len(padded) == 2
    losses, gradient = updates(padded, steps=3)
    np.testing.assert_allclose(losses, one_device[0], rtol=1e-6)
    assert largest_gap(gradient, one_device[1]) < 1e-5


@pytest.mark.slow
def test_a_rationale_of_weight_zero_is_label_only_training(data):
    """The same label rows, without the rationale rows, give the same gradient."""
    both = batches(data, pack=False)(0)
    alone = dataclasses.replace(
        data, objectives=label_only(), stores=(only_labels(data.stores[0]),)
    )
    losses, gradient = updates(both, weights=(1.0, 0.0))
    expected_losses, expected = updates(batches(alone, pack=False)(0), weights=(1.0,))
    np.testing.assert_allclose(losses, expected_losses, rtol=1e-6)
    assert largest_gap(gradient, expected) < 1e-5


def only_labels(store):
    return dataclasses.replace(store, objectives=store.objectives[:1], rows=store.rows[:1])


def test_the_state_is_donated_and_cut(data):
    mesh = make_mesh(Layout(fsdp=8))
    tx = optax.adamw(1e-3)
    abstract = abstract_state(MODEL, tx, mesh)
    state = init_state(MODEL, tx, abstract, seed=0)
    kernel = state.params["encoder"]["layers"]["mlp"]["wi_0"]["kernel"]
    assert kernel.addressable_shards[0].data.shape == (2, 64 // 8, 128)
    moment = state.opt_state[0].nu["encoder"]["layers"]["mlp"]["wi_0"]["kernel"]
    assert moment.sharding == kernel.sharding
    step = jit_train_step(abstract, mesh, model=T5(MODEL), tx=tx, objective_weights=WEIGHTS)
    step(state, place_rows(batches(data)(0), mesh))
    assert kernel.is_deleted()


def test_a_state_is_born_sharded():
    """Making it takes a device its share of memory, and nothing of the size of the whole."""
    config, tx = t5_config("t5_v1_1", "small", vocab_size=32128), optax.adamw(1e-3)
    abstract = abstract_state(config, tx, make_mesh("fsdp"))
    init = jax.jit(functools.partial(init_state, config, tx, abstract, seed=0))
    memory = init.lower().compile().memory_analysis()
    whole = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(abstract.params))
    assert memory.output_size_in_bytes < 3 * whole / 8 * 1.01
    assert memory.temp_size_in_bytes < whole / 8


def test_adafactor_moments_are_cut_like_their_parameter():
    mesh = make_mesh(Layout(fsdp=8))
    tx = optax.adafactor(1e-3, min_dim_size_to_factor=32)
    factored = abstract_state(MODEL, tx, mesh).opt_state[0]
    row = factored.v_row["encoder"]["layers"]["mlp"]["wi_0"]["kernel"]
    column = factored.v_col["encoder"]["layers"]["mlp"]["wi_0"]["kernel"]
    assert {row.shape, column.shape} == {(2, 64), (2, 128)}
    cut = row if row.shape == (2, 64) else column
    assert cut.sharding.shard_shape(cut.shape) == (2, 8)


def losses_with_dropout(data, devices=1, seed=0):
    """Of two steps; the learning rate is 0, so only the mask differs."""
    dropped = dataclasses.replace(MODEL, dropout_rate=0.3)
    mesh, tx = make_mesh(Layout(data=devices), jax.devices()[:devices]), optax.sgd(0.0)
    abstract = abstract_state(dropped, tx, mesh)
    state = init_state(dropped, tx, abstract, seed=0)
    state = state.replace(rng=jax.device_put(jax.random.key(seed), abstract.rng.sharding))
    step = jit_train_step(abstract, mesh, model=T5(dropped), tx=tx, objective_weights=WEIGHTS)
    found = []
    for _ in range(2):
        state, metrics = step(state, place_rows(batches(data)(0), mesh))
        found.append(float(metrics["loss"]))
    return found


def test_dropout_depends_on_seed_and_step(data):
    first, second = losses_with_dropout(data)
    assert losses_with_dropout(data) == [first, second]
    assert first != second
    assert losses_with_dropout(data, seed=1) != [first, second]


@pytest.mark.slow
def test_dropout_does_not_depend_on_devices(data):
    eight, one = losses_with_dropout(data, devices=8), losses_with_dropout(data)
    np.testing.assert_allclose(eight, one, rtol=1e-6)
