"""int8 kernels with a scale for each output, for faster decoding.

A kernel W is about W8 * scale, where W8 is from -127 to 127 and each column has its own scale (Xiao et al. 2022,
arXiv:2211.10438, section 2, "per-channel"). Nothing else is quantized.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict

from stepdistill_jax.models.config import ModelConfig
from stepdistill_jax.models.products import precision_of

KERNEL, SCALE = "kernel", "kernel_scale"
LARGEST = 127


class QuantizedDense(nn.Module):
    """A dense layer without bias, with an int8 kernel.

    Attributes:
        axes: logical axes of the kernel.
        dtype: type of the arithmetic.
        float32_sums: whether the output is float32. Otherwise it has the type `dtype`.
    """

    features: int
    axes: tuple[str, str]
    dtype: str
    float32_sums: bool = False

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Projects x [..., inputs] to [..., features]."""
        named = nn.with_logical_partitioning
        shape = (x.shape[-1], self.features)
        kernel: Any = self.param(KERNEL, named(_zeros(jnp.int8), self.axes), shape)
        scale: Any = self.param(SCALE, named(_zeros(jnp.float32), self.axes[1:]), shape[1:])
        y = int8_product(x, kernel, scale, self.dtype)
        return y if self.float32_sums else y.astype(self.dtype)


def int8_product(x: jax.Array, kernel: jax.Array, scale: jax.Array, dtype: str) -> jax.Array:
    """Returns x [..., inputs] times an int8 kernel [inputs, *outputs] and its scale [*outputs].

    The result is [..., *outputs] float32.
    """
    # Without the barrier, XLA would convert the kernel once, before the loop over tokens, and read the
    # converted kernel (2 or 4 bytes per weight) at each token.
    kernel, x = jax.lax.optimization_barrier((kernel, x.astype(dtype)))
    sums = jnp.tensordot(
        x,
        kernel.astype(dtype),
        axes=1,
        precision=precision_of(dtype),
        preferred_element_type=jnp.float32,
    )
    # a scale belongs to a column, so the sums can be multiplied by it, and no float32 kernel is ever made
    return sums * scale


def _zeros(dtype: Any) -> Any:
    return lambda key, shape: jnp.zeros(shape, dtype)


def kernel_of(projection: Mapping[str, Any], dtype: Any) -> jax.Array:
    """Returns a projection's kernel, [..., inputs, features], in `dtype`, even if it is stored as int8."""
    kernel = projection[KERNEL]
    if SCALE not in projection:
        return kernel.astype(dtype)
    return (kernel * projection[SCALE][..., None, :]).astype(dtype)


def quantize(params: Any, config: ModelConfig) -> tuple[Any, ModelConfig]:
    """Quantizes all kernels of a model to int8. Each kernel keeps its placement on devices.

    Args:
        params: parameters without adapters, unboxed, with stacked layers.

    Returns:
        The quantized parameters.
        The configuration of the quantized model.
    """
    flat: dict[tuple[str, ...], Any] = flatten_dict(params)
    # embeddings, norms and position biases have other names than `kernel`
    for path in [path for path in flat if path[-1] == KERNEL]:
        kernel = flat[path]
        flat[path], flat[*path[:-1], SCALE] = _quantize(kernel, kernel.sharding)
    return unflatten_dict(flat), dataclasses.replace(config, quantized=True)


@functools.partial(jax.jit, static_argnames="sharding")
def _quantize(kernel: jax.Array, sharding: Any) -> tuple[jax.Array, jax.Array]:
    """Returns the kernel [..., inputs, features] in int8, and its scales [..., features]."""
    largest = jnp.max(jnp.abs(kernel), axis=-2)
    # A column of zeros gets the scale 1 / 127, to avoid a division by 0. The column 0.5, -2.54 gets the scale 0.02
    # and becomes 25, -127.
    scale = jnp.where(largest > 0, largest, 1.0) / LARGEST
    rounded = jnp.clip(jnp.round(kernel / scale[..., None, :]), -LARGEST, LARGEST)
    return jax.lax.with_sharding_constraint(rounded.astype(jnp.int8), sharding), scale
