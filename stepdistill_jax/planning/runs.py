"""Lists the instructions that a module runs, and how many times each of them runs.

XLA prints the body of a loop only once, so the instructions in it count once for each iteration. The number of
iterations is known at compile time for loops over layers and microbatches.
"""

import dataclasses
import re
from collections.abc import Iterator

from stepdistill_jax.planning.hlo import Computation, Instruction, Module

_INDEX = re.compile(r"\bindex=(\d+)")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')


@dataclasses.dataclass(frozen=True)
class Run:
    """An instruction that a device runs as one operation.

    Attributes:
        times: how often the instruction runs when the module runs once.
        unknown_loop: name of the innermost loop of unknown length around the instruction, or None.
    """

    computation: Computation
    instruction: Instruction
    times: int
    unknown_loop: str | None


def runs(module: Module, unknown_trips: int | None = None) -> Iterator[Run]:
    """Yields the instructions that a module runs, including those inside loops and calls.

    Only the largest branch of a conditional is included.

    Args:
        unknown_trips: number of iterations to assume for the first loop of unknown length. Other loops of unknown
            length are then left out. None assumes one iteration for every loop of unknown length.
    """
    seen: list[str] = []

    def visit(computation: Computation, times: int, loop: str | None) -> Iterator[Run]:
        for instruction in computation:
            callees = module.called(instruction)
            if instruction.opcode == "while":
                times_here, within = trips(module, instruction, computation), loop
                if times_here is None:
                    seen.append(instruction.name)
                    within = instruction.name
                    # a decoder decodes tokens in only one of its loops
                    others = 1 if unknown_trips is None else 0
                    times_here = unknown_trips if unknown_trips and len(seen) == 1 else others
                # nested loops multiply: 2 microbatches and 12 layers run the body of the layer 24 times
                for body in callees if times_here else []:
                    yield from visit(body, times * times_here, within)
            elif instruction.opcode == "conditional":
                # only one branch runs; this counts the largest one, which does the work
                for branch in sorted(callees, key=lambda c: _size(module, c))[-1:]:
                    yield from visit(branch, times, loop)
            elif instruction.opcode in ("call", "async-start"):
                for callee in callees:
                    yield from visit(callee, times, loop)
            else:
                yield Run(computation, instruction, times, loop)

    yield from visit(module.entry, 1, None)


def trips(module: Module, loop: Instruction, around: Computation) -> int | None:
    """Returns the trip count of a `while` in the computation `around`, or None if it is unknown.

    If XLA's annotation `known_trip_count` is missing, the count is ceil((limit - start) / step) of the loop's
    counter. If the HLO text does not show where the counter starts, 0 is assumed; if it does not show the step, 1.
    """
    if known := _TRIPS.search(loop.attributes):
        return int(known.group(1))
    named = dict(re.findall(r"\b(condition|body)=%?([\w.\-]+)", loop.attributes))
    condition, body = (module.computations.get(named.get(n, "")) for n in ("condition", "body"))
    if condition is None or body is None:
        return None
    limits = [value for i in condition if (value := _constant(i)) is not None]
    if len(limits) != 1 or not any("direction=LT" in i.attributes for i in condition):
        return None
    read = [i for i in condition if i.opcode == "get-tuple-element"]
    found = _INDEX.search(read[0].attributes) if len(read) == 1 else None
    if found is None:
        return limits[0]
    place = int(found.group(1))  # index of the counter in the loop's carry
    # from 0 to 12 in steps of 4, there are ceil(12 / 4) = 3 runs; from 1 to 12 in steps of 4, also 3
    return max(0, -(-(limits[0] - _start(around, loop, place)) // _step(body, place)))


def _size(module: Module, computation: Computation) -> int:
    """Returns how many elements a computation produces if each of its loops runs once."""
    return sum(
        sum(array.size for array in instruction.arrays)
        + sum(_size(module, callee) for callee in module.called(instruction))
        for instruction in computation
    )


def _constant(instruction: Instruction) -> int | None:
    """Returns the value of an integer constant, or None for other instructions."""
    if instruction.opcode != "constant" or instruction.arrays[0].dtype not in ("s32", "u32"):
        return None
    return int(instruction.inside) if instruction.inside.isdigit() else None


def _start(around: Computation, loop: Instruction, place: int) -> int:
    """Returns the initial value of a loop's counter, or 0 if the HLO text does not show it."""
    # %init = tuple(%zero, %x); %loop = while(%init): the counter starts as the tuple's operand `place`
    given = around.by_name.get(loop.operands[0]) if loop.operands else None
    if given is None or given.opcode != "tuple" or place >= len(given.operands):
        return 0
    first = around.by_name.get(given.operands[place])
    return (_constant(first) or 0) if first is not None else 0


def _step(body: Computation, place: int) -> int:
    """Returns the increment of a loop's counter, or 1 if the HLO text does not show it."""
    # the body returns the new carry: ROOT tuple(%next, ...) with %next = add(%counter, %constant)
    if body.root.opcode != "tuple" or place >= len(body.root.operands):
        return 1
    added = body.by_name[body.root.operands[place]]
    steps = [_constant(one) for one in body.operands(added)] if added.opcode == "add" else []
    return next((step for step in steps if step), 1)
