"""Finds the wrong equations in a text: equations whose two sides differ."""

import itertools
import re
from collections.abc import Iterator

from stepdistill_jax.data import arithmetic

MAX_LENGTH = 100_000  # characters of a text that are checked
# repetitions are bounded, or a text of brackets would take quadratic time
_NUMBER = r"\$?(?:\d{1,3}(?:,\d{3}){1,5}(?!\d)|\d{1,18})(?:\.\d{1,500})?"
_TERM = rf"(?:\( ?){{0,8}}{_NUMBER}(?: ?\)){{0,8}}"
_EXPRESSION = rf"-?{_TERM}(?: ?[-+*/x] ?{_TERM}){{0,50}}"
_EQUATIONS = re.compile(rf"{_EXPRESSION}(?: ?= ?{_EXPRESSION}){{1,50}}")
_FIRST_NUMBER = re.compile(rf"-?{_NUMBER}")
_TYPED = str.maketrans({"\u00d7": "*", "\u00f7": "/"})  # printed multiplication and division signs
_SIGNS = str.maketrans({"x": "*", "$": None, ",": None})


def wrong_sums(text: str) -> list[str]:
    """Returns the equations of `text` whose two sides differ.

    Example: `wrong_sums("So 3 + 4 = 8, and 10 / 3 = 3.33.")` is ["3 + 4 = 8"].

    Sides are numbers, `+ - * / x` and parentheses. A side attached to other text (`5 apples + 3 = 8`, `7 = 2x + 3`)
    is not checked. Rounded results are right, and so are chains: `3 + 4 = 7 + 1 = 8`.
    """
    text = " ".join(text[:MAX_LENGTH].translate(_TYPED).split())
    wrong = []
    for found in _EQUATIONS.finditer(text):
        sides = [side.strip() for side in found[0].split("=")]
        if _hangs_on(text[max(found.start() - 2, 0) : found.start()]):
            sides = sides[1:]
        if text[found.end() : found.end() + 1].isalnum() or text.startswith("%", found.end()):
            sides = sides[:-1]
        wrong += [f"{a} = {b}" for a, b in itertools.pairwise(sides) if not _agree(a, b)]
    return wrong


def _hangs_on(before: str) -> bool:
    """Returns whether an expression continues the text `before` it.

    Example: in `50% * 4 = 2`, the expression `4` continues `50% *`.
    """
    last = before.rstrip()[-1:]
    return before[-1:].isalnum() or before[-1:] in (".", "%", ",") or last.isdigit() or (
        last != "" and last in "+-*/x^%="
    )  # fmt: skip


def _agree(left: str, right: str) -> bool:
    """Returns whether the two sides of an equation have equal values, or True if a side has no value."""
    value = arithmetic.evaluate(left.translate(_SIGNS))
    results = list(_results(right))
    if value is None or not results:
        return True
    return any(abs(value - result) <= allowed for result, allowed in results)


def _results(side: str) -> Iterator[tuple[float, float]]:
    """Yields the values that an equation's left side may have, as pairs (value, allowed difference).

    They are the value of the right side, `side`, and the number at its start.
    """
    first = _FIRST_NUMBER.match(side)
    for part in dict.fromkeys((side, first[0] if first else side)):
        plain = part.translate(_SIGNS)
        value = arithmetic.evaluate(plain)
        if value is not None:
            is_number = first is not None and part == first[0]
            decimals = len(plain.partition(".")[2]) if is_number else 6
            yield value, 0.5 * 10**-decimals + 1e-9 * abs(value)
