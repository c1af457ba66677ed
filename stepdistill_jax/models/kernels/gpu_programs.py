"""What one program of each attention kernel for NVIDIA GPUs does.

Queries come in halves of 64, since positions p and p + 64 share a random word of dropout: a program
has both halves and computes a word once. Keys come in tiles of 64. What stands after the end of an
array is never read and its segment is 0: padding.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from stepdistill_jax.models.dropout import DRAWS, HALF, random_words
from stepdistill_jax.models.products import precision_of

KEYS = 64  # of a tile
_LOG2_E = math.log2(math.e)  # a GPU computes 2^x, so scores are in units of log 2
_HIDDEN = -1e30  # a score that is not seen: 2^(_HIDDEN - _LOWEST) is 0
_LOWEST = -1e20  # where a running maximum begins
_NO_KEY = 1e30  # the log-sum of a query that sees no key: its weights are 0
_EVERY = 2**30  # greater than any segment


@dataclasses.dataclass(frozen=True)
class Call:
    """What is fixed when a kernel is compiled."""

    causal: bool
    kept: int
    shared: bool
    q_len: int
    k_len: int

    @property
    def halves(self) -> int:
        """How many tiles of 64 queries a program has."""
        return 1 if self.q_len <= HALF else 2

    @property
    def queries(self) -> int:
        """Queries of a program."""
        return self.halves * HALF

    @property
    def query_programs(self) -> int:
        """Programs that a row's queries take."""
        return pl.cdiv(self.q_len, self.queries)

    @property
    def key_tiles(self) -> int:
        """Tiles of a row's keys."""
        return pl.cdiv(self.k_len, KEYS)


@dataclasses.dataclass(frozen=True)
class _Tile:
    """64 queries or keys from place `start` on: x [64, d], segments and places [64] int32."""

    start: jax.Array
    x: jax.Array
    segments: jax.Array
    places: jax.Array


def forward(call, q_ref, k_ref, v_ref, bias_ref, q_segs, k_segs, seeds, out_ref, sum_ref):
    """Writes the output and the logarithm of the softmax's sum, to base 2, of a program's queries."""
    start = pl.program_id(0) * call.queries
    halves = _halves(call, q_ref, q_segs, start)

    def step(i, state):
        keys = _keys(call, k_ref, k_segs, i * KEYS)
        v = _rows(v_ref, i * KEYS, KEYS, call.k_len)
        words = _words(call, seeds, halves[0], keys)
        after = []
        for half, (queries, (mixed, top, total)) in enumerate(zip(halves, state, strict=True)):
            scores = _scores(call, queries, keys, bias_ref)
            highest = jnp.maximum(top, jnp.max(scores, axis=1))
            weights = jnp.exp2(scores - highest[:, None])
            shrink = jnp.exp2(top - highest)
            total = total * shrink + jnp.sum(weights, axis=1)
            weights = _dropped(call, weights, words, half).astype(v.dtype)
            after.append((mixed * shrink[:, None] + _dot(weights, v), highest, total))
        return tuple(after)

    lowest, zeros = jnp.full((HALF,), _LOWEST, jnp.float32), jnp.zeros((HALF,), jnp.float32)
    state = (jnp.zeros(halves[0].x.shape, jnp.float32), lowest, zeros)
    tiles = _key_tiles(call, halves, k_segs, start)
    for queries, (mixed, top, total) in zip(
        halves, jax.lax.fori_loop(*tiles, step, (state,) * call.halves), strict=True
    ):
        sees = total > 0
        some = jnp.where(sees, total, 1.0)
        _store(out_ref, mixed * (DRAWS / call.kept / some)[:, None], queries, call.q_len)
        log_sum = jnp.where(sees, top + jnp.log2(some), _NO_KEY)
        _store(sum_ref, log_sum, queries, call.q_len)


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
    """Writes the gradient of a program's queries, and slope . output of each, which all gradients need."""
    start = pl.program_id(0) * call.queries
    halves = _halves(call, q_ref, q_segs, start)
    slopes = [_rows(slope_ref, q.start, HALF, call.q_len) for q in halves]
    outs = [_rows(out_ref, q.start, HALF, call.q_len) for q in halves]
    dots = [
        jnp.sum(out.astype(jnp.float32) * slope.astype(jnp.float32), axis=1)
        for out, slope in zip(outs, slopes, strict=True)
    ]
    log_sums = [_vector(sums, q.start, HALF, call.q_len, _NO_KEY) for q in halves]

    def step(i, state):
        keys = _keys(call, k_ref, k_segs, i * KEYS)
        v = _rows(v_ref, i * KEYS, KEYS, call.k_len)
        words = _words(call, seeds, halves[0], keys)
        after = []
        for half, dq in enumerate(state):
            scores = _scores(call, halves[half], keys, bias_ref)
            weights = jnp.exp2(scores - log_sums[half][:, None])
            ds = _softmax_gradient(
                call, weights, _dot(slopes[half], v.T), dots[half][:, None], words, half
            )
            after.append(dq + _dot(ds.astype(keys.x.dtype), keys.x))
        return tuple(after)

    state = (jnp.zeros(halves[0].x.shape, jnp.float32),) * call.halves
    tiles = _key_tiles(call, halves, k_segs, start)
    found = jax.lax.fori_loop(*tiles, step, state)
    for queries, dq, dot in zip(halves, found, dots, strict=True):
        _store(dq_ref, dq, queries, call.q_len)
        _store(dot_ref, dot, queries, call.q_len)


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
    """Writes the gradients of the keys and values of a program.

    Its tiles are [keys, queries], or each product would transpose what the one before it computed.
    """
    keys = _keys(call, k_ref, k_segs, pl.program_id(0) * KEYS)
    v = _rows(v_ref, keys.start, KEYS, call.k_len)

    def step(i, state):
        dk, dv = state
        halves = _halves(call, q_ref, q_segs, i * call.queries)
        words = _words(call, seeds, halves[0], keys, keys_first=True)
        for half, queries in enumerate(halves):
            at = queries.start
            slope = _rows(slope_ref, at, HALF, call.q_len)
            log_sum = _vector(sums, at, HALF, call.q_len, _NO_KEY)
            dot = _vector(dots, at, HALF, call.q_len, 0.0)
            scores = _scores(call, queries, keys, bias_ref, keys_first=True)
            weights = jnp.exp2(scores - log_sum[None, :])
            dropped = _dropped(call, weights, words, half)
            dv = dv + _dot(dropped.astype(slope.dtype), slope)
            ds = _softmax_gradient(call, weights, _dot(v, slope.T), dot[None, :], words, half)
            dk = dk + _dot(ds.astype(queries.x.dtype), queries.x)
        return dk, dv

    others = _whole(q_segs, call.q_len)
    first, last = _span([keys.segments], others, call.queries)
    if call.causal:  # queries before the first key see none
        first = jnp.maximum(first, jax.lax.div(keys.start, call.queries))
    zeros = jnp.zeros(keys.x.shape, jnp.float32)
    dk, dv = jax.lax.fori_loop(first, last, step, (zeros, zeros))
    _store(dk_ref, dk, keys, call.k_len)
    _store(dv_ref, dv * (DRAWS / call.kept), keys, call.k_len)


