"""Compares the evaluator with Python's arithmetic, and tests what it refuses."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stepdistill_jax.data.arithmetic import equal, evaluate

numbers = st.one_of(
    st.integers(0, 10_000).map(str),
    st.decimals(0, 1000, places=2, allow_nan=False).map(str),
)
spaces = st.sampled_from(["", " ", "  "])


def _join(parts):
    return st.tuples(*(st.tuples(spaces, p) for p in parts)).map(
        lambda found: "".join(space + part for space, part in found)
    )


expressions = st.recursive(
    numbers,
    lambda inner: st.one_of(
        _join([inner, st.sampled_from("+-*/"), inner]),
        _join([st.just("("), inner, st.just(")")]),
        _join([st.sampled_from("+-"), inner]),
    ),
    max_leaves=12,
)


@given(expressions)
def test_a_value_is_the_one_that_python_gives(text):
    try:
        wanted = eval(text.strip(), {"__builtins__": {}})  # made of the parts above only
    except ZeroDivisionError:
        assert evaluate(text) is None
        return
    got = evaluate(text)
    assert got is not None
    assert math.isclose(got, wanted, rel_tol=1e-9, abs_tol=1e-9)


@given(st.text(max_size=60))
def test_any_text_gives_a_finite_number_or_none(text):
    value = evaluate(text)
    assert value is None or math.isfinite(value)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("( ( 17.0 + 15.0 ) / 2 )", 16.0),
        ("2 - 3 - 4", -5.0),
        ("12 / 3 / 2", 2.0),
        ("2 + 3 * 4", 14.0),
        ("-(2 + 3) * -4", 20.0),
        (".5 + 1.", 1.5),
    ],
)
def test_precedence_and_signs(text, value):
    assert evaluate(text) == value


@pytest.mark.parametrize(
    "text",
    [
        "",
        " ",
        "()",
        "( 1",
        "1 )",
        "1 +",
        "* 2",
        "1 2",
        "2 apples",
        "(some - 8)",
        "7x = 14",
        "(14, 21)",
        "1 / 0",
        "1 / (2 - 2)",
        "1e3",
        "2 ** 3",
        "2 // 3",
        "__import__('os')",
        "٣ + ٤",
        "1.2.3",
        "9" * 400,
        "(" * 500 + "1" + ")" * 500,
        "1" + "+1" * 2000,
    ],
)
def test_what_is_no_expression_has_no_value(text):
    assert evaluate(text) is None


def test_a_long_line_of_signs_does_not_recurse():
    assert evaluate("-" * 1999 + "1") == -1.0


def test_equality_forgives_a_relative_millionth():
    assert equal(1e9, 1e9 + 500)
    assert not equal(1e9, 1e9 + 5000)
    assert not equal(0.0, 1e-6)
