"""What a training step computes and keeps: random bits of dropout, products, arrays for the backward pass."""

import collections
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from stepdistill_jax.models.dropout import DRAWS, HALF, Dropout
from stepdistill_jax.models.encoder_decoder import EncoderDecoder, init_params
from stepdistill_jax.models.layers import dense
from stepdistill_jax.models.t5 import T5Config

MODEL = T5Config(
    vocab_size=64,
    emb_dim=16,
    num_heads=2,
    head_dim=8,
    mlp_dim=48,
    num_encoder_layers=3,
    num_decoder_layers=2,
    dropout_rate=0.1,
)
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
    """A random word has the draws of two positions; neither these nor keys, lines or columns go together."""
    x = dropped(jnp.ones((4, 500, 200)), 0.5) != 0
    first, second = x[:, :HALF], x[:, HALF : 2 * HALF]
    pairs = {"a word": (first, second), "a line": (x, np.roll(x, 1, 0))}
    pairs |= {f"{n} away": (x, np.roll(x, n, axis)) for axis in (1, 2) for n in (1, 2, 8, 128)}
    pairs["a key"] = (x, dropped(jnp.ones((4, 500, 200)), 0.5, key=1) != 0)
    for name, (one, other) in pairs.items():
        assert abs((one == other).mean() - 0.5) < 5 * 0.5 / one.size**0.5, name
    for axis in (1, 2):  # no position or feature is dropped more often than chance would
        rates = x.mean((0, 3 - axis))
        assert np.abs(rates - 0.5).max() < 5 * 0.5 / (x.size / len(rates)) ** 0.5


@pytest.mark.parametrize("length", [1, 2, 5])
def test_dropout_of_any_length_and_of_no_rate(length):
    x = jnp.ones((3, length, 8))
    assert dropped(x, 0.5).shape == x.shape
    np.testing.assert_array_equal(dropped(x, 0.0), x)
    np.testing.assert_array_equal(Dropout(0.5).apply({}, x, deterministic=True), x)


def batch_shapes():
    return {
        name: jax.ShapeDtypeStruct((BATCH, length), jnp.int32)
        for side, length in (("encoder", INPUTS), ("decoder", TARGETS))
        for name in (f"{side}_input_tokens", f"{side}_segment_ids")
    }


@functools.cache
def kept_arrays(config):
    """Shape and dtype -> how many arrays the forward pass keeps for the backward pass."""
    params = jax.eval_shape(lambda: init_params(config, jax.random.key(0)))

    def backward(params, batch):
        rngs = {"dropout": jax.random.key(0)}
        apply = EncoderDecoder(config).apply
        return jax.vjp(
            lambda p: apply({"params": p}, batch, enable_dropout=True, rngs=rngs), params
        )[1]

    kept = jax.tree.leaves(jax.eval_shape(backward, params, batch_shapes()))
    return collections.Counter((x.shape, x.dtype.name) for x in kept)


def test_the_backward_pass_keeps_products_and_no_masks():
    """Of the encoder's feed-forward block: what both projections give; of its attention: the scores."""
    kept = kept_arrays(MODEL)
    wide = (MODEL.num_encoder_layers, BATCH, INPUTS, MODEL.mlp_dim)
    flat = (MODEL.num_encoder_layers, BATCH * INPUTS, MODEL.mlp_dim)
    assert kept[wide, "float32"] + kept[flat, "float32"] == 2
    square = (MODEL.num_encoder_layers, BATCH, MODEL.num_heads, INPUTS, INPUTS)
    assert kept[square, "float32"] == 1
    masks = {shape: n for (shape, dtype), n in kept.items() if dtype in ("bool", "uint8")}
    assert not [shape for shape in masks if len(shape) > 3]
    full = kept_arrays(dataclasses.replace(MODEL, remat_policy="full"))
    assert not full[wide, "float32"] + full[flat, "float32"] + full[square, "float32"]


@functools.cache
def forward_program(config):
    params = jax.eval_shape(lambda: init_params(config, jax.random.key(0)))
    rngs = {"dropout": jax.random.key(0)}
    return jax.make_jaxpr(
        lambda p, x: EncoderDecoder(config).apply({"params": p}, x, enable_dropout=True, rngs=rngs)
    )(params, batch_shapes())


def drawn_masks(config, equations):
    """Shape -> how many masks a forward pass draws; a layer of a stack counts once."""
    program = forward_program(config)
    draws = [e.outvars[0].aval for e in equations(program) if e.primitive.name == "lt"]
    kinds = [e.invars[0].aval.dtype for e in equations(program) if e.primitive.name == "lt"]
    return collections.Counter(
        draw.shape for draw, kind in zip(draws, kinds, strict=True) if kind == jnp.uint32
    )


def test_dropout_has_all_the_places_of_t5(equations):
    """Inside the feed-forward block, on what each sublayer adds, on the attention weights, and at the
    input and output of both stacks (Raffel et al. 2020, arXiv:1910.10683, section 2.1)."""
    m = MODEL
    assert drawn_masks(m, equations) == {
        # at both ends of the stack; what attention and mlp add
        (BATCH, INPUTS, m.emb_dim): 2 + 2,
        # at both ends; what self_attention, encoder_decoder_attention and mlp add
        (BATCH, TARGETS, m.emb_dim): 2 + 3,
        (BATCH, INPUTS, m.mlp_dim): 1,
        (BATCH, TARGETS, m.mlp_dim): 1,
        (BATCH, m.num_heads, INPUTS, INPUTS): 1,
        (BATCH, m.num_heads, TARGETS, TARGETS): 1,
        (BATCH, m.num_heads, TARGETS, INPUTS): 1,
    }


def test_each_layer_has_masks_of_its_own(equations):
    """Their key is one for each layer, which the loop reads one by one."""
    loops = [e for e in equations(forward_program(MODEL)) if e.primitive.name == "scan"]
    assert len(loops) == 2
    for e in loops:
        read = e.invars[e.params["num_consts"] + e.params["num_carry"] :]
        keys = [v.aval.shape for v in read if jnp.issubdtype(v.aval.dtype, jax.dtypes.prng_key)]
        assert keys == [(e.params["length"],)]


def test_shared_masks_have_one_position_each(equations):
    own = drawn_masks(MODEL, equations)
    want = collections.Counter()
    for shape, count in own.items():
        want[(*shape[:-2], 1, shape[-1])] += count
    assert drawn_masks(dataclasses.replace(MODEL, dropout_broadcast=True), equations) == want


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