def bias_gradient(
    call, q_ref, k_ref, v_ref, bias_ref, q_segs, k_segs, seeds, sums, dots, slope_ref, db_ref
):
    """Writes the gradient of a program's part of the bias: a sum over the rows of the batch."""
    start, key = pl.program_id(1) * call.queries, pl.program_id(0) * KEYS
    rows = q_ref.shape[0]

    def step(row, state):
        halves = _halves(call, q_ref, q_segs, start, row)
        keys = _keys(call, k_ref, k_segs, key, row)
        v = _rows(v_ref, key, KEYS, call.k_len, row)
        words = _words(call, seeds, halves[0], keys, row)
        after = []
        for half, queries in enumerate(halves):
            at = queries.start
            slope = _rows(slope_ref, at, HALF, call.q_len, row)
            log_sum = _vector(sums, at, HALF, call.q_len, _NO_KEY, row)
            dot = _vector(dots, at, HALF, call.q_len, 0.0, row)
            scores = _scores(call, queries, keys, bias_ref)
            weights = jnp.exp2(scores - log_sum[:, None])
            after.append(
                state[half]
                + _softmax_gradient(call, weights, _dot(slope, v.T), dot[:, None], words, half)
            )
        return tuple(after)

    if call.causal:  # no query of the program sees a key
        rows = jnp.where(key < start + call.queries, rows, 0)
    zeros = (jnp.zeros((HALF, KEYS), jnp.float32),) * call.halves
    found = jax.lax.fori_loop(0, rows, step, zeros)
    for half, gradient in enumerate(found):
        _bias_tile(call, db_ref, start + half * HALF, key, gradient)


def _halves(call, q_ref, segments, start, *row):
    starts = [start + half * HALF for half in range(call.halves)]
    return [
        _Tile(
            at,
            _rows(q_ref, at, HALF, call.q_len, *row),
            _vector(segments, at, HALF, call.q_len, 0, *row),
            _places(at, HALF),
        )
        for at in starts
    ]


def _keys(call, k_ref, segments, start, *row):
    own = _vector(segments, start, KEYS, call.k_len, 0, *row)
    own = jnp.where(own > 0, own, -1)  # padding is no query's segment
    return _Tile(start, _rows(k_ref, start, KEYS, call.k_len, *row), own, _places(start, KEYS))


