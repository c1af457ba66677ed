"""Evaluates short arithmetic expressions without running model output as code."""

import math
import re

_TOKEN = re.compile(r"\s*([0-9]+(?:\.[0-9]*)?|\.[0-9]+|[-+*/()])")
MAX_LENGTH = 2000  # characters
MAX_DEPTH = 100  # parentheses; keeps the recursion far from Python's limit
RELATIVE_TOLERANCE = 1e-6


def evaluate(text: str) -> float | None:
    """Evaluates an expression of numbers, `+ - * /`, signs and parentheses.

    Example: `evaluate("( ( 17.0 + 15.0 ) / 2 )")` is 16.0.
    `evaluate("1 / 0")` and `evaluate("2 apples")` are None.

    Returns:
        A finite float. None if `text` is not an expression, has no finite value, or is too long or too deeply nested.
    """
    if len(text) > MAX_LENGTH:
        return None
    try:
        parser = _Parser(_tokens(text))
        value = parser.sum()
    except (_NotAnExpression, ZeroDivisionError):
        return None
    return value if parser.at_end and math.isfinite(value) else None


def equal(left: float, right: float) -> bool:
    """Returns whether two values are equal, within a relative tolerance of 1e-6 or an absolute one of 1e-9."""
    return math.isclose(left, right, rel_tol=RELATIVE_TOLERANCE, abs_tol=1e-9)


class _NotAnExpression(Exception):
    pass


def _tokens(text: str) -> list[str]:
    tokens, position, text = [], 0, text.rstrip()
    while position < len(text):
        match = _TOKEN.match(text, position)
        if match is None:
            raise _NotAnExpression
        tokens.append(match[1])
        position = match.end()
    return tokens


class _Parser:
    """Recursive-descent parser.

    Grammar: sum = product (("+" | "-") product)*;  product = factor (("*" | "/") factor)*;
    factor = ("+" | "-")* (NUMBER | "(" sum ")").
    """

    def __init__(self, tokens: list[str]):
        self._tokens = tokens
        self._position = 0
        self._depth = 0

    @property
    def at_end(self) -> bool:
        return self._position == len(self._tokens)

    def _next(self) -> str:
        return "" if self.at_end else self._tokens[self._position]

    def _take(self) -> str:
        token = self._next()
        self._position += 1
        return token

    def sum(self) -> float:
        value = self._product()
        while self._next() in ("+", "-"):
            value = value + self._product() if self._take() == "+" else value - self._product()
        return value

    def _product(self) -> float:
        value = self._factor()
        while self._next() in ("*", "/"):
            value = value * self._factor() if self._take() == "*" else value / self._factor()
        return value

    def _factor(self) -> float:
        sign = 1.0
        while self._next() in ("+", "-"):  # a loop: a line of minus signs must not recurse
            sign = -sign if self._take() == "-" else sign
        if self._next() != "(":
            if self._next() in ("", "*", "/", ")"):
                raise _NotAnExpression
            return sign * float(self._take())
        self._take()
        self._depth += 1
        if self._depth > MAX_DEPTH:
            raise _NotAnExpression
        value = self.sum()
        if self.at_end or self._take() != ")":
            raise _NotAnExpression
        self._depth -= 1
        return sign * value
