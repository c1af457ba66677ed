"""Checks the values of parameters.

Messages contain the parameter's name in backticks. Commands replace this name with their flag.
"""

import re
from collections.abc import Callable, Iterable
from numbers import Integral, Real
from operator import ge, gt, le, lt
from typing import Any, cast

from stepdistill_jax.errors import InputError, nearest

SNAKE_CASE = re.compile(r"[a-z][a-z0-9_]*")
INT32, FLOAT32 = 2**31 - 1, 3.4e38  # largest values of the dtypes of steps and rates


def whole(name: str, value: Any, least: int, most: int = INT32) -> int:
    """Returns `value` as an int if it is a whole number from `least` to `most`.

    Raises:
        InputError: the value is out of range, not whole, a bool, or not a number.
    """
    limits = f"of at least {least}"
    if isinstance(value, Integral) and not isinstance(value, bool):
        if least <= (found := int(value)) <= most:
            return found
        limits = f"from {least} to {most}" if found > most else limits
    raise refused(name, f"a whole number {limits}", value)


def number(
    name: str,
    value: Any,
    *,
    least: float | None = None,
    above: float | None = None,
    most: float | None = None,
    below: float | None = None,
) -> float:
    """Returns `value` as a plain int or float if it is a number within the bounds.

    Raises:
        InputError: the value is out of bounds, outside float32's range, NaN, a bool, or not a number.
    """
    bounds = (
        ("of at least", least, ge),
        ("above", above, gt),
        ("at most", most, le),
        ("below", below, lt),
    )
    given = [(words, x, holds) for words, x, holds in bounds if x is not None]
    is_number = isinstance(value, Real) and not isinstance(value, bool)
    found = cast(Any, float(value) if is_number and not isinstance(value, int) else value)
    if is_number and abs(found) <= FLOAT32 and all(holds(found, x) for _, x, holds in given):
        return found
    limits = " and ".join(f"{words} {x:g}" for words, x, _ in given)
    raise refused(name, f"a number {limits}".strip(), value)


def keep(owner: Any, check: Callable[..., Any], *names: str, of: str = "", **limits: Any) -> None:
    """Checks fields of a frozen dataclass, and stores the checked values in them.

    Args:
        check: `whole` or `number`.
        of: prefix of the names in messages, such as "optimizer.".
    """
    for name in names:
        object.__setattr__(owner, name, check(of + name, getattr(owner, name), **limits))


def of_type(name: str, value: Any, kind: Any, words: str) -> None:
    """Raises InputError if `value` is not of the type `kind`. `words` describes the type in the message."""
    if not isinstance(value, kind):
        raise refused(name, words, value)


def snake_case(name: str, value: Any) -> None:
    """Raises InputError if `value` is not a name such as my_task."""
    if not isinstance(value, str) or not SNAKE_CASE.fullmatch(value):
        raise refused(name, "lower_snake_case, such as my_task", value)


def one_of(name: str, value: Any, known: Iterable[str]) -> None:
    """Raises InputError, with the nearest name, if `value` is not a known name."""
    known = list(known)
    if value not in known:
        raise refused(name, f"one of {', '.join(known)}", value, nearest(str(value), known))


def refused(name: str, wanted: str, value: Any, hint: str = "") -> InputError:
    """Returns an error such as "`num_beams` must be a whole number of at least 1, not 0"."""
    shown = repr(value)
    shown = shown if len(shown) <= 200 else f"{shown[:200]}..."
    return InputError(f"`{name}` must be {wanted}, not {shown}{hint}")
