"""Runs the attention kernel for a chip on the devices of a mesh.

XLA cannot partition a kernel. So `shard_map` runs it on each device's own rows and heads.
"""

import functools
import importlib
import types
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from stepdistill_jax.models.dropout import DRAWS, dropout_seeds, kept_draws
from stepdistill_jax.models.sharding import BATCH_AXES, traced_platform

# a CPU interprets the TPU's kernel, for tests
KERNELS = {"tpu": "tpu", "gpu": "gpu", "cpu": "tpu"}
# decoding has only one or a few queries per row, so a kernel's tiles would be mostly empty and save no time
FEWEST_QUERIES = 16


def fused_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    relative_bias: jax.Array | None,
    query_segments: jax.Array,
    key_segments: jax.Array,
    causal: bool,
    dropout_rate: float,
    dropout_rng: jax.Array | None,
) -> jax.Array:
    """Returns the result of `attention.attention`, computed by a kernel.

    Softcap, window, scale, shared dropout masks, and fewer key/value heads than query heads are not supported.
    """
    platform = traced_platform()
    kept, seeds = kept_draws(dropout_rate), None
    if dropout_rng is not None and kept < DRAWS:
        seeds = dropout_seeds(dropout_rng, (q.shape[0], q.shape[2]))
    call = functools.partial(
        kernel_of(platform).attention,
        causal=causal,
        kept=kept,
        interpret=platform == "cpu",
    )
    # [1, heads, q, k] -> [heads, q, k]; a kernel needs segments for each row
    bias = None if relative_bias is None else relative_bias[0]
    query_segments = jnp.broadcast_to(query_segments, q.shape[:2])
    key_segments = jnp.broadcast_to(key_segments, k.shape[:2])
    # Names all free axes, even those over which nothing is sharded here, since XLA refuses a kernel that it
    # might have to partition.
    if (free := _free_axes()) and jax.sharding.get_abstract_mesh().size > 1:
        rows, heads = [tuple(a for a in free if a in axes) for axes in (BATCH_AXES, ("tensor",))]
        of_rows, of_heads = P(rows), P(rows, None, heads)
        call = jax.shard_map(
            call,
            # in the order of the call below; an argument that is None has no sharding
            in_specs=(
                *(of_heads,) * 3,
                None if bias is None else P(heads),
                *(of_rows,) * 2,
                None if seeds is None else P(None, rows, heads),
            ),
            out_specs=of_heads,
            axis_names=set(free),
            check_vma=False,
        )
    return call(q, k, v, bias, query_segments, key_segments, seeds)


def kernel_of(platform: str) -> types.ModuleType:
    """Returns a platform's kernel module, imported only when needed since importing Pallas is slow."""
    return importlib.import_module(f"stepdistill_jax.models.kernels.{KERNELS[platform]}")


def reason_against(
    device: Any,
    q_len: int,
    k_len: int,
    heads: int,
    head_dim: int,
    dtype: jax.typing.DTypeLike,
    *,
    bias: bool,
) -> str | None:
    """Returns why no kernel supports these shapes on a device, or None if one does.

    Args:
        device: any object with `platform` and `device_kind`.
        bias: whether there is a relative bias.
    """
    if device.platform not in KERNELS:
        return f"there is no kernel for {device.device_kind}"
    shapes = (q_len, k_len, heads, head_dim, dtype)
    return kernel_of(device.platform).reason_against(*shapes, bias=bias, kind=device.device_kind)


def _free_axes() -> tuple[str, ...]:
    """Returns the mesh axes that no enclosing `shard_map` handles already."""
    mesh = jax.sharding.get_abstract_mesh()
    return tuple(axis for axis in mesh.axis_names if axis not in mesh.manual_axes)
