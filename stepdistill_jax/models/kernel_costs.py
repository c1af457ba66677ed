"""A registry of formulas for the costs of kernel calls.

XLA does not know what a custom call computes, so a plan looks up its cost here. The module of a kernel
registers a formula:

    @kernel_cost("my_attention")
    def _cost(operands, results):
        return KernelCost(flops=..., bytes=..., other=...)
"""

import dataclasses
import re
from collections.abc import Callable, Sequence
from typing import Protocol


class Shaped(Protocol):
    """An operand or a result of a kernel call, with the fields that a formula can read."""

    @property
    def dtype(self) -> str:
        """Type as HLO spells it, for instance bf16, f32, s32 or pred."""
        ...

    @property
    def dims(self) -> tuple[int, ...]:
        """Size of each dimension."""
        ...

    @property
    def bytes(self) -> int:
        """Number of bytes in memory."""
        ...


@dataclasses.dataclass(frozen=True)
class KernelCost:
    """Cost of one call on one device.

    Attributes:
        flops: FLOPs of matmuls. A multiplication and its addition count as two.
        bytes: number of bytes read from and written to the device's main memory.
        integer: number of elementwise operations on integers.
        other: number of elementwise operations on all other types.
    """

    flops: float = 0.0
    bytes: float = 0.0
    integer: float = 0.0
    other: float = 0.0


Formula = Callable[[Sequence[Shaped], Sequence[Shaped]], KernelCost]
_FORMULAS: dict[str, Formula] = {}


def kernel_cost(name: str) -> Callable[[Formula], Formula]:
    """Returns a decorator that registers a function (operands, results) -> cost as the formula of a kernel.

    Args:
        name: the target of the kernel's custom call, or the kernel's name in a `jax.named_scope` or
            `pallas_call`.
    """

    def register(formula: Formula) -> Formula:
        _FORMULAS[name] = formula
        return formula

    return register


def formula_of(target: str, op_name: str) -> Formula | None:
    """Returns the formula of a custom call, or None if none is registered.

    The formula may be registered under the target of the call, or under a name in its JAX path, such as
    `jit(f)/transpose(jvp(my_attention))/pallas_call`. The target is tried first, then the names of the path from
    the last to the first.
    """
    names = [target, *reversed(re.split(r"[/()]", op_name))]
    return next((_FORMULAS[name] for name in names if name in _FORMULAS), None)
