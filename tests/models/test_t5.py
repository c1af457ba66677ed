"""What must hold of a T5 whatever its weights are; test_parity.py compares with `transformers`."""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from stepdistill_jax.models import sharding
from stepdistill_jax.models.encoder_decoder import (
    EncoderDecoder,
    abstract_params,
    init_params,
    start_cache,
)
from stepdistill_jax.models.t5 import T5Config

TINY = T5Config(
    vocab_size=64,
    emb_dim=32,
    num_heads=4,
    head_dim=8,
    mlp_dim=48,
    num_encoder_layers=2,
    num_decoder_layers=2,
    dropout_rate=0.2,
)


def teacher_forced(source, target):
    """The batch that predicts `target` from `source`; 0 is padding."""
    shifted = np.zeros_like(target)
    shifted[:, 1:] = target[:, :-1]
    return {
        "encoder_input_tokens": source,
        "encoder_segment_ids": (source > 0).astype(np.int32),
        "decoder_input_tokens": shifted,
        "decoder_segment_ids": (target > 0).astype(np.int32),
    }


@functools.partial(jax.jit, static_argnums=0)
def forward(config, params, batch):
    """Logits; jitted, since op by op a scanned model takes seconds."""
    return EncoderDecoder(config).apply({"params": params}, batch)


@functools.partial(jax.jit, static_argnums=0)
def forward_with_dropout(config, params, batch, key):
    rngs = {"dropout": key}
    return EncoderDecoder(config).apply({"params": params}, batch, enable_dropout=True, rngs=rngs)


@pytest.fixture(scope="module")
def tiny():
    return jax.jit(init_params, static_argnums=0)(TINY, jax.random.key(0))


@pytest.fixture(scope="module")
def tiny_batch():
    rng = np.random.default_rng(1)
    source = rng.integers(2, 64, (3, 11)).astype(np.int32)
    target = rng.integers(2, 64, (3, 7)).astype(np.int32)
    source[0, 6:] = target[1, 3:] = 0
    return teacher_forced(source, target)


def test_packed_examples_have_the_logits_of_examples_alone(tiny):
    rng = np.random.default_rng(2)
    sources = [rng.integers(2, 64, n) for n in (9, 30, 4)]
    targets = [rng.integers(2, 64, n) for n in (12, 3, 7)]
    packed = {name: np.zeros((1, length), np.int32) for name, length in PACKED_LENGTHS.items()}
    at = dict.fromkeys(packed, 0)

    def put(name, values):
        packed[name][0, at[name] : at[name] + len(values)] = values
        at[name] += len(values)

    for i, (source, target) in enumerate(zip(sources, targets, strict=True), 1):
        put("encoder_input_tokens", source)
        put("encoder_segment_ids", [i] * len(source))
        put("decoder_input_tokens", [0, *target[:-1]])
        put("decoder_segment_ids", [i] * len(target))
    alone = teacher_forced(*(np.zeros((3, n), np.int32) for n in (30, 12)))
    for i, (source, target) in enumerate(zip(sources, targets, strict=True)):
        row = teacher_forced(*(x[None].astype(np.int32) for x in (source, target)))
        for name, x in row.items():
            alone[name][i, : x.shape[1]] = x[0]
    got = np.asarray(forward(TINY, tiny, packed))[0]
    want, start = np.asarray(forward(TINY, tiny, alone)), 0
    for i, target in enumerate(targets):
        stop = start + len(target)
        np.testing.assert_allclose(got[start:stop], want[i, : len(target)], atol=5e-5)
        start = stop


PACKED_LENGTHS = {
    "encoder_input_tokens": 48,
    "encoder_segment_ids": 48,
    "decoder_input_tokens": 25,
    "decoder_segment_ids": 25,
}


def test_a_logit_does_not_depend_on_later_targets(tiny, tiny_batch):
    before = np.asarray(forward(TINY, tiny, tiny_batch))
    changed = dict(tiny_batch, decoder_input_tokens=tiny_batch["decoder_input_tokens"].copy())
    changed["decoder_input_tokens"][:, 4:] = 9
    after = np.asarray(forward(TINY, tiny, changed))
    used = tiny_batch["decoder_segment_ids"][:, :4] > 0
    np.testing.assert_array_equal(before[:, :4][used], after[:, :4][used])
    assert np.abs(before[0, 4:] - after[0, 4:]).max() > 1e-3


def test_ids_and_length_of_padding_do_not_matter(tiny, tiny_batch):
    want = np.asarray(forward(TINY, tiny, tiny_batch))
    garbage = {}
    for name, x in tiny_batch.items():
        x = np.pad(x, ((0, 0), (0, 5)))
        side = "encoder_segment_ids" if name.startswith("encoder") else "decoder_segment_ids"
        used = np.pad(tiny_batch[side], ((0, 0), (0, 5))) > 0
        garbage[name] = x if "segment" in name else np.where(used, x, 33)
    got = np.asarray(forward(TINY, tiny, garbage))[:, : want.shape[1]]
    used = tiny_batch["decoder_segment_ids"] > 0
    np.testing.assert_allclose(got[used], want[used], atol=2e-5)


