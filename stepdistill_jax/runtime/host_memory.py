"""What malloc does with the large buffers of a step that runs on a CPU."""

import ctypes
import importlib.util
import os
import platform

# malloc.h
M_TRIM_THRESHOLD, M_MMAP_MAX, M_ARENA_MAX = -1, -4, -8
NEVER = 2**31 - 1


def keep_pages() -> bool:
    """Lets glibc keep the pages that XLA gives back, where JAX will run on a CPU.

    XLA takes a step's buffers anew in each step. glibc returns large ones to the kernel, which then
    clears every page again: up to 40% of the time of a step of a small T5. Kept, memory stays at
    its peak. All three settings are needed, before JAX starts its threads: no mappings of their own
    for large blocks, no trimming, and one heap, since only the main one is never given back.

    Returns:
        Whether it is done: not on an accelerator, nor with another C library.
    """
    if not _on_cpu() or platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    settings = ((M_MMAP_MAX, 0), (M_TRIM_THRESHOLD, NEVER), (M_ARENA_MAX, 1))
    return min(mallopt(name, value) for name, value in settings) == 1


def _on_cpu() -> bool:
    """As JAX will decide, without starting it."""
    if chosen := os.environ.get("JAX_PLATFORMS"):
        return chosen.split(",")[0] == "cpu"
    return not any(importlib.util.find_spec(name) for name in ("jax_plugins", "libtpu"))
