"""The step gives the same update however the batch is cut: devices, slices, packing."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from stepdistill_jax.batches.batch import Batches
from stepdistill_jax.data.objectives import label_only
from stepdistill_jax.models.encoder_decoder import EncoderDecoder, init_params
from stepdistill_jax.models.families import model_config
from stepdistill_jax.models.sharding import Layout, make_mesh, place_rows
from stepdistill_jax.models.t5 import T5Config
from stepdistill_jax.tasks.task_data import TaskData
from stepdistill_jax.training import ExtraLoss
from stepdistill_jax.training.state import abstract_state, create_state, init_state
from stepdistill_jax.training.step import in_mesh, jit_train_step, train_step

MODEL = dataclasses.replace(model_config("t5_v1_1", "tiny", vocab_size=128), dropout_rate=0.0)
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


@pytest.fixture(scope="module")
def updates(take_steps):
    """`updates(batch, ...)`: (losses, gradient of the first step) of some steps on the same batch."""
    tx = optax.sgd(1e-2, momentum=0.9)  # its trace after one step is the gradient itself

    def updated(batch, layout=ONE, devices=1, *, weights=WEIGHTS, steps=1, **settings):
        settings |= {"tx": tx, "weights": weights}
        state, _ = take_steps(MODEL, [batch], layout, devices, **settings)
        _, found = take_steps(MODEL, [batch] * steps, layout, devices, **settings)
        gradient = jax.tree.map(np.array, state.opt_state[0].trace)
        return [float(metrics["loss"]) for metrics in found], gradient

    return updated


@pytest.fixture(scope="module")
def one_device(data, updates):
    return updates(batches(data)(0), steps=3)


def largest_gap(gradient, expected):
    """Norm of the difference, relative, of the leaf where it is largest."""
    gaps = jax.tree.map(lambda a, b: np.linalg.norm(a - b) / np.linalg.norm(b), gradient, expected)
    return max(jax.tree.leaves(gaps))


def test_eight_devices_give_the_update_of_one(data, one_device, updates):
    """Cut in every way at once; `test_layouts.py` takes ten steps on each layout."""
    layout = Layout(data=2, fsdp=2, tensor=2)
    losses, gradient = updates(batches(data)(0), layout, devices=8, steps=3)
    np.testing.assert_allclose(losses, one_device[0], rtol=1e-6)  # measured 2e-7
    assert largest_gap(gradient, one_device[1]) < 1e-5  # measured 2e-6


@pytest.mark.parametrize("devices", [1, pytest.param(8, marks=pytest.mark.slow)])
def test_four_slices_give_the_update_of_one(data, one_device, devices, updates):
    layout = Layout(data=devices)
    losses, gradient = updates(batches(data)(0), layout, devices, num_microbatches=4, steps=3)
    np.testing.assert_allclose(losses, one_device[0], rtol=1e-6)
    assert largest_gap(gradient, one_device[1]) < 1e-5


def test_padded_rows_give_the_update_of_packed_ones(data, one_device, updates):
    padded = batches(data, pack=False)(0)
    assert len(padded) == 2
    losses, gradient = updates(padded, steps=3)
    np.testing.assert_allclose(losses, one_device[0], rtol=1e-6)
    assert largest_gap(gradient, one_device[1]) < 1e-5


@pytest.mark.slow
def test_a_rationale_of_weight_zero_is_label_only_training(data, updates):
    """The same label rows, without the rationale rows, give the same gradient."""
    both = batches(data, pack=False)(0)
    store = only_labels(data.stores[0])
    alone = TaskData.of_store("synthetic", "train", label_only(), store, data.vocabulary)
    losses, gradient = updates(both, weights=(1.0, 0.0))
    expected_losses, expected = updates(batches(alone, pack=False)(0), weights=(1.0,))
    np.testing.assert_allclose(losses, expected_losses, rtol=1e-6)
    assert largest_gap(gradient, expected) < 1e-5


def only_labels(store):
    return dataclasses.replace(store, objectives=store.objectives[:1], rows=store.rows[:1])


@pytest.mark.slow
def test_the_state_is_donated_and_cut(data):
    mesh = make_mesh(Layout(fsdp=8))
    tx = optax.adamw(1e-3)
    abstract = abstract_state(MODEL, tx, mesh)
    state = init_state(MODEL, tx, abstract, seed=0)
    kernel = state.params["encoder"]["layers"]["mlp"]["wi_0"]["kernel"]
    assert kernel.addressable_shards[0].data.shape == (2, 64 // 8, 128)
    moment = state.opt_state[0].nu["encoder"]["layers"]["mlp"]["wi_0"]["kernel"]
    assert moment.sharding == kernel.sharding
    step = jit_train_step(
        abstract, mesh, model=EncoderDecoder(MODEL), tx=tx, objective_weights=WEIGHTS
    )
    step(state, place_rows(batches(data)(0), mesh))
    assert kernel.is_deleted()


def test_a_step_copies_no_moment_of_the_optimizer(data):
    """On a CPU, XLA's default copies each moment before it updates it in place."""
    config = dataclasses.replace(MODEL, vocab_size=3001)
    mesh, tx = make_mesh(Layout(), jax.devices()[:1]), optax.adamw(1e-3)
    abstract = abstract_state(config, tx, mesh)
    step = jit_train_step(
        abstract, mesh, model=EncoderDecoder(config), tx=tx, objective_weights=WEIGHTS
    )
    lowered = in_mesh(step.__wrapped__.lower, mesh)(abstract, batches(data)(0))
    text = lowered.compile().as_text()
    moments = r"%state_opt_state\w*token_embedder\S*"
    assert re.search(rf"{moments} = f32\[3001,", text)
    assert not re.findall(rf"copy\({moments}\)", text)


