"""Everything that exists only for speed on CPUs; results are those of the plain way.

Gains, measured on two cores (docs/training_speed.md, docs/decoding_speed.md):

    keep_pages      a step takes 0.63 to 1.0 of the time, with a tenth of the page faults
    keep_mask       a step of 16 examples: 4.53 -> 4.17 s on one thread, 2.45 -> 2.30 s on two, with two draws of
                    a random word; four in one pass: 1.06 times the examples/s of that on two
    argmax          8 -> 0.4 ms of a decoding step of 64 rows
    sum_over_rows   attention alone, forward and backward, takes about 0.6 of the time
    in_row_blocks   decoding 256 rows takes 0.83 of the time
"""

import ctypes
import importlib.util
import os
import platform
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

M_TRIM_THRESHOLD, M_MMAP_MAX, M_ARENA_MAX = -1, -4, -8  # malloc.h
NEVER = 2**31 - 1
ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))  # bits, of threefry-2x32
DROPOUT_MASK = "dropout_mask"  # name of the masks, for `jax.checkpoint` policies
DRAWS = 2**16  # values that a random number of a dropout mask can have
BLOCK_TOKENS = 1024  # whose activations fit a CPU's cache


def keep_pages() -> bool:
    """Makes glibc keep the pages that XLA frees, if JAX will run on a CPU.

    XLA allocates a step's buffers again in each step. glibc returns large ones to the kernel, which
    then clears every page again: up to 40% of the time of a step of a small T5. Kept, memory stays
    at its peak. All three settings are needed, before JAX starts its threads: no mappings of their
    own for large blocks, no trimming, and one heap, since only the main one is never returned.

    Returns:
        Whether it is done: not on an accelerator, nor with another C library.
    """
    if not _on_cpu() or platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    settings = ((M_MMAP_MAX, 0), (M_TRIM_THRESHOLD, NEVER), (M_ARENA_MAX, 1))
    return min(mallopt(name, value) for name, value in settings) == 1


def _on_cpu() -> bool:
    """Predicts JAX's choice of platform without starting it."""
    if chosen := os.environ.get("JAX_PLATFORMS"):
        return chosen.split(",")[0] == "cpu"
    return not any(importlib.util.find_spec(name) for name in ("jax_plugins", "libtpu"))


def keep_mask(key: jax.Array, shape: tuple[int, ...], kept: int) -> jax.Array:
    """Mask [..., length, features], true with probability `kept` / `DRAWS`, from a quarter of the bits.

    `jax.random.bits` gives one word for each evaluation of threefry, and its rounds are a loop over
    memory on a CPU. Four values share one evaluation here, 16 bits each.
    """
    *batch, length, features = shape
    places = (*batch, -(-length // 4), features)

    def number(first: int, last: int) -> jax.Array:
        """Returns each element's place, counted over the axes `first` to `last` - 1."""
        count = jnp.zeros(places, jnp.uint32)
        for axis in range(first, last):
            here = jax.lax.broadcasted_iota(jnp.uint32, places, axis)
            count = count * np.uint32(places[axis]) + here
        return count

    # two counters, since 32 bits may not hold one
    counters = number(0, len(batch)), number(len(batch), len(places))
    words = threefry(jax.random.bits(key, (2,)), *counters)
    draws = [draw for word in words for draw in (word % DRAWS, word // DRAWS)]
    bits = sum((draw < kept).astype(jnp.uint8) << i for i, draw in enumerate(draws))
    # computed once, not again for each quarter; and kept like this, a quarter of the mask's size
    bits = checkpoint_name(jax.lax.optimization_barrier(bits), DROPOUT_MASK)
    # quarters side by side along the length, the one axis that no layout cuts
    mask = jnp.concatenate([bits >> i & 1 for i in range(4)], axis=-2)
    return mask[..., :length, :] != 0


def threefry(key: jax.Array, x: jax.Array, y: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Both random words of counters x and y, uint32 each: threefry-2x32 of 20 rounds.

    The generator of `jax.random` (Salmon et al. 2011, doi:10.1145/2063384.2063405) in one expression,
    which XLA compiles to one pass.
    """
    keys = (key[0], key[1], key[0] ^ key[1] ^ np.uint32(0x1BD11BDA))
    x, y = x + keys[0], y + keys[1]
    for group in range(5):
        for rotation in ROTATIONS[group % 2]:
            x = x + y
            y = x ^ (y << rotation | y >> 32 - rotation)
        x, y = x + keys[(group + 1) % 3], y + keys[(group + 2) % 3] + np.uint32(group + 1)
    return x, y


def sum_over_rows(x: jax.Array) -> jax.Array:
    """[rows, ...] -> [1, ...], on a CPU as a product with ones.

    XLA's own sum over the first axis jumps from row to row for each element there.
    """

    def product(x):
        ones = jnp.ones((1, x.shape[0]), x.dtype)
        sums = jnp.matmul(ones, x.reshape(x.shape[0], -1), precision=jax.lax.Precision.HIGHEST)
        return sums.reshape(1, *x.shape[1:])

    return jax.lax.platform_dependent(x, cpu=product, default=lambda x: x.sum(0, keepdims=True))


def argmax(logits: jax.Array) -> jax.Array:
    """`jnp.argmax` over the last axis, the first of equals, in two passes of vector instructions.

    XLA's own goes id by id on a CPU.
    """
    last = logits.shape[-1] - 1
    best = jnp.max(logits, axis=-1, keepdims=True)
    return jnp.min(jnp.where(logits == best, jnp.arange(last + 1), last), axis=-1)


def in_row_blocks(encode: Callable, *arrays: jax.Array) -> jax.Array:
    """`encode` of arrays [batch, length], on a CPU one block of rows after the other.

    The activations of a block stay in the cache. Elsewhere all rows are encoded at once.
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
    """The largest divisor of `batch` with at most 1024 ids; all if none is near, or for symbolic sizes."""
    if not isinstance(batch, int) or not isinstance(length, int):
        return batch
    most = max(1, BLOCK_TOKENS // length)
    rows = max(n for n in range(1, batch + 1) if batch % n == 0 and n <= most)
    return rows if 2 * rows > most else batch
