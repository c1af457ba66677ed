"""An optimised module of XLA, read from its text: computations, instructions, shapes and loops."""

import dataclasses
import functools
import math
import re
from collections.abc import Iterator

_HEAD = re.compile(r"(ENTRY )?%?([\w.\-]+) \(.*\) -> .*\{")
_ARRAY = re.compile(r"\b(pred|token|opaque|bf16|[a-z]\d+\w*)\[([\d,]*)\](\{[^{}]*\})?")
_TILE = re.compile(r"\{([\d,]+):.*?T\(([\d,*]+)\)")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_INDEX = re.compile(r"\bindex=(\d+)")
_OPERAND = re.compile(r"%([\w.\-]+)")
_CALLED = re.compile(
    r"\b(?:body|to_apply|calls|true_computation|false_computation)=%?([\w.\-]+)"
    r"|branch_computations=\{([^}]*)\}"
)


@dataclasses.dataclass(frozen=True)
class Array:
    """Type and layout of an array.

    Attributes:
        dtype: as HLO writes it: `bf16`, `f32`, `pred`, ...
        dims: sizes; () is a scalar.
        layout: `{1,0:T(8,128)(2,1)S(1)}`: dimensions from the fastest to the slowest, tiles and
            memory space; empty where the text has none.
    """

    dtype: str
    dims: tuple[int, ...]
    layout: str = ""

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.dims)

    @property
    def space(self) -> int:
        """Memory space: 0 is the device's main memory."""
        found = re.search(r"S\((\d+)\)", self.layout)
        return int(found.group(1)) if found else 0

    @property
    def data_bytes(self) -> int:
        """Bytes of its elements."""
        return self.size * bits(self.dtype) // 8

    @property
    def bytes(self) -> int:
        """Bytes that it takes, the filling of its tiles included.

        Example: bf16[100,200]{1,0:T(8,128)(2,1)} takes 104 x 256 x 2 bytes.
        """
        dims = list(self.dims)
        if found := _TILE.match(self.layout):
            order = [int(axis) for axis in found.group(1).split(",")]
            tile = [int(size) if size != "*" else 1 for size in found.group(2).split(",")]
            for axis, size in zip(order, reversed(tile), strict=False):
                dims[axis] = -(-dims[axis] // size) * size
        return math.prod(dims) * bits(self.dtype) // 8


def bits(dtype: str) -> int:
    """Bits of an element in memory: bf16 16, f8e4m3fn 8, pred 8, a token 0."""
    if dtype == "pred":
        return 8
    digits = re.search(r"\d+", dtype)
    return int(digits.group()) if digits else 0


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of a computation.

    Attributes:
        name: without `%`.
        opcode: `fusion`, `custom-call`, `while`, ...
        arrays: of the result; those of a tuple in order, nested ones flattened.
        operands: names, in the same computation.
        inside: the text between the parentheses after the opcode.
        attributes: the text behind them.
        is_root: whether the computation returns it.
    """

    name: str
    opcode: str
    arrays: tuple[Array, ...]
    operands: tuple[str, ...]
    inside: str
    attributes: str
    is_root: bool

    @property
    def op_name(self) -> str:
        """Where in the model it comes from, as JAX says; empty where it does not."""
        found = re.search(r'op_name="([^"]*)"', self.attributes)
        return found.group(1) if found else ""

    @property
    def target(self) -> str:
        """Of a custom call, what is called."""
        found = re.search(r'custom_call_target="([^"]*)"', self.attributes)
        return found.group(1) if found else ""

    @property
    def called(self) -> list[str]:
        """Names of the computations that it runs; not a loop's condition."""
        if self.opcode in ("async-update", "async-done"):  # the start runs it
            return []
        names = []
        for one, branches in _CALLED.findall(self.attributes):
            names += [one] if one else re.findall(r"[\w.\-]+", branches)
        return names

    def axes(self, attribute: str) -> list[int]:
        """Numbers of an attribute such as `lhs_contracting_dims={1,2}`."""
        found = re.search(rf"\b{attribute}=\{{([\d,]+)\}}", self.attributes)
        return [int(axis) for axis in found.group(1).split(",")] if found else []


class Computation:
    """Instructions in the order of their schedule."""

    def __init__(self, name: str):
        """Starts empty."""
        self.name = name
        self.instructions: list[Instruction] = []
        self.by_name: dict[str, Instruction] = {}

    def __iter__(self) -> Iterator[Instruction]:
        return iter(self.instructions)

    def add(self, instruction: Instruction) -> None:
        """Appends one."""
        self.instructions.append(instruction)
        self.by_name[instruction.name] = instruction

    def operands(self, instruction: Instruction) -> list[Instruction]:
        """The instructions that give its operands; one that the text lacks is left out."""
        return [self.by_name[name] for name in instruction.operands if name in self.by_name]

    @functools.cached_property
    def root(self) -> Instruction:
        """What is returned."""
        return next((i for i in self if i.is_root), self.instructions[-1])

    @functools.cached_property
    def parameters(self) -> list[Instruction]:
        """In order of their numbers."""
        found = [i for i in self if i.opcode == "parameter"]
        return sorted(found, key=lambda i: int(i.inside or 0))

    @functools.cached_property
    def uses(self) -> dict[str, list[tuple[Instruction, int]]]:
        """Name -> (instruction that reads it, number of the operand) each."""
        found: dict[str, list[tuple[Instruction, int]]] = {i.name: [] for i in self}
        for instruction in self:
            for place, name in enumerate(instruction.operands):
                if name in found:
                    found[name].append((instruction, place))
        return found


@dataclasses.dataclass(frozen=True)
class Run:
    """An instruction that a device runs by itself, with the loops around it.

    Attributes:
        computation: that it is in.
        instruction: itself.
        times: that it runs.
        unknown_loop: name of a loop around it whose length is not known; None where all are.
    """

    computation: Computation
    instruction: Instruction
    times: int
    unknown_loop: str | None


class Module:
    """All computations of a module.

    XLA prints a loop's body once: what lies in it counts as often as the loop runs. The loops over
    layers and slices have a length that is known when they are compiled.
    """

    def __init__(self, text: str | None):
        """Parses `compiled.as_text()`, which all our backends have."""
        assert text is not None
        self.computations: dict[str, Computation] = {}
        self.entry = Computation("")
        current = None
        for line in text.splitlines():
            if line.startswith("}"):
                current = None
            elif current is None and line.endswith("{") and (head := _HEAD.match(line)):
                current = self.computations.setdefault(head.group(2), Computation(head.group(2)))
                if head.group(1):
                    self.entry = current
            elif current is not None and " = " in line:
                current.add(_instruction(line.strip()))

    def called(self, instruction: Instruction) -> list[Computation]:
        """The computations that it runs and the text has."""
        return [self.computations[name] for name in instruction.called if name in self.computations]

    def trips(self, loop: Instruction, around: Computation) -> int | None:
        """How often a `while` of the computation `around` runs, None where that is not known.

        As XLA noted it, else by the counter that its condition compares with a constant:
        ceil((limit - start) / step), where what the text does not say is a start of 0 and steps of 1.
        """
        if known := _TRIPS.search(loop.attributes):
            return int(known.group(1))
        named = dict(re.findall(r"\b(condition|body)=%?([\w.\-]+)", loop.attributes))
        condition, body = (self.computations.get(named.get(n, "")) for n in ("condition", "body"))
        if condition is None or body is None:
            return None
        limits = [value for i in condition if (value := _constant(i)) is not None]
        if len(limits) != 1 or not any("direction=LT" in i.attributes for i in condition):
            return None
        read = [i for i in condition if i.opcode == "get-tuple-element"]
        found = _INDEX.search(read[0].attributes) if len(read) == 1 else None
        if found is None:
            return limits[0]
        place = int(found.group(1))  # of the counter, in what the loop carries
        return max(0, -(-(limits[0] - _start(around, loop, place)) // _step(body, place)))

    def runs(self, unknown_trips: int | None = None) -> Iterator[Run]:
        """What the entry runs, loops, calls and the largest branch of each conditional gone through.

        Args:
            unknown_trips: how often the first loop of unknown length runs; others like it do not,
                then: at each token a decoder's rows are in one of its loops. None: each runs once.
        """
        seen: list[str] = []

        def visit(computation: Computation, times: int, loop: str | None) -> Iterator[Run]:
            for instruction in computation:
                callees = self.called(instruction)
                if instruction.opcode == "while":
                    trips, within = self.trips(instruction, computation), loop
                    if trips is None:
                        seen.append(instruction.name)
                        within = instruction.name
                        others = 1 if unknown_trips is None else 0
                        trips = unknown_trips if unknown_trips and len(seen) == 1 else others
                    for body in callees if trips else []:
                        yield from visit(body, times * trips, within)
                elif instruction.opcode == "conditional":
                    for branch in sorted(callees, key=self._size)[-1:]:
                        yield from visit(branch, times, loop)
                elif instruction.opcode in ("call", "async-start"):
                    for callee in callees:
                        yield from visit(callee, times, loop)
                else:
                    yield Run(computation, instruction, times, loop)

        yield from visit(self.entry, 1, None)

    def _size(self, computation: Computation) -> int:
        """Elements that a computation makes, as if each loop in it ran once."""
        return sum(
            sum(array.size for array in instruction.arrays)
            + sum(self._size(callee) for callee in self.called(instruction))
            for instruction in computation
        )

    def nested(self, computation: Computation) -> Iterator[Instruction]:
        """Instructions of a computation and of the fusions and calls in it, at any depth."""
        for instruction in computation:
            yield instruction
            if instruction.opcode in ("fusion", "call"):
                for inner in self.called(instruction):
                    yield from self.nested(inner)


def _instruction(line: str) -> Instruction:
    """`ROOT %n = (f32[2]{0}, u8[4]{0}) custom-call(%a, %b), custom_call_target="t"`."""
    is_root = line.startswith("ROOT ")
    name, _, rest = line.removeprefix("ROOT ").partition(" = ")
    if rest.startswith("("):
        end = _closing(rest, 0) + 1
        shapes, rest = rest[:end], rest[end:].lstrip()
    else:
        shapes, _, rest = rest.partition(" ")
    opcode, _, _ = rest.partition("(")
    end = _closing(rest, len(opcode))
    inside = rest[len(opcode) + 1 : end]
    return Instruction(
        name.lstrip("%"),
        opcode,
        _arrays(shapes),
        tuple(_OPERAND.findall(inside)),
        inside,
        rest[end + 1 :],
        is_root,
    )


def _constant(instruction: Instruction) -> int | None:
    """The value of a constant whole number, None of anything else."""
    if instruction.opcode != "constant" or instruction.arrays[0].dtype not in ("s32", "u32"):
        return None
    return int(instruction.inside) if instruction.inside.isdigit() else None


def _start(around: Computation, loop: Instruction, place: int) -> int:
    """What a loop's counter is at first; 0 where the text does not say."""
    given = around.by_name.get(loop.operands[0]) if loop.operands else None
    if given is None or given.opcode != "tuple" or place >= len(given.operands):
        return 0
    first = around.by_name.get(given.operands[place])
    return (_constant(first) or 0) if first is not None else 0


def _step(body: Computation, place: int) -> int:
    """What a loop adds to its counter; 1 where the text does not say."""
    if body.root.opcode != "tuple" or place >= len(body.root.operands):
        return 1
    added = body.by_name[body.root.operands[place]]
    steps = [_constant(one) for one in body.operands(added)] if added.opcode == "add" else []
    return next((step for step in steps if step), 1)


@functools.lru_cache(maxsize=10_000)  # few layouts, many lines
def _arrays(text: str) -> tuple[Array, ...]:
    return tuple(
        Array(dtype, tuple(int(d) for d in dims.split(",")) if dims else (), layout)
        for dtype, dims, layout in _ARRAY.findall(text)
    )


def _closing(text: str, start: int) -> int:
    """Place of the parenthesis that closes the one at `start`; the end where there is none."""
    depth = 0
    for found in re.finditer(r"[()]", text[start:]):
        depth += 1 if found.group() == "(" else -1
        if not depth:
            return start + found.start()
    return len(text)
