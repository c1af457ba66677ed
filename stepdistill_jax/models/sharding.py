"""Placement of arrays on devices: the mesh, its layouts, and logical axis rules as in T5X.

`jax.jit` partitions a step with GSPMD, according to these shardings.
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

# The first rule whose mesh axis is still free wins. For example, the rows of a kernel ("embed", "joined_kv")
# are sharded over fsdp and its columns over tensor.
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
# logical axis -> the field of `models.config.Side` or `ModelConfig` that holds its size
_FIELDS = {
    "vocab": "vocab_size",
    "mlp": "mlp_dim",
    "heads": "num_heads",
    "joined_kv": "num_heads x head_dim",
    "embed": "emb_dim",
}


@dataclasses.dataclass(frozen=True)
class Layout:
    """Sizes of the mesh axes. One of `data`, `fsdp` and `tensor` may be -1, for all remaining devices.

    Attributes:
        data: number of copies of the parameters in each group of devices (see `dcn_data`). Each copy processes its
            own rows of the batch.
        fsdp: number of shards of each copy and of its rows.
        tensor: number of shards of heads, feed-forward width and vocabulary.
        dcn_data: number of groups of devices. The data centre's network (DCN) connects the groups. -1 means one
            group for each slice, like MaxText's `dcn_data_parallelism`. The mesh's axis named data has the size
            dcn_data x data.
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
    """Returns the mesh of a layout.

    Where possible, each copy of the parameters is on devices of a single slice.

    Args:
        layout: a `Layout`, or a name in `LAYOUTS`.
        devices: None means all devices. If the devices have no slice index, or are CPUs of one machine, each
            process counts as a slice.

    Raises:
        InputError: the layout is unknown, or its sizes do not fit the devices.
    """
    if isinstance(layout, str):
        one_of("layout", layout, LAYOUTS)
        layout = LAYOUTS[layout]
    of_type("layout", layout, Layout, "a layout's name or a `Layout`")
    devices = list(jax.devices() if devices is None else devices)
    sizes = _sizes(layout, devices)
    # Auto: GSPMD propagates shardings. JAX's default, Explicit, needs a sharding for each operation.
    return Mesh(_arranged(sizes, devices), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def _slices(devices: list[Any]) -> int:
    """Returns the number of slices.

    If the devices have no slice index, or are CPUs of one machine, each process counts as a slice.
    """
    found = collections.Counter(getattr(d, "slice_index", None) for d in devices)
    # On CPUs JAX counts all processes of a machine as one slice. Tests of several slices use several
    # processes, so there each process counts as a slice.
    if None in found or (len(found) == 1 and devices[0].platform == "cpu"):
        found = collections.Counter(d.process_index for d in devices)
    if len(set(found.values())) > 1:
        raise InputError(
            f"`layout`: slices must have equally many devices, but have {sorted(found.values())}"
        )
    return len(found)


def _sizes(layout: Layout, devices: list[Any]) -> tuple[int, int, int]:
    """Returns the sizes of the mesh axes `data`, `fsdp` and `tensor`. The first is a multiple of `dcn_data`."""
    # 2 slices of 4 devices: Layout(fsdp=-1, dcn_data=-1) -> (2, 4, 1); Layout(data=-1, tensor=2) -> (4, 1, 2)
    count, copies = len(devices), layout.dcn_data
    if copies == -1 and (copies := _slices(devices)) == 1:
        raise InputError(
            f"`layout`: hybrid keeps a copy of the parameters in each slice, and there is one slice"
            f" of {count} devices. Use fsdp, or set `Layout.dcn_data` to the number of copies"
        )
    if copies > 1 and (slices := _slices(devices)) % copies and copies % slices:
        raise InputError(
            f"`layout`: dcn_data={copies} does not fit {slices} slices; nearest that fits:"
            f" dcn_data={slices}"
        )
    wanted = (copies, layout.data, layout.fsdp, layout.tensor)
    given = [size for size in wanted if size != -1]
    used = math.prod(given)
    # without a -1, the sizes must use all devices; with one, they must divide the number of devices
    fits = min(given) >= 1 and count % used == 0 and (len(given) == 3 or used == count)
    if not fits or len(given) < 3:
        names = (*(("dcn_data",) * (copies != 1)), *AXES)
        raise InputError(
            f"`layout`: {' x '.join(names)} = {' x '.join(map(str, wanted[-len(names) :]))} does not"
            f" fit {count} devices; nearest that fits: {_nearest_layout(wanted, count)}"
        )
    copies, data, fsdp, tensor = (count // used if size == -1 else size for size in wanted)
    return copies * data, fsdp, tensor


def _nearest_layout(
    wanted: Sequence[int], count: int, *, embed: int = 0, cut_by_tensor: int = 0
) -> str:
    """Returns the layout of `count` devices nearest to `wanted`, as a string such as "fsdp=4, tensor=2".

    `wanted` is (dcn_data, data, fsdp, tensor); -1 means any size. fsdp is chosen so that `embed` is a multiple of it,
    and tensor so that `cut_by_tensor` is a multiple of it. The default 0 allows any size.
    """
    # the distance is the sum of |log(size / wanted size)|

    def distance(layout: Sequence[int]) -> tuple[float, ...]:
        gaps = [
            0.0 if asked == -1 else abs(math.log(size / max(asked, 1)))
            for asked, size in zip(wanted, layout, strict=True)
        ]
        # on a tie, the layout with the fewest axes above 1, then the one that changes dcn_data and data least
        return round(sum(gaps), 9), sum(size > 1 for size in layout), *gaps[:2], gaps[3]

    # fsdp follows from the other three: copies x data x fsdp x tensor = count
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
    """Returns the devices as an array [data, fsdp, tensor].

    Slices are placed side by side along `data` as far as possible, then along `fsdp`, and then along `tensor`.
    """
    # JAX splits a physical axis of a TPU's torus only if no other arrangement exists
    options: dict[str, Any] = {"devices": devices, "allow_split_physical_axes": True}
    slices = len({getattr(d, "slice_index", None) for d in devices})
    if slices == 1:
        return mesh_utils.create_device_mesh(sizes, **options)
    # 4 slices of 4 devices and sizes (2, 8, 1): outer (2, 2, 1), inner (1, 4, 1). The sizes multiply to the
    # number of devices, so `left` ends at 1.
    outer, left = [], slices
    for size in sizes:
        outer.append(math.gcd(size, left))
        left //= outer[-1]
    inner = [size // o for size, o in zip(sizes, outer, strict=True)]
    return mesh_utils.create_hybrid_device_mesh(inner, outer, **options)


def traced_device() -> Any:
    """Returns an object with the `platform` and `device_kind` of the traced program's devices.

    The devices need not exist on this machine. Without a current mesh, the result is JAX's first device.
    """
    return jax.sharding.get_abstract_mesh().abstract_device or jax.devices()[0]


def traced_platform() -> str:
    """Returns the platform for which JAX is tracing a program: `cpu`, `gpu` or `tpu`."""
    return traced_device().platform


def batch_shards(mesh: Mesh) -> int:
    """Returns the number of shards of a batch's rows."""
    return math.prod(mesh.shape[axis] for axis in BATCH_AXES)


def replicated(mesh: Mesh) -> NamedSharding:
    """Returns the sharding that gives each device a complete copy."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Returns the sharding of an array [batch, ...] over its rows."""
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def place_rows(batch: Any, mesh: Mesh, *, blocks: Sequence[int] = (0,), num_blocks: int = 1) -> Any:
    """Turns a tree of host arrays [rows, ...] into global arrays, sharded over the mesh by rows.

    By default, `batch` has all rows of the global batch.

    Args:
        batch: the rows of this process's blocks, one block after the other.
        blocks: indices of these blocks, from `blocks_on`.
        num_blocks: number of equal blocks of rows in the global batch.
    """
    sharding = batch_sharding(mesh)
    place_of = {block: place for place, block in enumerate(blocks)}

    def placed(x: np.ndarray) -> jax.Array:
        size = len(x) // len(blocks)

        def rows(index: Any) -> np.ndarray:
            # blocks (2, 3) of 8 rows each: global row 20 is row 4 of block 2, so row 4 of x. The rows of a
            # device may begin in one block and end in the next. In x, these blocks are adjacent, too.
            first, end, _ = index[0].indices(size * num_blocks)
            own = place_of[first // size] * size + first % size
            return x[own : own + end - first]

        return jax.make_array_from_callback((size * num_blocks, *x.shape[1:]), sharding, rows)

    return jax.tree.map(placed, batch)


def blocks_on(mesh: Mesh, num_blocks: int, devices: Sequence[Any] | None = None) -> tuple[int, ...]:
    """Returns the ascending indices of the blocks that contain rows of the given devices.

    Two processes may need the same block.

    Args:
        num_blocks: number of equal blocks of rows in the global batch.
        devices: devices of the mesh; None means this process's devices.
    """
    shards = batch_shards(mesh)
    # The answer is the same for any number of rows that both `shards` and `num_blocks` divide, so this takes
    # their product. With 4 shards and 6 blocks (of 4 rows each), the second shard has the rows 6 to 11, which
    # are in the blocks 1 and 2.
    owned = batch_sharding(mesh).devices_indices_map((shards * num_blocks,))
    needed = set()
    for device in mesh.local_devices if devices is None else devices:
        first, end, _ = owned[device][0].indices(shards * num_blocks)
        needed.update(range(first // shards, -(-end // shards)))
    return tuple(sorted(needed))


def param_shardings(mesh: Mesh, boxed: Any, config: ModelConfig) -> Any:
    """Returns the shardings of a model's parameters.

    Args:
        boxed: parameters or shapes with logical axis names, from `models.encoder_decoder.abstract_params`.

    Raises:
        InputError: a dimension or number of heads is not a multiple of the size of the mesh axis that shards it.
    """
    specs = nn.get_partition_spec(boxed)
    shardings = nn.logical_to_mesh_sharding(specs, mesh, LOGICAL_AXIS_RULES)
    heads = {}
    # With a position bias, its table [heads, buckets] is sharded too, so the check of dimensions covers the
    # heads.
    if config.position_bias is None:
        heads = {"encoder": config.encoder.num_kv_heads, "decoder": config.decoder.num_kv_heads}
    _check_divisible(mesh, jax.eval_shape(nn.meta.unbox, boxed), specs, shardings, heads)
    return shardings


def _check_divisible(
    mesh: Mesh, params: Any, specs: Any, shardings: Any, heads: Mapping[str, int]
) -> None:
    """Raises InputError if a sharded dimension is not a multiple of the size of its mesh axis.

    Also raises it if a value of `heads`, the number of key and value heads of the encoder or decoder, is not a
    multiple of the size of the axis `tensor`, since no head may be split.
    """
    # for example, a kernel [embed, 128] with 2 heads can have at most 2 shards
    wrong: dict[str, str] = {}
    # for each axis, the greatest common divisor of the dimensions that are sharded over it
    cut: dict[str, int] = dict.fromkeys(AXES, 0)

    def check(path, param, spec, sharding) -> None:
        # strict=False: a sharding's spec may be shorter than the shape; the remaining axes are not sharded
        for size, logical, axis in zip(param.shape, spec, sharding.spec, strict=False):
            if axis is None:
                continue
            cut[axis] = math.gcd(cut[axis], size)
            if size % mesh.shape[axis]:
                # one example for each size: all layers have the same fault
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
            wrong.setdefault(
                what,
                f"the {' and '.join(sorted(whose))} cannot split a key and value head over devices",
            )
    if wrong:
        wanted = (1, *(mesh.shape[axis] for axis in AXES))
        nearest_layout = _nearest_layout(
            wanted, mesh.size, embed=cut["fsdp"], cut_by_tensor=cut["tensor"]
        )
        raise InputError(
            f"`layout`: {', '.join(f'{what} ({where})' for what, where in wrong.items())}; nearest"
            f" layout of {mesh.size} devices that fits: {nearest_layout}"
        )
