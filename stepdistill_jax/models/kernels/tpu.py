"""T5's attention for TPUs from v5e on, in Pallas.

A program is one instance of a kernel. The grid of programs is (pair of heads, row of the batch), and rows are the
inner loop. So the bias of a pair of heads is fetched once, and its gradient is summed over rows on the chip.
"""

import functools

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from stepdistill_jax.models.attention import ATTENTION_OUTPUT
from stepdistill_jax.models.dropout import DRAWS, HALF
from stepdistill_jax.models.kernel_costs import KernelCost, kernel_cost
from stepdistill_jax.models.kernels import tpu_programs
from stepdistill_jax.models.kernels.tpu_programs import COLUMNS, QUERIES, UNSEEN, Call

_LANES = 128
_DTYPES = ("bfloat16", "float32")
_MEMORY = 60 * 2**20  # a v5p has 64 MiB; a v5e and a v6e have 128
_TEMPORARIES = 12  # approximate number of arrays [keys, 256] float32 that a program needs at a time
_FORWARD, _BACKWARD = "tpu_attention", "tpu_attention_gradient"


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
    """Returns why the kernel does not support these shapes, or None if it does."""
    del heads, kind  # on a chip with less memory, the test at the start of a run fails to compile
    dtype = jnp.dtype(dtype)
    if 2 * head_dim % _LANES:
        return f"head_dim {head_dim} is not a multiple of {_LANES // 2}"
    if dtype.name not in _DTYPES:
        return f"dtype {dtype.name} is not one of {_DTYPES}"
    padded = _up(q_len, QUERIES), _up(k_len, _LANES)
    need = _memory(*padded, head_dim, dtype.itemsize, bias=bias)
    if need > _MEMORY:
        return f"lengths {q_len}, {k_len} need {-(-need >> 20)} MiB, above the limit of {_MEMORY >> 20} MiB"
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
    queries, heads, width = q.shape[1:]
    # 500 queries get 12 more, and 114 keys 14: the next multiples of 128
    more_queries, more_keys = -queries % QUERIES, -k.shape[1] % _LANES
    odd = heads % 2  # if the number of heads is odd, the last one is paired with a head of zeros

    # [rows, length, heads, d] -> [rows, padded length, heads x d]: a pair of heads is then 2 d columns
    def flat(x, more):
        x = jnp.pad(x, ((0, 0), (0, more), (0, odd), (0, 0)))
        return x.reshape(*x.shape[:2], -1)

    if bias is not None:
        bias = _bias_columns(jnp.pad(bias, ((0, odd), (0, more_queries), (0, more_keys))))
    if seeds is not None:
        # rows first, so that a program gets the seeds of one row; those of all rows may not fit scalar memory
        # (1 MiB)
        seeds = jnp.pad(seeds, ((0, 0), (0, 0), (0, odd))).swapaxes(0, 1)
    query_segments = jnp.pad(query_segments, ((0, 0), (0, more_queries)))
    # Padding has segment 0 among queries and another value among keys, so a comparison alone gives the mask.
    key_segments = jnp.where(key_segments > 0, key_segments, UNSEEN)
    key_segments = jnp.pad(key_segments, ((0, 0), (0, more_keys)), constant_values=UNSEEN)
    out: jax.Array = _attention(
        flat(q, more_queries),
        flat(k, more_keys),
        flat(v, more_keys),
        bias,
        _segment_columns(query_segments),
        key_segments[:, None],
        seeds,
        Call(width, causal, DRAWS if seeds is None else kept, interpret),
    )
    return out.reshape(*out.shape[:2], heads + odd, width)[:, :queries, :heads]


