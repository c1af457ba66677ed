"""Computes the cost of an operation: FLOPs, bytes of main memory, elementwise operations."""

import collections
import dataclasses
import math
import re

import numpy as np

from stepdistill_jax.models.kernel_costs import formula_of
from stepdistill_jax.planning.hlo import Array, Computation, Instruction, Module

# opcodes for which a device runs nothing
FREE = {
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "opt-barrier",
    "partition-id", "replica-id", "add-dependency", "domain",
}  # fmt: skip
# custom calls that are only markers for the compiler
MARKS = {"AllocateBuffer", "AssumeGatherIndicesInBound", "ConcatBitcast", "Sharding"}
# opcodes that are not counted as elementwise operations inside a fusion: they only move elements, or their cost is
# counted elsewhere
_MOVES = {
    "broadcast", "reshape", "transpose", "copy", "dot", "convolution", "slice", "dynamic-slice",
    "dynamic-update-slice", "concatenate", "pad", "iota", "fusion", "call", "custom-call", "gather",
}  # fmt: skip
_SLICES = ("dynamic-slice", "slice", "gather")
_WORKSPACE = ("s8", "u8")
_COPIES = ("copy-start", "slice-start", "dynamic-slice-start")


@dataclasses.dataclass(frozen=True)
class Cost:
    """Cost of one run of an operation on one device.

    Attributes:
        products: {(dtype of the factors, precision): FLOPs of the matmuls}.
        bytes: bytes read from and written to main memory.
        integer, other: number of elementwise operations on integers and on other types.
        known: False for a kernel without a formula (see `kernel_cost`). Only its bytes are counted.
    """

    products: dict[tuple[str, str], float] = dataclasses.field(default_factory=dict)
    bytes: float = 0.0
    integer: float = 0.0
    other: float = 0.0
    known: bool = True

    @property
    def flops(self) -> float:
        """FLOPs of all matmuls."""
        return sum(self.products.values())


