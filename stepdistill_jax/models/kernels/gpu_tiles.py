"""Loads, computes and stores tiles of attention for the NVIDIA kernels.

A program (one instance of a Pallas kernel) processes one or two halves at a time. A half has 64 queries. Positions
after the end of an array count as padding (segment 0).
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from stepdistill_jax.models.dropout import DRAWS, HALF, random_words
from stepdistill_jax.models.products import precision_of

KEYS = 64  # keys of a tile
FEW_KEYS = 32  # for float32, and on an A100; with 64, shared memory or registers overflow
LOG2_E = math.log2(math.e)
_HIDDEN = -1e30  # score of a hidden key; its weight is 0, whatever the maximum is
LOWEST = -1e20  # start of a running maximum; far above _HIDDEN, so hidden keys get weights of 0
NO_KEY = 1e30  # base-2 log-sum of a query that sees no key; it makes all its weights 0
_EVERY = 2**30  # greater than any segment


@dataclasses.dataclass(frozen=True)
class Call:
    """The constants of a compiled kernel.

    Attributes:
        causal, kept, interpret: as in the docstring of `models.kernels`.
        q_len, k_len: number of queries and number of keys in a row.
        keys: number of keys in a tile.
    """

    causal: bool
    kept: int
    q_len: int
    k_len: int
    keys: int
    interpret: bool

    @property
    def halves(self) -> int:
        """Number of halves in a program: 1 or 2."""
        return 1 if self.q_len <= HALF else 2

    @property
    def queries(self) -> int:
        """Number of queries in a program."""
        return self.halves * HALF

    @property
    def query_programs(self) -> int:
        """Number of programs for a row's queries."""
        return pl.cdiv(self.q_len, self.queries)

    @property
    def key_tiles(self) -> int:
        """Number of tiles for a row's keys."""
        return pl.cdiv(self.k_len, self.keys)

    @property
    def tiles(self) -> int:
        """Number of tiles that are computed for one row and head.

        A tile has the scores of one program's queries with `keys` keys.
        """
        if not self.causal:
            return self.query_programs * self.key_tiles
        # program i reads keys up to its last query. With 256 queries, 256 keys and tiles of 64 keys, the two
        # programs read 2 and 4 tiles, so 6 of the 8 pairs.
        ends = (pl.cdiv((i + 1) * self.queries, self.keys) for i in range(self.query_programs))
        return sum(min(end, self.key_tiles) for end in ends)


@dataclasses.dataclass(frozen=True)
class _Tile:
    """Consecutive queries or keys of a row.

    Attributes:
        start: position of the first query or key.
        x: the queries or keys, [n, d].
        segments: their segments, [n] int32.
        places: position of each query or key in the row, [n] int32.
    """

    start: jax.Array
    x: jax.Array
    segments: jax.Array
    places: jax.Array


def queries(call, q_ref, segments, start, *row):
    """Loads a program's queries and returns one `_Tile` for every 64 queries.

    Args:
        start: position of the program's first query.
        row: index of the row in the batch; left out if `q_ref` and `segments` have no batch axis.
    """
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
    """Loads a tile of keys. Padding keys get segment -1, so that no query sees them."""
    own = _vector(segments, start, call.keys, call.k_len, call.keys, 0, *row)
    own = jnp.where(own > 0, own, -1)
    return _Tile(start, key_rows(call, k_ref, start, *row), own, _places(start, call.keys))


def scores(call, queries, keys, bias_ref, *, keys_first=False):
    """Returns the scores of a tile, [queries, keys], or [keys, queries] if `keys_first`.

    The score is `_HIDDEN` where a query does not see a key.
    """
    first, second = (keys, queries) if keys_first else (queries, keys)
    scores = dot(call, first.x, second.x.T)
    if bias_ref is not None:
        bias = _bias(call, bias_ref, queries.start, keys.start)
        scores += bias.T if keys_first else bias
    # padding has segment 0 among queries and -1 among keys, so it sees nothing and is not seen
    q, k = _pair(queries.segments, keys.segments, keys_first)
    mask = q == k
    if call.causal:
        q, k = _pair(queries.places, keys.places, keys_first)
        mask &= k <= q
    return jnp.where(mask, scores, _HIDDEN)


def words(call, seeds, queries, keys, *row, keys_first=False):
    """Returns the random numbers for the dropout of a tile, or None without dropout.

    There is one 32-bit word for each key and each of the first 64 queries. The low 16 bits are the random number of
    that query. The high 16 bits are the random number of the query 64 positions later.
    """
    if call.kept == DRAWS:
        return None
    # The hash needs positions whose bit 6 is 0. This is true in the first half, since a program starts at a
    # multiple of 128, or at 0 if there are at most 64 queries.
    q, k = _pair(queries.places.astype(jnp.uint32), keys.places.astype(jnp.uint32), keys_first)
    return random_words(seeds[(0, *row)], seeds[(1, *row)], q, k)


def weights(scores, top):
    """Returns e^score / 2^top, computed as 2^(score log2(e) - top): on a GPU, one multiply-add and one `exp2`."""
    return jnp.exp2(scores * LOG2_E - top)


def dropped(call, x, words, half):
    """Applies dropout to the tile `x`, but does not scale up the kept elements.

    Args:
        words: result of the function `words`. With None, `x` is returned unchanged.
        half: which half of the program's queries the tile has, 0 or 1.
    """
    if words is None:
        return x
    draws = words >> 16 if half else words & (DRAWS - 1)
    return jnp.where(draws < call.kept, x, 0.0)


