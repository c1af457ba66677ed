"""int8 kernels: how far they are from the weights, and that every way through the model reads them alike."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict
from hypothesis import given
from hypothesis import strategies as st

from stepdistill_jax.decoding.choices import ChoiceScorer
from stepdistill_jax.decoding.greedy import LabelDecoder
from stepdistill_jax.models.encoder_decoder import EncoderDecoder, abstract_params, init_params
from stepdistill_jax.models.quantized import KERNEL, SCALE, kernel_of, quantize
from stepdistill_jax.models.t5 import T5Config

CONFIG = T5Config(
    vocab_size=128,
    emb_dim=32,
    num_heads=2,
    head_dim=8,
    mlp_dim=48,
    num_encoder_layers=2,
    num_decoder_layers=2,
    dropout_rate=0.0,
)
TIED = dataclasses.replace(CONFIG, logits_via_embedding=True, mlp_activations=("relu",))


def rows(count=9):
    rng = np.random.default_rng(1)
    return [[*rng.integers(3, 128, rng.integers(1, 31)).tolist(), 1] for _ in range(count)]


@pytest.fixture(scope="module", params=[CONFIG, TIED], ids=["own head", "tied head"])
def models(request):
    """(int8 parameters, their configuration), and a float32 model with the same weights."""
    config = request.param
    params = jax.jit(init_params, static_argnums=0)(config, jax.random.key(2))
    small, small_config = quantize(params, config)
    flat = flatten_dict(small)
    for path in [p for p in flat if p[-1] == SCALE]:
        projection = {KERNEL: flat[*path[:-1], KERNEL], SCALE: flat.pop(path)}
        flat[*path[:-1], KERNEL] = kernel_of(projection, jnp.float32)
    return (small, small_config), (unflatten_dict(flat), config)


@given(
    shape=st.sampled_from([(3, 5), (2, 4, 3)]),
    seed=st.integers(0, 1000),
    exponent=st.integers(-30, 30),
    zero=st.booleans(),
)
def test_a_weight_is_off_by_half_a_step_of_its_column_at_most(shape, seed, exponent, zero):
    kernel = np.random.default_rng(seed).normal(size=shape).astype(np.float32) * 2.0**exponent
    if zero:
        kernel[..., 0] = 0
    small, config = quantize({"a": {KERNEL: jnp.asarray(kernel)}, "b": jnp.ones(2)}, CONFIG)
    assert config.quantized and small["a"][KERNEL].dtype == jnp.int8
    back = np.asarray(kernel_of(small["a"], jnp.float32))
    step = np.abs(kernel).max(axis=-2, keepdims=True) / 127
    assert (np.abs(back - kernel) <= step * 0.501).all()
    assert small["b"].dtype == jnp.float32


def test_the_tree_is_the_one_that_the_model_makes(models):
    (params, config), _ = models
    boxed = flatten_dict(abstract_params(config))
    found = {path: (x.shape, x.dtype) for path, x in flatten_dict(params).items()}
    assert found == {path: (x.value.shape, x.value.dtype) for path, x in boxed.items()}
    kernels = [path for path in found if path[-1] == KERNEL]
    assert kernels and all(found[path][1] == jnp.int8 for path in kernels)
    assert all(len(boxed[path].names) == len(found[path][0]) for path in boxed)


def test_logits_are_those_of_the_same_weights_in_float32(models):
    tokens = jnp.asarray(np.random.default_rng(3).integers(3, 128, (3, 12)), jnp.int32)
    names = "encoder_input_tokens", "decoder_input_tokens"
    segments = "encoder_segment_ids", "decoder_segment_ids"
    batch = dict.fromkeys(names, tokens) | dict.fromkeys(segments, jnp.ones_like(tokens))
    found, wanted = (
        np.asarray(jax.jit(EncoderDecoder(config).apply)({"params": params}, batch))
        for params, config in models
    )
    assert np.abs(found - wanted).max() < 1e-5 * wanted.std()


@pytest.mark.parametrize("max_decode_len", [3, 12])  # cross-attention over states, over kept keys
def test_answers_and_scores_are_those_of_the_same_weights(models, max_decode_len):
    found, wanted = (
        LabelDecoder(config, max_decode_len=max_decode_len, batch_size=4)(params, rows())
        for params, config in models
    )
    assert found.ids == wanted.ids
    np.testing.assert_allclose(found.scores, wanted.scores, atol=1e-4)


def test_choices_are_scored_alike(models):
    answers = [[[4, 1], [6, 8, 1]]] * 9
    found, wanted = (
        ChoiceScorer(config, batch_size=4)(params, rows(), answers) for params, config in models
    )
    np.testing.assert_allclose(found, wanted, atol=1e-4)
