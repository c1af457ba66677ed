"""The kernel functions of attention on NVIDIA GPUs.

Pallas runs a kernel function many times, each time for other queries or keys. Such a run is called a program. Its
references point to one row of the batch and one head:

    q, out      [q, d]
    slope       [q, d]; gradient of the loss with respect to `out`
    k, v        [k, d]
    bias        [q, k]
    segments    [q] and [k]
    seeds       [2]
    sums        [q]; base-2 logarithm of each softmax's denominator
    dots        [q]; slope . out of each query

In `bias_gradient`, all references except the bias and its gradient cover all rows of the batch: q is
[rows, q, d], and seeds is [2, rows].
"""

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from stepdistill_jax.models.dropout import DRAWS, HALF
from stepdistill_jax.models.kernels import gpu_tiles as tiles


def forward(call, q_ref, k_ref, v_ref, bias_ref, q_segs, k_segs, seeds, out_ref, sum_ref):
    """Writes the attention output of a program's queries, and the base-2 logarithm of each softmax's denominator."""
    start = pl.program_id(0) * call.queries
    halves = tiles.queries(call, q_ref, q_segs, start)

    # The state of each half, over the keys so far: `mixed`, the weighted sum of values; `top`, the largest
    # score; `total`, the sum of the weights e^(score - top). FlashAttention (arXiv:2205.14135, algorithm 1).
    def step(i, state):
        keys = tiles.keys(call, k_ref, k_segs, i * call.keys)
        v = tiles.key_rows(call, v_ref, i * call.keys)
        words = tiles.words(call, seeds, halves[0], keys)
        after = []
        for half, (queries, (mixed, top, total)) in enumerate(zip(halves, state, strict=True)):
            scores = tiles.scores(call, queries, keys, bias_ref)
            highest = jnp.maximum(top, jnp.max(scores, axis=1))
            weights = tiles.weights(scores, (highest * tiles.LOG2_E)[:, None])
            # earlier sums are relative to the old maximum; e^(top - highest) converts them
            shrink = tiles.weights(top - highest, 0.0)
            total = total * shrink + jnp.sum(weights, axis=1)
            # after the sum, since dropout applies to the softmax's result and does not change its denominator
            weights = tiles.dropped(call, weights, words, half).astype(v.dtype)
            after.append((mixed * shrink[:, None] + tiles.dot(call, weights, v), highest, total))
        return tuple(after)

    lowest, zeros = jnp.full((HALF,), tiles.LOWEST, jnp.float32), jnp.zeros((HALF,), jnp.float32)
    state = (jnp.zeros(halves[0].x.shape, jnp.float32), lowest, zeros)
    seen = tiles.key_tiles(call, halves, k_segs, start)
    for queries, (mixed, top, total) in zip(
        halves, jax.lax.fori_loop(*seen, step, (state,) * call.halves), strict=True
    ):
        # Without a visible key, `top` stays LOWEST, so hidden scores (-1e30) get weight 0 and `total` is 0.
        sees = total > 0
        some = jnp.where(sees, total, 1.0)
        # one multiplication applies both the softmax's denominator and dropout's scale
        tiles.store_queries(call, out_ref, mixed * (DRAWS / call.kept / some)[:, None], queries)
        # the base-2 logarithm of the sum of e^score, with the maximum added back; NO_KEY gives weights of 0
        log_sum = jnp.where(sees, top * tiles.LOG2_E + jnp.log2(some), tiles.NO_KEY)
        tiles.store_queries(call, sum_ref, log_sum, queries)


def queries_gradient(
    call,
    q_ref,
    k_ref,
    v_ref,
    bias_ref,
    q_segs,
    k_segs,
    seeds,
    sums,
    out_ref,
    slope_ref,
    dq_ref,
    dot_ref,
):
    """Writes the gradient of a program's queries, and the dot product of `slope` and `out` for each query."""
    start = pl.program_id(0) * call.queries
    halves = tiles.queries(call, q_ref, q_segs, start)
    slopes = [tiles.query_rows(call, slope_ref, q.start) for q in halves]
    outs = [tiles.query_rows(call, out_ref, q.start) for q in halves]
    # The softmax's gradient needs the sum over keys of (weight x gradient of the weight). It equals
    # slope . output, also with dropout, so no further loop over keys is needed.
    dots = [
        jnp.sum(out.astype(jnp.float32) * slope.astype(jnp.float32), axis=1)
        for out, slope in zip(outs, slopes, strict=True)
    ]
    log_sums = [tiles.query_vector(call, sums, q.start, tiles.NO_KEY) for q in halves]

    def step(i, state):
        keys = tiles.keys(call, k_ref, k_segs, i * call.keys)
        v = tiles.key_rows(call, v_ref, i * call.keys)
        words = tiles.words(call, seeds, halves[0], keys)
        after = []
        for half, dq in enumerate(state):
            scores = tiles.scores(call, halves[half], keys, bias_ref)
            weights = tiles.weights(scores, log_sums[half][:, None])
            ds = tiles.softmax_gradient(
                call, weights, tiles.dot(call, slopes[half], v.T), dots[half][:, None], words, half
            )
            # T5 does not scale scores, so score = q . k + bias, and dq = sum over keys of ds k
            after.append(dq + tiles.dot(call, ds.astype(keys.x.dtype), keys.x))
        return tuple(after)

    state = (jnp.zeros(halves[0].x.shape, jnp.float32),) * call.halves
    seen = tiles.key_tiles(call, halves, k_segs, start)
    found = jax.lax.fori_loop(*seen, step, state)
    for queries, dq, dot in zip(halves, found, dots, strict=True):
        tiles.store_queries(call, dq_ref, dq, queries)
        tiles.store_queries(call, dot_ref, dot, queries)


