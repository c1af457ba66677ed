"""Placement of arrays: mesh, layouts, and T5X-style logical axis rules.

`jax.jit` with shardings is the successor of `pjit`: GSPMD partitions the step by the shardings below.
"""

import collections
import dataclasses
import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from stepdistill_jax.errors import InputError
from stepdistill_jax.models.config import ModelConfig
from stepdistill_jax.runtime.checks import keep, of_type, one_of, whole

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
# logical axis -> the field of `models.config.Side` or `ModelConfig` that is its size
_FIELDS = {
    "vocab": "vocab_size",
    "mlp": "mlp_dim",
    "heads": "num_heads",
    "joined_kv": "num_heads x head_dim",
    "embed": "emb_dim",
}


@dataclasses.dataclass(frozen=True)
class Layout:
    """Sizes of the mesh axes; one of `data`, `fsdp` and `tensor` may be -1, "all devices left".

    Attributes:
        data: copies of the parameters inside a slice, each with rows of its own.
        fsdp: parts into which parameters and rows are cut.
        tensor: parts into which heads, feed-forward width and vocabulary are cut.
        dcn_data: groups of devices, joined by the data centre's network (DCN), that hold a copy
            each; -1 is one for each slice (MaxText's `dcn_data_parallelism`). The mesh's axis
            `data` is dcn_data x data.
    """

    data: int = 1
    fsdp: int = 1
    tensor: int = 1
    dcn_data: int = 1

    def __post_init__(self):
        keep(self, whole, "data", "fsdp", "tensor", "dcn_data", of="Layout.", least=-1)


LAYOUTS: dict[str, Layout] = {
    "data": Layout(data=-1),
    "fsdp": Layout(fsdp=-1),
    "fsdp_tensor": Layout(fsdp=-1, tensor=2),
    "tensor": Layout(tensor=-1),
    "hybrid": Layout(fsdp=-1, dcn_data=-1),
}