def _scores(call, queries, keys, bias_ref, *, keys_first=False):
    """[queries, keys] or [keys, queries] in units of log 2, `_HIDDEN` where not seen."""
    first, second = (keys, queries) if keys_first else (queries, keys)
    scores = _dot(first.x, second.x.T)
    if bias_ref is not None:
        bias = _bias_tile(call, bias_ref, queries.start, keys.start)
        scores += bias.T if keys_first else bias
    q, k = _pair(queries.segments, keys.segments, keys_first)
    mask = q == k
    if call.causal:
        q, k = _pair(queries.places, keys.places, keys_first)
        mask &= k <= q
    return jnp.where(mask, scores * _LOG2_E, _HIDDEN)


def _words(call, seeds, queries, keys, *row, keys_first=False):
    """Random words of the first half's places, whose high bits are the second half's; or None."""
    if call.kept == DRAWS:
        return None
    q, k = _pair(queries.places.astype(jnp.uint32), keys.places.astype(jnp.uint32), keys_first)
    if call.shared:
        q = jnp.zeros((1, 1), jnp.uint32)
    return random_words(seeds[(0, *row)], seeds[(1, *row)], q, k)


def _dropped(call, x, words, half):
    """`x` where dropout keeps it, not scaled up."""
    if words is None:
        return x
    high = half and not call.shared
    draws = words >> 16 if high else words & (DRAWS - 1)
    return jnp.where(draws < call.kept, x, 0.0)


def _softmax_gradient(call, weights, of_weights, dot, words, half):
    """Gradient of the scores; of_weights: slope . value, before dropout's scale."""
    return weights * (_dropped(call, of_weights * (DRAWS / call.kept), words, half) - dot)


def _key_tiles(call, halves, segments, start):
    """The tiles of keys (first, after the last) that a program's queries may see."""
    own = [queries.segments for queries in halves]
    first, last = _span(own, _whole(segments, call.k_len), KEYS)
    if call.causal:
        last = jnp.minimum(last, jax.lax.div(start + call.queries + KEYS - 1, KEYS))
    return first, last


def _span(own, others, tile):
    """The tiles (first, after the last) of `others` that may hold a segment of `own`.

    By the least and the greatest of `own`: exact where segments rise along a row, else too many.
    """
    low, high = jnp.int32(_EVERY), jnp.int32(0)
    for segments in own:
        low = jnp.minimum(low, jnp.min(jnp.where(segments > 0, segments, _EVERY)))
        high = jnp.maximum(high, jnp.max(segments))
    places = _places(0, others.shape[0])
    meets = (others > 0) & (others >= low) & (others <= high)
    first = jnp.min(jnp.where(meets, places, _EVERY))
    last = jnp.max(jnp.where(meets, places, -tile))
    return jax.lax.div(first, tile), jax.lax.div(last, tile) + 1


def _pair(queries, keys, keys_first):
    """Vectors that broadcast to a tile."""
    if keys_first:
        return queries[None, :], keys[:, None]
    return queries[:, None], keys[None, :]


def _places(start, count):
    return start + jax.lax.iota(jnp.int32, count)


def _whole(ref, length):
    return _vector(ref, 0, pl.next_power_of_2(length), length, 0)


def _rows(ref, start, count, length, *row):
    """[count, d] of ref [*row, length, d]."""
    at = ref.at[(*row, pl.ds(start, count), slice(None))]
    if length % count == 0:
        return plgpu.load(at)
    return plgpu.load(at, mask=(_places(start, count) < length)[:, None], other=0.0)


def _vector(ref, start, count, length, other, *row):
    """[count] of ref [*row, length]."""
    at = ref.at[(*row, pl.ds(start, count))]
    if length % count == 0:
        return plgpu.load(at)
    return plgpu.load(at, mask=_places(start, count) < length, other=other)


def _store(ref, x, tile, length):
    """x [n] or [n, d] into ref [length] or [length, d], at the places of the tile."""
    at = ref.at[(pl.ds(tile.start, x.shape[0]),) + (slice(None),) * (x.ndim - 1)]
    mask = (tile.places < length).reshape(-1, *(1,) * (x.ndim - 1))
    plgpu.store(at, x.astype(ref.dtype), mask=None if length % x.shape[0] == 0 else mask)


def _bias_tile(call, ref, query, key, value=None):
    """Loads 64 queries and keys of ref [q, k], or stores `value` there."""
    at = ref.at[pl.ds(query, HALF), pl.ds(key, KEYS)]
    mask = None
    if call.q_len % HALF or call.k_len % KEYS:
        inside = _places(query, HALF) < call.q_len, _places(key, KEYS) < call.k_len
        mask = inside[0][:, None] & inside[1][None, :]
    if value is None:
        return plgpu.load(at, mask=mask, other=None if mask is None else 0.0)
    return plgpu.store(at, value, mask=mask)


def _dot(x, y):
    return jax.lax.dot(x, y, precision=precision_of(x.dtype), preferred_element_type=jnp.float32)
