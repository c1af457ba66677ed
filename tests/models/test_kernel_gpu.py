"""The attention kernels for NVIDIA GPUs against plain operations: interpreted here, compiled for an H100."""

import dataclasses
import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stepdistill_jax.models.attention import ATTENTION_OUTPUT, attention, seen
from stepdistill_jax.models.dropout import dropout_seeds, kept_draws
from stepdistill_jax.models.kernel_costs import formula_of
from stepdistill_jax.models.kernels import gpu
from stepdistill_jax.planning import devices

KEY = jax.random.key(7)
# relative norm of the difference to plain operations: (value, gradients)
TOLERANCE = {"float32": (1e-6, 1e-5), "bfloat16": (8e-3, 1.2e-2)}


@dataclasses.dataclass(frozen=True)
class Case:
    q_len: int
    k_len: int
    causal: bool = False
    bias: bool = True
    rate: float = 0.0
    rows: int = 2
    heads: int = 2
    head_dim: int = 16
    dtype: str = "float32"
    seed: int = 0

    def arrays(self):
        """(q, k, v, bias), segments of queries and keys, a slope that is 0 where a query sees nothing."""
        rng = np.random.default_rng(self.seed)
        shape = (self.heads, self.head_dim)
        q = rng.normal(size=(self.rows, self.q_len, *shape)) / self.head_dim**0.5
        k, v = (rng.normal(size=(self.rows, self.k_len, *shape)) for _ in range(2))
        bias = rng.normal(size=(self.heads, self.q_len, self.k_len)) if self.bias else None
        k_segments = self.segments(rng, self.k_len)
        q_segments = k_segments if self.causal else self.segments(rng, self.q_len)
        mask = np.array(seen(q_segments, k_segments))[:, 0]
        if self.causal:
            mask &= np.tri(self.q_len, dtype=bool)
        slope = rng.normal(size=q.shape) * mask.any(-1)[:, :, None, None]
        cast = lambda x: jnp.asarray(x, self.dtype)  # noqa: E731
        bias = None if bias is None else jnp.asarray(bias, jnp.float32)
        return (*map(cast, (q, k, v)), bias), q_segments, k_segments, cast(slope), mask.any(-1)

    def segments(self, rng, length):
        """Packed examples and padding; of the last row padding alone."""
        found = np.sort(rng.integers(1, 4, (self.rows, length)), axis=1)
        found[:, length - length // 16 :] = 0
        found[-1] *= self.rows == 1
        return jnp.asarray(found, jnp.int32)


def kernel(case, q_segments, k_segments):
    seeds = dropout_seeds(KEY, (case.rows, case.heads)) if case.rate else None
    return lambda q, k, v, bias: gpu.attention(
        q, k, v, bias, q_segments, k_segments, seeds,
        causal=case.causal, kept=kept_draws(case.rate), interpret=True,
    )  # fmt: skip


def plain(case, q_segments, k_segments):
    return lambda q, k, v, bias: attention(
        q, k, v,
        relative_bias=None if bias is None else bias[None],
        query_segments=q_segments, key_segments=k_segments, causal=case.causal,
        dropout_rate=case.rate, dropout_rng=KEY, implementation="xla",
    )  # fmt: skip


def check(case):
    """Value where a query sees a key, and all gradients."""
    arrays, q_segments, k_segments, slope, sees = case.arrays()

    def run(make):
        def both(*arrays):
            value, pull = jax.vjp(make(case, q_segments, k_segments), *arrays)
            return value, pull(slope)

        value, gradients = jax.jit(both)(*arrays)
        assert all(x.dtype == y.dtype for x, y in zip(gradients[:3], arrays[:3], strict=True))
        found = [value, *(x for x in gradients if x is not None)]
        assert all(np.isfinite(np.asarray(x, np.float32)).all() for x in found)
        return [
            np.asarray(value, np.float64)[sees],
            *(np.asarray(x, np.float64) for x in found[1:]),
        ]

    got, want = run(kernel), run(plain)
    assert len(got) == 4 + case.bias
    tolerances = TOLERANCE[case.dtype][0], *(TOLERANCE[case.dtype][1],) * 4
    for one, other, tolerance in zip(got, want, tolerances, strict=False):
        norm = np.linalg.norm(other)
        # of queries that see one key each, the gradient is 0
        assert np.linalg.norm(one - other) <= tolerance * (norm if norm > 1e-3 else 2)


def test_the_kernel_computes_what_plain_operations_do():
    """Two programs of queries, of which one has a half alone; the same masks of dropout."""
    check(Case(150, 150, causal=True, rate=0.2, heads=1))


@pytest.mark.slow
@pytest.mark.parametrize(
    "case",
    [
        Case(114, 200),
        Case(7, 7, causal=True, rate=0.1),
        Case(64, 130, bias=False, rate=0.1),
        Case(130, 64, rate=0.5, rows=3),
        Case(192, 70, heads=1),  # the last program has one half
        Case(200, 300, dtype="bfloat16", head_dim=64, rate=0.1),
        Case(256, 256, causal=True, dtype="bfloat16", head_dim=128, rows=1),
    ],
    ids=str,
)
def test_encoder_decoder_and_cross_attention(case):
    check(case)


@pytest.mark.slow
@pytest.mark.timeout(900)
@given(
    q_len=st.integers(1, 200),
    k_len=st.integers(1, 200),
    causal=st.booleans(),
    bias=st.booleans(),
    rate=st.sampled_from([0.0, 0.1, 0.5]),
    rows=st.integers(1, 3),
    seed=st.integers(0, 1000),
)
def test_drawn_shapes_and_segments(q_len, k_len, causal, bias, rate, rows, seed):
    check(Case(q_len, q_len if causal else k_len, causal, bias, rate, rows, seed=seed))


@pytest.mark.slow
def test_segments_in_any_order_and_keys_that_nobody_sees():
    """Which tiles are skipped goes by the least and the greatest segment: no other tile may be."""
    case = Case(140, 200, heads=1)
    arrays, *_ = case.arrays()
    rng = np.random.default_rng(3)
    segments = [jnp.asarray(rng.choice([0, 2, 5, 9], (2, n)), jnp.int32) for n in (140, 200)]
    sees = np.asarray(seen(*segments)).any(-1)[:, 0]
    got, want = (make(case, *segments)(*arrays) for make in (kernel, plain))
    np.testing.assert_allclose(np.asarray(got)[sees], np.asarray(want)[sees], rtol=1e-5, atol=1e-6)
    assert not np.asarray(got)[~sees].any()


@pytest.mark.slow
def test_forward_and_backward_have_the_same_masks():
    """Finite differences along a direction of all arguments, dropout on."""
    case = Case(70, 130, rate=0.3, heads=1)
    arrays, q_segments, k_segments, slope, _ = case.arrays()
    run = kernel(case, q_segments, k_segments)
    rng = np.random.default_rng(5)
    direction = [jnp.asarray(rng.normal(size=x.shape), jnp.float32) for x in arrays]

    def along(step):
        moved = [x + step * d for x, d in zip(arrays, direction, strict=True)]
        return np.vdot(np.asarray(run(*moved), np.float64), np.asarray(slope, np.float64))

    gradients = jax.vjp(run, *arrays)[1](slope)
    want = sum(np.vdot(g, d) for g, d in zip(gradients, direction, strict=True))
    assert (along(1e-2) - along(-1e-2)) / 2e-2 == pytest.approx(float(want), rel=2e-3)


@pytest.mark.slow
@pytest.mark.parametrize("rate", [0.1, 0.6])
def test_dropout_keeps_its_rate_and_the_mean(rate):
    """Even weights: a query's output counts the keys that it keeps."""
    rows, length, heads = 2, 192, 2
    zeros = jnp.zeros((rows, length, heads, 16))
    ones = jnp.ones((rows, length), jnp.int32)
    out = gpu.attention(
        zeros, zeros, zeros + 1, None, ones, ones, dropout_seeds(KEY, (rows, heads)),
        causal=False, kept=kept_draws(rate), interpret=True,
    )  # fmt: skip
    kept = np.asarray(out[..., 0], np.float64) * length * (1 - rate)
    np.testing.assert_allclose(kept, kept.round(), atol=1e-2)  # whole keys
    draws = rows * length * heads * length
    assert kept.sum() / draws == pytest.approx(1 - rate, abs=4 * (rate * (1 - rate) / draws) ** 0.5)


def test_a_layer_that_is_computed_again_does_not_call_the_forward_kernel_again(equations):
    case = Case(16, 16, rate=0.1)
    arrays, q_segments, k_segments, *_ = case.arrays()
    run = kernel(case, q_segments, k_segments)

    def calls(policy):
        layer = jax.checkpoint(lambda *x: jnp.sin(run(*x)), policy=policy, prevent_cse=False)
        program = jax.make_jaxpr(jax.grad(lambda *x: layer(*x).sum(), (0, 1, 2, 3)))(*arrays)
        return sum(equation.primitive.name == "pallas_call" for equation in equations(program))

    policies = jax.checkpoint_policies
    assert calls(policies.save_only_these_names(ATTENTION_OUTPUT)) == 4
    assert calls(policies.nothing_saveable) == 5


def test_shapes_that_the_kernel_cannot_do():
    def reason(*shapes, kind="NVIDIA H100 80GB HBM3"):
        return gpu.reason_against(*shapes, bias=True, kind=kind)

    older = "NVIDIA A100-SXM4-80GB"
    assert reason(512, 114, 16, 64, jnp.bfloat16) is None
    assert reason(512, 114, 32, 128, jnp.bfloat16) is None
    assert "head_dim 80" in reason(512, 512, 16, 80, jnp.bfloat16)
    assert "head_dim 128" in reason(512, 512, 16, 128, jnp.float32)
    assert "float16" in reason(512, 512, 16, 64, jnp.float16)
    assert "40000" in reason(40_000, 512, 16, 64, jnp.float32)
    assert reason(512, 114, 16, 64, jnp.bfloat16, kind=older) is None
    assert older in reason(512, 114, 32, 128, jnp.bfloat16, kind=older)
    assert "AMD" in reason(512, 114, 16, 64, jnp.bfloat16, kind="AMD Instinct MI300X")


@dataclasses.dataclass(frozen=True)
class Array:
    dtype: str
    dims: tuple[int, ...]

    @property
    def bytes(self):
        return int(np.prod(self.dims)) * {"bf16": 2, "f32": 4, "s32": 4, "u32": 4}[self.dtype]


@pytest.mark.parametrize(("causal", "tiles"), [(False, 4 * 8), (True, 2 + 4 + 6 + 8)])
def test_a_forward_call_costs_two_products_of_each_tile(causal, tiles):
    """512 queries and keys, 128 queries and 64 keys in a tile, dropout."""
    wide, square, segments = (2, 512, 3, 64), (3, 512, 512), (2, 512)
    operands = [Array("bf16", wide)] * 3 + [Array("f32", square)]
    operands += [Array("s32", segments)] * 2 + [Array("u32", (2, 2, 3))]
    results = [Array("bf16", wide), Array("f32", (2, 3, 512))]
    name = "gpu_attention_forward" + "_causal" * causal
    cost = formula_of("triton", f"jit(f)/transpose(jvp({name}))/pallas_call")(operands, results)
    places = 2 * 3 * tiles * 128 * 64
    assert cost.flops == places * 2 * 2 * 64
    assert cost.bytes == sum(array.bytes for array in operands + results)
    assert cost.integer == places * (8 + 2 * causal)
    assert cost.other == places * 8


# bfloat16 and heads of small to xl, and of the original 3b; both passes of all three attentions
COMPILE = """
import itertools, json, sys
import jax, jax.numpy as jnp
from stepdistill_jax.models.kernels import gpu
from stepdistill_jax.planning.devices import topology_devices

heads, head_dim, inputs, targets, dtype = json.loads(sys.argv[1])
(device,) = topology_devices("cuda:1")
shapes = inputs, targets, heads, head_dim, dtype
assert gpu.reason_against(*shapes, bias=True, kind=device.device_kind) is None
sharding = jax.sharding.SingleDeviceSharding(device)
shape = lambda *dims, dtype=dtype: jax.ShapeDtypeStruct(dims, dtype, sharding=sharding)
for q_len, k_len, causal, bias in [
    (inputs, inputs, False, True), (targets, targets, True, True), (targets, inputs, False, False)
]:
    def both(q, k, v, bias, q_segments, k_segments, seeds, slope):
        run = lambda *x: gpu.attention(*x, q_segments, k_segments, seeds, causal=causal, kept=60000)
        value, pull = jax.vjp(run, q, k, v, bias)
        return value, pull(slope)

    q, k = (shape(4, length, heads, head_dim) for length in (q_len, k_len))
    bias = shape(heads, q_len, k_len, dtype=jnp.float32) if bias else None
    segments = [shape(4, length, dtype=jnp.int32) for length in (q_len, k_len)]
    seeds = shape(2, 4, heads, dtype=jnp.uint32)
    text = jax.jit(both).lower(q, k, k, bias, *segments, seeds, q).compile().as_text()
    print(text.count('custom_call_target="__gpu$xla.gpu.triton"'))
"""


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("lengths", [(512, 114), (1024, 256)], ids=str)
@pytest.mark.parametrize(
    "heads", [(6, 64), (12, 64), (16, 64), (32, 64), (32, 128), (12, 64, "float32")], ids=str
)
def test_the_kernels_compile_for_an_h100(heads, lengths):
    if not any(devices._found(f"jax_plugins.xla_cuda{version}") for version in (13, 12)):
        pytest.skip("no compiler for NVIDIA GPUs: pip install '.[aot-cuda]'")
    count, width, dtype = (*heads, "bfloat16")[:3]
    done = subprocess.run(
        [sys.executable, "-c", COMPILE, json.dumps([count, width, *lengths, dtype])],
        text=True, capture_output=True, env=os.environ | {"XLA_FLAGS": ""}, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert [int(n) for n in done.stdout.split()] == [4, 4, 3]
