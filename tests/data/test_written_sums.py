import time

import pytest

from stepdistill_jax.data.written_sums import wrong_sums


@pytest.mark.parametrize(
    ("text", "wrong"),
    [
        ("So 3 + 4 = 8, and 10 / 3 = 3.33.", ["3 + 4 = 8"]),
        ("So 3 + 4 = 7.", []),
        ("$5 + $3 = $9.", ["$5 + $3 = $9"]),
        ("16 x 17 = 272 and 1,000 + 88 = 1,088.", []),
        ("16 \u00d7 17 = 271.", ["16 * 17 = 271"]),
        ("(3+4) * 2 = 15", ["(3+4) * 2 = 15"]),
        ("3 + 4 = 7 + 1 = 8", []),
        ("3 + 4 = 7 + 1 = 9", ["7 + 1 = 9"]),
        ("5 - 8 = -3", []),
        ("5 - 8 = 3", ["5 - 8 = 3"]),
        # a result may be rounded to the digits that it shows
        ("193 / 15 = 12.9", []),
        ("193 / 15 = 12.8", ["193 / 15 = 12.8"]),
        ("20 / 3 = 6", ["20 / 3 = 6"]),
        # a sum attached to other text cannot be checked
        ("5 apples + 3 = 8", []),
        ("5 apples + 3 + 1 = 9", []),
        ("153 pages x 2/3 = 102 pages", []),
        ("7 = 2x + 3", []),
        ("2x + 3 = 7", []),
        ("50% * 4 = 2", []),
        ("2 1/2 + 1 = 9", []),
        ("x = 3 and y = 4", []),
        ("1 / 0 = 4", []),
        ("3 + 4\n= 8", ["3 + 4 = 8"]),
    ],
)
def test_sums_that_do_not_add_up_are_found(text, wrong):
    assert wrong_sums(text) == wrong


@pytest.mark.parametrize("piece", ["(", "1 + ", "1", "1 ) ", "1 = ", "( 1 = "])
def test_a_long_text_takes_no_time(piece):
    began = time.process_time()
    wrong_sums(piece * 5000)
    assert time.process_time() - began < 2  # measured 0.1 s at most
