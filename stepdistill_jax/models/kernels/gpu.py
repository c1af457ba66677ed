"""T5's attention for NVIDIA GPUs from the A100 on, in Pallas (Triton).

The forward kernel (FlashAttention) stores the logarithm of each softmax's denominator. From it, the backward
kernels recompute the weights. A program is one instance of a kernel (`pl.program_id`). No two programs add to the
same output, so results are repeatable:

    queries' gradient           a program has a block of queries of one row and head, and loops over keys
    keys' and values' gradient  a program has a tile of keys of one row and head, and loops over queries
    bias's gradient             a program has a block of queries and a tile of keys of one head, and loops over rows

A block has 128 queries, or 64 if a row has no more. A tile has 64 keys, or 32 (`gpu_tiles.FEW_KEYS`).
"""

import functools

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from stepdistill_jax.models.attention import ATTENTION_OUTPUT
from stepdistill_jax.models.dropout import DRAWS
from stepdistill_jax.models.kernels import gpu_programs
from stepdistill_jax.models.kernels.gpu_costs import name_of
from stepdistill_jax.models.kernels.gpu_tiles import FEW_KEYS, KEYS, Call
from stepdistill_jax.models.sharding import traced_device

_HEAD_DIMS = (16, 32, 64, 128)
_DTYPES = ("bfloat16", "float32")
_LONGEST = 32768  # a program reads the segments of a complete row
# Matmuls on a Hopper GPU read their factors from shared memory. Other GPUs load the factors into registers
# first, so their tiles must be smaller.
_HOPPER = ("H100", "H200", "H800", "H20")


def reason_against(
    q_len: int,
    k_len: int,
    heads: int,
    head_dim: int,
    dtype: jax.typing.DTypeLike,
    *,
    bias: bool,
    kind: str,
) -> str | None:
    """Returns why the kernel does not support these shapes on this kind of GPU, or None if it does."""
    del heads, bias
    if not kind.startswith("NVIDIA"):
        return f"there is no kernel for {kind}"
    if head_dim not in _HEAD_DIMS:
        return f"head_dim {head_dim} is not one of {_HEAD_DIMS}"
    if jnp.dtype(dtype).name not in _DTYPES:
        return f"dtype {jnp.dtype(dtype).name} is not one of {_DTYPES}"
    single = jnp.dtype(dtype) == jnp.float32
    if single and head_dim > 64:
        return f"head_dim {head_dim} in float32 does not fit into shared memory"
    if not _is_hopper(kind) and (single or head_dim > 64):
        return f"head_dim {head_dim} in {jnp.dtype(dtype).name} was not tested on {kind}"
    if max(q_len, k_len) > _LONGEST:
        return f"length {max(q_len, k_len)} is above {_LONGEST}"
    return None


def attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    bias: jax.Array | None,
    query_segments: jax.Array,
    key_segments: jax.Array,
    seeds: jax.Array | None,
    *,
    causal: bool,
    kept: int,
    interpret: bool = False,
) -> jax.Array:
    """Computes attention on one device. The package's docstring describes the arguments and the result."""
    if seeds is None:
        kept = DRAWS  # with this value, the programs draw no random numbers
    large = q.dtype != jnp.float32 and _is_hopper(traced_device().device_kind)
    keys = KEYS if large else FEW_KEYS
    call = Call(causal, kept, q.shape[1], k.shape[1], keys, interpret)
    return _attention(q, k, v, bias, query_segments, key_segments, seeds, call)


def _is_hopper(kind: str) -> bool:
    """Returns whether this kind of device is a Hopper GPU.

    The result is also True for a CPU, where kernels run in interpret mode.
    """
    return not kind.startswith("NVIDIA") or any(name in kind for name in _HOPPER)


@functools.partial(jax.custom_vjp, nondiff_argnums=(7,))
def _attention(q, k, v, bias, q_segments, k_segments, seeds, call):
    return _forward(q, k, v, bias, q_segments, k_segments, seeds, call)[0]


def _forward(q, k, v, bias, q_segments, k_segments, seeds, call):
    arrays = (q, k, v, bias, q_segments, k_segments, seeds)
    rows, _, heads, _ = q.shape
    one = _Specs(arrays)
    out, log_sum = _run(
        gpu_programs.forward,
        call,
        (call.query_programs, rows, heads),
        arrays,
        one.inputs,
        [jax.ShapeDtypeStruct(q.shape, v.dtype), _per_query(q)],
        [one.queries, one.per_query],
    )
    # `jax.checkpoint` saves these two arrays by name. Otherwise a recomputed layer would run the kernel again.
    out = checkpoint_name(out, ATTENTION_OUTPUT)
    log_sum = checkpoint_name(log_sum, ATTENTION_OUTPUT)
    return out, (arrays, out, log_sum)


