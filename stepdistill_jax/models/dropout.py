"""Dropout: as a function, and as a module that has its own random numbers."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from stepdistill_jax.models.cpu_speed import DRAWS, keep_mask


def dropout(x: jax.Array, rate: float, rng: jax.Array | None, *, broadcast: bool) -> jax.Array:
    """Sets a share of the values to 0 and scales up the rest.

    The rate is met to 1 in 65,536, and the rest is divided by the rate that is met. Masks depend on
    the rng, the shape and the rate alone.

    Args:
        x: [..., length, features].
        rate: share that becomes 0, 0 <= rate < 1.
        rng: None returns `x`.
        broadcast: all positions of the length share one mask, as in T5X (`broadcast_dims=(-2,)`).

    Returns:
        The shape and dtype of `x`.
    """
    kept = round(DRAWS * (1 - rate))
    if rng is None or kept == DRAWS:
        return x
    shape = (*x.shape[:-2], 1, x.shape[-1]) if broadcast else x.shape
    mask = keep_mask(rng, shape, kept)
    return jnp.where(mask, x * (DRAWS / kept), 0)


class Dropout(nn.Module):
    """`dropout` with the rng collection of that name.

    Attributes:
        rate: share that becomes 0, 0 <= rate < 1.
        broadcast: all positions share one mask.
        deterministic: the input is returned; given here or in the call.
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
