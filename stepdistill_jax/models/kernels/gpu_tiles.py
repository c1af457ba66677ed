"""Tiles of attention, of which the programs of the kernels for NVIDIA GPUs are made.

Queries come in halves of 64, since positions p and p + 64 share a random word of dropout: a program
has both halves and computes a word once. Keys come in tiles of 64 or 32. What stands after the end of an
array is never read, and its segment is 0: padding.
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
FEW_KEYS = 32  # of float32, and on an A100: else shared memory or registers overflow
LOG2_E = math.log2(math.e)
_HIDDEN = -1e30  # a score that is not seen: its weight is 0, whatever the maximum
LOWEST = -1e20  # where a running maximum begins
NO_KEY = 1e30  # the log-sum, to base 2, of a query that sees no key: its weights are 0
_EVERY = 2**30  # greater than any segment


@dataclasses.dataclass(frozen=True)
class Call:
    """What is fixed when a kernel is compiled; keys: of a tile."""

    causal: bool
    kept: int
    q_len: int
    k_len: int
    keys: int
    interpret: bool

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
        return pl.cdiv(self.k_len, self.keys)

    @property
    def tiles(self) -> int:
        """Pairs of a program's queries and a tile of keys that are computed for a row and a head."""
        if not self.causal:
            return self.query_programs * self.key_tiles
        ends = (pl.cdiv((i + 1) * self.queries, self.keys) for i in range(self.query_programs))
        return sum(min(end, self.key_tiles) for end in ends)


@dataclasses.dataclass(frozen=True)
class _Tile:
    """64 queries or keys from place `start` on: x [64, d], segments and places [64] int32."""

    start: jax.Array
    x: jax.Array
    segments: jax.Array
    places: jax.Array


def queries(call, q_ref, segments, start, *row):
    """The halves of a program's queries from `start` on; row: in arrays of all rows."""
    starts = [start + half * HALF for half in range(call.halves)]
    return [
        _Tile(
            at,
            query_rows(call, q_ref, at, *row),
            query_vector(call, segments, at, 0, *row),
            _places(at, HALF),
        )
        for at in starts
    ]


def keys(call, k_ref, segments, start, *row):
    """A tile of keys; padding has segment -1, which no query has."""
    own = _vector(segments, start, call.keys, call.k_len, call.keys, 0, *row)
    own = jnp.where(own > 0, own, -1)
    return _Tile(start, key_rows(call, k_ref, start, *row), own, _places(start, call.keys))


def scores(call, queries, keys, bias_ref, *, keys_first=False):
    """[queries, keys] or [keys, queries], `_HIDDEN` where not seen."""
    first, second = (keys, queries) if keys_first else (queries, keys)
    scores = dot(call, first.x, second.x.T)
    if bias_ref is not None:
        bias = _bias(call, bias_ref, queries.start, keys.start)
        scores += bias.T if keys_first else bias
    q, k = _pair(queries.segments, keys.segments, keys_first)
    mask = q == k
    if call.causal:
        q, k = _pair(queries.places, keys.places, keys_first)
        mask &= k <= q
    return jnp.where(mask, scores, _HIDDEN)


def words(call, seeds, queries, keys, *row, keys_first=False):
    """Random words of the first half's places, whose high bits are the second half's; or None."""
    if call.kept == DRAWS:
        return None
    q, k = _pair(queries.places.astype(jnp.uint32), keys.places.astype(jnp.uint32), keys_first)
    return random_words(seeds[(0, *row)], seeds[(1, *row)], q, k)


def weights(scores, top):
    """e^score / 2^top: a GPU computes powers of 2, and a multiplication and a difference at once."""
    return jnp.exp2(scores * LOG2_E - top)


def dropped(call, x, words, half):
    """`x` where dropout keeps it, not scaled up."""
    if words is None:
        return x
    draws = words >> 16 if half else words & (DRAWS - 1)
    return jnp.where(draws < call.kept, x, 0.0)


def softmax_gradient(call, weight, of_weights, dot, words, half):
    """Gradient of the scores; of_weights: slope . value, before dropout's scale."""
    return weight * (dropped(call, of_weights * (DRAWS / call.kept), words, half) - dot)


def key_tiles(call, halves, segments, start):
    """The tiles of keys (first, after the last) that a program's queries may see."""
    own = [queries.segments for queries in halves]
    first, last = _span(own, _whole(segments, call.k_len), call.keys)
    if call.causal:
        last = jnp.minimum(last, jax.lax.div(start + call.queries + call.keys - 1, call.keys))
    return first, last