def softmax_gradient(call, weight, of_weights, dot, words, half):
    """Returns the gradient of the loss with respect to the attention scores of a tile.

    Below, `slope` is the gradient of the loss with respect to the output.

    Args:
        weight: softmax weights, before dropout.
        of_weights: gradient with respect to the weights after dropout: the dot products of `slope` and the values.
        dot: dot product of `slope` and the output for each query, broadcast over the keys.
        words, half: as in `dropped`.
    """
    # y = softmax(s), z = m y, where m is 0 or dropout's scale:  ds = y (m dz - sum over keys of y m dz)
    return weight * (dropped(call, of_weights * (DRAWS / call.kept), words, half) - dot)


def key_tiles(call, halves, segments, start):
    """Returns the range (first, end) of the key tiles that a program's queries may see."""
    own = [queries.segments for queries in halves]
    first, last = _span(own, _whole(segments, call.k_len), call.keys)
    # The end is rounded up. After it, all keys are later than the program's last query.
    if call.causal:
        last = jnp.minimum(last, jax.lax.div(start + call.queries + call.keys - 1, call.keys))
    return first, last


def query_tiles(call, keys, segments):
    """Returns the range (first, end) of the query blocks that may see a tile of keys.

    A query block has `call.queries` queries.
    """
    first, last = _span([keys.segments], _whole(segments, call.q_len), call.queries)
    # The first is rounded down. Before it, all queries are earlier than the first key.
    if call.causal:
        first = jnp.maximum(first, jax.lax.div(keys.start, call.queries))
    return first, last


def _span(own, others, tile):
    """Returns the range (first, end) of the tiles of `others` in which a segment of `own` may occur.

    If there is no such tile, the range is empty.

    Example: if `tile` is 2, `others` is 1 1 1 2 2 3 3 0, and `own` has only segment 2, the range is (1, 3).
    It covers the positions 2 to 5.
    """
    # only the smallest and the largest segment of `own` are compared, so unordered segments give a longer range
    # if `own` has only padding, `low` stays _EVERY and `high` 0, so no segment is in between
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
    """Adds an axis to both vectors, so that they broadcast to the shape of a tile."""
    if keys_first:
        return queries[None, :], keys[:, None]
    return queries[:, None], keys[None, :]


def _places(start, count):
    return start + jax.lax.iota(jnp.int32, count)


def _whole(ref, length):
    """Loads ref [length] and pads it with zeros to a power of 2, since Triton allows no other shape."""
    count = pl.next_power_of_2(length)
    return _vector(ref, 0, count, length, count, 0)


def query_rows(call, ref, start, *row):
    """Loads the 64 rows of ref [*row, q, d] from `start` on, as [64, d]."""
    return _rows(ref, start, HALF, call.q_len, call.queries, *row)


def key_rows(call, ref, start, *row):
    """Loads the `call.keys` rows of ref [*row, k, d] from `start` on, as [keys, d]."""
    return _rows(ref, start, call.keys, call.k_len, call.keys, *row)


def query_vector(call, ref, start, other, *row):
    """Loads 64 elements of ref [*row, q] along q, from `start` on. Positions past the end of ref get `other`."""
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
    """Returns which of the positions `start` to `start + count - 1` lie inside an array, [count] bool.

    The array has the size `length` and is processed in blocks of `step` positions. If `length` is a multiple of
    `step`, all positions lie inside, and the result is None.
    """
    # length 256 in steps of 128 needs no mask. Length 200 needs one, since the second program reaches place 255.
    return None if length % step == 0 else _places(start, count) < length


def store_queries(call, ref, x, tile):
    """Writes x to the positions of `tile` in ref. Shapes: x [64] and ref [q], or x [64, d] and ref [q, d]."""
    _store(ref, x, tile, _inside(tile.start, HALF, call.q_len, call.queries))


def store_keys(call, ref, x, tile):
    """Writes x [keys, d] to `tile`'s place in ref [k, d]."""
    _store(ref, x, tile, _inside(tile.start, call.keys, call.k_len, call.keys))


def _store(ref, x, tile, inside):
    at = ref.at[(pl.ds(tile.start, x.shape[0]),) + (slice(None),) * (x.ndim - 1)]
    if inside is not None and x.ndim == 2:
        inside = inside[:, None]
    plgpu.store(at, x.astype(ref.dtype), mask=inside)


def _bias(call, ref, query, key):
    """Loads the bias between 64 queries and a tile of keys, [64, keys], from ref [q, k]."""
    at, mask = _bias_tile(call, ref, query, key)
    return plgpu.load(at, mask=mask, other=None if mask is None else 0.0)


def store_bias(call, ref, query, key, x):
    """Writes x [64, keys] into ref [q, k], starting at (query, key)."""
    at, mask = _bias_tile(call, ref, query, key)
    plgpu.store(at, x, mask=mask)


def _bias_tile(call, ref, query, key):
    """Returns a reference to the tile [64, keys] of ref [q, k] that starts at (query, key), and the tile's mask.

    The mask [64, keys] is False at positions beyond the end of ref. It is None if all tiles end within ref.
    """
    at = ref.at[pl.ds(query, HALF), pl.ds(key, call.keys)]
    if call.q_len % call.queries == 0 and call.k_len % call.keys == 0:
        return at, None
    inside = _places(query, HALF) < call.q_len, _places(key, call.keys) < call.k_len
    return at, inside[0][:, None] & inside[1][None, :]


def dot(call, x, y):
    """Returns the matmul of x and y, summed in float32.

    Float32 factors are split into two TF32 factors each. Three TF32 matmuls have float32's precision, in half the
    time of an exact one.
    """
    precision = precision_of(x.dtype)
    if precision is not None and not call.interpret:
        precision = jax.lax.DotAlgorithmPreset.TF32_TF32_F32_X3
    return jax.lax.dot(x, y, precision=precision, preferred_element_type=jnp.float32)
