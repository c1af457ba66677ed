"""Computes a lower bound of a compiled module's time on a chip, from the costs of its operations.

The bound is the sum over all operations of max(matmul time, main memory time, elementwise time). Communication
between devices is not included, since it can overlap with computation.
"""

import dataclasses
import re
from collections import Counter, defaultdict
from typing import Any

from stepdistill_jax.planning.collectives import kind_of
from stepdistill_jax.planning.costs import FREE, Cost, Costs
from stepdistill_jax.planning.hlo import Instruction, Module
from stepdistill_jax.planning.parts import part_of
from stepdistill_jax.planning.runs import runs
from stepdistill_jax.runtime.chips import Chip

DEAREST = 12  # number of the most expensive operations that `to_json` lists


@dataclasses.dataclass(frozen=True)
class Operation:
    """One operation of a module. All attributes except `times` are for one run of the operation.

    Attributes:
        part: the part of the model to which the operation belongs.
        times: how often the operation runs each time the module runs.
        products: seconds for matmuls at the chip's peak.
        memory: seconds to read and write main memory.
        elements: seconds for elementwise operations.
        cycles: the TPU compiler's estimate, or 0.
    """

    instruction: Instruction
    part: str
    times: int
    cost: Cost
    products: float
    memory: float
    elements: float
    cycles: int

    @property
    def seconds(self) -> float:
        """Lower bound of the total time of the operation's runs, in seconds."""
        return self.times * max(self.products, self.memory, self.elements)


@dataclasses.dataclass(frozen=True)
class Bound:
    """Lower bound of a module's time on one device.

    Attributes:
        operations: the most expensive first.
        unknown_loops: number of loops of unknown length that contain an operation.
    """

    chip: Chip
    operations: tuple[Operation, ...]
    unknown_loops: int

    @property
    def seconds(self) -> float:
        """Lower bound of the time of one run of the module, in seconds."""
        return sum(o.seconds for o in self.operations)

    @property
    def kernels(self) -> int:
        """Number of kernel launches on one device. Each run of an operation counts as a launch."""
        return sum(o.times for o in self.operations)

    @property
    def flops(self) -> float:
        """FLOPs of all matmuls in one run of the module."""
        return sum(o.times * o.cost.flops for o in self.operations)

    def to_json(self) -> dict[str, Any]:
        """Returns a dict that JSON can represent, with times in milliseconds."""
        return {
            "bound_ms": 1e3 * self.seconds,
            **_totals(self.operations),
            "kernels": self.kernels,
            "compiler_ms": 1e3 * sum(o.times * o.cycles for o in self.operations) / self.chip.clock,
            "parts": self._parts(),
            "dearest": [_described(o) for o in self.operations[:DEAREST]],
            "unknown_loops": self.unknown_loops,
            "calls_without_formula": dict(
                Counter(o.instruction.target for o in self.operations if not o.cost.known)
            ),
        }

    def _parts(self) -> list[dict[str, Any]]:
        by_part = defaultdict(list)
        for operation in self.operations:
            by_part[operation.part].append(operation)
        rows = [
            {"part": part, "bound_ms": 1e3 * sum(o.seconds for o in found), **_totals(found)}
            for part, found in by_part.items()
        ]
        return sorted(rows, key=lambda row: -row["bound_ms"])


def bound(module: Module, chip: Chip, *, on_tpu: bool, unknown_trips: int | None = None) -> Bound:
    """Returns the lower bound of a module's time.

    Args:
        on_tpu: whether the chip is a TPU, where all memory spaces except 0 are on-chip memory.
        unknown_trips: as for `runs`.
    """
    costs, operations, unknown = Costs(module, spaces_on_chip=on_tpu), [], set()
    for run in runs(module, unknown_trips):
        opcode = run.instruction.opcode
        # an asynchronous operation is counted at its start, not at its update or end; collectives use the links,
        # so they are not counted
        if opcode in FREE or opcode.endswith(("-done", "-update")) or kind_of(run.instruction):
            continue
        cost = costs.of(run.computation, run.instruction)
        operation = _operation(module, run.instruction, run.times, cost, chip)
        if operation.seconds:
            operations.append(operation)
            unknown.add(run.unknown_loop)
    operations.sort(key=lambda o: -o.seconds)
    return Bound(chip, tuple(operations), len(unknown - {None}))


def _operation(
    module: Module, instruction: Instruction, times: int, cost: Cost, chip: Chip
) -> Operation:
    cycles = re.search(r'"estimated_cycles":"?(\d+)', instruction.attributes)
    return Operation(
        instruction,
        part_of(module, instruction, cost),
        times,
        cost,
        # the peak depends on the dtype of the factors and the precision of the matmul
        products=sum(flops / chip.products(*kind) for kind, flops in cost.products.items()),
        memory=cost.bytes / chip.bandwidth,
        elements=cost.integer / chip.integer + cost.other / chip.other,
        cycles=int(cycles.group(1)) if cycles else 0,
    )


def _totals(operations) -> dict[str, float]:
    """Returns the total FLOPs, bytes and elementwise operations, and the time that each kind of work takes alone.

    An operation in a loop counts once per iteration.
    """
    return {
        "flops": sum(o.times * o.cost.flops for o in operations),
        "bytes": sum(o.times * o.cost.bytes for o in operations),
        "element_operations": sum(o.times * (o.cost.integer + o.cost.other) for o in operations),
        "products_ms": 1e3 * sum(o.times * o.products for o in operations),
        "memory_ms": 1e3 * sum(o.times * o.memory for o in operations),
        "elements_ms": 1e3 * sum(o.times * o.elements for o in operations),
    }


def _described(operation: Operation) -> dict[str, Any]:
    """Returns an operation as values that JSON can represent."""
    instruction = operation.instruction
    arrays = instruction.arrays[:3]
    return {
        "name": instruction.name,
        "part": operation.part,
        "times": operation.times,
        "bound_ms": 1e3 * operation.seconds,
        "flops": operation.cost.flops,
        "bytes": operation.cost.bytes,
        "result": ", ".join(f"{a.dtype}[{','.join(map(str, a.dims))}]" for a in arrays),
        "op_name": instruction.op_name,
    }