def _bias_columns(bias):
    """Arranges a bias [heads, q, k] as [pairs, rounds, k, 256], with the columns in the order of `tpu_programs`."""
    heads, queries, keys = bias.shape
    # (pair, head of the pair, round, half, query of the half, key)
    # -> (pair, round, key, half, head of the pair, query of the half); the last three are the column
    bias = bias.reshape(heads // 2, 2, queries // QUERIES, 2, HALF, keys)
    return bias.transpose(0, 2, 5, 3, 1, 4).reshape(heads // 2, -1, keys, COLUMNS)


def _segment_columns(segments):
    """Arranges segments [rows, q] as [rows, rounds, 256], with the columns in the order of `tpu_programs`.

    Each query's segment appears twice: a program processes two heads, and each head has its own column.
    """
    # (row, round, half, head of the pair, query of the half)
    halves = segments.reshape(segments.shape[0], -1, 2, 1, HALF)
    both = jnp.broadcast_to(halves, (*halves.shape[:3], 2, HALF))
    return both.reshape(*both.shape[:2], COLUMNS)


@functools.partial(jax.custom_vjp, nondiff_argnums=(7,))
def _attention(q, k, v, bias, q_segments, k_segments, seeds, call):
    return _forward(q, k, v, bias, q_segments, k_segments, seeds, call)[0]


def _forward(q, k, v, bias, q_segments, k_segments, seeds, call):
    given = (seeds, q, k, v, bias, q_segments, k_segments)
    one = _Specs(given, call.width)
    out, log_sums = _run(
        call,
        tpu_programs.forward,
        _FORWARD,
        one,
        given,
        one.given,
        [jax.ShapeDtypeStruct(q.shape, v.dtype), jax.ShapeDtypeStruct(one.log_sums, jnp.float32)],
        [one.queries, one.per_query],
        [],
    )
    # `jax.checkpoint` saves these two arrays by name. Otherwise a recomputed layer would run the kernel again.
    out = checkpoint_name(out, ATTENTION_OUTPUT)
    log_sums = checkpoint_name(log_sums, ATTENTION_OUTPUT)
    return out, (given, out, log_sums)


def _backward(call, saved, slope):
    given, out, log_sums = saved
    _, q, k, v, bias, _, _ = given
    one = _Specs(given, call.width)
    like = jax.ShapeDtypeStruct.like
    sums = pltpu.VMEM((k.shape[1], 2 * call.width), jnp.float32)
    slopes = _run(
        call,
        tpu_programs.backward,
        _BACKWARD,
        one,
        (*given, out, log_sums, slope),
        [*one.given, one.queries, one.per_query, one.queries],
        [like(q), like(k), like(v), None if bias is None else like(bias)],
        [one.queries, one.keys, one.keys, one.bias],
        [sums, sums],
    )
    return *slopes, None, None, None


_attention.defvjp(_forward, _backward)


class _Specs:
    """Block specs of the arrays. Each program of the grid computes one pair of heads in one row of the batch."""

    def __init__(self, given, width: int):
        seeds, q, k, _, bias, _, _ = given
        rows, queries = q.shape[:2]
        keys, rounds, pairs = k.shape[1], queries // QUERIES, q.shape[2] // (2 * width)
        self.grid = pairs, rows
        self.log_sums = (rows, pairs, rounds, COLUMNS)
        has_bias = bias is not None
        self.memory = _memory(queries, keys, width, q.dtype.itemsize, bias=has_bias)
        self.queries = pl.BlockSpec((1, queries, 2 * width), lambda p, r: (r, 0, p))
        self.keys = pl.BlockSpec((1, keys, 2 * width), lambda p, r: (r, 0, p))
        self.per_query = pl.BlockSpec((1, 1, rounds, COLUMNS), lambda p, r: (r, p, 0, 0))
        self.seeds = self.bias = None
        if seeds is not None:
            of_row = (1, *seeds.shape[1:])
            self.seeds = pl.BlockSpec(of_row, lambda p, r: (r, 0, 0), memory_space=pltpu.SMEM)
        if bias is not None:
            self.bias = pl.BlockSpec((1, rounds, keys, COLUMNS), lambda p, r: (p, 0, 0, 0))
        self.given = [
            self.seeds,
            self.queries,
            self.keys,
            self.keys,
            self.bias,
            pl.BlockSpec((1, rounds, COLUMNS), lambda p, r: (r, 0, 0)),
            pl.BlockSpec((1, 1, keys), lambda p, r: (r, 0, 0)),
        ]
        self.scratch = [
            pltpu.VMEM((keys, _LANES), jnp.int32),
            pltpu.VMEM((2 * width, keys), q.dtype),
        ]


def _run(call, program, name, one, arrays, in_specs, out_shape, out_specs, scratch):
    return pl.pallas_call(
        functools.partial(program, call),
        grid=one.grid,
        in_specs=in_specs,
        out_specs=out_specs,
        out_shape=out_shape,
        scratch_shapes=[*one.scratch, *scratch],
        # rows run in order, since the gradient of the bias is summed over them; pairs may run in any order
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=one.memory
        ),
        interpret=call.interpret,
        name=name,
    )(*arrays)


def _memory(queries: int, keys: int, width: int, itemsize: int, *, bias: bool) -> int:
    """Returns the bytes of vector memory that the backward program needs."""
    of_bias = bias * 4 * 2 * queries * keys  # float32, two heads
    # q, the output and their gradients, k, v and their gradients, each with two heads
    rows = 4 * (queries + keys) * 2 * width * itemsize
    # the transposed keys, float32 sums for the gradients of k and v, and the segments of the keys
    scratch = keys * (2 * width * (itemsize + 8) + 4 * _LANES)
    # the bias and its gradient; each block has two buffers, one of which is filled for the next program
    return 2 * (2 * of_bias + rows) + scratch + _TEMPORARIES * keys * COLUMNS * 4


def _up(length: int, multiple: int) -> int:
    return -(-length // multiple) * multiple


# Costs. The operands are seeds (with dropout), q, k, v, the bias (if there is one) and the segments of queries
# and keys. The backward call also has the output, the log-sums and the output's gradient. The operands do not
# show whether a call is causal, so the two operations per element of a causal mask are not counted.


@kernel_cost(_FORWARD)
def _forward_cost(operands, results) -> KernelCost:
    # Matmuls: scores, mean of values. Operations per element: mask, maximum, difference, exponential (a
    # multiplication and a power of 2), sum, rounding; with dropout, one selection.
    pairs = results[-1].dims[1]
    return _cost(operands, results, pairs, after=0, products=2, other=7, of_bias=1, choices=1)


@kernel_cost(_BACKWARD)
def _backward_cost(operands, results) -> KernelCost:
    # Matmuls: scores, gradients of weights, q, k and v. Operations per element: mask, difference,
    # exponential (2), two for the gradient, two roundings; with a bias, also its gradient.
    pairs = operands[-2].dims[1]
    return _cost(operands, results, pairs, after=3, products=5, other=8, of_bias=2, choices=2)


def _cost(operands, results, pairs, *, after, products, other, of_bias, choices) -> KernelCost:
    dropout = operands[0].dtype == "u32"
    given = operands[dropout : len(operands) - after]
    q, k, bias = given[0], given[1], len(given) == 6
    elements = q.dims[0] * 2 * pairs * q.dims[1] * k.dims[1]
    # Both heads of a pair are one matmul, so each element is a sum over the features of both heads. A TPU
    # multiplies float32 in 6 passes of bfloat16 (`Precision.HIGHEST`).
    passes = 6 if q.dtype == "f32" else 1
    flops = products * 2 * elements * (q.dims[2] // pairs) * passes
    # each pair of heads reads the segments; the sum over all operands below already includes one reading
    again = (pairs - 1) * sum(array.bytes for array in given[-2:])
    # 1 operation to compare segments; a random word takes 10, and has two draws, each extracted and compared
    integer = 1 + dropout * (10 / 2 + 2)
    return KernelCost(
        flops=flops,
        bytes=again + sum(array.bytes for array in (*operands, *results)),
        integer=integer * elements,
        other=(other + bias * of_bias + dropout * choices) * elements,
    )
