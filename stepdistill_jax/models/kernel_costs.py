"""Registered formulas for the costs of kernel calls.

XLA does not know what a custom call computes. So each kernel's module registers a formula, which
`stepdistill_jax.planning` uses:

    @kernel_cost("my_attention")
    def _cost(operands, results):
        return KernelCost(flops=..., bytes=..., other=...)
"""

import dataclasses
import re
from collections.abc import Callable, Sequence
from typing import Protocol


class Shaped(Protocol):
    """An operand or a result of a kernel call."""

    @property
    def dtype(self) -> str:
        """Type as HLO spells it, such as bf16, f32, s32 or pred."""
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
        flops: in matmuls only. A multiplication and its addition count as two.
        bytes: read from and written to main memory.
        integer, other: number of elementwise operations on integers and on other types.
    """

    flops: float = 0.0
    bytes: float = 0.0
    integer: float = 0.0
    other: float = 0.0


Formula = Callable[[Sequence[Shaped], Sequence[Shaped]], KernelCost]
_FORMULAS: dict[str, Formula] = {}


def kernel_cost(name: str) -> Callable[[Formula], Formula]:
    """Returns a decorator that registers a kernel's formula, a function (operands, results) -> cost.

    Args:
        name: target of the kernel's custom call, or the kernel's name in a `jax.named_scope` or `pallas_call`.
    """

    def register(formula: Formula) -> Formula:
        _FORMULAS[name] = formula
        return formula

    return register


def formula_of(target: str, op_name: str) -> Formula | None:
    """Returns the formula that is registered for a custom call, or None if there is no such formula.

    Args:
        target: the call's target. A formula registered under this name is preferred.
        op_name: the call's JAX path, such as `jit(f)/transpose(jvp(my_attention))/pallas_call`. If `target` is
            not registered, the last registered name in this path is used.
    """
    names = [target, *reversed(re.split(r"[/()]", op_name))]
    return next((_FORMULAS[name] for name in names if name in _FORMULAS), None)
