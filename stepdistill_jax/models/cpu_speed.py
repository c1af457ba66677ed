"""Code that exists only for speed on CPUs. It gives the same results as the plain code.

Gains are in docs/lab/training_speed.md and docs/lab/decoding_speed.md.
"""

import ctypes
import importlib.util
import os
import platform
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

M_TRIM_THRESHOLD, M_MMAP_MAX, M_ARENA_MAX = -1, -4, -8  # malloc.h
# a threshold that is never reached (mallopt(3)); 2**31 - 1 would return a step's memory once it has 2 GiB
NEVER = -1
BLOCK_TOKENS = 1024  # number of tokens whose activations fit a CPU's cache


def keep_pages() -> bool:
    """Makes glibc keep the pages that XLA frees, if JAX will run on a CPU.

    Call this before JAX starts its threads. The process then never gives back its peak memory.

    Returns:
        Whether the settings were changed. False on an accelerator or with another C library.
    """
    # Otherwise, the operating system clears the pages of a step's buffers again in each step, which takes up to 40%
    # of the step time of a small T5.
    if not _on_cpu() or platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    # no separate mappings, no trimming, and one heap, since glibc keeps the memory of the main heap only
    settings = ((M_MMAP_MAX, 0), (M_TRIM_THRESHOLD, NEVER), (M_ARENA_MAX, 1))
    return min(mallopt(name, value) for name, value in settings) == 1


def _on_cpu() -> bool:
    """Predicts, without starting JAX, whether JAX will choose the CPU."""
    if chosen := os.environ.get("JAX_PLATFORMS"):
        return chosen.split(",")[0] == "cpu"
    return not any(importlib.util.find_spec(name) for name in ("jax_plugins", "libtpu"))


def step_options(mesh: Mesh) -> dict[str, bool] | None:
    """Returns XLA's options for a training step on this mesh, or None if its devices are not CPUs.

    One option avoids copies of Adam's moments. The other turns off a parallel schedule that keeps more buffers
    alive.
    """
    if mesh.devices.flat[0].platform != "cpu":
        return None
    return {
        "xla_cpu_copy_insertion_use_region_analysis": True,
        "xla_cpu_enable_concurrency_optimized_scheduler": False,
    }


def sum_over_rows(x: jax.Array) -> jax.Array:
    """Sums over the first axis, [rows, ...] -> [1, ...].

    On a CPU, it is a matmul with ones, since XLA's own sum over the first axis is slow there.
    """

    def product(x):
        ones = jnp.ones((1, x.shape[0]), x.dtype)
        sums = jnp.matmul(ones, x.reshape(x.shape[0], -1), precision=jax.lax.Precision.HIGHEST)
        return sums.reshape(1, *x.shape[1:])

    return jax.lax.platform_dependent(x, cpu=product, default=lambda x: x.sum(0, keepdims=True))


def argmax(logits: jax.Array) -> jax.Array:
    """Returns `jnp.argmax` over the last axis.

    XLA's own argmax is slow on a CPU, where it compares the ids one by one.
    """
    # the largest value, then the smallest id that has it: 2 7 7 1 -> 3 1 2 3 -> 1. For a row of NaN: the last id
    last = logits.shape[-1] - 1
    best = jnp.max(logits, axis=-1, keepdims=True)
    return jnp.min(jnp.where(logits == best, jnp.arange(last + 1), last), axis=-1)


def in_row_blocks(encode: Callable, *arrays: jax.Array) -> jax.Array:
    """Returns `encode(*arrays)` for arrays [batch, length].

    On a CPU, one block of rows is encoded at a time, so that its activations fit the cache.
    """
    batch, length = arrays[0].shape
    rows = _rows_of_block(batch, length)
    if rows == batch:
        return encode(*arrays)

    def in_blocks(*arrays):
        blocks = [x.reshape(batch // rows, rows, length) for x in arrays]
        return jax.lax.map(lambda block: encode(*block), blocks).reshape(batch, length, -1)

    return jax.lax.platform_dependent(*arrays, cpu=in_blocks, default=encode)


def _rows_of_block(batch: Any, length: Any) -> Any:
    """Returns the number of rows of a block.

    This is the largest divisor of `batch` for which a block has at most `BLOCK_TOKENS` tokens, or 1 if a single
    row has more. If such a block fills at most half of `BLOCK_TOKENS`, or if a size is symbolic, it is `batch`
    (a single block).
    """
    if not isinstance(batch, int) or not isinstance(length, int):
        return batch
    # 256 rows of 100 ids: at most 10 rows fit, so 8. 251 rows (a prime) of 100 ids: the divisor is 1, so all rows
    # at once
    most = max(1, BLOCK_TOKENS // length)
    rows = max(n for n in range(1, batch + 1) if batch % n == 0 and n <= most)
    return rows if 2 * rows > most else batch
