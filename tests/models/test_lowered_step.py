"""What the programs of training and decoding say before a compiler has seen them. Nothing is compiled."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from stepdistill_jax.decoding import choices
from stepdistill_jax.decoding.greedy import greedy_decode
from stepdistill_jax.models.config import LoraConfig
from stepdistill_jax.models.encoder_decoder import EncoderDecoder, init_params
from stepdistill_jax.models.t5 import T5Config
from stepdistill_jax.training.state import create_state
from stepdistill_jax.training.step import eval_step, train_step

HIGHEST = (jax.lax.Precision.HIGHEST,) * 2
ROWS, INPUTS, TARGETS, LAYERS = 3, 10, 7, 5
MODEL = T5Config(
    vocab_size=64,
    emb_dim=16,
    num_heads=2,
    head_dim=8,
    mlp_dim=24,
    num_encoder_layers=LAYERS,
    num_decoder_layers=LAYERS,
    num_buckets=6,
    dtype="bfloat16",
)
TRAINING = {"objective_weights": (0.5, 0.5)}


@functools.cache
def abstract_params(config):
    return jax.eval_shape(functools.partial(init_params, config), jax.random.key(0))


def batch():
    lengths = {"encoder": INPUTS, "decoder": TARGETS}
    names = [f"{side}_{name}" for side in lengths for name in ("input_tokens", "segment_ids")]
    names += [f"decoder_{name}" for name in ("target_tokens", "objective_ids")]
    ids = {n: jnp.ones((ROWS, lengths[n.split("_")[0]]), jnp.int32) for n in names}
    return ids | {"decoder_loss_weights": jnp.ones((ROWS, TARGETS))}


@functools.cache
def training_program(config):
    tx = optax.adamw(1e-3)
    state = jax.eval_shape(functools.partial(create_state, tx=tx, seed=0), abstract_params(config))
    step = functools.partial(train_step, model=EncoderDecoder(config), tx=tx, **TRAINING)
    return jax.make_jaxpr(step)(state, (batch(),))


def shapes(variables):
    return [(v.aval.shape, v.aval.dtype.name) for v in variables]


def test_no_scores_or_masks_go_from_layer_to_layer(equations):
    """Forward and backward, of both sides: a relative bias [1, heads, q, k] and its gradient alone."""
    loops = [e for e in equations(training_program(MODEL)) if e.primitive.name == "scan"]
    loops = [e for e in loops if e.params["length"] == LAYERS]
    assert len(loops) == 4
    squares = [(MODEL.num_heads, *s) for s in ((INPUTS,) * 2, (TARGETS,) * 2, (TARGETS, INPUTS))]
    crossing = [shape for e in loops for shape in shapes([*e.invars, *e.outvars])]
    large = [s for s, dtype in crossing if dtype == "float32" and s[-3:] in squares]
    assert set(large) == {(1, MODEL.num_heads, n, n) for n in (INPUTS, TARGETS)}
    kept = [s for s, dtype in crossing if dtype == "bfloat16" and s[-3:] in squares]
    assert (LAYERS, ROWS, MODEL.num_heads, INPUTS, INPUTS) in kept  # the scores, for the backward


@pytest.mark.parametrize("remat_policy", ["elementwise", "full"])
def test_without_a_loop_layers_are_unrolled_and_memory_is_still_saved(remat_policy, equations):
    """XLA would undo `full` by keeping what is computed twice."""
    config = dataclasses.replace(MODEL, scan_layers=False, remat_policy=remat_policy)
    every = [*equations(training_program(config))]
    loops = [e for e in every if e.primitive.name == "scan" and e.params["length"] == LAYERS]
    assert [e.params["unroll"] for e in loops] == [LAYERS] * 4
    kept = {e.params["prevent_cse"] for e in every if e.primitive.name == "remat2"}
    assert kept == {remat_policy == "full"}


def test_the_gradient_of_a_relative_bias_is_a_product_with_one_hot_buckets(equations):
    table = (MODEL.num_heads, MODEL.num_buckets)
    made = [e for e in equations(training_program(MODEL)) if table in dict(shapes(e.outvars))]
    names = [e.primitive.name for e in made]
    assert not [name for name in names if "scatter" in name]
    products = [e for e in made if e.primitive.name == "dot_general"]
    assert [e.params["precision"] for e in products] == [HIGHEST] * 2


def decoding_program(config, tokens, **changes):
    config = dataclasses.replace(config, **changes)
    decode = functools.partial(greedy_decode, config=config, max_decode_len=tokens)
    rows = jax.ShapeDtypeStruct((ROWS, INPUTS), jnp.int32)
    return jax.make_jaxpr(lambda p, x: decode(p, encoder_input_tokens=x))(
        abstract_params(config), rows
    )


def evaluation(config):
    step = functools.partial(eval_step, model=EncoderDecoder(config), num_objectives=2)
    return jax.make_jaxpr(step)(abstract_params(config), (batch(),))


def forward(config, **changes):
    config = dataclasses.replace(config, **changes)
    logits = lambda params: EncoderDecoder(config).apply({"params": params}, batch())  # noqa: E731
    return jax.make_jaxpr(logits)(abstract_params(config))


def scoring(config):
    seen = []

    def trace(fn, mesh, dtype):
        def call(params, arrays):
            seen.append(jax.make_jaxpr(fn)(params, arrays))
            return np.zeros(arrays[1].shape, np.float32)

        return call

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(choices, "jit_over_rows", trace)
        scorer = choices.ChoiceScorer(config, batch_size=2)
        scorer(abstract_params(config), [[5, 1]], [[[4, 1], [6, 1]]])
    return seen[0]


PROGRAMS = {
    "train": training_program,
    "adapters": lambda c: forward(c, lora=LoraConfig(query=2, wo=2)),
    "a tied head": lambda c: forward(c, logits_via_embedding=True),
    "evaluate": evaluation,
    "decode over the encoder's states": lambda c: decoding_program(c, 2),
    "decode over keys and values": lambda c: decoding_program(c, 9),
    "decode int8": lambda c: decoding_program(c, 9, quantized=True),
    "score choices": scoring,
}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", PROGRAMS)
def test_float32_is_multiplied_as_float32_and_bfloat16_as_bfloat16(name, dtype, equations):
    """By default an accelerator rounds float32 factors to bfloat16 or TF32."""
    config = dataclasses.replace(MODEL, dtype=dtype)
    products = [e for e in equations(PROGRAMS[name](config)) if e.primitive.name == "dot_general"]
    by_dtype = {"float32": [], "bfloat16": []}
    for e in products:
        (factors,) = {dtype for _, dtype in shapes(e.invars)}
        by_dtype[factors].append(e.params["precision"])
    assert set(by_dtype["float32"]) <= {HIGHEST}
    assert set(by_dtype["bfloat16"]) <= {None}
    assert len(by_dtype[dtype]) > 15