class Costs:
    """Computes the costs of a module's operations."""

    def __init__(self, module: Module, *, spaces_on_chip: bool):
        """Stores an optimised program.

        Args:
            spaces_on_chip: whether memory spaces other than 0 are on the chip, as on a TPU. Otherwise they are
                main memory.
        """
        self._module = module
        self._on_chip = spaces_on_chip

    def of(self, computation: Computation, instruction: Instruction) -> Cost:
        """Returns the cost of an instruction that runs as one operation."""
        if instruction.opcode == "custom-call" and instruction.target in MARKS:
            return Cost()
        operands = computation.operands(instruction)
        if is_kernel(instruction):
            return self._kernel(instruction, operands)
        integer, other = self._elements(computation, instruction)
        return Cost(
            self._products(computation, instruction),
            self._bytes(instruction, operands),
            integer,
            other,
        )

    def _kernel(self, instruction: Instruction, operands: list[Instruction]) -> Cost:
        formula = formula_of(instruction.target, instruction.op_name)
        read = [array for operand in operands for array in operand.arrays]
        if formula is None:
            return Cost(bytes=self._bytes(instruction, operands), known=False)
        found = formula(read, instruction.arrays)
        dtype = read[0].dtype if read else "bf16"
        return Cost({(dtype, "default"): found.flops}, found.bytes, found.integer, found.other)

    # FLOPs

    def _products(
        self, computation: Computation, instruction: Instruction
    ) -> dict[tuple[str, str], float]:
        found: dict[tuple[str, str], float] = collections.defaultdict(float)
        flops = _flops(computation, instruction)
        if flops:
            factor = computation.by_name[instruction.operands[0]].arrays[0]
            found[factor.dtype, _precision(instruction)] += flops
        elif instruction.opcode in ("fusion", "call"):
            for inner in self._module.called(instruction):
                for one in inner:
                    for kind, flops in self._products(inner, one).items():
                        found[kind] += flops
        return found

    # elementwise operations

    def _elements(self, computation: Computation, instruction: Instruction) -> tuple[float, float]:
        """Returns (number of elementwise operations on integers, number of those on other types).

        A reduction counts as one operation for each element of its operand. Any other instruction counts as
        one operation for each element of its result.
        """
        totals = [0.0, 0.0]
        if instruction.opcode in ("fusion", "call"):
            for inner in self._module.called(instruction):
                for one in inner:
                    for i, count in enumerate(self._elements(inner, one)):
                        totals[i] += count
        elif instruction.arrays and instruction.opcode not in FREE | _MOVES:
            array = instruction.arrays[0]
            if instruction.opcode == "reduce" and (read := computation.operands(instruction)):
                array = read[0].arrays[0]
            # u32 and s32 are integers; pred counts as other
            totals[array.dtype[0] not in "us"] += array.size
        return totals[0], totals[1]

    # bytes of main memory

    def _in_memory(self, array: Array) -> int:
        return 0 if self._on_chip and array.space else array.bytes

    def _bytes(self, instruction: Instruction, operands: list[Instruction]) -> float:
        opcode, results = instruction.opcode, instruction.arrays
        if opcode == "custom-call" and len(results) > 1:
            # leaves out the workspace of a library, which is allocated but may not be used
            results = tuple(array for array in results if array.dtype not in _WORKSPACE)
        written = sum(map(self._in_memory, results))
        if opcode in _SLICES:  # a slice reads as much as it writes
            return 2 * written
        if opcode == "dynamic-update-slice":  # in place, so it reads and writes only the update
            return 2 * self._in_memory(operands[1].arrays[0])
        if opcode == "scatter":
            return 2 * sum(map(self._in_memory, operands[-1].arrays)) + written
        # results are (destination, source, ...): the moved bytes count once for each of these two in main memory
        if opcode in _COPIES:
            ends = results[:2]
            moved = min(array.bytes for array in ends)
            return sum(moved for array in ends if self._in_memory(array))
        if opcode == "fusion":
            return self._fusion_bytes(instruction, operands)
        return written + sum(self._in_memory(array) for o in operands for array in o.arrays)

    def _fusion_bytes(self, instruction: Instruction, operands: list[Instruction]) -> float:
        (inner,) = self._module.called(instruction)
        root = inner.root
        roots = (
            [inner.by_name[name] for name in root.operands] if root.opcode == "tuple" else [root]
        )
        total, in_place = 0.0, set()
        for one, array in zip(roots, instruction.arrays, strict=False):
            one = _source(inner, one)
            if one.opcode == "dynamic-update-slice":  # the rest of the operand stays in place
                update = inner.by_name[one.operands[1]].arrays[0]
                total += min(update.bytes, array.bytes) if self._in_memory(array) else 0
                in_place.add(_source(inner, inner.by_name[one.operands[0]]).name)
            else:
                total += self._in_memory(array)
        for parameter, operand in zip(inner.parameters, operands, strict=False):
            if parameter.name not in in_place:
                arrays = zip(parameter.arrays, operand.arrays, strict=False)
                if any(self._in_memory(a) and self._in_memory(b) for a, b in arrays):
                    total += self._read(inner, parameter)
        return total

    def _read(self, inner: Computation, parameter: Instruction) -> float:
        """Returns how many bytes of an operand a fusion reads.

        If the fusion uses only slices of the operand, only the slices' bytes are counted.
        """
        whole, total = sum(array.bytes for array in parameter.arrays), 0.0
        uses = list(_uses(inner, parameter.name))
        for user, place in uses:
            if user.opcode in _SLICES and place == 0:
                source = inner.by_name[user.operands[0]].arrays[0]
                # The slice's bytes are converted to the operand's dtype: if a bfloat16 operand is first converted
                # to float32 and then sliced, half of the slice's bytes are read.
                total += user.arrays[0].bytes * parameter.arrays[0].bytes / source.bytes
            elif user.opcode == "fusion" and (callee := self._module.called(user)):
                total += self._read(callee[0], callee[0].parameters[place])
            else:
                return whole
        return min(whole, total) if uses else whole


def _uses(inner: Computation, name: str):
    """Yields (instruction, operand index) for each use of a value, or of a bitcast or conversion of the value."""
    for user, place in inner.uses[name]:
        if user.opcode in ("bitcast", "convert"):
            yield from _uses(inner, user.name)
        else:
            yield user, place


