"""Where arrays live: mesh, layouts, and T5X-style logical axis rules.

`jax.jit` with shardings is the successor of `pjit`: GSPMD cuts the step by the shardings below.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from stepdistill_jax.errors import InputError, nearest

AXES = ("data", "fsdp", "tensor")
BATCH_AXES = ("data", "fsdp")

# the first rule whose mesh axes are still free wins
LOGICAL_AXIS_RULES = (
    ("batch", BATCH_AXES),
    ("vocab", "tensor"),
    ("mlp", "tensor"),
    ("heads", "tensor"),
    ("joined_kv", "tensor"),
    ("embed", "fsdp"),
    ("layers", None),
    ("length", None),
    ("kv", None),
    ("relpos_buckets", None),
    ("lora", None),
)


@dataclasses.dataclass(frozen=True)
class Layout:
    """Sizes of the mesh axes; one of them may be -1, "all devices that are left".

    Attributes:
        data: copies of the parameters, each with rows of its own.
        fsdp: parts into which parameters and rows are cut.
        tensor: parts into which heads and feed-forward width are cut.
    """

    data: int = 1
    fsdp: int = 1
    tensor: int = 1


LAYOUTS: dict[str, Layout] = {
    "data": Layout(data=-1),
    "fsdp": Layout(fsdp=-1),
    "fsdp_tensor": Layout(fsdp=-1, tensor=2),
}


def make_mesh(layout: str | Layout, devices: Sequence[Any] | None = None) -> Mesh:
    """The mesh of a layout (or of its name) over all devices, or over the given ones.

    Raises:
        InputError: an unknown layout, or one whose sizes do not divide the devices.
    """
    if isinstance(layout, str):
        if layout not in LAYOUTS:
            raise InputError(
                f"LAYOUT: one of {', '.join(LAYOUTS)} is wanted, got {layout!r}"
                f"{nearest(layout, LAYOUTS)}"
            )
        layout = LAYOUTS[layout]
    devices = jax.devices() if devices is None else devices
    sizes = [layout.data, layout.fsdp, layout.tensor]
    fixed = math.prod(s for s in sizes if s != -1)
    if sizes.count(-1) > 1 or fixed < 1 or len(devices) % fixed:
        raise InputError(
            f"LAYOUT: data x fsdp x tensor = {' x '.join(map(str, sizes))} does not divide"
            f" {len(devices)} devices"
        )
    sizes = [len(devices) // fixed if s == -1 else s for s in sizes]
    if math.prod(sizes) != len(devices):
        raise InputError(
            f"LAYOUT: data x fsdp x tensor = {' x '.join(map(str, sizes))} uses"
            f" {math.prod(sizes)} of {len(devices)} devices"
        )
    # Auto: GSPMD propagates; JAX's default, Explicit, wants a sharding on each operation
    return jax.make_mesh(
        tuple(sizes), AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices
    )


def batch_shards(mesh: Mesh) -> int:
    """Number of parts into which the rows of a batch are cut."""
    return math.prod(mesh.shape[axis] for axis in BATCH_AXES)


def replicated(mesh: Mesh) -> NamedSharding:
    """The whole array on each device."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """[batch, ...] cut by rows."""
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def place_rows(batch: Any, mesh: Mesh) -> Any:
    """A tree of host arrays [rows, ...] as global arrays cut by rows over the mesh.

    Every process holds the whole batch and gives each of its devices the rows that this device
    owns: right for any mesh, also where a tensor axis makes two processes own the same rows.
    """
    sharding = batch_sharding(mesh)
    return jax.tree.map(
        lambda x: jax.make_array_from_callback(x.shape, sharding, lambda index: x[index]), batch
    )


def param_shardings(mesh: Mesh, boxed: Any) -> Any:
    """Shardings of a tree of logically partitioned boxes (`models.t5.abstract_params`)."""
    return nn.logical_to_mesh_sharding(nn.get_partition_spec(boxed), mesh, LOGICAL_AXIS_RULES)
