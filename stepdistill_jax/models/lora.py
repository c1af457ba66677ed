"""Low-rank adapters (LoRA; Hu et al. 2021, arXiv:2106.09685, section 4.1).

A projection computes y = x W + (alpha / rank) (x A) B. The parameters W (frozen), A and B are named `kernel`, `lora_a`
and `lora_b`.
"""

import dataclasses
import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.core import Tracer

from stepdistill_jax.models.config import ModelConfig
from stepdistill_jax.models.products import kernel_product

LORA_A, LORA_B = "lora_a", "lora_b"


class LoraDense(nn.Module):
    """A dense layer without bias, plus a low-rank adapter of two matrices A and B.

    B starts as zeros, and A as random numbers.

    Attributes:
        axes: logical axes of the kernel.
        stddev: standard deviation of the initial kernel.
        scale: alpha / rank.
        dtype: type of the arithmetic. Parameters are float32.
    """

    features: int
    axes: tuple[str, str]
    stddev: float
    rank: int
    scale: float
    dtype: str

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Projects x [..., inputs] to [..., features]."""
        inputs, (rows, columns) = x.shape[-1], self.axes
        named, normal = nn.with_logical_partitioning, nn.initializers.normal
        # variance 1 / (3 inputs): that of the uniform distribution between -1 / sqrt(inputs) and 1 / sqrt(inputs),
        # as in the authors' code
        uniform = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")
        kernel: Any = self.param(
            "kernel", named(normal(self.stddev), self.axes), (inputs, self.features)
        )
        a: Any = self.param(LORA_A, named(uniform, (rows, "lora")), (inputs, self.rank))
        b: Any = self.param(
            LORA_B, named(nn.initializers.zeros, ("lora", columns)), (self.rank, self.features)
        )
        x = x.astype(self.dtype)
        # (x A) B, not x (A B); the scale is applied to x A, since that is the smallest array, [..., rank]
        return kernel_product(x, kernel) + kernel_product(kernel_product(x, a) * self.scale, b)  # type: ignore[operator]  # custom_vjp hides the type


def has_adapters(params: Any) -> bool:
    """Returns whether a tree of parameters, shapes or shardings contains adapters."""
    return any(path[-1] == LORA_A for path in flatten_dict(params))


def split(params: Any) -> tuple[Any, Any]:
    """Splits parameters into (trained, frozen).

    If there are adapters, only they are trained. Otherwise, all parameters are trained, and the frozen tree is {}.
    """
    if not has_adapters(params):
        return params, {}
    trained, frozen = {}, {}
    for path, x in flatten_dict(params).items():
        (trained if path[-1] in (LORA_A, LORA_B) else frozen)[path] = x
    return unflatten_dict(trained), unflatten_dict(frozen)


def combine(trained: Any, frozen: Any) -> Any:
    """Joins the two trees from `split`."""
    if not frozen:
        return trained
    return unflatten_dict(flatten_dict(frozen) | flatten_dict(trained))


def base_of(params: Any) -> Any:
    """Returns the parameters without adapters. The adapters are removed, not merged into the kernels."""
    trained, frozen = split(params)
    return frozen or trained


def merge(params: Any, config: ModelConfig) -> tuple[Any, ModelConfig]:
    """Merges adapters into the kernels: W becomes W + (alpha / rank) A B, computed in float32.

    Without LoRA, returns both arguments unchanged. Outside `jax.jit`, arrays keep their placement on devices.

    Args:
        params: unboxed, with stacked layers.

    Returns:
        The parameters; unmerged arrays are shared.
        The configuration without LoRA.

    Raises:
        ValueError: `params` have adapters but `config` does not, or the other way round.
    """
    if has_adapters(params) != (config.lora is not None):
        raise ValueError("`params` and `config` disagree on whether the model has adapters")
    if config.lora is None:
        return params, config
    adapters, frozen = split(params)
    merged: dict[tuple[str, ...], Any] = flatten_dict(frozen)
    thin: dict[tuple[str, ...], Any] = flatten_dict(adapters)
    for path, a in thin.items():
        if path[-1] == LORA_A:
            kernel, b = merged[*path[:-1], "kernel"], thin[*path[:-1], LORA_B]
            sharding = None if isinstance(kernel, Tracer) else kernel.sharding
            scale = config.lora.alpha / a.shape[-1]  # the last axis of A is the projection's rank
            merged[*path[:-1], "kernel"] = _add_product(kernel, a, b, scale, sharding)
    return unflatten_dict(merged), dataclasses.replace(config, lora=None)


@functools.partial(jax.jit, static_argnames=("scale", "sharding"))
def _add_product(kernel, a, b, scale: float, sharding) -> jax.Array:
    # [layers, inputs, features] + scale [layers, inputs, rank] [layers, rank, features]
    # HIGHEST: accelerators round float32 factors by default
    product = jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST)
    whole = kernel + scale * product
    return whole if sharding is None else jax.lax.with_sharding_constraint(whole, sharding)