def keys_gradient(
    call,
    q_ref,
    k_ref,
    v_ref,
    bias_ref,
    q_segs,
    k_segs,
    seeds,
    sums,
    dots,
    slope_ref,
    dk_ref,
    dv_ref,
):
    """Writes the gradients of one tile of keys and values.

    Scores and weights are [keys, queries], so that no matmul has to transpose an array that was just computed.
    """
    keys = tiles.keys(call, k_ref, k_segs, pl.program_id(0) * call.keys)
    v = tiles.key_rows(call, v_ref, keys.start)

    def step(i, state):
        dk, dv = state
        halves = tiles.queries(call, q_ref, q_segs, i * call.queries)
        words = tiles.words(call, seeds, halves[0], keys, keys_first=True)
        for half, queries in enumerate(halves):
            at = queries.start
            slope = tiles.query_rows(call, slope_ref, at)
            log_sum = tiles.query_vector(call, sums, at, tiles.NO_KEY)
            dot = tiles.query_vector(call, dots, at, 0.0)
            # the scores are the same as in the forward pass, so this gives the softmax's weights again
            scores = tiles.scores(call, queries, keys, bias_ref, keys_first=True)
            weights = tiles.weights(scores, log_sum[None, :])
            dropped = tiles.dropped(call, weights, words, half)
            # without dropout's scale, a constant by which the complete sum is multiplied below
            dv = dv + tiles.dot(call, dropped.astype(slope.dtype), slope)
            ds = tiles.softmax_gradient(
                call, weights, tiles.dot(call, v, slope.T), dot[None, :], words, half
            )
            dk = dk + tiles.dot(call, ds.astype(queries.x.dtype), queries.x)
        return dk, dv

    zeros = jnp.zeros(keys.x.shape, jnp.float32)
    seeing = tiles.query_tiles(call, keys, q_segs)
    dk, dv = jax.lax.fori_loop(*seeing, step, (zeros, zeros))
    tiles.store_keys(call, dk_ref, dk, keys)
    tiles.store_keys(call, dv_ref, dv * (DRAWS / call.kept), keys)


def bias_gradient(
    call, q_ref, k_ref, v_ref, bias_ref, q_segs, k_segs, seeds, sums, dots, slope_ref, db_ref
):
    """Writes the gradient of the bias between a program's queries and keys, summed over the rows of the batch."""
    # the bias is added to the scores of each row, so its gradient is the sum of the scores' gradients
    start, key = pl.program_id(1) * call.queries, pl.program_id(0) * call.keys
    rows = q_ref.shape[0]

    def step(row, state):
        halves = tiles.queries(call, q_ref, q_segs, start, row)
        keys = tiles.keys(call, k_ref, k_segs, key, row)
        v = tiles.key_rows(call, v_ref, key, row)
        words = tiles.words(call, seeds, halves[0], keys, row)
        after = []
        for half, queries in enumerate(halves):
            at = queries.start
            slope = tiles.query_rows(call, slope_ref, at, row)
            log_sum = tiles.query_vector(call, sums, at, tiles.NO_KEY, row)
            dot = tiles.query_vector(call, dots, at, 0.0, row)
            scores = tiles.scores(call, queries, keys, bias_ref)
            weights = tiles.weights(scores, log_sum[:, None])
            after.append(
                state[half]
                + tiles.softmax_gradient(
                    call, weights, tiles.dot(call, slope, v.T), dot[:, None], words, half
                )
            )
        return tuple(after)

    if call.causal:  # if no query of the program sees these keys, loop over 0 rows and write zeros
        rows *= (key < start + call.queries).astype(jnp.int32)
    zeros = (jnp.zeros((HALF, call.keys), jnp.float32),) * call.halves
    found = jax.lax.fori_loop(0, rows, step, zeros)
    for half, gradient in enumerate(found):
        tiles.store_bias(call, db_ref, start + half * HALF, key, gradient)
