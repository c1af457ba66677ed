"""The kernel of a chip behind `attention`: on the devices of a mesh, and in a training step."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from stepdistill_jax.models.attention import attention
from stepdistill_jax.models.sharding import Layout, make_mesh

ROWS, LENGTH, HEADS, WIDTH = 8, 20, 4, 64


@functools.cache
def example():
    rng = np.random.default_rng(8)
    normal = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)  # noqa: E731
    q, k, v, slope = (normal(ROWS, LENGTH, HEADS, WIDTH) for _ in range(4))
    segments = jnp.asarray(np.sort(rng.integers(1, 4, (ROWS, LENGTH)), axis=1), jnp.int32)
    return (q / 8, k, v, normal(1, HEADS, LENGTH, LENGTH)), segments, slope


def value_and_gradients(implementation):
    arrays, segments, slope = example()

    def total(q, k, v, bias):
        mixed = attention(
            q,
            k,
            v,
            relative_bias=bias,
            query_segments=segments,
            key_segments=segments,
            causal=True,
            dropout_rate=0.3,
            dropout_rng=jax.random.key(3),
            implementation=implementation,
        )
        return jnp.vdot(mixed, slope), mixed

    return jax.jit(jax.grad(total, (0, 1, 2, 3), has_aux=True))(*arrays)


@pytest.mark.parametrize("sizes", [(8, 1, 1), (1, 4, 2), (2, 2, 2)], ids=str)
def test_devices_compute_their_rows_and_heads_with_the_same_masks(sizes):
    """Dropout is on: rows and heads must be known by their place in the whole batch."""
    gradients, mixed = value_and_gradients("xla")
    with jax.set_mesh(make_mesh(Layout(*sizes))):
        on_mesh, their_mixed = value_and_gradients("pallas")
    np.testing.assert_allclose(their_mixed, mixed, rtol=1e-5, atol=1e-5)
    for one, other in zip(on_mesh, gradients, strict=True):
        assert np.linalg.norm(one - other) <= 1e-5 * np.linalg.norm(other)