SMALLEST = dataclasses.replace(
    TINY, emb_dim=16, num_heads=2, mlp_dim=24, num_encoder_layers=1, num_decoder_layers=1
)


def dropout_key(seed):
    """A key of the generator that compiles fastest; threefry takes a third longer."""
    return jax.random.key(seed, impl="rbg")


@pytest.fixture(scope="module")
def smallest():
    return jax.jit(init_params, static_argnums=0)(SMALLEST, jax.random.key(0))


def test_dropout_needs_asking_for_and_follows_its_key(smallest, tiny_batch):
    def logits(key=None, config=SMALLEST):
        if key is None:
            return np.asarray(forward(config, smallest, tiny_batch))
        return np.asarray(forward_with_dropout(config, smallest, tiny_batch, dropout_key(key)))

    np.testing.assert_array_equal(logits(), logits())
    np.testing.assert_array_equal(logits(3), logits(3))
    assert np.abs(logits(3) - logits(4)).max() > 0.1
    assert np.abs(logits(3) - logits()).max() > 0.1
    without = dataclasses.replace(SMALLEST, dropout_rate=0.0)
    np.testing.assert_allclose(logits(3, without), logits(), atol=1e-5)


@pytest.mark.slow
def test_remat_changes_neither_loss_nor_gradients(smallest, tiny_batch):
    def loss_and_gradients(config):
        def loss(params):
            out = forward_with_dropout(config, params, tiny_batch, dropout_key(5))
            return jnp.mean(nn.logsumexp(out, axis=-1))

        quick = {"xla_backend_optimization_level": 0}  # compiling is all that takes time here
        return jax.jit(jax.value_and_grad(loss), compiler_options=quick)(smallest)

    want = loss_and_gradients(SMALLEST)
    for policy in ("minimal", "full"):
        got = loss_and_gradients(dataclasses.replace(SMALLEST, remat_policy=policy))
        for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def test_bfloat16_logits_are_near_float32_and_parameters_stay_float32(tiny, tiny_batch):
    config = dataclasses.replace(TINY, dtype="bfloat16")
    abstract = jax.eval_shape(functools.partial(init_params, config), jax.random.key(0))
    dtypes = {x.dtype for x in jax.tree.leaves(abstract)}
    assert dtypes == {jnp.dtype("float32")}
    want = np.asarray(forward(TINY, tiny, tiny_batch))
    got = forward(config, tiny, tiny_batch)
    assert got.dtype == jnp.float32
    gap = np.abs(np.asarray(got) - want) / want.std()
    assert gap.max() < 0.2 and np.sqrt((gap**2).mean()) < 0.05


@pytest.mark.parametrize("layout", [(8, 1, 1), (2, 2, 2)], ids=str)
def test_logits_are_the_same_on_eight_devices(tiny, layout):
    assert len(jax.devices()) == 8
    rng = np.random.default_rng(3)
    shapes = (8, 16), (8, 6)
    batch = teacher_forced(*(rng.integers(2, 64, s).astype(np.int32) for s in shapes))
    want = np.asarray(forward(TINY, tiny, batch))
    mesh = sharding.make_mesh(sharding.Layout(*layout))
    placed = jax.device_put(tiny, sharding.param_shardings(mesh, abstract_params(TINY), TINY))
    batch = jax.device_put(batch, sharding.batch_sharding(mesh))
    with jax.set_mesh(mesh), nn.logical_axis_rules(sharding.LOGICAL_AXIS_RULES):
        got = jax.jit(EncoderDecoder(TINY).apply)({"params": placed}, batch)
    np.testing.assert_allclose(np.asarray(got), want, atol=2e-5)


@pytest.mark.parametrize("beams", [1, 3])
def test_a_step_over_the_encoder_states_has_the_logits_of_their_keys_and_values(
    tiny, tiny_batch, beams
):
    source = jnp.asarray(tiny_batch["encoder_input_tokens"])
    segments, model = (source > 0).astype(jnp.int32), EncoderDecoder(TINY)

    @jax.jit
    def logits(ids):
        encoded = model.apply({"params": tiny}, source, segments, method="encode")
        states, last = (encoded, encoded.swapaxes(1, 2)), []
        for cross, given in ((True, None), (False, states)):
            cache = start_cache(tiny, encoded, TINY, 2, cross=cross)
            for name in ("key", "value"):
                cache[name] = jnp.repeat(cache[name], beams, axis=1)
            for index in range(2):
                step = ids, cache, segments, jnp.int32(index), given
                found, cache = model.apply({"params": tiny}, *step, method="decode_step")
            last.append(found)
        return last

    want, got = logits(jnp.arange(3 * beams)[:, None] + 7)
    assert np.asarray(want).std() > 0.1
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)
