"""Positions in attention: T5's learned bias, and rotary embeddings."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

ROPE = "rope"  # scope in the names of the operations of rotary embeddings
Rotation = tuple[jax.Array, jax.Array]  # cosines and sines, each [length, kv / 2] float32


def relative_buckets(
    query: jax.Array, key: jax.Array, *, bidirectional: bool, num_buckets: int, max_distance: int
) -> jax.Array:
    """Returns the bucket for each query position [q] and key position [k], [q, k] int32.

    Half of the buckets have one distance each. The others have ranges that grow logarithmically up to
    `max_distance` (Raffel et al. 2020, arXiv:1910.10683, section 2.1).
    """
    # bidirectional, 32 buckets: a key 3 places before its query has bucket 3, and a key 3 places after it has
    # bucket 16 + 3. Keys 16 and 22 places before it share bucket 10. Causal: all keys after the query have bucket 0.
    relative, offset = key[None, :] - query[:, None], 0
    if bidirectional:
        num_buckets //= 2
        offset = (relative > 0) * num_buckets
        relative = jnp.abs(relative)
    else:
        relative = jnp.maximum(-relative, 0)
    exact = num_buckets // 2
    # max(..., 1) avoids the logarithm of 0, which is infinite; its result is not used below
    ratio = jnp.log(jnp.maximum(relative, 1) / exact) / np.log(max_distance / exact)
    large = jnp.minimum(exact + (ratio * (num_buckets - exact)).astype(jnp.int32), num_buckets - 1)
    return offset + jnp.where(relative < exact, relative, large)


@jax.custom_vjp
def _of_buckets(table: jax.Array, buckets: jax.Array) -> jax.Array:
    """Looks up the buckets [q, k] in a table [heads, buckets] and returns [heads, q, k].

    The table's gradient is a matmul with one-hot buckets, since JAX's own scatter is slow on accelerators.
    """
    return jnp.take(table, buckets, axis=1)


def _to_table(kept: tuple[jax.Array, jax.Array], slope: jax.Array) -> tuple[jax.Array, None]:
    table, buckets = kept
    hot = jax.nn.one_hot(buckets, table.shape[1], dtype=slope.dtype)
    # `slope` is the gradient of the looked-up biases. HIGHEST, since by default accelerators would round the
    # gradients before they sum q x k of them.
    product = jnp.einsum("hqk,qkb->hb", slope, hot, precision=jax.lax.Precision.HIGHEST)
    return product, None


_of_buckets.defvjp(
    lambda table, buckets: (_of_buckets(table, buckets), (table, buckets)), _to_table
)


class RelativeBias(nn.Module):
    """A learned bias for each head and bucket, added to the scores of self-attention."""

    config: Any  # a `models.t5.T5Config`; no other family has this table
    bidirectional: bool

    @nn.compact
    def __call__(self, query: jax.Array, key: jax.Array) -> jax.Array:
        """Returns the bias, [1, heads, q, k] float32, for query positions [q] and key positions [k]."""
        c = self.config
        init = nn.with_logical_partitioning(
            nn.initializers.normal(c.emb_dim**-0.5), ("heads", "relpos_buckets")
        )
        table: Any = self.param("rel_embedding", init, (c.num_heads, c.num_buckets))
        buckets = relative_buckets(
            query,
            key,
            bidirectional=self.bidirectional,
            num_buckets=c.num_buckets,
            max_distance=c.max_distance,
        )
        return _of_buckets(table, buckets)[None]


@jax.named_scope(ROPE)
def rotation(positions: jax.Array, head_dim: int, theta: float) -> Rotation:
    """Returns the cosines and sines of the angles for `rotate`.

    The angle for position p and the pair i of features is p / theta^(2i / head_dim) (Su et al. 2021,
    arXiv:2104.09864, equation 15). Positions may start at any number, since only their differences matter.

    Args:
        positions: [length] int32.
        head_dim: must be even.
    """
    # scores depend only on distances, so the start of positions does not matter
    # float32, since pair 0 is rotated by p radians, and bfloat16 rounds whole numbers above 256
    frequencies = theta ** -(np.arange(0, head_dim, 2, dtype=np.float32) / head_dim)
    angles = positions.astype(jnp.float32)[:, None] * frequencies[None, :]
    return jnp.cos(angles), jnp.sin(angles)


@jax.named_scope(ROPE)
def rotate(x: jax.Array, by: Rotation) -> jax.Array:
    """Rotates each pair of features of x [batch, length, heads, kv].

    A pair is feature i of the first half and feature i of the second half, as in Hugging Face's weights.
    """
    # [length, kv / 2] -> [1, length, 1, kv / 2]
    cos, sin = (table[None, :, None, :] for table in by)
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    turned = [first * cos - second * sin, second * cos + first * sin]
    return jnp.concatenate(turned, axis=-1).astype(x.dtype)
