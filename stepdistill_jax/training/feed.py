"""From host batches to device arrays: each process places the rows of its own devices."""

import jax
from jax.sharding import Mesh

from stepdistill_jax.sharding import batch_sharding
from stepdistill_jax.training.batches import Batch, process_slice


def place(batch: Batch, mesh: Mesh) -> tuple[dict[str, jax.Array], ...]:
    """The global batch as arrays cut by rows over the mesh; every process passes the same one."""
    sharding = batch_sharding(mesh)
    if jax.process_count() == 1:
        return jax.device_put(batch, sharding)
    local = process_slice(batch, jax.process_index(), jax.process_count())
    return jax.tree.map(lambda x: jax.make_array_from_process_local_data(sharding, x), local)
