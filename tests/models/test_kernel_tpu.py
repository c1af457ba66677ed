"""The TPU's attention kernel, interpreted, against plain operations; and the TPU compiler on it."""

import functools
import math
import os
import subprocess
import sys
from typing import NamedTuple

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import pytest

from stepdistill_jax.models.attention import ATTENTION_OUTPUT, attention
from stepdistill_jax.models.dropout import dropout, dropout_seeds, kept_draws
from stepdistill_jax.models.kernel_costs import formula_of
from stepdistill_jax.models.kernels import tpu

KEY = jax.random.key(3)


def example(rows, queries, keys, heads, width, *, bias, dtype="float32", seed=0):
    """(q, k, v, bias), (segments of queries, of keys), slope of the output."""
    rng = np.random.default_rng(seed)

    def normal(*shape):
        return jnp.asarray(rng.normal(size=shape), jnp.float32)

    q, slope = (normal(rows, queries, heads, width).astype(dtype) for _ in range(2))
    k, v = (normal(rows, keys, heads, width).astype(dtype) for _ in range(2))
    segments = [np.sort(rng.integers(1, 4, (rows, length)), axis=1) for length in (queries, keys)]
    for of in segments:
        of[:, -of.shape[1] // 5 :] = 0
    segments = segments[1:] * 2 if queries == keys else segments
    bias = normal(1, heads, queries, keys) if bias else None
    return (q / 8, k, v, bias), [jnp.asarray(x, jnp.int32) for x in segments], slope


def plain(q, k, v, bias, *, segments, rate, **options):
    rng = KEY if rate else None
    return attention(
        q, k, v, relative_bias=bias, query_segments=segments[0], key_segments=segments[1],
        dropout_rate=rate, dropout_rng=rng, implementation="xla", **options,
    )  # fmt: skip


def kernel(q, k, v, bias, *, segments, rate, **options):
    seeds = dropout_seeds(KEY, (q.shape[0], q.shape[2])) if rate else None
    bias = None if bias is None else bias[0]
    return tpu.attention(
        q, k, v, bias, *segments, seeds, kept=kept_draws(rate), interpret=True, **options
    )


def value_and_gradients(function, arrays, slope):
    def both(slope, *arrays):
        value, back = jax.vjp(function, *arrays)
        return value, back(slope)

    return jax.tree.leaves(jax.jit(both)(slope, *arrays))


def check(shape, *, bias, causal, rate, dtype="float32"):
    arrays, segments, slope = example(*shape, bias=bias, dtype=dtype)
    visible = (segments[0][:, :, None] == segments[1][:, None]) & (segments[1] > 0)[:, None]
    if causal:
        visible &= jnp.tril(jnp.ones(visible.shape[1:], bool))
    known = visible.any(axis=2)[:, :, None, None]
    assert 0.3 < known.mean() < 1
    options = {"segments": segments, "rate": rate, "causal": causal}
    want = value_and_gradients(functools.partial(plain, **options), arrays, slope * known)
    got = value_and_gradients(functools.partial(kernel, **options), arrays, slope * known)
    assert not np.where(
        known, 0, got[0]
    ).any()  # the kernel gives 0 where the plain form has no meaning
    limits = {"float32": (1e-6, 1e-5), "bfloat16": (0.01, 0.02)}[
        dtype
    ]  # measured 1e-7, 2.4e-7; 0.003, 0.004
    for i, (one, other) in enumerate(zip(got, want, strict=True)):
        assert (one.shape, one.dtype) == (other.shape, other.dtype)
        one, other = (np.asarray(x, np.float64) for x in (one, other))
        other = other if i else other * known
        assert np.linalg.norm(one - other) <= limits[i > 0] * np.linalg.norm(other)


def test_an_odd_head_dropout_and_a_bias_are_as_in_the_plain_form():
    check((2, 140, 140, 3, 64), bias=True, causal=True, rate=0.3)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("rate", [0.0, 0.1])
@pytest.mark.parametrize(
    ("shape", "bias", "causal"),
    [
        ((2, 20, 20, 2, 64), True, False),
        ((3, 7, 150, 4, 64), False, False),
        ((2, 130, 512, 3, 64), False, False),
        ((1, 300, 260, 2, 128), True, False),
        ((2, 700, 700, 1, 64), True, True),
    ],
    ids=str,
)
def test_value_and_gradients_are_those_of_the_plain_form(shape, bias, causal, rate, dtype):
    check(shape, bias=bias, causal=causal, rate=rate, dtype=dtype)


def test_dropout_keeps_its_rate_and_mean():
    """Even weights, whose values are the unit vectors: the output is the weights themselves."""
    rows, queries, keys = 3, 200, 64
    zeros = jnp.zeros((rows, queries, 2, keys))
    unit = jnp.broadcast_to(jnp.eye(keys)[None, :, None], (rows, keys, 2, keys))
    segments = [jnp.ones((rows, length), jnp.int32) for length in (queries, keys)]
    found = kernel(zeros, unit, unit, None, segments=segments, rate=0.3, causal=False)
    weights = np.asarray(found).transpose(0, 2, 1, 3) * keys
    even = jnp.ones(weights.shape)
    np.testing.assert_allclose(weights, dropout(even, 0.3, KEY, broadcast=False), rtol=1e-6)
    sigma = (0.3 * 0.7 / weights.size) ** 0.5
    assert abs((weights == 0).mean() - 0.3) < 5 * sigma
    assert abs(weights.mean() - 1) < 5 * sigma / 0.7


def test_gradients_are_differences_of_values_with_the_mask_fixed():
    arrays, segments, slope = example(1, 20, 30, 2, 64, bias=True)
    call = functools.partial(kernel, segments=segments, rate=0.3, causal=False)
    total = jax.jit(jax.value_and_grad(lambda *x: jnp.vdot(call(*x), slope), (0, 1, 2, 3)))
    _, gradients = total(*arrays)
    rng = np.random.default_rng(9)
    for i, gradient in enumerate(gradients):
        way = jnp.asarray(rng.normal(size=gradient.shape), jnp.float32)
        ends = [total(*arrays[:i], arrays[i] + s * way, *arrays[i + 1 :])[0] for s in (-0.01, 0.01)]
        along = float(jnp.vdot(gradient, way))
        # measured 0.001 of the gradient's length
        assert abs(float(ends[1] - ends[0]) / 0.02 - along) < 0.01 * np.linalg.norm(gradient)


def test_a_layer_computed_again_does_not_call_the_kernel_again():
    arrays, segments, _ = example(1, 16, 16, 2, 64, bias=True)
    policies = jax.checkpoint_policies

    def layer(*arrays):
        return jnp.sin(kernel(*arrays, segments=segments, rate=0.1, causal=False))

    def calls(policy):
        again = jax.checkpoint(layer, policy=policy, prevent_cse=False)
        gradient = jax.value_and_grad(lambda *x: again(*x).sum(), (0, 1, 2, 3))
        return sorted(names_of_kernels(jax.make_jaxpr(gradient)(*arrays).jaxpr))

    once = ["tpu_attention", "tpu_attention_gradient"]
    assert calls(policies.save_only_these_names(ATTENTION_OUTPUT)) == once
    assert calls(policies.nothing_saveable) == sorted([*once, "tpu_attention"])


def names_of_kernels(jaxpr):
    """Of the calls whose outputs are read; XLA drops the others."""
    read = {x for x in jaxpr.outvars if isinstance(x, jax.extend.core.Var)}
    for equation in reversed(jaxpr.eqns):
        if not read.intersection(equation.outvars):
            continue
        read.update(x for x in equation.invars if isinstance(x, jax.extend.core.Var))
        if equation.primitive.name == "pallas_call":
            yield equation.params["name"]
        else:
            for inner in jax.core.jaxprs_in_params(equation.params):
                yield from names_of_kernels(inner)


def test_shapes_that_the_kernel_cannot_do_are_named():
    reason = functools.partial(tpu.reason_against, bias=True, kind="TPU v5 lite")
    for d in (64, 128):
        for lengths in ((512, 512), (114, 114), (114, 512), (1024, 1024), (256, 1024)):
            assert reason(*lengths, 3, d, jnp.bfloat16) is None
    assert "head_dim 48" in reason(512, 512, 8, 48, jnp.bfloat16)
    assert "float16" in reason(512, 512, 8, 64, jnp.float16)
    assert "4096" in reason(4096, 4096, 8, 64, jnp.bfloat16)
    assert "need 61 MiB, above the limit of 60" in reason(1088, 1088, 8, 64, jnp.bfloat16)
    # without a bias, as across: the keys alone are long
    assert "2048" in reason(512, 2048, 8, 64, jnp.bfloat16)
    assert reason(512, 2048, 8, 64, jnp.bfloat16, bias=False) is None


class Array(NamedTuple):
    dtype: str
    dims: tuple[int, ...]

    @property
    def bytes(self):
        return math.prod(self.dims) * (2 if self.dtype == "bf16" else 4)


def test_a_forward_call_costs_two_products_and_reads_segments_for_each_pair():
    """2 rows of 128 queries and keys, 4 heads of 64."""
    wide, bias = Array("bf16", (2, 128, 256)), Array("f32", (2, 1, 128, 256))
    segments = Array("s32", (2, 1, 256)), Array("s32", (2, 1, 128))
    operands = [Array("u32", (2, 2, 4)), wide, wide, wide, bias, *segments]
    results = [wide, Array("f32", (2, 2, 1, 256))]
    formula = formula_of("tpu_custom_call", "jit(f)/jvp(tpu_attention)/pallas_call")
    elements = 2 * 4 * 128 * 128
    found = formula(operands, results)
    assert found.flops == 2 * 2 * elements * 128
    # seeds, 4 wide, bias, log-sums, and segments of both pairs
    sizes = 2 * 2 * 4, 4 * 128 * 256, 2 * 128 * 256, 4 * 256, 2 * 2 * (256 + 128)
    assert found.bytes == 4 * sum(sizes)
    without = formula([*operands[1:4], *segments], results)
    assert found.integer - without.integer == 7 * elements
    assert found.other - without.other == 2 * elements


COMPILED = """
import sys
import jax, jax.numpy as jnp
from stepdistill_jax.models.kernels import tpu
from stepdistill_jax.planning.devices import topology_devices
from stepdistill_jax.planning.hlo import Module
from stepdistill_jax.planning.roofline import bound
from stepdistill_jax.runtime.chips import chip_of

(device, *_), lengths = topology_devices(sys.argv[1]), [int(x) for x in sys.argv[2].split("/")]
sharding, rows = jax.sharding.SingleDeviceSharding(device), int(sys.argv[6])
heads, width, dtype = int(sys.argv[3]), int(sys.argv[4]), jnp.dtype(sys.argv[5])

def array(*shape, dtype=dtype):
    return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

source, target = lengths
encoder, decoder = (source, source, True, False), (target, target, True, True)
cross = target, source, False, False
for q_len, k_len, bias, causal in (encoder, decoder, cross):
    shapes = q_len, k_len, heads, width, dtype
    assert tpu.reason_against(*shapes, bias=bias, kind=device.device_kind) is None
    q, k = array(rows, q_len, heads, width), array(rows, k_len, heads, width)
    given = (q, k, k, array(heads, q_len, k_len, dtype=jnp.float32) if bias else None)
    segments = [array(rows, length, dtype=jnp.int32) for length in (q_len, k_len)]
    others = *segments, array(2, rows, heads, dtype=jnp.uint32)

    def both(slope, others, *given):
        call = lambda *x: tpu.attention(*x, *others, causal=causal, kept=58982)
        value, back = jax.vjp(call, *given)
        return value, back(slope)

    compiled = jax.jit(both).lower(q, others, *given).compile()
    found = bound(Module(compiled.as_text()), chip_of(device.device_kind), on_tpu=True).to_json()
    assert not found["calls_without_formula"], found
    tiles = rows * (heads + heads % 2) * -(-q_len // 128) * -(-k_len // 128)
    # seven products of 128 x 128 elements and two heads' features
    passes = 6 if dtype == "float32" else 1
    assert found["flops"] == tiles * 7 * 2 * 128 * 128 * 2 * width * passes
"""


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    ("lengths", "heads", "width", "dtype", "rows"),
    [
        ("512/114", 3, 64, "bfloat16", 4),  # half of `small`'s heads
        ("512/114", 16, 64, "bfloat16", 4),
        ("512/114", 12, 64, "float32", 4),
        ("1024/256", 16, 64, "bfloat16", 4),
        ("1024/256", 6, 64, "float32", 4),
        ("512/114", 32, 128, "bfloat16", 4),
        ("1024/256", 32, 128, "bfloat16", 4),
        ("128/128", 16, 64, "bfloat16", 2048),  # whose seeds would not fit at once
    ],
)
@pytest.mark.parametrize("topology", ["v5e:2x2", "v5p:2x2x1", "v6e:2x2"])
def test_the_compiler_takes_the_kernel(topology, lengths, heads, width, dtype, rows):
    pytest.importorskip("libtpu", reason="no TPU compiler: pip install '.[tpu]'")
    done = subprocess.run(
        [sys.executable, "-c", COMPILED, topology, lengths, *map(str, (heads, width, dtype, rows))],
        text=True, capture_output=True, env=os.environ | {"XLA_FLAGS": ""},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
