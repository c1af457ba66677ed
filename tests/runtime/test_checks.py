import json
import math
import re

import numpy as np
import pytest

from stepdistill_jax.errors import InputError
from stepdistill_jax.runtime.checks import number, one_of, whole


def refused(check, message):
    with pytest.raises(InputError, match=re.escape(message)):
        check()


@pytest.mark.parametrize("value", [1, 7, np.int64(3), 2**31 - 1])
def test_a_whole_number_comes_back_as_json_has_it(value):
    assert json.loads(json.dumps(whole("n", value, 1))) == value


@pytest.mark.parametrize("value", [0, -1, True, 2.0, "2", None, math.nan, np.float32(1)])
def test_what_is_no_whole_number_in_the_range_is_refused(value):
    refused(
        lambda: whole("n", value, 1), f"`n` must be a whole number of at least 1, not {value!r}"
    )


def test_the_upper_limit_of_a_whole_number_is_named_where_it_is_passed():
    refused(lambda: whole("n", 9, 1, 8), "`n` must be a whole number from 1 to 8, not 9")
    refused(lambda: whole("n", 2**31, 0), "`n` must be a whole number from 0 to 2147483647")


@pytest.mark.parametrize("value", [0, 1, 0.5, np.float32(0.25)])
def test_a_number_comes_back_as_json_has_it(value):
    assert json.loads(json.dumps(number("x", value, least=0, most=1))) == value


@pytest.mark.parametrize("value", [-0.1, 1.5, True, "1", None, math.nan, math.inf, 1j])
def test_what_is_no_number_in_the_range_is_refused(value):
    message = f"`x` must be a number of at least 0 and at most 1, not {value!r}"
    refused(lambda: number("x", value, least=0, most=1), message)


@pytest.mark.parametrize("value", [0, 1])
def test_open_ends_leave_their_bound_out(value):
    refused(lambda: number("x", value, above=0, below=1), "a number above 0 and below 1, not")


def test_what_float32_cannot_hold_is_refused():
    refused(lambda: number("x", 1e39, above=0), "`x` must be a number above 0, not 1e+39")


def test_one_of_names_all_and_the_nearest():
    one_of("layout", "data", ("data", "fsdp"))
    message = "`layout` must be one of data, fsdp, not 'fdsp'; did you mean 'fsdp'?"
    refused(lambda: one_of("layout", "fdsp", ("data", "fsdp")), message)
    refused(lambda: one_of("layout", None, ("data", "fsdp")), "one of data, fsdp, not None")
