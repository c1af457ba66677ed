"""What a compiled step sends between devices, read from its HLO text.

XLA prints a loop's body once: what lies in it counts as often as the loop runs. The loops over layers
and slices have a length that is known when they are compiled.
"""

import dataclasses
import math
import re
from collections import defaultdict
from collections.abc import Iterator

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
_BITS = {"pred": 8, "s4": 4, "u4": 4} | {
    f"{letter}{bits}": bits for letter in "sufc" for bits in (8, 16, 32, 64, 128)
}
_COMPUTATION = re.compile(r"(?:ENTRY )?%?([\w.\-]+) \(.*\) -> .* \{")
_COLLECTIVE = re.compile(rf"= (.*?) ({'|'.join(KINDS)})(-start)?\(")
_SHAPE = re.compile(r"\b(bf16|[a-z]\d+|pred)\w*\[([\d,]*)\]")
_CALLED = re.compile(
    r"(?:body|to_apply|calls|true_computation|false_computation)=%?([\w.\-]+)"
    r"|branch_computations=\{([^}]*)\}"
)
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
# the TPU compiler's name for an all-reduce of which each device keeps its part
_FUSED_SCATTER = "all-reduce-scatter"


@dataclasses.dataclass(frozen=True)
class Collective:
    """One collective operation of a step.

    Attributes:
        kind: of `KINDS`.
        count: runs in a step.
        result_bytes: of one run on one device.
        group: devices that take part together.
        shapes: of the result, as HLO writes them.
        op_name: where in the model it comes from; empty where XLA does not say.
    """

    kind: str
    count: int
    result_bytes: int
    group: int
    shapes: str
    op_name: str

    @property
    def bytes(self) -> int:
        """Result bytes of all runs of a step."""
        return self.count * self.result_bytes

    @property
    def wire_bytes(self) -> float:
        """Bytes that a device sends in a step, by ring algorithms: none over a group of one."""
        share = (self.group - 1) / self.group
        factor = {
            "all-gather": share,
            "all-to-all": share,
            "all-reduce": 2 * share,
            "reduce-scatter": self.group - 1.0,  # the result is one part of what is summed
            "collective-permute": 1.0,
        }[self.kind]
        return self.bytes * factor


def collectives(hlo: str, num_devices: int) -> tuple[list[Collective], int]:
    """Collectives of a compiled module over more than one device, largest first.

    Args:
        hlo: text of an optimised module (`compiled.as_text()`).
        num_devices: of the mesh; the group of an operation that names none.

    Returns:
        The operations, and the number of loops with a collective whose length is not known (each
        counted as one run).
    """
    bodies, entry = _computations(hlo)
    unknown = 0

    def visit(name: str, times: int) -> Iterator[Collective]:
        nonlocal unknown
        for line in bodies[name]:
            if found := _COLLECTIVE.search(line):
                yield _operation(line, found, times, num_devices)
            is_loop = " while(" in line
            trips = _trip_count(line, bodies) if is_loop else 1
            inside: list[Collective] = []
            for one, branches in _CALLED.findall(line):
                for callee in [one] if one else re.findall(r"[\w.\-]+", branches):
                    found_there = list(visit(callee, times * (trips or 1)))
                    if callee.startswith(_FUSED_SCATTER):
                        found_there = [_as_scatter(c) for c in found_there]
                    inside += found_there
            unknown += bool(is_loop and trips is None and inside)
            yield from inside

    operations = [c for c in visit(entry, 1) if c.group > 1]
    return sorted(operations, key=lambda c: -c.wire_bytes), unknown


def by_kind(operations: list[Collective]) -> dict[str, dict[str, float]]:
    """`count`, `bytes` (results) and `wire_bytes` of a step on one device, per kind."""
    totals: dict[str, dict[str, float]] = {}
    for c in operations:
        total = totals.setdefault(c.kind, {"count": 0, "bytes": 0, "wire_bytes": 0})
        total["count"] += c.count
        total["bytes"] += c.bytes
        total["wire_bytes"] += round(c.wire_bytes)
    return dict(sorted(totals.items()))


def _computations(hlo: str) -> tuple[dict[str, list[str]], str]:
    """Lines of each computation, and the name of the entry."""
    bodies, name, entry = defaultdict(list), "", ""
    for line in hlo.splitlines():
        if head := _COMPUTATION.match(line):
            name = head.group(1)
            entry = name if line.startswith("ENTRY") else entry
        bodies[name].append(line)
    return bodies, entry


def _operation(line: str, found: re.Match, times: int, num_devices: int) -> Collective:
    shapes, kind, start = found.groups()
    sizes = [
        _BITS[t if t == "pred" else t.removeprefix("b")] * math.prod(map(int, dims.split(","))) // 8
        if dims
        else _BITS[t if t == "pred" else t.removeprefix("b")] // 8
        for t, dims in _SHAPE.findall(shapes)
    ]
    if start and kind != "all-reduce":  # the started form gives its operands, too
        sizes = [s for s in sizes if s > 4][-max(1, len(sizes) // 2) :]
    op_name = re.search(r'op_name="([^"]*)"', line)
    return Collective(
        kind,
        times,
        sum(sizes),
        2 if kind == "collective-permute" else _group(line, num_devices),
        shapes,
        op_name.group(1) if op_name else "",
    )


def _as_scatter(c: Collective) -> Collective:
    if c.kind != "all-reduce":
        return c
    return dataclasses.replace(
        c, kind="reduce-scatter", result_bytes=c.result_bytes // max(c.group, 1)
    )


def _group(line: str, num_devices: int) -> int:
    """Devices of one group, from any of the three ways in which HLO writes them."""
    groups = line.partition("replica_groups=")[2]
    if listed := re.match(r"\{\{([\d,]+)\}", groups):
        return listed.group(1).count(",") + 1
    if iota := re.match(r"\[(\d+),(\d+)\]<=", groups):
        return int(iota.group(2))
    if mesh := re.match(r"mesh\[([^\]]*)\] ?\{([^}]*)\}", groups):
        sizes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", mesh.group(1))}
        # 'axis' is all of it, 'axis':(1)2 a part of two
        return math.prod(
            int(part) if part else sizes[name]
            for name, part in re.findall(r"'([^']+)'(?::\(\d+\)(\d+))?", mesh.group(2))
        )
    return num_devices


def _trip_count(line: str, bodies: dict[str, list[str]]) -> int | None:
    """How often a loop runs: as XLA noted it, else the constant that its condition compares with."""
    if known := _TRIPS.search(line):
        return int(known.group(1))
    condition = re.search(r"condition=%?([\w.\-]+)", line)
    lines = bodies[condition.group(1)] if condition else []
    constants = [int(n) for text in lines for n in re.findall(r" s32\S* constant\((\d+)\)", text)]
    below = any("direction=LT" in text for text in lines)
    return constants[0] if below and len(constants) == 1 else None
