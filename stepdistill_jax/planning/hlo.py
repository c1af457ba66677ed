"""Parses the text of an optimised XLA module."""

import dataclasses
import functools
import math
import re
from collections.abc import Iterator

# %region_0.1 (arg: (s32[], f32[8,4])) -> (s32[], f32[8,4]) {
_HEAD = re.compile(r"(ENTRY )?%?([\w.\-]+) \(.*\) -> .*\{")
# bf16[100,200]{1,0:T(8,128)(2,1)S(1)}: dtype, dims, layout
_ARRAY = re.compile(r"\b(pred|token|opaque|bf16|[a-z]\d+\w*)\[([\d,]*)\](\{[^{}]*\})?")
_TILE = re.compile(r"\{([\d,]+):.*?T\(([\d,*]+)\)")
_OPERAND = re.compile(r"%([\w.\-]+)")
_CALLED = re.compile(
    r"\b(?:body|to_apply|calls|true_computation|false_computation)=%?([\w.\-]+)"
    r"|branch_computations=\{([^}]*)\}"
)


@dataclasses.dataclass(frozen=True)
class Array:
    """The type, shape and layout of an array.

    Attributes:
        dtype: type as HLO spells it: `bf16`, `f32`, `pred`, ...
        dims: size of each dimension.
        layout: dimensions from the fastest to the slowest, tiles and memory space, such as
            `{1,0:T(8,128)(2,1)S(1)}`, or "".
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
        """Index of the memory space; 0 is the device's main memory."""
        found = re.search(r"S\((\d+)\)", self.layout)
        return int(found.group(1)) if found else 0

    @property
    def data_bytes(self) -> int:
        """Bytes of the elements, without padding."""
        return self.size * bits(self.dtype) // 8

    @property
    def bytes(self) -> int:
        """Bytes in memory, including the padding of tiles.

        Example: bf16[100,200]{1,0:T(8,128)(2,1)} takes 104 x 256 x 2 bytes.
        """
        dims = list(self.dims)
        if found := _TILE.match(self.layout):
            # the last size of a tile belongs to the fastest dimension; only the first tile, here T(8,128), pads
            order = [int(axis) for axis in found.group(1).split(",")]
            tile = [int(size) if size != "*" else 1 for size in found.group(2).split(",")]
            for axis, size in zip(order, reversed(tile), strict=False):
                dims[axis] = -(-dims[axis] // size) * size
        return math.prod(dims) * bits(self.dtype) // 8


def bits(dtype: str) -> int:
    """Returns the bits of an element in memory: 16 for bf16, 8 for f8e4m3fn and pred, 0 for a token."""
    if dtype == "pred":
        return 8
    digits = re.search(r"\d+", dtype)
    return int(digits.group()) if digits else 0


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of a computation.

    Attributes:
        name: name without `%`.
        opcode: `fusion`, `custom-call`, `while`, ...
        arrays: the result, with nested tuples flattened.
        operands: names of instructions of the same computation.
        inside: text between the parentheses after the opcode.
        attributes: text after the closing parenthesis.
        is_root: whether the computation returns the result.
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
        """JAX's name for the operation, such as `jit(train_step)/.../mlp/wi_0/dot_general`; "" if there is none."""
        found = re.search(r'op_name="([^"]*)"', self.attributes)
        return found.group(1) if found else ""

    @property
    def target(self) -> str:
        """Target of a custom call; "" for other instructions."""
        found = re.search(r'custom_call_target="([^"]*)"', self.attributes)
        return found.group(1) if found else ""

    @property
    def called(self) -> list[str]:
        """Names of the computations that the instruction runs, except a loop's condition."""
        if self.opcode in ("async-update", "async-done"):  # `async-start` runs the computation
            return []
        names = []
        for one, branches in _CALLED.findall(self.attributes):
            names += [one] if one else re.findall(r"[\w.\-]+", branches)
        return names

    def axes(self, attribute: str) -> list[int]:
        """Returns the axes that an attribute lists: [1, 2] for `lhs_contracting_dims={1,2}`, [] if it is missing."""
        found = re.search(rf"\b{attribute}=\{{([\d,]+)\}}", self.attributes)
        return [int(axis) for axis in found.group(1).split(",")] if found else []


class Computation:
    """A list of instructions in scheduled order."""

    def __init__(self, name: str):
        """Creates an empty computation."""
        self.name = name
        self.instructions: list[Instruction] = []
        self.by_name: dict[str, Instruction] = {}

    def __iter__(self) -> Iterator[Instruction]:
        return iter(self.instructions)

    def add(self, instruction: Instruction) -> None:
        """Appends an instruction."""
        self.instructions.append(instruction)
        self.by_name[instruction.name] = instruction

    def operands(self, instruction: Instruction) -> list[Instruction]:
        """Returns the instructions that compute the operands. Operands that the text does not define are left out."""
        return [self.by_name[name] for name in instruction.operands if name in self.by_name]

    @functools.cached_property
    def root(self) -> Instruction:
        """The instruction whose result the computation returns."""
        return next((i for i in self if i.is_root), self.instructions[-1])

    @functools.cached_property
    def parameters(self) -> list[Instruction]:
        """The computation's parameters, in order."""
        found = [i for i in self if i.opcode == "parameter"]
        return sorted(found, key=lambda i: int(i.inside or 0))

    @functools.cached_property
    def uses(self) -> dict[str, list[tuple[Instruction, int]]]:
        """{name of a value: [(instruction that reads the value, operand index), ...]}."""
        found: dict[str, list[tuple[Instruction, int]]] = {i.name: [] for i in self}
        for instruction in self:
            for place, name in enumerate(instruction.operands):
                if name in found:
                    found[name].append((instruction, place))
        return found


class Module:
    """The computations of an optimised XLA module."""

    def __init__(self, text: str | None):
        """Parses the result of `compiled.as_text()`."""
        assert text is not None
        self.computations: dict[str, Computation] = {}
        self.entry = Computation("")
        current = None
        # computations are not nested in the text: each has a head, indented instructions, and a brace in column 0
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
        """Returns the computations that an instruction runs, except those that the module's text does not define."""
        return [self.computations[name] for name in instruction.called if name in self.computations]

    def nested(self, computation: Computation) -> Iterator[Instruction]:
        """Yields a computation's instructions, including those inside its fusions and calls at any depth."""
        for instruction in computation:
            yield instruction
            if instruction.opcode in ("fusion", "call"):
                for inner in self.called(instruction):
                    yield from self.nested(inner)


def _instruction(line: str) -> Instruction:
    """Parses a line such as `ROOT %n = (f32[2]{0}, u8[4]{0}) custom-call(%a, %b), custom_call_target="t"`."""
    is_root = line.startswith("ROOT ")
    name, _, rest = line.removeprefix("ROOT ").partition(" = ")
    # the shapes of a tuple contain spaces, so they end at its closing parenthesis
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


@functools.lru_cache(maxsize=10_000)  # many lines have the same shapes
def _arrays(text: str) -> tuple[Array, ...]:
    return tuple(
        Array(dtype, tuple(int(d) for d in dims.split(",")) if dims else (), layout)
        for dtype, dims, layout in _ARRAY.findall(text)
    )


def _closing(text: str, start: int) -> int:
    """Returns the index of the parenthesis that closes the one at `start`, or `len(text)` if none does."""
    depth = 0
    for found in re.finditer(r"[()]", text[start:]):
        depth += 1 if found.group() == "(" else -1
        if not depth:
            return start + found.start()
    return len(text)
