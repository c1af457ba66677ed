"""Advice for a step that does not fit into a device's memory."""

import contextlib
from collections.abc import Iterator

import jax

from stepdistill_jax.training.config import TrainConfig


@contextlib.contextmanager
def out_of_memory_explained(config: TrainConfig) -> Iterator[None]:
    """Turns a device's out-of-memory error into one line with the settings that decide the memory.

    Raises:
        MemoryError: instead of JAX's RESOURCE_EXHAUSTED.
    """
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise MemoryError(
            f"a device is out of memory ({str(error).splitlines()[0]}); settings that decide:"
            f" `batch_size={config.batch_size}` (smaller),"
            f" `num_microbatches={config.num_microbatches}` (more, same result),"
            f" `remat_policy={config.remat_policy}` (minimal, then full, same result),"
            f" `dtype={config.dtype}` (bfloat16 halves the activations),"
            f" `layout={config.layout}` (fsdp cuts parameters and optimizer over the devices);"
            " `stepdistill plan` shows in advance what fits"
        ) from error
