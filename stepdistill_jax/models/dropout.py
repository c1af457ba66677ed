"""Dropout as a function, and as a module with its own random numbers.

A mask is a stateless function of a seed and an element's place. So a kernel can draw it again in its
backward pass instead of keeping it, and it does not depend on how an array is cut.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

DRAWS = 2**16  # values of a draw; a random word holds two draws
HALF = 64  # positions p and p + 64 share a word if bit 6 of p is 0


def dropout(x: jax.Array, rate: float, rng: jax.Array | None, *, broadcast: bool) -> jax.Array:
    """Sets a share of the values to 0 and scales up the rest.

    The rate is rounded to 1 in 65,536, and the kept values are divided by the rounded share. Masks
    depend only on the rng, the shape and the rate.

    Args:
        x: [..., length, features].
        rate: share that becomes 0, 0 <= rate < 1.
        rng: None returns `x`.
        broadcast: all positions of the length share one mask, as in T5X (`broadcast_dims=(-2,)`).

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
    words = random_words(first, second, position & ~np.uint32(HALF), feature)
    draws = jnp.where(position & HALF, words >> 16, words & (DRAWS - 1))
    # in float32: in bfloat16, 1 / 0.9 is 0.16% too small
    scaled = (x.astype(jnp.float32) * (DRAWS / kept)).astype(x.dtype)
    return jnp.where(draws < kept, scaled, 0)


def kept_draws(rate: float) -> int:
    """Returns the number of the `DRAWS` values of a draw that keep an element."""
    return max(1, round(DRAWS * (1 - rate)))


def dropout_seeds(rng: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Returns the seeds of masks [2, *shape] uint32: two words for each matrix."""
    return jax.random.bits(rng, (2, *shape), jnp.uint32)


def random_words(
    first: jax.Array, second: jax.Array, position: jax.Array, feature: jax.Array
) -> jax.Array:
    """Returns the random word of each place of a matrix: a hash of two seeds and the place.

    Two rounds of xorshift and multiplication (Wellons 2018, "Prospecting for Hash Functions":
    lowbias32) with a seed before each: 9 operations on integers, threefry has 110.

    Args:
        first, second: uint32 seeds of the matrix.
        position, feature: uint32 row and column, arrays that broadcast. Masks repeat from 65,536
            (`config.MAX_WIDTH`) on.
    """
    x = (position << 16 | feature) ^ first
    x = (x ^ x >> 16) * np.uint32(0x7FEB352D)
    x = (x ^ x >> 15 ^ second) * np.uint32(0x846CA68B)
    return x ^ x >> 16


class Dropout(nn.Module):
    """`dropout` with the rng collection of that name.

    Attributes:
        rate: share that becomes 0, 0 <= rate < 1.
        broadcast: all positions share one mask.
        deterministic: returns the input; given here or in the call.
    """

    rate: float
    broadcast: bool = False
    deterministic: bool | None = None

    @nn.compact
    def __call__(self, x: jax.Array, deterministic: bool | None = None) -> jax.Array:
        """x [..., length, features] -> the same shape."""
        off = nn.merge_param("deterministic", self.deterministic, deterministic) or not self.rate
        rng = None if off else self.make_rng("dropout")
        return dropout(x, self.rate, rng, broadcast=self.broadcast)
