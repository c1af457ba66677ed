"""The kernel functions of attention on TPUs.

Pallas runs a kernel function once for each batch row and pair of heads. Such a run is called a program. A program
loops over the queries in rounds of 128, and computes their scores as an array [keys, 256] with these columns:

    column    0 ...  63   64 ... 127  128 ... 191  192 ... 255
    query     0 ...  63    0 ...  63   64 ... 127   64 ... 127
    head          first       second        first       second

For dropout, columns c and c + 128 use the two halves of the same random words.

One matmul computes the scores of both heads:

    k [keys, 2 d] . _per_head(q) [256, 2 d] = scores [keys, 256]
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl

from stepdistill_jax.models.dropout import DRAWS, HALF, random_words
from stepdistill_jax.models.products import precision_of

QUERIES = 2 * HALF  # queries that a program processes at a time
COLUMNS = 2 * QUERIES  # columns for two heads
UNSEEN = -2  # segment of keys that no query sees
_UNROLLED = 4  # a loop of at most 4 rounds is unrolled; a longer one would take long to compile
_HIDDEN = -1e9  # score of a hidden key
# Lower bound of a query's largest score. With it, a query that sees no key has weights of exp(_HIDDEN - _LEAST)
# = 0, not exp(0) = 1.
_LEAST = -1e8
_PLAIN, _BY_ROWS = (((1,), (0,)), ((), ())), (((1,), (1,)), ((), ()))  # x y, x y^T


class Call(NamedTuple):
    """The constants of a kernel.

    Attributes:
        width: number of features of a head.
        causal, kept, interpret: see the package's docstring.
    """

    width: int
    causal: bool
    kept: int
    interpret: bool


def forward(
    call: Call, seeds, q, k, v, bias, q_segments, k_segments, out, log_sums, columns, turned
):
    """Writes each query's output, and the logarithm of the query's softmax denominator.

    Args:
        seeds: [1, 2, heads], or None without dropout.
        q, out: [1, queries, 2 d].
        k, v: [1, keys, 2 d].
        bias: [1, rounds, keys, 256], or None.
        q_segments: [1, rounds, 256].
        k_segments: [1, 1, keys].
        log_sums: [1, 1, rounds, 256].
        columns: scratch memory for `k_segments`, [keys, 128].
        turned: scratch memory for transposed values, [2 d, keys].
    """
    seeds = _seeds(seeds)
    _turn(k_segments, columns)
    turned[...] = v[0].T  # once for all rounds

    def some(i, _):
        at = pl.ds(pl.multiple_of(i * QUERIES, QUERIES), QUERIES)
        scores = _scores(call, i, k[0], _per_head(call, q[0, at]), bias, q_segments, columns)
        top = jnp.maximum(_over_keys(jnp.maximum, jnp.max, scores), _LEAST)
        weights = jnp.exp(scores - top)
        total = _over_keys(jnp.add, jnp.sum, weights)
        total = jnp.where(total == 0, 1, total)  # for a query without keys, 0 / 1
        # after the sum, since dropout applies to the softmax's result and does not change its denominator
        if seeds is not None:
            weights = jnp.where(_keep(call, i, seeds, k.shape[1]), weights, 0)
        mixed = _product(call, turned[...], weights.astype(v.dtype))
        mixed *= DRAWS / call.kept / total
        log_sums[0, 0, pl.ds(i, 1)] = top + jnp.log(total)
        out[0, at] = _of_own_head(call, mixed).astype(out.dtype)

    _each(q, some)


def backward(
    call: Call,
    seeds, q, k, v, bias, q_segments, k_segments, out, log_sums, slope,
    q_slope, k_slope, v_slope, bias_slope,
    columns, turned, k_sum, v_sum,
):  # fmt: skip
    """Writes the gradients of q, k and v for a row of the batch, and adds its bias gradient to `bias_slope`.

    Args:
        slope, q_slope, k_slope, v_slope, bias_slope: gradients in the shapes of out, q, k, v and bias.
        turned: scratch memory for the transposed keys, [2 d, keys].
        k_sum, v_sum: scratch memory for the sums of the gradients of k and v, [keys, 2 d] float32.
        others: as in `forward`.
    """
    # For a softmax weight w, a mask m (0 or the scale s) and the gradient g of the weight after dropout, the score's
    # gradient is w (m g - sum over keys of w m g). The sum equals out . slope. The code computes
    # s w (g' - out . slope / s), where g' is g if dropout keeps the weight, and 0 otherwise.
    seeds = _seeds(seeds)
    _turn(k_segments, columns)
    turned[...] = k[0].T
    for of_row in (k_sum, v_sum):
        of_row[...] = jnp.zeros_like(of_row)
    if bias is not None:
        # the block of this gradient stays in vector memory for all rows of a pair of heads
        @pl.when(pl.program_id(1) == 0)
        def _():
            bias_slope[...] = jnp.zeros_like(bias_slope)

    scale = DRAWS / call.kept

    def some(i, _):
        at = pl.ds(pl.multiple_of(i * QUERIES, QUERIES), QUERIES)
        queries, slopes = _per_head(call, q[0, at]), _per_head(call, slope[0, at])
        scores = _scores(call, i, k[0], queries, bias, q_segments, columns)
        # s w, with the scale as a summand of the log-sum: this costs almost nothing, since the log-sum is one row
        weights = jnp.exp(scores - (log_sums[0, 0, pl.ds(i, 1)] - math.log(scale)))
        # out . slope / s of each column, [1, 256]
        dots = _per_head(call, out[0, at].astype(jnp.float32) * slope[0, at].astype(jnp.float32))
        dots = jnp.sum(dots.T, axis=0, keepdims=True) / scale
        dropped, of_dropped = weights, _product(call, v[0], slopes, _BY_ROWS)
        if seeds is not None:
            keep = _keep(call, i, seeds, k.shape[1])
            dropped, of_dropped = (jnp.where(keep, x, 0) for x in (dropped, of_dropped))
        of_scores = weights * (of_dropped - dots)
        if bias is not None:
            bias_slope[0, i] += of_scores
        v_sum[...] += _product(call, dropped.astype(v.dtype), slopes)
        of_scores = of_scores.astype(q.dtype)
        k_sum[...] += _product(call, of_scores, queries)
        q_slope[0, at] = _of_own_head(call, _product(call, turned[...], of_scores)).astype(q.dtype)

    _each(q, some)
    k_slope[0] = k_sum[...].astype(k.dtype)
    v_slope[0] = v_sum[...].astype(v.dtype)


def _each(q, some: Callable) -> None:
    """Calls `some(i, None)` for each round i. Each round covers 128 queries.

    None is the unused carry of `jax.lax.fori_loop`.
    """
    rounds = q.shape[1] // QUERIES
    unroll = rounds if rounds <= _UNROLLED else 1
    jax.lax.fori_loop(0, rounds, some, None, unroll=unroll)


def _turn(k_segments, columns):
    """Writes k_segments [1, 1, keys] into each of the 128 columns of `columns` [keys, 128]."""
    keys, width = columns.shape
    columns[...] = jnp.broadcast_to(k_segments[0], (width, keys)).T


def _scores(call, i, k, queries, bias, q_segments, columns):
    """Returns the masked scores of round i, [keys, 256] float32."""
    scores = _product(call, k, queries, _BY_ROWS)
    if bias is not None:
        scores += bias[0, i]
    seen = jnp.concatenate([columns[...]] * 2, axis=1) == q_segments[0, pl.ds(i, 1)]
    if call.causal:
        column = jax.lax.broadcasted_iota(jnp.int32, (1, COLUMNS), 1)
        # column 70 of round 2 is query 256 + 0 + 6 (second head), column 200 query 256 + 64 + 8
        query = i * QUERIES + jnp.where(column < QUERIES, 0, HALF) + column % HALF
        seen &= jax.lax.broadcasted_iota(jnp.int32, scores.shape, 0) <= query
    return jnp.where(seen, scores, _HIDDEN)


def _seeds(seeds):
    """Returns the two dropout seeds of each column of scores, or None without dropout.

    The result is two arrays [1, 128] uint32 for the columns 0 to 127. The columns 128 to 255 have the same seeds.
    """
    if seeds is None:
        return None
    head = 2 * pl.program_id(0)
    of_first = jax.lax.broadcasted_iota(jnp.int32, (1, QUERIES), 1) < HALF
    return [
        jnp.where(of_first, seeds[0, word, head], seeds[0, word, head + 1]) for word in range(2)
    ]


def _keep(call, i, seeds, keys):
    """Returns which attention weights dropout keeps in round i of the loop, [keys, 256] bool.

    `dropout.dropout` keeps the same weights.
    """
    column = jax.lax.broadcasted_iota(jnp.int32, (1, QUERIES), 1)
    position = (i * QUERIES + column % HALF).astype(jnp.uint32)
    feature = jax.lax.broadcasted_iota(jnp.uint32, (keys, QUERIES), 0)
    # `random_words` computes (position << 16 | feature) ^ seed. With position 0 and the seed already
    # combined with the position, the result is equal and costs two operations less per element.
    none: Any = np.uint32(0)
    words = random_words(seeds[0] ^ position << 16, seeds[1], none, feature)
    draws = jnp.concatenate([words & (DRAWS - 1), words >> 16], axis=1)
    return draws.astype(jnp.int32) < call.kept  # the chip compares signed numbers


def _per_head(call, x):
    """Separates the two heads of x, [128, 2 d] -> [256, 2 d].

    Row i of the result belongs to the query and the head of column i of the scores. It has this head's features,
    and zeros in place of the other head's.
    """
    wide = x.astype(jnp.float32)  # the chip has no selection of bfloat16 values
    own = jax.lax.broadcasted_iota(jnp.int32, x.shape, 1) < call.width
    first, second = jnp.where(own, wide, 0), jnp.where(own, 0, wide)
    halves = first[:HALF], second[:HALF], first[HALF:], second[HALF:]
    return jnp.concatenate(halves).astype(x.dtype)


def _of_own_head(call, x):
    """Transposes x and puts the two heads of each query side by side again: [2 d, 256] -> [128, 2 d].

    Each column of x belongs to one query and one head, as in `_per_head`. Only this head's features are kept.
    """
    x = x.T
    own = jax.lax.broadcasted_iota(jnp.int32, (HALF, x.shape[1]), 1) < call.width
    blocks = [x[i : i + HALF] for i in range(0, COLUMNS, HALF)]
    return jnp.concatenate([jnp.where(own, *blocks[:2]), jnp.where(own, *blocks[2:])])


def _over_keys(combine, reduce, x):
    """Reduces x over its keys, [keys, 256] -> [1, 256].

    First, `combine` repeatedly merges the two halves of x. Then `reduce` reduces the rows that are left.
    """
    # merging is fast, since the operations of a merge do not wait for one another;
    # a vector register has 8 rows, so the row count stays a multiple of 8: 384 -> 192 -> 96 -> 48 -> 24
    while x.shape[0] % 16 == 0:
        x = combine(*jnp.split(x, 2))
    return reduce(x, axis=0, keepdims=True)


def _product(call, x, y, dimensions=_PLAIN):
    if call.interpret:  # a CPU cannot multiply bfloat16 factors into a float32 result
        x, y = x.astype(jnp.float32), y.astype(jnp.float32)
    return jax.lax.dot_general(
        x, y, dimensions, precision_of(x.dtype), preferred_element_type=jnp.float32
    )
