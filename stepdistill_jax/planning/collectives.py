"""Finds the collectives of a compiled step, and the bytes that they send."""

import dataclasses
import math
import re
from collections import defaultdict
from typing import Any

from stepdistill_jax.planning.hlo import Instruction, Module
from stepdistill_jax.planning.runs import runs

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
# the TPU compiler's name for an all-reduce whose result stays sharded over the devices
_FUSED_SCATTER = "all-reduce-scatter"


@dataclasses.dataclass(frozen=True)
class Collective:
    """One collective operation of a step.

    Attributes:
        kind: one of `KINDS`.
        count: how often the operation runs in a step.
        result_bytes: bytes that one run produces on one device.
        group: number of devices that exchange data with each other.
        shares: {HLO name of a dtype: fraction of `result_bytes` that has this dtype}.
        op_name: as in `Instruction`.
    """

    kind: str
    count: int
    result_bytes: int
    group: int
    shares: dict[str, float]
    op_name: str

    @property
    def bytes(self) -> int:
        """Bytes that the operation produces on one device in a step, over all `count` times that it runs."""
        return self.count * self.result_bytes

    @property
    def wire_bytes(self) -> float:
        """Bytes that one device sends in a step, assuming ring algorithms."""
        # A ring of 4 devices gathers a result of R bytes in 3 steps, in each of which a device sends R / 4. An
        # all-reduce is a reduce-scatter followed by an all-gather.
        share = (self.group - 1) / self.group
        factor = {
            "all-gather": share,
            "all-to-all": share,
            "all-reduce": 2 * share,
            "reduce-scatter": self.group - 1.0,  # the result is one part of the sum
            "collective-permute": 1.0,
        }[self.kind]
        return self.bytes * factor


def collectives(
    module: Module, num_devices: int, *, unknown_trips: int | None = None
) -> tuple[list[Collective], int]:
    """Finds a compiled module's collectives over more than one device.

    Args:
        num_devices: number of devices in the mesh. A collective without replica groups runs on all of them.
        unknown_trips: as for `runs`.

    Returns:
        The collectives, from the most to the fewest sent bytes.
        The number of loops of unknown length that contain a collective.
    """
    operations, unknown = [], set()
    for run in runs(module, unknown_trips):
        # the TPU compiler also fuses collectives with the operations around them
        fused = [c for c in module.called(run.instruction) if run.instruction.opcode == "fusion"]
        inside = [(one, c.name) for c in fused for one in module.nested(c)]
        for one, where in [(run.instruction, ""), *inside]:
            if (kind := kind_of(one)) is None:
                continue
            found = _operation(one, kind, run.times, num_devices)
            if found.group > 1:
                operations.append(_as_scatter(found) if where.startswith(_FUSED_SCATTER) else found)
                unknown.add(run.unknown_loop)
    return sorted(operations, key=lambda c: -c.wire_bytes), len(unknown - {None})


def kind_of(instruction: Instruction) -> str | None:
    """Returns the kind of a collective; None for any other instruction, and for a collective's `-done` instruction."""
    kind = instruction.opcode.removesuffix("-start")
    return kind if kind in KINDS else None


def by_kind(operations: list[Collective]) -> dict[str, dict[str, float]]:
    """Returns {kind: sums over a step on one device}.

    The sums are `count`, `bytes` (of the results) and `wire_bytes`.
    """
    totals: dict[str, dict[str, float]] = {}
    for c in operations:
        total = totals.setdefault(c.kind, {"count": 0, "bytes": 0, "wire_bytes": 0})
        total["count"] += c.count
        total["bytes"] += c.bytes
        total["wire_bytes"] += round(c.wire_bytes)
    return dict(sorted(totals.items()))


def by_dtype(operations: list[Collective]) -> list[dict[str, Any]]:
    """Returns a dict for each pair of kind and dtype, sorted by the bytes sent, largest first.

    Each dict has `kind`, `dtype` and the entries of `by_kind`. A combined collective with arrays of two dtypes
    counts under each dtype.
    """
    totals: dict[tuple[str, str], list[float]] = {}
    for c in operations:
        for dtype, share in c.shares.items():
            total = totals.setdefault((c.kind, dtype), [0, 0.0, 0.0])
            for i, part in enumerate((c.count, share * c.bytes, share * c.wire_bytes)):
                total[i] += part
    rows = [
        {
            "kind": kind,
            "dtype": dtype,
            "count": count,
            "bytes": round(size),
            "wire_bytes": round(sent),
        }
        for (kind, dtype), (count, size, sent) in totals.items()
    ]
    return sorted(rows, key=lambda row: -row["wire_bytes"])


def _operation(instruction: Instruction, kind: str, times: int, num_devices: int) -> Collective:
    results = instruction.arrays
    if instruction.opcode.endswith("-start") and kind != "all-reduce":
        # the `-start` form returns its operands, then as many results, then its own state
        count = len(instruction.operands)
        results = results[count : 2 * count]
    size = sum(array.data_bytes for array in results)
    shares: dict[str, float] = defaultdict(float)
    for array in results:
        shares[array.dtype] += array.data_bytes / size if size else 0.0
    return Collective(
        kind,
        times,
        size,
        2 if kind == "collective-permute" else _group(instruction.attributes, num_devices),
        dict(shares),
        instruction.op_name,
    )


def _as_scatter(c: Collective) -> Collective:
    if c.kind != "all-reduce":
        return c
    return dataclasses.replace(
        c, kind="reduce-scatter", result_bytes=c.result_bytes // max(c.group, 1)
    )


def _group(attributes: str, num_devices: int) -> int:
    """Returns the size of a collective's replica groups; `num_devices` if the attributes list no groups.

    HLO has three notations for replica groups.
    """
    # {{0,1},{2,3}} lists groups of 2; [2,4]<=[8] is 2 groups of 4; mesh['fsdp'=4,'tensor'=2] {'tensor'} is
    # an axis of 2
    groups = attributes.partition("replica_groups=")[2]
    if listed := re.match(r"\{\{([\d,]+)\}", groups):
        return listed.group(1).count(",") + 1
    if iota := re.match(r"\[(\d+),(\d+)\]<=", groups):
        return int(iota.group(2))
    if mesh := re.match(r"mesh\[([^\]]*)\] ?\{([^}]*)\}", groups):
        sizes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", mesh.group(1))}
        # 'axis' is the complete axis, 'axis':(1)2 a part of it of size 2
        return math.prod(
            int(part) if part else sizes[name]
            for name, part in re.findall(r"'([^']+)'(?::\(\d+\)(\d+))?", mesh.group(2))
        )
    return num_devices
