"""The table of docs/lab/numerics.md: what is float32 when activations are bfloat16. Nothing is compiled."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from stepdistill_jax.models.encoder_decoder import EncoderDecoder, init_params, start_cache
from stepdistill_jax.models.families import model_config
from stepdistill_jax.training.state import create_state
from stepdistill_jax.training.step import train_step

F32, BF16 = jnp.dtype("float32"), jnp.dtype("bfloat16")
FAMILIES = ("t5_v1_0", "t5_v1_1", "umt5")


def config_of(family):
    config = model_config(family, "tiny", vocab_size=128)
    return dataclasses.replace(config, dtype="bfloat16", dropout_rate=0.0)


def abstract_params(config):
    return jax.eval_shape(functools.partial(init_params, config), jax.random.key(0))


def batch():
    ids = {
        f"{side}_{name}": jnp.ones((2, 8), jnp.int32)
        for side in ("encoder", "decoder")
        for name in ("input_tokens", "segment_ids")
    }
    ones = jnp.ones((2, 8), jnp.int32)
    weights = {"decoder_loss_weights": jnp.ones((2, 8), jnp.float32)}
    return ids | weights | {"decoder_target_tokens": ones, "decoder_objective_ids": ones}


@pytest.fixture(scope="module", params=FAMILIES)
def forward(request, equations):
    """(config, {primitive: [(dtypes in, dtypes out)]}) of the forward pass."""
    config = config_of(request.param)

    def logits(params, batch):
        return EncoderDecoder(config).apply({"params": params}, batch)

    traced = jax.make_jaxpr(logits)(abstract_params(config), batch())
    found = {}
    for e in equations(traced):
        dtypes = [[v.aval.dtype for v in side if hasattr(v.aval, "dtype")] for side in (e.invars, e.outvars)]  # fmt: skip
        found.setdefault(e.primitive.name, []).append(dtypes)
    return config, found


def dtypes_in(calls):
    return {dtype for dtypes, _ in calls for dtype in dtypes}


def test_softmax_and_root_mean_squares_are_float32(forward):
    _, found = forward
    assert len(found["exp"]) == 3  # self-attention twice, attention to the encoder
    assert dtypes_in(found["exp"]) == dtypes_in(found["reduce_max"]) == {F32}
    assert len(found["rsqrt"]) == 7  # 2 + 3 in the layers, which are traced once, and the final 2
    assert dtypes_in(found["rsqrt"]) == {F32}


def test_matrix_products_and_the_gate_are_bfloat16(forward):
    config, found = forward
    gated = len(config.mlp_activations) == 2
    # projections, scores and mixtures of three attentions; two feed-forward blocks; the head
    products = [e for e in found["dot_general"] if e[0] == [BF16, BF16]]
    assert len(products) == 3 * 6 + 2 * (3 if gated else 2) + 1
    outputs = [out for _, out in products]
    assert outputs.count([F32]) == 1 and outputs[-1] == [F32], "the head alone sums in float32"
    assert outputs.count([BF16]) == len(outputs) - 1
    if gated:
        assert dtypes_in(found["tanh"]) == {BF16}


def test_tokens_and_positions_are_looked_up_in_float32(forward):
    _, found = forward
    assert [dtypes[0] for dtypes, _ in found["gather"]] == [F32] * 4
    assert [e for e in found["dot_general"] if e[0] != [BF16, BF16]] == []


def test_the_gradient_of_a_frequent_token_loses_no_digits():
    config = config_of("t5_v1_1")
    params = jax.jit(init_params, static_argnums=0)(config, jax.random.key(0))

    def total(table, dtype):
        """The sum over 2,000 equal tokens of what the lookup gives."""
        model = EncoderDecoder(dataclasses.replace(config, dtype=dtype))
        ids = jnp.full((4, 500), 7)
        whole = {**params, "token_embedder": table}
        states = model.apply({"params": whole}, ids, "token_embedder", method="_embed")
        return jnp.sum(states.astype(jnp.float32))

    gradient = jax.jit(jax.grad(total), static_argnums=1)(params["token_embedder"], "bfloat16")
    np.testing.assert_array_equal(gradient[7], 2000.0)


def test_states_and_cache_are_bfloat16_and_logits_float32():
    config = config_of("t5_v1_1")
    params, ids = abstract_params(config), jnp.ones((2, 8), jnp.int32)
    encode = functools.partial(EncoderDecoder(config).apply, method="encode")
    states = jax.eval_shape(encode, {"params": params}, ids, ids)
    assert states.dtype == BF16
    cache = jax.eval_shape(functools.partial(start_cache, config=config, max_decode_len=4), params, states)  # fmt: skip
    assert {x.dtype for x in cache.values()} == {BF16}
    assert jax.eval_shape(EncoderDecoder(config).apply, {"params": params}, batch()).dtype == F32


@pytest.mark.parametrize("num_microbatches", [1, 2])
def test_parameters_moments_gradients_and_loss_of_a_step_are_float32(num_microbatches):
    config = config_of("t5_v1_1")
    seen = []

    def spy(updates, state, params=None):
        seen.append({x.dtype for x in jax.tree.leaves(updates)})
        return updates, state

    watch = optax.GradientTransformation(lambda params: optax.EmptyState(), spy)
    tx = optax.chain(watch, optax.clip_by_global_norm(1.0), optax.adamw(1e-3))
    state = jax.eval_shape(functools.partial(create_state, tx=tx, seed=0), abstract_params(config))
    step = functools.partial(
        train_step,
        model=EncoderDecoder(config),
        tx=tx,
        objective_weights=(0.5, 0.5),
        num_microbatches=num_microbatches,
    )
    after, metrics = jax.eval_shape(step, state, (batch(),))
    assert seen == [{F32}]  # gradients, as the optimizer gets them
    assert {x.dtype for x in jax.tree.leaves(after.params)} == {F32}
    moments = [x.dtype for x in jax.tree.leaves(after.opt_state) if x.ndim]
    assert len(moments) == 2 * len(jax.tree.leaves(after.params)) and set(moments) == {F32}
    assert {x.dtype for x in jax.tree.leaves(metrics)} == {F32}


def test_float32_activations_leave_no_bfloat16_anywhere(equations):
    config = dataclasses.replace(config_of("umt5"), dtype="float32")

    def logits(params, batch):
        return EncoderDecoder(config).apply({"params": params}, batch)

    traced = jax.make_jaxpr(logits)(abstract_params(config), batch())
    dtypes = {np.dtype(v.aval.dtype) for e in equations(traced) for v in e.outvars}
    assert F32 in dtypes and BF16 not in dtypes