def make_mesh(layout: str | Layout, devices: Sequence[Any] | None = None) -> Mesh:
    """Returns the mesh of a layout (or of its name) over all devices, or over the given ones.

    Slices are the outermost axis, so a copy's parts communicate over the fast links of one slice. If
    devices do not know their slice, or are virtual devices of one machine (CPU), each process counts
    as a slice, and `dcn_data` cuts the devices, in order of processes, into equal blocks.

    Raises:
        InputError: an unknown layout, or one whose sizes do not fit the devices; names the nearest.
    """
    if isinstance(layout, str):
        one_of("layout", layout, LAYOUTS)
        layout = LAYOUTS[layout]
    of_type("layout", layout, Layout, "a layout's name or a `Layout`")
    devices = list(jax.devices() if devices is None else devices)
    sizes = _sizes(layout, devices)
    # Auto: GSPMD propagates; JAX's default, Explicit, needs a sharding for each operation
    return Mesh(_arranged(sizes, devices), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def _slices(devices: list[Any]) -> int:
    """Returns the number of slices, or of processes if devices do not know their slice."""
    found = collections.Counter(getattr(d, "slice_index", None) for d in devices)
    # JAX counts the hosts of one machine as one slice: several processes there rehearse several
    if None in found or (len(found) == 1 and devices[0].platform == "cpu"):
        found = collections.Counter(d.process_index for d in devices)
    if len(set(found.values())) > 1:
        raise InputError(
            f"`layout`: slices must be of equal size, not of {sorted(found.values())} devices"
        )
    return len(found)


def _sizes(layout: Layout, devices: list[Any]) -> tuple[int, int, int]:
    """Returns (data, fsdp, tensor) of the mesh; data includes copies across slices."""
    count, copies = len(devices), layout.dcn_data
    if copies == -1 and (copies := _slices(devices)) == 1:
        raise InputError(
            f"`layout`: hybrid keeps a copy in each slice, and there is one slice ({count} devices);"
            " fsdp is the layout of one slice (or give `Layout.dcn_data` the number of copies)"
        )
    if copies > 1 and (slices := _slices(devices)) % copies and copies % slices:
        raise InputError(
            f"`layout`: dcn_data={copies} does not fit {slices} slices; nearest that does:"
            f" dcn_data={slices}"
        )
    wanted = (copies, layout.data, layout.fsdp, layout.tensor)
    given = [size for size in wanted if size != -1]
    used = math.prod(given)
    fits = min(given) >= 1 and count % used == 0 and (len(given) == 3 or used == count)
    if not fits or len(given) < 3:
        names = (*(("dcn_data",) * (copies != 1)), *AXES)
        raise InputError(
            f"`layout`: {' x '.join(names)} = {' x '.join(map(str, wanted[-len(names) :]))} does not"
            f" fit {count} devices; nearest that does: {_nearest_layout(wanted, count)}"
        )
    copies, data, fsdp, tensor = (count // used if size == -1 else size for size in wanted)
    return copies * data, fsdp, tensor


def _nearest_layout(
    wanted: Sequence[int], count: int, *, embed: int = 0, cut_by_tensor: int = 0
) -> str:
    """Returns, as text, the layout of `count` devices whose factors to `wanted` are smallest.

    Args:
        wanted: dcn_data, data, fsdp, tensor; -1 is free.
        count: devices.
        embed, cut_by_tensor: sizes that fsdp and tensor must divide; 0 allows any.
    """

    def distance(layout: Sequence[int]) -> tuple[float, ...]:
        gaps = [
            0.0 if asked == -1 else abs(math.log(size / max(asked, 1)))
            for asked, size in zip(wanted, layout, strict=True)
        ]
        # ties: the layout with the fewest axes, then the one that keeps the copies
        return round(sum(gaps), 9), sum(size > 1 for size in layout), *gaps[:2], gaps[3]

    divisors = [d for d in range(1, count + 1) if count % d == 0]
    layouts = [
        (copies, data, count // (copies * data * tensor), tensor)
        for copies in (divisors if wanted[0] != 1 else [1])
        for data, tensor in itertools.product(divisors, repeat=2)
        if count % (copies * data * tensor) == 0 and cut_by_tensor % tensor == 0
    ]
    best = min((x for x in layouts if embed % x[2] == 0), key=distance)
    named = zip(("dcn_data", *AXES), best, strict=True)
    return ", ".join(f"{name}={size}" for name, size in named if size > 1) or "data=1"


def _arranged(sizes: tuple[int, int, int], devices: list[Any]) -> np.ndarray:
    """Returns [data, fsdp, tensor] devices, slices along the first axes that they divide."""
    # tried last: splitting a physical axis is better than no mesh
    options: dict[str, Any] = {"devices": devices, "allow_split_physical_axes": True}
    slices = len({getattr(d, "slice_index", None) for d in devices})
    if slices == 1:
        return mesh_utils.create_device_mesh(sizes, **options)
    outer, left = [], slices  # sizes multiply to the number of devices, so 1 remains
    for size in sizes:
        outer.append(math.gcd(size, left))
        left //= outer[-1]
    inner = [size // o for size, o in zip(sizes, outer, strict=True)]
    return mesh_utils.create_hybrid_device_mesh(inner, outer, **options)


def traced_device() -> Any:
    """Returns a device of the program being traced, for its `platform` and `device_kind`.

    It belongs to the mesh of the tracing context, whose devices need not exist here; without a mesh it
    is JAX's first device.
    """
    return jax.sharding.get_abstract_mesh().abstract_device or jax.devices()[0]


def traced_platform() -> str:
    """Returns the platform of the program being traced: `cpu`, `gpu` or `tpu`."""
    return traced_device().platform


def batch_shards(mesh: Mesh) -> int:
    """Returns the number of parts into which the rows of a batch are cut."""
    return math.prod(mesh.shape[axis] for axis in BATCH_AXES)


def replicated(mesh: Mesh) -> NamedSharding:
    """Returns the sharding of a whole array on each device."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Returns the sharding of [batch, ...] by rows."""
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def place_rows(batch: Any, mesh: Mesh, *, blocks: Sequence[int] = (0,), num_blocks: int = 1) -> Any:
    """Turns a tree of host arrays [rows, ...] into global arrays cut by rows over the mesh.

    Every process gives each of its devices the rows that the device owns. This holds for any mesh, also
    if a tensor axis makes two processes own the same rows.

    Args:
        batch: arrays of this process's blocks, one after the other; all rows by default.
        mesh: over which rows are cut.
        blocks: ascending numbers of these blocks among `num_blocks` equal ones, from `blocks_on`.
        num_blocks: number of blocks of all rows.
    """
    sharding = batch_sharding(mesh)
    place_of = {block: place for place, block in enumerate(blocks)}

    def placed(x: np.ndarray) -> jax.Array:
        size = len(x) // len(blocks)

        def rows(index: Any) -> np.ndarray:
            # consecutive blocks: a device's rows may begin in one and end in another
            first, end, _ = index[0].indices(size * num_blocks)
            own = place_of[first // size] * size + first % size
            return x[own : own + end - first]

        return jax.make_array_from_callback((size * num_blocks, *x.shape[1:]), sharding, rows)

    return jax.tree.map(placed, batch)


def blocks_on(mesh: Mesh, num_blocks: int, devices: Sequence[Any] | None = None) -> tuple[int, ...]:
    """Returns the numbers of the equal blocks of a batch's rows that devices need.

    A device needs each block that holds one of its rows. Two processes need the same block if blocks
    and devices do not divide each other, or if a tensor axis spans processes.

    Args:
        mesh: over which rows are cut.
        num_blocks: number of blocks of all rows.
        devices: of the mesh; None is this process's devices.
    """
    shards = batch_shards(mesh)
    owned = batch_sharding(mesh).devices_indices_map((shards * num_blocks,))
    needed = set()
    for device in mesh.local_devices if devices is None else devices:
        first, end, _ = owned[device][0].indices(shards * num_blocks)
        needed.update(range(first // shards, -(-end // shards)))
    return tuple(sorted(needed))


def param_shardings(mesh: Mesh, boxed: Any, config: ModelConfig | None = None) -> Any:
    """Returns the shardings of a tree of logically partitioned boxes (`models.encoder_decoder.abstract_params`).

    Args:
        mesh: over which parameters are cut.
        boxed: the tree.
        config: of the model, whose heads must stay whole; None checks only dimensions.

    Raises:
        InputError: an axis of the mesh does not divide a dimension that it cuts; names both, and
            the nearest layout that divides everything.
    """
    specs = nn.get_partition_spec(boxed)
    shardings = nn.logical_to_mesh_sharding(specs, mesh, LOGICAL_AXIS_RULES)
    heads = {}
    if config is not None and config.position_bias is None:  # else a table by heads is cut, too
        heads = {"encoder": config.encoder.num_kv_heads, "decoder": config.decoder.num_kv_heads}
    _check_divisible(mesh, jax.eval_shape(nn.meta.unbox, boxed), specs, shardings, heads)
    return shardings


def _check_divisible(
    mesh: Mesh, params: Any, specs: Any, shardings: Any, heads: Mapping[str, int]
) -> None:
    """Refuses dimensions that are no multiple of their mesh axis: jit raises, and GSPMD would pad.

    Heads stay whole: the `heads` of a side's keys and values must divide evenly. A kernel [embed, 2
    heads x 64] does not show that its 128 columns can be cut into two parts at most.
    """
    wrong: dict[str, str] = {}
    # greatest common divisor of the dimensions that an axis cuts
    cut: dict[str, int] = dict.fromkeys(AXES, 0)

    def check(path, param, spec, sharding) -> None:
        for size, logical, axis in zip(param.shape, spec, sharding.spec, strict=False):
            if axis is None:
                continue
            cut[axis] = math.gcd(cut[axis], size)
            if size % mesh.shape[axis]:
                name = jax.tree_util.keystr(path, simple=True, separator="/")
                wrong.setdefault(
                    f"{axis}={mesh.shape[axis]} does not divide {_FIELDS[logical]}={size}",
                    f"{name} {list(param.shape)}",
                )

    jax.tree_util.tree_map_with_path(check, params, specs, shardings)
    for side, count in heads.items():
        cut["tensor"] = math.gcd(cut["tensor"], count)
        if count % mesh.shape["tensor"]:
            what = f"tensor={mesh.shape['tensor']} does not divide num_kv_heads={count}"
            whose = {side, *(s for s in heads if heads[s] == count)}
            wrong.setdefault(what, f"whole heads of keys and values, {' and '.join(sorted(whose))}")
    if wrong:
        wanted = (1, *(mesh.shape[axis] for axis in AXES))
        nearest_layout = _nearest_layout(
            wanted, mesh.size, embed=cut["fsdp"], cut_by_tensor=cut["tensor"]
        )
        raise InputError(
            f"`layout`: {', '.join(f'{what} ({where})' for what, where in wrong.items())}; nearest"
            f" layout of {mesh.size} devices that does: {nearest_layout}"
        )
