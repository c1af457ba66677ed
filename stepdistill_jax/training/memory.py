"""Explains a device's out-of-memory error: names the settings that determine how much memory a step needs."""

import contextlib
from collections.abc import Iterator

import jax

from stepdistill_jax.training.config import TrainConfig


@contextlib.contextmanager
def out_of_memory_explained(config: TrainConfig) -> Iterator[None]:
    """A context that replaces a device's out-of-memory error with one line that names the settings to change.

    Raises:
        MemoryError: JAX raised RESOURCE_EXHAUSTED.
    """
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise MemoryError(
            f"a device is out of memory ({str(error).splitlines()[0]}). To need less:"
            f" lower `batch_size={config.batch_size}`;"
            f" raise `num_microbatches={config.num_microbatches}` (same result);"
            f" change `remat_policy={config.remat_policy}` to minimal, then full (same result),"
            f" `dtype={config.dtype}` to bfloat16 (halves the activations),"
            f" `layout={config.layout}` to fsdp (shards parameters and optimizer over the devices)."
            " `stepdistill plan` shows in advance what fits"
        ) from error