def test_a_state_is_born_sharded():
    """Making it takes a device its share of memory, and nothing of the size of the whole."""
    config, tx = model_config("t5_v1_1", "small", vocab_size=32128), optax.adamw(1e-3)
    abstract = abstract_state(config, tx, make_mesh("fsdp"))
    init = jax.jit(functools.partial(init_state, config, tx, abstract, seed=0))
    memory = init.lower().compile().memory_analysis()
    whole = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(abstract.params))
    assert memory.output_size_in_bytes < 3 * whole / 8 * 1.01
    assert memory.temp_size_in_bytes < whole / 8


def test_a_sharded_state_has_the_parameters_of_one_device():
    tx, found = optax.sgd(0.1), []
    for layout, devices in ((Layout(), 1), (Layout(fsdp=8), 8), (Layout(fsdp=4, tensor=2), 8)):
        abstract = abstract_state(MODEL, tx, make_mesh(layout, jax.devices()[:devices]))
        state = jax.jit(functools.partial(init_state, MODEL, tx, abstract, seed=3))()
        found.append(jax.tree.leaves(jax.tree.map(np.asarray, state.params)))
    for other in found[1:]:
        assert all(np.array_equal(x, y) for x, y in zip(found[0], other, strict=True))


def test_adafactor_moments_are_cut_like_their_parameter():
    mesh = make_mesh(Layout(fsdp=8))
    tx = optax.adafactor(1e-3, min_dim_size_to_factor=32)
    factored = abstract_state(MODEL, tx, mesh).opt_state[0]
    row = factored.v_row["encoder"]["layers"]["mlp"]["wi_0"]["kernel"]
    column = factored.v_col["encoder"]["layers"]["mlp"]["wi_0"]["kernel"]
    assert {row.shape, column.shape} == {(2, 64), (2, 128)}
    cut = row if row.shape == (2, 64) else column
    assert cut.sharding.shard_shape(cut.shape) == (2, 8)


@dataclasses.dataclass(frozen=True)
class SquareRoot(ExtraLoss):
    """Root of the states' squares; of inputs that start with 0 it is the root of 0, whose slope is infinite."""

    name = "square_root"

    def count(self, group):
        return jnp.ones(())

    def total(self, states, output, group):
        return jnp.sqrt((states**2).sum() * group["encoder_input_tokens"][:, 0].sum())


@pytest.fixture(scope="module")
def dropped_step(one_layer):
    """(state, step) of a model with dropout, two slices and an extra loss, compiled once."""
    (model, params), tx = one_layer(dropout_rate=0.3), optax.adam(1e-2)
    step = functools.partial(
        train_step,
        model=model,
        tx=tx,
        objective_weights=WEIGHTS,
        num_microbatches=2,
        extra_loss=SquareRoot(0.1),
    )
    return create_state(params, tx, seed=0), jax.jit(step)


