"""The mean over examples: what a batch carries, and the loss against one target at a time."""

import dataclasses

import jax
import numpy as np
import optax
import pytest

from stepdistill_jax.batches.batch import Batches
from stepdistill_jax.commands.gin_config import load_config
from stepdistill_jax.errors import InputError
from stepdistill_jax.models.encoder_decoder import EncoderDecoder
from stepdistill_jax.models.families import model_config
from stepdistill_jax.models.sharding import Layout, make_mesh
from stepdistill_jax.training.state import abstract_state
from stepdistill_jax.training.step import jit_eval_step

MODEL = dataclasses.replace(
    model_config("t5_v1_1", "tiny", vocab_size=128),
    emb_dim=16, num_heads=2, head_dim=8, mlp_dim=32, num_encoder_layers=1, dropout_rate=0.0,
)  # fmt: skip
# 24 cut some of the rationales: a cut target has the length that it was cut to
SIZES = {"batch_size": 16, "input_length": 64, "target_length": 24, "seed": 0}


def targets_of(group):
    """(objective, summed weight, distinct weights) of each target of a group, with its length."""
    for row in range(len(group["decoder_segment_ids"])):
        segments = group["decoder_segment_ids"][row]
        for segment in range(1, segments.max() + 1):
            mine = segments == segment
            weights = group["decoder_loss_weights"][row][mine]
            yield int(group["decoder_objective_ids"][row][mine][-1]), weights


def test_the_tokens_of_a_target_share_its_weight(data):
    by_token, by_example = (Batches(data, **SIZES, loss_mean=m)(0) for m in ("token", "example"))
    for name in by_token[0].keys() - {"decoder_loss_weights"}:
        np.testing.assert_array_equal(by_token[0][name], by_example[0][name])
    lengths = set()
    for (objective, token), (_, example) in zip(
        targets_of(by_token[0]), targets_of(by_example[0]), strict=True
    ):
        assert len(set(token.tolist())) == len(set(example.tolist())) == 1
        np.testing.assert_allclose(example.sum(), token[0], rtol=1e-6)
        lengths.add((objective, len(token)))
    assert len(lengths) > 5 and (2, 24) in lengths


@pytest.fixture(scope="module")
def scores(data, params):
    """(group, logits [rows, length, vocab]) of the step's unpacked rows, for each objective."""
    groups = Batches(data, **SIZES, pack=False)(0)
    longest = {n: max(g[n].shape[1] for g in groups) for n in groups[0]}
    padded = [
        {n: np.pad(x, ((0, 0), (0, longest[n] - x.shape[1]))) for n, x in g.items()} for g in groups
    ]
    logits = jax.jit(EncoderDecoder(MODEL).apply)
    return [(g, np.asarray(logits({"params": params}, g), np.float64)) for g in padded]


def one_at_a_time(scores, mean):
    """[2, objectives] loss and accuracy, by a loop over the unpacked rows of the step."""
    found = []
    for group, logits in scores:
        log_probabilities = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        totals = np.zeros(3)  # loss, accuracy, weight
        for row, targets in enumerate(group["decoder_target_tokens"]):
            own = np.flatnonzero(group["decoder_segment_ids"][row])
            if not len(own):
                continue
            nll = -log_probabilities[row, own, targets[own]]
            right = logits[row, own].argmax(-1) == targets[own]
            share = 1 / len(own) if mean == "example" else 1
            weight = group["decoder_loss_weights"][row, 0] * share
            totals += weight * np.array([nll.sum(), right.sum(), len(own)])
        found.append(totals[:2] / totals[2])
    return np.array(found).T


@pytest.mark.parametrize("mean", ["token", "example"])
def test_packed_rows_give_the_mean_of_one_target_at_a_time(data, params, scores, mean):
    mesh = make_mesh(Layout(), jax.devices()[:1])
    abstract = abstract_state(MODEL, optax.sgd(0.1), mesh)
    step = jit_eval_step(abstract, mesh, model=EncoderDecoder(MODEL), num_objectives=2)
    sums = step(params, Batches(data, **SIZES, loss_mean=mean)(0))
    loss, accuracy = one_at_a_time(scores, mean)
    np.testing.assert_allclose(sums.loss / sums.count, loss, rtol=1e-5)
    np.testing.assert_allclose(sums.correct / sums.count, accuracy, atol=1e-6)


def test_the_two_means_differ_on_this_data(scores):
    token, example = (one_at_a_time(scores, m)[0] for m in ("token", "example"))
    assert (np.abs(token / example - 1) > 5e-4).all()


def test_the_setting_is_checked_and_is_the_papers_by_default():
    assert load_config("demo_step_by_step")[0].loss_mean == "token"
    config, _ = load_config("demo_step_by_step", ["train.loss_mean=example"])
    assert config.loss_mean == "example"
    with pytest.raises(
        InputError, match=r"loss_mean must be one of token, example, not .examples.; did you"
    ):
        load_config("demo_step_by_step", ["train.loss_mean=examples"])
