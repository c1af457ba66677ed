"""Losses of pairs: the batch that they see, and MI-DSS's against its formula, written in torch."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch

from stepdistill_jax.batches.batch import Batches
from stepdistill_jax.commands.gin_config import load_config
from stepdistill_jax.errors import InputError
from stepdistill_jax.models.encoder_decoder import EncoderDecoder, OutputLayer
from stepdistill_jax.models.families import model_config
from stepdistill_jax.models.sharding import Layout, batch_sharding, make_mesh, place_rows
from stepdistill_jax.training import TrainConfig
from stepdistill_jax.training.data import batches_of
from stepdistill_jax.training.mutual_information import MutualInformation
from stepdistill_jax.training.state import abstract_state, create_state, init_state
from stepdistill_jax.training.step import jit_train_step, train_step

LOSS = MutualInformation(0.3)
TX = optax.sgd(0.1, momentum=0.9)  # its trace after one step is the gradient itself


def batch_of(data, **changes):
    settings = {"input_length": 32, "target_length": 48, "seed": 0, "row_multiple": 8}
    return Batches(data, 24, pairs=True, **settings | changes)(0)


def by_target(data):
    """The public code's two padded batches: (target ids, is it a token) of label and of rationale.

    Of the examples of the first step that have both; [pairs, length] each.
    """
    examples = Batches(data, 24, 32, 48, seed=0).examples(0).indices
    rows = [r["targets"] for r in data.stores[0].rows]
    pairs = [i for i in examples if all(r.lengths[i] for r in rows)]
    found = []
    for of in rows:
        ids = [torch.tensor(of.ids[of.starts[i] : of.starts[i] + of.lengths[i]]) for i in pairs]
        padded = torch.nn.utils.rnn.pad_sequence(ids, batch_first=True, padding_value=-1)
        found.append((padded.clamp(min=0), padded >= 0))
    return found


def formula(table, targets):
    """Mean loss of the pairs and its gradient: softmax, maximum over the tokens, cross-entropy."""
    table = torch.tensor(table, requires_grad=True)
    reduced = []
    for ids, is_token in targets:
        before = torch.nn.functional.pad(ids, (1, 0))[:, :-1]  # the decoder reads 0 first
        probabilities = (table[before.long()] @ table.T).softmax(-1)
        reduced.append(torch.where(is_token[..., None], probabilities, 0.0).amax(1))
    label, rationale = reduced
    loss = torch.nn.functional.cross_entropy(rationale, label.detach())
    loss.backward()
    return loss.item(), table.grad.numpy()


@pytest.fixture(scope="module")
def updated(one_layer):
    """`updated(batch, slices)`: (mean of the loss, gradient of 0.3 x it alone) by the training step."""
    model, params = one_layer(dropout_rate=0.0)

    def update(batch, num_microbatches=1):
        static = {"model": model, "tx": TX, "objective_weights": (0.0, 0.0), "extra_loss": LOSS}
        step = jax.jit(functools.partial(train_step, **static, num_microbatches=num_microbatches))
        state, metrics = step(create_state(params, TX, seed=0), batch)
        sums = metrics["sums"]
        gradient = np.asarray(state.opt_state[0].trace["token_embedder"])
        return float(sums.loss[-1] / sums.count[-1]), gradient

    return update


@pytest.mark.parametrize(
    ("changes", "slices"),
    [
        pytest.param({"pack": False}, 1, id="padded"),
        pytest.param({}, 1, id="packed", marks=pytest.mark.slow),
        pytest.param({"row_lengths": (96, 128)}, 4, id="packed in four slices"),
    ],
)
def test_the_update_is_that_of_the_published_formula_on_padded_batches(
    data, one_layer, updated, changes, slices
):
    table = one_layer(dropout_rate=0.0)[1]["token_embedder"]
    targets = by_target(data)
    assert 15 < len(targets[0][0]) < 24  # some lack a rationale
    want, gradient = formula(table, targets)
    got, slope = updated(batch_of(data, **changes), slices)
    np.testing.assert_allclose(got, want, rtol=1e-6)  # measured 2e-7
    np.testing.assert_allclose(slope, 0.3 * gradient, rtol=1e-4, atol=1e-7)
    assert np.abs(gradient).max() > 1e-3


def test_eight_devices_give_the_sum_and_the_gradient_of_one(data):
    (group,) = batch_of(data)
    rng = np.random.default_rng(1)
    states = rng.normal(size=(*group["decoder_example_ids"].shape, 16)).astype(np.float32)
    kernel = rng.normal(size=(16, 128)).astype(np.float32)
    mesh = make_mesh(Layout(data=8))
    rows = batch_sharding(mesh)

    def loss(states, kernel, group):
        return LOSS.total(states, OutputLayer(kernel), group) / LOSS.count(group)

    slopes = jax.value_and_grad(loss, argnums=(0, 1))
    one = jax.jit(slopes)(states, kernel, group)
    with jax.set_mesh(mesh):
        placed = jax.tree.map(lambda x: jax.device_put(x, rows), (states, group))
        compiled = jax.jit(slopes).lower(placed[0], kernel, placed[1]).compile()
        eight = compiled(placed[0], kernel, placed[1])
    for got, want in zip(jax.tree.leaves(eight), jax.tree.leaves(one), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-7)
    # a device's pairs are its own: no row travels, but for sums
    assert "all-gather" not in compiled.as_text()


MODEL = dataclasses.replace(
    model_config("t5_v1_1", "tiny", vocab_size=128),
    emb_dim=16, num_heads=2, head_dim=8, mlp_dim=32, num_encoder_layers=1, dropout_rate=0.0,
)  # fmt: skip


@pytest.mark.slow
def test_a_t5_has_one_update_packed_and_padded_on_one_device_and_on_eight_in_slices(data):
    def gradient(batch, layout, devices, slices):
        mesh = make_mesh(layout, jax.devices()[:devices])
        abstract = abstract_state(MODEL, TX, mesh)
        static = {"tx": TX, "objective_weights": (0.5, 0.5), "extra_loss": LOSS}
        static |= {"model": EncoderDecoder(MODEL), "num_microbatches": slices}
        step = jit_train_step(abstract, mesh, **static)
        state, metrics = step(init_state(MODEL, TX, abstract, seed=0), place_rows(batch, mesh))
        assert float(metrics["sums"].loss[-1]) > 0
        return float(metrics["loss"]), jax.tree.map(np.array, state.opt_state[0].trace)

    loss, want = gradient(batch_of(data), Layout(), 1, 1)
    cube = Layout(data=2, fsdp=2, tensor=2)
    many = batch_of(data, row_multiple=16, row_lengths=(64, 88))
    for form in ((batch_of(data, pack=False), Layout(), 1, 1), (many, cube, 8, 4)):
        other, got = gradient(*form)
        assert other == pytest.approx(loss, rel=1e-6)
        gaps = jax.tree.map(
            lambda a, b: np.linalg.norm(a - b) / max(np.linalg.norm(b), 1e-6), got, want
        )
        assert max(jax.tree.leaves(gaps)) < 1e-5


def test_mutual_information_docstring():
    ids = jnp.ones((1, 4), jnp.int32)
    group = {"decoder_example_ids": ids, "decoder_objective_ids": jnp.array([[1, 1, 2, 2]])}
    states = jnp.log(jnp.array([[[0.9, 0.1], [0.2, 0.8], [0.5, 0.5], [0.5, 0.5]]]))
    assert LOSS.count(group) == 1
    total = jax.jit(LOSS.total)(states, OutputLayer(jnp.eye(2)), group)
    np.testing.assert_allclose(total, 1.7 * np.log(2), rtol=1e-6)


def test_an_example_without_a_rationale_adds_nothing():
    group = {
        "decoder_example_ids": jnp.array([[2, 2, 1, 1, 1, 0]]),
        "decoder_objective_ids": jnp.array([[1, 1, 1, 0, 2, 0]]),  # 0: a decoder prefix
    }
    states = jnp.asarray(np.random.default_rng(0).normal(size=(1, 6, 3)), jnp.float32)
    total, slope = jax.jit(jax.value_and_grad(LOSS.total))(states, OutputLayer(jnp.eye(3)), group)
    assert LOSS.is_pair(group).tolist() == [[True, False, False]]
    assert np.isfinite(total) and total > 0
    assert [bool(x) for x in np.abs(slope[0]).max(-1) > 0] == [False] * 4 + [True, False]


def test_the_part_adds_the_papers_weights_loss_to_any_arm_of_two():
    part = ["losses/mutual_information.gin"]
    for name in ("demo_step_by_step", "demo_shared_encoder"):
        config, text = load_config(name, [], part)
        assert config.extra_loss == MutualInformation(0.1) and config.pairs
        assert "EXTRA_LOSS = @mutual_information()" in text
    config, _ = load_config("demo_step_by_step", ["mutual_information.weight=0.5"], part)
    assert config.extra_loss.weight == 0.5
    with pytest.raises(InputError, match="MutualInformation pairs the targets of two objectives"):
        load_config("demo_label_only", [], part)


def test_only_batches_of_train_and_of_a_run_with_pairs_are_packed_by_example(data):
    paired = TrainConfig("synthetic", batch_size=8, extra_loss=LOSS)
    assert batches_of(paired, data).pairs
    assert not batches_of(TrainConfig("synthetic", batch_size=8), data).pairs
    assert not batches_of(paired, dataclasses.replace(data, split="validation")).pairs