@pytest.mark.parametrize("num_microbatches", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_the_update_does_not_depend_on_the_tasks_that_rows_are_of(one_layer, num_microbatches):
    """An objective's loss is the mean over the tokens of all tasks."""
    (model, params), tx = one_layer(dropout_rate=0.0), optax.sgd(1e-2)
    static = {"model": model, "tx": tx, "objective_weights": WEIGHTS}
    static |= {"num_microbatches": num_microbatches, "extra_loss": SquareRoot(0.1)}
    (group,) = equal_rows()
    of_tasks = group | {"decoder_task_ids": np.array([[1, 1, 3], [3, 1, 1]], np.int32)}
    state = create_state(params, tx, seed=0)
    one, ours = train_step(state, (group,), **static)
    several, theirs = train_step(state, (of_tasks,), **static, num_tasks=3)
    for a, b in zip(jax.tree.leaves(one.params), jax.tree.leaves(several.params), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7)
    assert float(theirs["loss"]) == pytest.approx(float(ours["loss"]), rel=1e-6)
    assert theirs["sums"].count.tolist() == [2, 2, 0, 0, 1, 1, *ours["sums"].count[-1:].tolist()]


def equal_rows(first_input=5):
    """Two rows, a slice each, of the same tokens; the first trains the label, the second the rationale."""
    ids = np.array([[first_input, 6, 7, 9, 8, 11, 1]] * 2, np.int32)
    targets, ones = np.array([[9, 21, 1]] * 2, np.int32), np.ones((2, 3), np.int32)
    group = {
        "encoder_input_tokens": ids,
        "encoder_segment_ids": np.ones_like(ids),
        "decoder_input_tokens": np.array([[0, 9, 21]] * 2, np.int32),
        "decoder_segment_ids": ones,
        "decoder_target_tokens": targets,
        "decoder_objective_ids": ones * np.array([[1], [2]], np.int32),
        "decoder_loss_weights": ones.astype(np.float32),
    }
    return (group,)


def test_equal_rows_in_two_slices_meet_different_dropout_masks(dropped_step):
    state, step = dropped_step
    label, rationale, _ = step(state, equal_rows())[1]["sums"].loss
    assert abs(label - rationale) > 0.01 * label


def test_dropout_depends_on_seed_and_step(dropped_step):
    state, step = dropped_step

    def loss(seed=0, at=0):
        of_seed = create_state(state.params, optax.adam(1e-2), seed)
        return float(step(of_seed.replace(step=jnp.int32(at)), equal_rows())[1]["loss"])

    assert loss() == loss()
    assert len({loss(), loss(at=1), loss(at=2), loss(seed=1)}) == 4


def test_a_gradient_that_is_not_finite_changes_nothing_though_the_loss_is(dropped_step):
    """The step counts; the next one goes on from the same parameters and moments."""
    start, step = dropped_step
    before, _ = step(start, equal_rows())
    after, metrics = step(before, equal_rows(first_input=0))
    assert np.isfinite(metrics["loss"]) and not np.isfinite(metrics["grad_norm"])
    assert (before.step, after.step) == (1, 2)
    jax.tree.map(np.testing.assert_array_equal, after.params, before.params)
    jax.tree.map(np.testing.assert_array_equal, after.opt_state, before.opt_state)
    good, metrics = step(after, equal_rows())
    assert np.isfinite(metrics["grad_norm"])
    assert (good.params["token_embedder"] != after.params["token_embedder"]).any()


def test_the_key_of_dropout_has_drawn_no_parameter():
    """Else a mask would be drawn from the bits that made the weights."""
    config, tx = (
        T5Config(
            vocab_size=128,
            emb_dim=16,
            num_heads=2,
            head_dim=8,
            mlp_dim=32,
            num_encoder_layers=1,
            num_decoder_layers=1,
        ),
        optax.sgd(1.0),
    )
    abstract = abstract_state(config, tx, make_mesh(Layout(), jax.devices()[:1]))

    @jax.jit
    def tables():
        state = init_state(config, tx, abstract, seed=3)
        keys = [state.rng, *(jax.random.fold_in(state.rng, step) for step in range(3))]
        keys.append(jax.random.fold_in(jax.random.key(3), 0))  # that of init, as a control
        init = jax.vmap(lambda key: init_params(config, key)["token_embedder"])
        return state.params["token_embedder"], init(jnp.stack(keys)), jax.random.key_data(state.rng)

    drawn, of_keys, rng = tables()
    assert [np.array_equal(drawn, x) for x in of_keys] == [False] * 4 + [True]
    # weights of a model directory do not change the masks
    np.testing.assert_array_equal(rng, jax.random.key_data(create_state({}, tx, 3).rng))
    assert (rng != jax.random.key_data(create_state({}, tx, 4).rng)).any()


@pytest.mark.slow
def test_dropout_does_not_depend_on_devices(data, take_steps):
    def losses(devices):
        """Of two steps; the learning rate is 0, so only the mask differs."""
        dropped = dataclasses.replace(MODEL, dropout_rate=0.3)
        given = {"tx": optax.sgd(0.0), "weights": WEIGHTS, "seed": 0}
        two = [batches(data)(0)] * 2
        _, found = take_steps(dropped, two, Layout(data=devices), devices, **given)
        return [float(metrics["loss"]) for metrics in found]

    one = losses(1)
    assert one[0] != one[1]
    np.testing.assert_allclose(losses(8), one, rtol=1e-6)