def query_tiles(call, keys, segments):
    """The programs' queries (first, after the last) that may see a tile of keys."""
    first, last = _span([keys.segments], _whole(segments, call.q_len), call.queries)
    if call.causal:  # queries before the first key see none
        first = jnp.maximum(first, jax.lax.div(keys.start, call.queries))
    return first, last


def _span(own, others, tile):
    """The tiles (first, after the last) of `others` that may hold a segment of `own`.

    Found from the least and the greatest segment of `own`: exact if segments rise along a row,
    otherwise more tiles than necessary.
    """
    low, high = jnp.int32(_EVERY), jnp.int32(0)
    for segments in own:
        low = jnp.minimum(low, jnp.min(jnp.where(segments > 0, segments, _EVERY)))
        high = jnp.maximum(high, jnp.max(segments))
    places = _places(0, others.shape[0])
    meets = (others > 0) & (others >= low) & (others <= high)
    first = jnp.min(jnp.where(meets, places, others.shape[0]))
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
    """All of ref [length], with zeros up to a power of 2, as Triton wants its shapes."""
    count = pl.next_power_of_2(length)
    return _vector(ref, 0, count, length, count, 0)


def query_rows(call, ref, start, *row):
    """[64, d] of ref [*row, q, d]."""
    return _rows(ref, start, HALF, call.q_len, call.queries, *row)


def key_rows(call, ref, start, *row):
    """[keys, d] of ref [*row, k, d]."""
    return _rows(ref, start, call.keys, call.k_len, call.keys, *row)


def query_vector(call, ref, start, other, *row):
    """[64] of ref [*row, q], `other` after the end."""
    return _vector(ref, start, HALF, call.q_len, call.queries, other, *row)


def _rows(ref, start, count, length, step, *row):
    at = ref.at[(*row, pl.ds(start, count), slice(None))]
    inside = _inside(start, count, length, step)
    if inside is None:
        return plgpu.load(at)
    return plgpu.load(at, mask=inside[:, None], other=0.0)


def _vector(ref, start, count, length, step, other, *row):
    at = ref.at[(*row, pl.ds(start, count))]
    inside = _inside(start, count, length, step)
    return plgpu.load(at, mask=inside, other=None if inside is None else other)


def _inside(start, count, length, step):
    """[count] bool: places before the end; None where programs of `step` places never pass it."""
    return None if length % step == 0 else _places(start, count) < length


def store_queries(call, ref, x, tile):
    """Writes x [64] or [64, d] into ref [q] or [q, d]."""
    _store(ref, x, tile, _inside(tile.start, HALF, call.q_len, call.queries))


def store_keys(call, ref, x, tile):
    """Writes x [keys, d] into ref [k, d]."""
    _store(ref, x, tile, _inside(tile.start, call.keys, call.k_len, call.keys))


def _store(ref, x, tile, inside):
    at = ref.at[(pl.ds(tile.start, x.shape[0]),) + (slice(None),) * (x.ndim - 1)]
    if inside is not None and x.ndim == 2:
        inside = inside[:, None]
    plgpu.store(at, x.astype(ref.dtype), mask=inside)


def _bias(call, ref, query, key):
    """[64, keys] of ref [q, k]."""
    at, mask = _bias_tile(call, ref, query, key)
    return plgpu.load(at, mask=mask, other=None if mask is None else 0.0)


def store_bias(call, ref, query, key, x):
    """Writes x [64, keys] into ref [q, k]."""
    at, mask = _bias_tile(call, ref, query, key)
    plgpu.store(at, x, mask=mask)


def _bias_tile(call, ref, query, key):
    """64 queries and a tile of keys of ref [q, k], and which of them are inside; None: all are."""
    at = ref.at[pl.ds(query, HALF), pl.ds(key, call.keys)]
    if call.q_len % call.queries == 0 and call.k_len % call.keys == 0:
        return at, None
    inside = _places(query, HALF) < call.q_len, _places(key, call.keys) < call.k_len
    return at, inside[0][:, None] & inside[1][None, :]


def dot(call, x, y):
    """A product with float32 sums; of float32 factors as exact as float32 is.

    Three products of TF32 numbers stand for one of float32 (each factor as a sum of two), which a GPU
    computes twice as fast as its exact one; Triton's exact product spills kilobytes of registers.
    """
    precision = precision_of(x.dtype)
    if precision is not None and not call.interpret:
        precision = jax.lax.DotAlgorithmPreset.TF32_TF32_F32_X3
    return jax.lax.dot(x, y, precision=precision, preferred_element_type=jnp.float32)
