"""Costs of kernel calls, computed by formulas next to the kernels.

XLA does not know what a custom call computes, so a plan looks up its cost here. A kernel registers a
formula:

    @kernel_cost("my_attention")
    def _cost(operands, results): ...
        return KernelCost(flops=..., bytes=..., other=...)
"""

import dataclasses
import re
from collections.abc import Callable, Sequence
from typing import Protocol


class Shaped(Protocol):
    """An operand or a result of a call."""

    @property
    def dtype(self) -> str:
        """Type in HLO's spelling: bf16, f32, s32, pred."""
        ...

    @property
    def dims(self) -> tuple[int, ...]:
        """Size of each dimension."""
        ...

    @property
    def bytes(self) -> int:
        """Bytes in memory."""
        ...


@dataclasses.dataclass(frozen=True)
class KernelCost:
    """Cost of one call on one device.

    Attributes:
        flops: FLOPs of matrix products, two for each multiplication.
        bytes: bytes read from and written to the device's main memory.
        integer, other: element operations on integers, and on all other types.
    """

    flops: float = 0.0
    bytes: float = 0.0
    integer: float = 0.0
    other: float = 0.0


Formula = Callable[[Sequence[Shaped], Sequence[Shaped]], KernelCost]
_FORMULAS: dict[str, Formula] = {}


def kernel_cost(name: str) -> Callable[[Formula], Formula]:
    """Returns a decorator that registers a kernel's formula, (operands, results) -> cost.

    Args:
        name: the target of the kernel's custom call, or its name in a `jax.named_scope` or `pallas_call`.
    """

    def register(formula: Formula) -> Formula:
        _FORMULAS[name] = formula
        return formula

    return register


def formula_of(target: str, op_name: str) -> Formula | None:
    """Returns the formula of a custom call: by its target, or by a name in its JAX path, innermost first.

    A path looks like `jit(f)/transpose(jvp(my_attention))/pallas_call`.
    """
    names = [target, *reversed(re.split(r"[/()]", op_name))]
    return next((_FORMULAS[name] for name in names if name in _FORMULAS), None)
