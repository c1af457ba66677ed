"""Adapters add a low-rank product to a projection, and merge into plain weights."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict

from stepdistill_jax.errors import InputError
from stepdistill_jax.models import sharding
from stepdistill_jax.models.config import LoraConfig
from stepdistill_jax.models.encoder_decoder import (
    EncoderDecoder,
    abstract_params,
    init_params,
    start_cache,
)
from stepdistill_jax.models.families import model_config
from stepdistill_jax.models.flops import train_flops
from stepdistill_jax.models.lora import base_of, has_adapters, merge, split
from stepdistill_jax.models.t5 import T5Config

PLAIN = T5Config(
    vocab_size=64,
    emb_dim=32,
    num_heads=4,
    head_dim=8,
    mlp_dim=48,
    num_encoder_layers=2,
    num_decoder_layers=3,
    dropout_rate=0.0,
)
RANKS = {"query": 2, "key": 3, "value": 4, "out": 5, "wi": 6, "wo": 7}
LORA = LoraConfig(**RANKS, alpha=6.0)
V1_0 = {"mlp_activations": ("relu",), "logits_via_embedding": True, "scale_decoder_outputs": True}


def adapted(**changes) -> T5Config:
    return dataclasses.replace(PLAIN, **{"lora": LORA} | changes)


@functools.cache
def params_of(config, *, zero_b=False):
    """Random, B too unless it is to be as at the start."""
    params = jax.jit(init_params, static_argnums=0)(config, jax.random.key(0))
    if zero_b:
        return params
    rng = np.random.default_rng(1)
    flat = flatten_dict(params)
    for path, x in flat.items():
        if path[-1] == "lora_b":
            flat[path] = jnp.asarray(rng.normal(0, 0.1, x.shape), jnp.float32)
    return unflatten_dict(flat)


@pytest.fixture(scope="module")
def batch():
    rng = np.random.default_rng(2)
    source, target = rng.integers(2, 64, (3, 11)), rng.integers(2, 64, (3, 7))
    source[0, 6:] = target[1, 3:] = 0
    features = {
        "encoder_input_tokens": source,
        "encoder_segment_ids": source > 0,
        "decoder_input_tokens": np.pad(target[:, :-1], ((0, 0), (1, 0))),
        "decoder_segment_ids": target > 0,
    }
    return {name: jnp.asarray(x, jnp.int32) for name, x in features.items()}


@functools.partial(jax.jit, static_argnums=0)
def forward(config, params, batch):
    return EncoderDecoder(config).apply({"params": params}, batch)


@pytest.mark.parametrize(
    "changes",
    [pytest.param({}, id="v1.1"), pytest.param(V1_0, id="v1.0", marks=pytest.mark.slow)],
)
@pytest.mark.slow
def test_adapters_begin_as_the_base_exactly(changes, batch):
    config = adapted(**changes)
    params = params_of(config, zero_b=True)
    plain = dataclasses.replace(config, lora=None)
    expected = forward(plain, base_of(params), batch)
    np.testing.assert_array_equal(forward(config, params, batch), expected)


@pytest.mark.parametrize(
    "changes",
    [pytest.param({}, id="v1.1"), pytest.param(V1_0, id="v1.0", marks=pytest.mark.slow)],
)
def test_merged_weights_give_the_logits_of_the_adapters(changes, batch):
    config = adapted(**changes)
    params = params_of(config)
    merged, plain = merge(params, config)
    assert plain == dataclasses.replace(config, lora=None)
    got, expected = forward(config, params, batch), forward(plain, merged, batch)
    np.testing.assert_allclose(got, expected, atol=1e-5)  # measured 2e-6 on logits of std 1
    # the adapters do something, or the comparison would say nothing
    assert np.abs(got - forward(plain, base_of(params), batch)).max() > 0.3


def test_a_merged_kernel_is_the_papers_formula_in_every_projection():
    """W + (alpha / rank) A B layer by layer, in NumPy; all other parameters are the same arrays."""
    config = adapted()
    params = params_of(config)
    flat, merged = flatten_dict(params), flatten_dict(merge(params, config)[0])
    changed = set()
    for path, got in merged.items():
        if (*path[:-1], "lora_a") not in flat:
            assert got is flat[path]
            continue
        w, a, b = (np.asarray(flat[*path[:-1], n], float) for n in ("kernel", "lora_a", "lora_b"))
        rank = RANKS[path[-2].removesuffix("_0").removesuffix("_1")]
        assert a.shape[-1] == b.shape[-2] == rank
        expected = np.stack([w[i] + 6.0 / rank * a[i] @ b[i] for i in range(len(w))])
        np.testing.assert_allclose(got, expected, atol=1e-6)
        changed.add(path[-2])
    assert changed == {"query", "key", "value", "out", "wi_0", "wi_1", "wo"}


@pytest.mark.parametrize("projection", RANKS)
def test_a_rank_adds_adapters_to_its_projection_alone(projection):
    config = adapted(lora=LoraConfig(**{projection: 2}))
    trained, frozen = split(
        jax.eval_shape(functools.partial(init_params, config), jax.random.key(0))
    )
    modules = {path[-2].removesuffix("_0").removesuffix("_1") for path in flatten_dict(trained)}
    assert modules == {projection}
    blocks = {path[2] for path in flatten_dict(trained)}
    assert blocks == (
        {"mlp"}
        if projection[0] == "w"
        else {"attention", "self_attention", "encoder_decoder_attention"}
    )
    plain = jax.eval_shape(functools.partial(init_params, PLAIN), jax.random.key(0))
    assert jax.tree.map(jnp.shape, frozen) == jax.tree.map(jnp.shape, plain)


@pytest.mark.slow
def test_the_gradient_of_adapters_follows_from_that_of_the_merged_kernel(batch):
    """y = x (W + s A B): with G the gradient by the merged kernel, dA = s G B^T and dB = s A^T G."""
    config, targets = adapted(), jnp.roll(batch["decoder_input_tokens"], -1, axis=1)
    params = params_of(config)

    def loss(config, params):
        logits = EncoderDecoder(config).apply({"params": params}, batch)
        return optax.softmax_cross_entropy_with_integer_labels(logits, targets).mean()

    merged, plain = merge(params, config)
    got = flatten_dict(jax.jit(jax.grad(functools.partial(loss, config)))(params))
    by_kernel = flatten_dict(jax.jit(jax.grad(functools.partial(loss, plain)))(merged))
    flat = flatten_dict(params)
    paths = [p for p in flat if p[-1] == "lora_a"]
    assert paths
    for path in paths:
        a, b = np.asarray(flat[path]), np.asarray(flat[*path[:-1], "lora_b"])
        g, s = np.asarray(by_kernel[*path[:-1], "kernel"]), 6.0 / a.shape[-1]
        for name, expected in (
            ("lora_a", s * g @ b.swapaxes(1, 2)),
            ("lora_b", s * a.swapaxes(1, 2) @ g),
        ):
            gap = np.linalg.norm(got[*path[:-1], name] - expected) / np.linalg.norm(expected)
            assert gap < 1e-5, (path, name, gap)  # measured 1e-6


def test_a_merged_kernel_lies_where_its_kernel_did():
    config = adapted()
    mesh = sharding.make_mesh("fsdp_tensor")
    shardings = sharding.param_shardings(mesh, abstract_params(config), config)
    placed = jax.device_put(params_of(config), shardings)
    expected = flatten_dict(merge(params_of(config), config)[0])
    for path, got in flatten_dict(merge(placed, config)[0]).items():
        assert got.sharding == flatten_dict(shardings)[path]
        np.testing.assert_allclose(got, expected[path], atol=1e-6)
    adapter = placed["encoder"]["layers"]["mlp"]["wo"]["lora_a"]  # [layers, mlp, lora]
    assert adapter.addressable_shards[0].data.shape == (2, 48 // 2, 7)


def test_nothing_decodes_with_adapters_that_are_not_merged():
    """With a plain configuration Flax would leave them out without a word."""
    encoded = jnp.zeros((1, 4, PLAIN.emb_dim))
    params = params_of(adapted())
    for config in (adapted(), PLAIN):
        with pytest.raises(ValueError, match="merge first"):
            start_cache(params, encoded, config, 4)
    start_cache(*merge(params, adapted())[:1], encoded, PLAIN, 4)


def test_merge_wants_parameters_that_fit_the_configuration():
    for params, config in ((params_of(adapted()), PLAIN), (params_of(PLAIN), adapted())):
        with pytest.raises(ValueError, match="disagree"):
            merge(params, config)
    assert merge(params_of(PLAIN), PLAIN) == (params_of(PLAIN), PLAIN)
    assert not has_adapters(params_of(PLAIN))


def test_a_step_of_adapters_is_said_to_cost_less_than_a_full_one():
    """No gradient of the frozen kernels: 4 of 6 FLOPs per weight, and the adapters' own on top."""
    plain = model_config("t5_v1_1", "large", vocab_size=32128)
    size = {"rows": 8, "input_length": 512, "target_length": 114}
    full = train_flops(plain, **size)
    lora = train_flops(dataclasses.replace(plain, lora=LoraConfig(query=8, value=8)), **size)
    assert 0.66 * full < lora < 0.75 * full


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, "at least one rank must be above 0"),
        ({"query": -1}, "lora.query` must be a whole number"),
        ({"wo": 2.0}, "lora.wo` must be a whole number"),
        ({"key": True}, "lora.key` must be a whole number"),
        ({"query": 1, "alpha": 0}, "lora.alpha` must be a number above 0"),
        ({"query": 1, "alpha": "8"}, "lora.alpha` must be a number above 0"),
    ],
    ids=str,
)
def test_a_wrong_rank_or_alpha_is_refused(fields, message):
    with pytest.raises(InputError, match=message):
        LoraConfig(**fields)