def _source(inner: Computation, instruction: Instruction) -> Instruction:
    """Returns the instruction that computes a value, before any bitcast, copy or conversion."""
    while instruction.opcode in ("bitcast", "copy", "convert") and instruction.operands:
        instruction = inner.by_name[instruction.operands[0]]
    return instruction


def is_kernel(instruction: Instruction) -> bool:
    """Returns whether an instruction is a custom call that runs a kernel, such as one written in Pallas.

    cuBLAS matmuls and the compiler's markers (`MARKS`) are custom calls, too, but do not count as kernels.
    """
    named = instruction.opcode == "custom-call" and instruction.target not in MARKS
    return named and not _is_gemm(instruction)


def _is_gemm(instruction: Instruction) -> bool:
    return "cublas" in instruction.target


def _flops(computation: Computation, instruction: Instruction) -> float:
    """Returns the FLOPs of a matmul or a convolution, and 0 for any other instruction."""
    if instruction.opcode == "dot":
        return _dot_flops(computation, instruction, instruction.axes("lhs_contracting_dims"))
    if instruction.opcode == "convolution":
        return _convolution_flops(computation, instruction)
    if instruction.opcode == "custom-call" and _is_gemm(instruction):
        found = re.search(r'"lhs_contracting_dimensions":\[([^\]]*)\]', instruction.attributes)
        axes = [int(n) for n in re.findall(r"\d+", found.group(1))] if found else []
        return _dot_flops(computation, instruction, axes) if axes else 0.0
    return 0.0


def _precision(instruction: Instruction) -> str:
    found = re.search(
        r'operand_precision(?:=\{|":\[)"?(\w+)', instruction.attributes, re.IGNORECASE
    )
    return found.group(1).lower() if found else "default"


def _dot_flops(computation: Computation, dot: Instruction, contracted: list[int]) -> float:
    left = computation.by_name[dot.operands[0]].arrays[0]
    # [m, k] times [k, n]: two FLOPs for each of the k summands of each of the m n results
    return 2.0 * dot.arrays[0].size * math.prod(left.dims[axis] for axis in contracted)


def _convolution_flops(computation: Computation, convolution: Instruction) -> float:
    """Returns the FLOPs of a convolution, not counting multiplications by padding.

    The TPU compiler writes a batched matmul as a convolution whose spatial dimensions are the batch dimensions.
    """
    left, right = (computation.by_name[name].arrays[0] for name in convolution.operands[:2])
    out = convolution.arrays[0]
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", convolution.attributes)
    assert labels is not None  # every convolution has them
    of_left, of_right, of_out = labels.groups()
    window = re.search(r"window=\{([^}]*)\}", convolution.attributes)
    fields = dict(field.split("=") for field in window.group(1).split()) if window else {}
    pairs, axes = 1, [label for label in of_out if label.isdigit()]

    def number(field: str, axis: int, default: int) -> int:
        """Returns a window field's value for an axis; for `pad`, the padding at the start.

        Example: for axis 1, `size=1x16` gives 16, and `pad=0_0x15_14` gives 15.
        """
        return int(fields[field].split("x")[axis].partition("_")[0]) if field in fields else default

    for i, label in enumerate(axes):
        size, low = number("size", i, 1), number("pad", i, 0)
        # [output positions, kernel positions]: the input position that each pair reads, where the elements of the
        # input are `apart` places apart. Positions outside the input, or between two elements, are padding.
        places = (
            np.arange(out.dims[of_out.index(label)])[:, None] * number("stride", i, 1)
            + np.arange(size)[None, :] * number("rhs_dilate", i, 1)
            - low
        )
        apart = number("lhs_dilate", i, 1)
        last = (left.dims[of_left.index(label)] - 1) * apart
        pairs *= int(((places >= 0) & (places <= last) & (places % apart == 0)).sum())
    features = right.dims[of_right.index("i")]
    return 2.0 * out.dims[of_out.index("f")] * out.dims[of_out.index("b")] * features * pairs