def _backward(call, saved, slope):
    arrays, out, log_sum = saved
    q, k, v, bias = arrays[:4]
    rows, _, heads, _ = q.shape
    one = _Specs(arrays)
    # `slope` is the gradient of the output. dots = slope . output of each query, [rows, heads, q]: the first
    # kernel computes it, and the next two read it (D in FlashAttention-2, arXiv:2307.08691, algorithm 2).
    dq, dots = _run(
        gpu_programs.queries_gradient,
        call,
        (call.query_programs, rows, heads),
        (*arrays, log_sum, out, slope),
        [*one.inputs, one.per_query, one.queries, one.queries],
        [jax.ShapeDtypeStruct.like(q), _per_query(q)],
        [one.queries, one.per_query],
    )
    dk, dv = _run(
        gpu_programs.keys_gradient,
        call,
        (call.key_tiles, rows, heads),
        (*arrays, log_sum, dots, slope),
        [*one.inputs, one.per_query, one.per_query, one.queries],
        [jax.ShapeDtypeStruct.like(k), jax.ShapeDtypeStruct.like(v)],
        [one.keys, one.keys],
    )
    dbias = None
    if bias is not None:
        # This kernel computes the weights a third time. To write the gradient of the scores to main memory
        # and sum it over rows would take 1.5 times as long (docs/lab/accelerators.md).
        every = _Specs(arrays, all_rows=True)
        (dbias,) = _run(
            gpu_programs.bias_gradient,
            call,
            (call.key_tiles, call.query_programs, heads),
            (*arrays, log_sum, dots, slope),
            [*every.inputs, every.per_query, every.per_query, every.queries],
            [jax.ShapeDtypeStruct.like(bias)],
            [every.bias],
        )
    return dq, dk, dv, dbias, None, None, None


_attention.defvjp(_forward, _backward)


class _Specs:
    """Pallas block specs of the attention arrays.

    A program gets one head of one row, or of all rows if `all_rows` is set.
    """

    def __init__(self, arrays, all_rows: bool = False):
        q, k, _, bias, _, _, seeds = arrays
        rows, q_len, _, width = q.shape
        k_len = k.shape[1]
        row = rows if all_rows else None  # None drops the axis from the program's reference

        def spec(shape, index):
            # The grid is (tile, row, head); with all rows it is (tile of keys, queries, head). The head is last, so
            # programs that run at the same time share its cached bias and keys.
            def place(part, r, head):
                return index(0 if all_rows else r, head)

            return pl.BlockSpec(shape, place)

        self.queries = spec((row, q_len, None, width), lambda r, h: (r, 0, h, 0))
        self.keys = spec((row, k_len, None, width), lambda r, h: (r, 0, h, 0))
        self.per_query = spec((row, None, q_len), lambda r, h: (r, h, 0))
        self.bias = spec((None, q_len, k_len), lambda r, h: (h, 0, 0))
        self.inputs = [
            self.queries,
            self.keys,
            self.keys,
            None if bias is None else self.bias,
            spec((row, q_len), lambda r, h: (r, 0)),
            spec((row, k_len), lambda r, h: (r, 0)),
            None if seeds is None else spec((2, row, None), lambda r, h: (0, r, h)),
        ]


def _per_query(q):
    rows, q_len, heads, _ = q.shape
    return jax.ShapeDtypeStruct((rows, heads, q_len), jnp.float32)


def _run(program, call, grid, arrays, in_specs, out_shape, out_specs):
    # The sums of a wide tile need the registers of more threads. With two stages, two tiles are in shared
    # memory at a time, and in float32, they do not fit.
    single = arrays[0].dtype == jnp.float32
    warps = 8 if single or arrays[0].shape[-1] > 64 else 4
    kernel = pl.pallas_call(
        functools.partial(program, call),
        grid=grid,
        in_specs=in_specs,
        out_specs=out_specs,
        out_shape=out_shape,
        compiler_params=plgpu.CompilerParams(num_warps=warps, num_stages=1 if single else 2),
        interpret=call.interpret,
        name=name_of(program.__name__, call.causal),
    )
    # If this kernel's output was saved, a recomputed layer does not need the kernel again. JAX removes an unused
    # jitted function, but never an unused pallas_call.
    return jax.jit(kernel)(*arrays)
