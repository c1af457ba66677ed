"""Dropout as a function, and as a module with its own random numbers.

A mask depends only on a seed and an element's place. So a kernel can draw it again in its backward pass
instead of storing it, and it is the same however an array is sharded.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

DRAWS = 2**16  # possible values of a draw; a random word of 32 bits holds two draws
HALF = 64  # positions p and p + 64 share a word if bit 6 of p is 0


def dropout(x: jax.Array, rate: float, rng: jax.Array | None, *, broadcast: bool) -> jax.Array:
    """Sets a share of the values to 0 and scales up the rest.

    The rate is rounded to a multiple of 1 / 65,536, and the values that remain are divided by the rounded
    share of them. Masks depend only on the rng, the shape and the rate.

    Args:
        x: [..., length, features].
        rate: share that becomes 0, 0 <= rate < 1.
        rng: a key; None returns `x` unchanged.
        broadcast: all positions share one mask, as in T5X (`broadcast_dims=(-2,)`).

    Returns:
        The shape and dtype of `x`.
    """
    kept = kept_draws(rate)
    if rng is None or kept == DRAWS:
        return x
    first, second = dropout_seeds(rng, x.shape[:-2])[..., None, None]
    shape = (*x.shape[:-2], 1 if broadcast else x.shape[-2], x.shape[-1])
    position = jax.lax.broadcasted_iota(jnp.uint32, shape, len(shape) - 2)
    feature = jax.lax.broadcasted_iota(jnp.uint32, shape, len(shape) - 1)
    # positions 5 and 69 = 5 + 64 get the word of 5: the low 16 bits are the draw of 5, the high ones of 69
    words = random_words(first, second, position & ~np.uint32(HALF), feature)
    draws = jnp.where(position & HALF, words >> 16, words & (DRAWS - 1))
    # the product is float32, since 1 / 0.9 rounded to bfloat16 is 0.16% too small
    scaled = (x.astype(jnp.float32) * (DRAWS / kept)).astype(x.dtype)
    return jnp.where(draws < kept, scaled, 0)


def kept_draws(rate: float) -> int:
    """Returns how many of the `DRAWS` possible values of a draw keep an element; at least 1."""
    return max(1, round(DRAWS * (1 - rate)))


def dropout_seeds(rng: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Returns two random seeds for each matrix: [2, *shape] uint32."""
    return jax.random.bits(rng, (2, *shape), jnp.uint32)


def random_words(
    first: jax.Array, second: jax.Array, position: jax.Array, feature: jax.Array
) -> jax.Array:
    """Returns a random word for each place of a matrix: a hash of two seeds and the place.

    The hash is two rounds of xorshift and multiplication (Wellons 2018, "Prospecting for Hash Functions":
    lowbias32), with a seed before each round. It takes 9 integer operations; threefry takes 110.

    Args:
        first, second: uint32 seeds of the matrix.
        position, feature: uint32 row and column, arrays that broadcast; both below 65,536
            (`config.MAX_WIDTH`), since masks repeat from there on.
    """
    # one word of 32 bits holds both: row 3, column 5 is 0x00030005
    x = (position << 16 | feature) ^ first
    x = (x ^ x >> 16) * np.uint32(0x7FEB352D)
    x = (x ^ x >> 15 ^ second) * np.uint32(0x846CA68B)
    return x ^ x >> 16


class Dropout(nn.Module):
    """Applies `dropout` with keys from the rng collection `dropout`.

    Attributes:
        rate: share that becomes 0, 0 <= rate < 1.
        broadcast: all positions share one mask.
        deterministic: returns the input unchanged; given here or in the call.
    """

    rate: float
    broadcast: bool = False
    deterministic: bool | None = None

    @nn.compact
    def __call__(self, x: jax.Array, deterministic: bool | None = None) -> jax.Array:
        """Applies dropout to x [..., length, features]; returns the same shape."""
        off = nn.merge_param("deterministic", self.deterministic, deterministic) or not self.rate
        rng = None if off else self.make_rng("dropout")
        return dropout(x, self.rate, rng, broadcast=self.broadcast)
