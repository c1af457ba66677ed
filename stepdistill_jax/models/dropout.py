"""Dropout as a function and as a Flax module.

Whether an element is dropped depends only on seeds and the element's position, not on sharding.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

DRAWS = 2**16  # number of possible values of a draw; a random word of 32 bits has two draws
HALF = 64  # positions p and p + 64 share a word if bit 6 of p is 0


def dropout(x: jax.Array, rate: float, rng: jax.Array | None, *, broadcast: bool) -> jax.Array:
    """Sets random elements to 0 and scales up the others.

    Args:
        x: [..., length, features]. The result has the same shape and dtype.
        rate: share of the elements that become 0; 0 <= rate < 1. It is rounded to a multiple of 1 / 65,536.
        rng: None returns `x` unchanged.
        broadcast: whether all positions share one mask, as in T5X (`broadcast_dims=(-2,)`).
    """
    kept = kept_draws(rate)
    if rng is None or kept == DRAWS:
        return x
    first, second = dropout_seeds(rng, x.shape[:-2])[..., None, None]
    shape = (*x.shape[:-2], 1 if broadcast else x.shape[-2], x.shape[-1])
    position = jax.lax.broadcasted_iota(jnp.uint32, shape, len(shape) - 2)
    feature = jax.lax.broadcasted_iota(jnp.uint32, shape, len(shape) - 1)
    # positions 5 and 69 = 5 + 64 share the word of 5: its low 16 bits are the draw of 5, its high bits that of 69
    words = random_words(first, second, position & ~np.uint32(HALF), feature)
    draws = jnp.where(position & HALF, words >> 16, words & (DRAWS - 1))
    # scaled in float32, since 1 / 0.9 rounded to bfloat16 is 0.16% too small
    scaled = (x.astype(jnp.float32) * (DRAWS / kept)).astype(x.dtype)
    return jnp.where(draws < kept, scaled, 0)


def kept_draws(rate: float) -> int:
    """Returns the limit `kept`, from 1 to `DRAWS`. Dropout keeps an element if its random draw is below `kept`."""
    return max(1, round(DRAWS * (1 - rate)))


def dropout_seeds(rng: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Returns two uint32 seeds, [2, *shape], for each matrix of an array [*shape, rows, columns]."""
    return jax.random.bits(rng, (2, *shape), jnp.uint32)


def random_words(
    first: jax.Array, second: jax.Array, position: jax.Array, feature: jax.Array
) -> jax.Array:
    """Returns a random word for each element of a matrix: a hash of two seeds, the row and the column.

    The hash is lowbias32 (Wellons 2018, "Prospecting for Hash Functions").

    Args:
        first, second: the two uint32 seeds of the matrix.
        position, feature: row and column indices, uint32 arrays that broadcast. Elements with an index of
            65,536 (`config.MAX_WIDTH`) or more get the words of other elements.
    """
    # 9 integer operations, while threefry takes 110; a seed is XORed in before each of the two rounds
    # one word of 32 bits has room for both: row 3, column 5 is 0x00030005
    x = (position << 16 | feature) ^ first
    x = (x ^ x >> 16) * np.uint32(0x7FEB352D)
    x = (x ^ x >> 15 ^ second) * np.uint32(0x846CA68B)
    return x ^ x >> 16


class Dropout(nn.Module):
    """Applies `dropout` with keys from the rng collection `dropout`.

    Attributes:
        rate, broadcast: as for `dropout`.
        deterministic: whether dropout is off. Give it either here or in the call.
    """

    rate: float
    broadcast: bool = False
    deterministic: bool | None = None

    @nn.compact
    def __call__(self, x: jax.Array, deterministic: bool | None = None) -> jax.Array:
        """Applies dropout to x [..., length, features]."""
        off = nn.merge_param("deterministic", self.deterministic, deterministic) or not self.rate
        rng = None if off else self.make_rng("dropout")
        return dropout(x, self.rate, rng, broadcast=self.broadcast)
