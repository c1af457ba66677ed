"""Code that exists only for speed on CPUs. It gives the same results as the plain code.

The gains were measured on two cores (docs/lab/training_speed.md, docs/lab/decoding_speed.md):

    keep_pages      a training step takes 0.63 to 1.0 times as long and has a tenth of the page faults
    argmax          the argmax in a decoding step of 64 rows takes 0.4 ms instead of 8 ms
    sum_over_rows   attention alone, forward and backward, takes about 0.6 times as long
    in_row_blocks   decoding 256 rows takes 0.83 times as long
    step_options    a training step of T5Gemma takes 0.87 times as long and 6.7 GB instead of 9.2 GB
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

    XLA allocates a step's buffers again in each step. Without this setting, glibc returns large buffers to the
    operating system, which clears every page before it hands it out again. This takes up to 40% of the time
    of a step of a small T5. With this setting, the process never gives back its peak memory.

    This must be called before JAX starts its threads. It changes three settings of glibc: no separate mappings
    for large blocks, no trimming, and a single heap, since glibc keeps the memory of the main heap only.

    Returns:
        Whether the settings were changed. They are not if JAX will run on an accelerator, or if the C library
        is not glibc.
    """
    if not _on_cpu() or platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    settings = ((M_MMAP_MAX, 0), (M_TRIM_THRESHOLD, NEVER), (M_ARENA_MAX, 1))
    return min(mallopt(name, value) for name, value in settings) == 1


def _on_cpu() -> bool:
    """Predicts, without starting JAX, whether JAX will choose the CPU."""
    if chosen := os.environ.get("JAX_PLATFORMS"):
        return chosen.split(",")[0] == "cpu"
    return not any(importlib.util.find_spec(name) for name in ("jax_plugins", "libtpu"))


def step_options(mesh: Mesh) -> dict[str, bool] | None:
    """Returns XLA's options for a training step on this mesh, or None if the mesh does not consist of CPUs.

    By default, XLA copies Adam's moments before it updates them in place, because it does not consider
    the order of the operations. Also by default, it orders the operations so that many can run at the same
    time, which keeps more buffers alive than a few cores can use.
    """
    if mesh.devices.flat[0].platform != "cpu":
        return None
    return {
        "xla_cpu_copy_insertion_use_region_analysis": True,
        "xla_cpu_enable_concurrency_optimized_scheduler": False,
    }


def sum_over_rows(x: jax.Array) -> jax.Array:
    """Sums over the first axis, [rows, ...] -> [1, ...]. On a CPU, the sum is computed as a matmul with ones.

    XLA's own sum over the first axis is slow on a CPU, since it jumps from row to row for each element.
    """

    def product(x):
        ones = jnp.ones((1, x.shape[0]), x.dtype)
        sums = jnp.matmul(ones, x.reshape(x.shape[0], -1), precision=jax.lax.Precision.HIGHEST)
        return sums.reshape(1, *x.shape[1:])

    return jax.lax.platform_dependent(x, cpu=product, default=lambda x: x.sum(0, keepdims=True))


def argmax(logits: jax.Array) -> jax.Array:
    """Returns `jnp.argmax` over the last axis, computed in two passes of vector instructions.

    XLA's own argmax compares the ids one by one on a CPU.
    """
    # the largest value, then the smallest id that has it: 2 7 7 1 -> 3 1 2 3 -> 1. For a row of NaN: the last id
    last = logits.shape[-1] - 1
    best = jnp.max(logits, axis=-1, keepdims=True)
    return jnp.min(jnp.where(logits == best, jnp.arange(last + 1), last), axis=-1)


def in_row_blocks(encode: Callable, *arrays: jax.Array) -> jax.Array:
    """Returns `encode(*arrays)` for arrays [batch, length].

    On a CPU, one block of rows is encoded at a time, so that the activations of a block fit the CPU's cache.
    Other devices encode all rows at once.
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
    """Returns the number of rows of a block: the largest divisor of `batch` for which a block has at most 1024 ids.

    The result is `batch` if this divisor is less than half of the number of rows that would fit, or if sizes
    are symbolic.
    """
    if not isinstance(batch, int) or not isinstance(length, int):
        return batch
    # 256 rows of 100 ids: at most 10 rows fit, so 8. 251 rows (a prime) of 100 ids: the divisor is 1, so all rows
    # at once
    most = max(1, BLOCK_TOKENS // length)
    rows = max(n for n in range(1, batch + 1) if batch % n == 0 and n <= most)
    return rows if 2 * rows > most else batch
