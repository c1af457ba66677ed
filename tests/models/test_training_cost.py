"""What a training step computes and keeps: random bits of dropout, products, arrays for the backward pass."""

import collections
import dataclasses
import functools

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import pytest

from stepdistill_jax.models.config import T5Config
from stepdistill_jax.models.cpu_speed import DRAWS, threefry
from stepdistill_jax.models.dropout import Dropout
from stepdistill_jax.models.layers import dense
from stepdistill_jax.models.t5 import T5, init_params

MODEL = T5Config(64, 16, 2, 8, 48, 3, 2, dropout_rate=0.1)
BATCH, INPUTS, TARGETS = 2, 10, 7


def dropped(x, rate=0.1, key=0):
    return np.asarray(
        Dropout(rate, deterministic=False).apply({}, x, rngs={"dropout": jax.random.key(key)})
    )


@pytest.mark.parametrize("rate", [0.1, 0.5, 0.97])
@pytest.mark.parametrize("shape", [(40, 30, 50), (3, 7, 11, 260), (1, 60_000)], ids=str)
def test_dropout_meets_its_rate_and_keeps_the_mean(rate, shape):
    x = dropped(jnp.ones(shape), rate)
    kept = (x != 0).mean()
    sigma = (rate * (1 - rate) / x.size) ** 0.5
    assert abs(kept - (1 - rate)) < 5 * sigma + 1 / DRAWS
    (value,) = set(np.unique(x).tolist()) - {0.0}
    assert value == pytest.approx(1 / (1 - rate), rel=1 / DRAWS / (1 - rate))


def test_dropout_masks_are_independent_of_their_neighbours():
    """Four values share a draw: a quarter of a row apart. Nor do keys, lines or columns go together."""
    x = dropped(jnp.ones((4, 500, 200)), 0.5) != 0
    others = {"quarter": np.roll(x, 125, 1), "half": np.roll(x, 250, 1), "line": np.roll(x, 1, 0)}
    others |= {"next": np.roll(x, 1, 1), "column": np.roll(x, 1, 2)}
    others["key"] = dropped(jnp.ones((4, 500, 200)), 0.5, key=1) != 0
    for name, other in others.items():
        assert abs((x == other).mean() - 0.5) < 5 * 0.5 / x.size**0.5, name


def test_the_random_words_are_those_of_jax():
    key, counters = jnp.array([7, 2**32 - 5], jnp.uint32), jnp.arange(60, dtype=jnp.uint32)
    x, y = threefry(key, counters[:30], counters[30:])
    theirs = jax.extend.random.threefry_2x32(key, counters)  # pairs the halves of its counters
    np.testing.assert_array_equal(jnp.concatenate([x, y]), theirs)


@pytest.mark.parametrize("length", [1, 2, 5])
def test_dropout_of_any_length_and_of_no_rate(length):
    x = jnp.ones((3, length, 8))
    assert dropped(x, 0.5).shape == x.shape
    np.testing.assert_array_equal(dropped(x, 0.0), x)
    np.testing.assert_array_equal(Dropout(0.5).apply({}, x, deterministic=True), x)


@functools.cache
def kept_arrays(config):
    """Shape and dtype -> how many arrays the forward pass keeps for the backward pass."""
    params = jax.eval_shape(lambda: init_params(config, jax.random.key(0)))
    batch = {
        name: jax.ShapeDtypeStruct((BATCH, length), jnp.int32)
        for side, length in (("encoder", INPUTS), ("decoder", TARGETS))
        for name in (f"{side}_input_tokens", f"{side}_segment_ids")
    }

    def backward(params, batch):
        rngs = {"dropout": jax.random.key(0)}
        apply = T5(config).apply
        return jax.vjp(
            lambda p: apply({"params": p}, batch, enable_dropout=True, rngs=rngs), params
        )[1]

    kept = jax.tree.leaves(jax.eval_shape(backward, params, batch))
    return collections.Counter((x.shape, x.dtype.name) for x in kept)


def quarter(length):
    """Positions of a layer's mask as it is kept: a byte holds four of them."""
    return -(-length // 4)


def kept_masks(config):
    """Shape -> how many masks are kept: those of layers in bytes, those at the ends of a stack as they are."""
    kept = kept_arrays(config).items()
    return {
        shape: n for (shape, dtype), n in kept if dtype == ("uint8" if len(shape) > 3 else "bool")
    }


def test_the_backward_pass_keeps_products_and_dropout_masks_alone():
    """Of the encoder's feed-forward block: what both projections give, and one mask; of its attention
    weights: the scores and one mask."""
    kept = kept_arrays(MODEL)
    wide = (MODEL.num_encoder_layers, BATCH, INPUTS, MODEL.mlp_dim)
    flat = (MODEL.num_encoder_layers, BATCH * INPUTS, MODEL.mlp_dim)
    assert kept[wide, "float32"] + kept[flat, "float32"] == 2
    assert kept[(*wide[:2], quarter(INPUTS), MODEL.mlp_dim), "uint8"] == 1
    square = (MODEL.num_encoder_layers, BATCH, MODEL.num_heads, INPUTS, INPUTS)
    assert kept[square, "float32"] == 1
    assert kept[(*square[:3], quarter(INPUTS), INPUTS), "uint8"] == 1
    assert not kept[wide, "bool"] + kept[square, "bool"]
    full = kept_arrays(dataclasses.replace(MODEL, remat_policy="full"))
    assert not full[wide, "float32"] + full[flat, "float32"] + full[square, "float32"]


def test_dropout_has_all_the_places_of_t5():
    """Inside the feed-forward block, on what each sublayer adds, on the attention weights, and at the
    input and output of both stacks (Raffel et al. 2020, arXiv:1910.10683, section 2.1)."""
    m = MODEL
    inputs, targets = quarter(INPUTS), quarter(TARGETS)
    encoder, decoder = (m.num_encoder_layers, BATCH), (m.num_decoder_layers, BATCH)
    places = {
        "encoder: embeddings, encoder_norm": ((BATCH, INPUTS, m.emb_dim), 2),
        "encoder layers: outputs of attention, mlp": ((*encoder, inputs, m.emb_dim), 2),
        "encoder layers: attention weights": ((*encoder, m.num_heads, inputs, INPUTS), 1),
        "encoder layers: inside mlp": ((*encoder, inputs, m.mlp_dim), 1),
        "decoder: embeddings, decoder_norm": ((BATCH, TARGETS, m.emb_dim), 2),
        "decoder layers: outputs of self_attention, encoder_decoder_attention, mlp": (
            (*decoder, targets, m.emb_dim),
            3,
        ),
        "decoder layers: self_attention weights": ((*decoder, m.num_heads, targets, TARGETS), 1),
        "decoder layers: encoder_decoder_attention weights": (
            (*decoder, m.num_heads, targets, INPUTS),
            1,
        ),
        "decoder layers: inside mlp": ((*decoder, targets, m.mlp_dim), 1),
    }
    masks = kept_masks(m)
    found = {place: masks.pop(shape, 0) for place, (shape, _) in places.items()}
    assert found == {place: count for place, (_, count) in places.items()}
    assert not masks


def test_the_shared_masks_of_a_layer_have_one_position_each():
    def of_layers(config):
        masks = {shape: n for shape, n in kept_masks(config).items() if len(shape) > 3}
        return collections.Counter(masks).elements()

    want = sorted((*shape[:-2], 1, shape[-1]) for shape in of_layers(MODEL))
    assert sorted(of_layers(dataclasses.replace(MODEL, dropout_broadcast=True))) == want


def test_the_output_of_attention_is_kept_by_its_name_and_once():
    """A kernel would run twice otherwise; of plain operations the product behind it is not kept, too."""
    layers, heads, width = MODEL.num_encoder_layers, MODEL.num_heads, MODEL.head_dim
    kept = kept_arrays(MODEL)
    assert kept[(layers, BATCH, INPUTS, heads, width), "float32"] == 1
    assert kept[(layers, BATCH, heads, width, INPUTS), "float32"] == 0


def test_the_gradient_of_a_kernel_is_a_product_of_two_matrices():
    """With batch and length apart, XLA's CPU backend turns one of them round first."""
    layer = dense(MODEL, 24, ("embed", "mlp"), 0.02)
    x = jnp.ones((BATCH, INPUTS, MODEL.emb_dim))
    params = layer.init(jax.random.key(0), x)
    program = jax.make_jaxpr(jax.grad(lambda p: layer.apply(p, x).sum()))(params)
    products = [e for e in program.eqns if e.primitive.name == "dot_general"]
    assert len(products) == 2
    assert all(v.aval.ndim == 2 for e in products for v in e.invars)
