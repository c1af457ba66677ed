import pytest
from hypothesis import given
from hypothesis import strategies as st

from stepdistill_jax.data.text_metrics import LabelCounts, accuracy, is_valid, majority_baseline
from stepdistill_jax.errors import InputError


@pytest.mark.parametrize(
    ("prediction", "label", "same"),
    [
        ("math problem", "math problem", True),
        (" math\n problem ", "math problem", True),
        ("Math problem", "math problem", False),
        ("mathproblem", "math problem", False),
    ],
)
def test_text_match_forgives_whitespace_and_nothing_else(prediction, label, same):
    assert accuracy([prediction], [label], "text_match") == same


@pytest.mark.parametrize(
    ("prediction", "label", "same"),
    [
        ("10", "( 8.0 + 2.0 )", True),
        ("(2 + 8)", "( 8.0 + 2.0 )", True),
        ("( 8 + 2", "( 8.0 + 2.0 )", False),
        ("", "( 8.0 - 8.0 )", False),
        ("none", "none", True),  # a label without a value is compared as text
        ("10", "none", False),
        ("3.3333333", "( 10.0 / 3.0 )", True),
        ("3.33", "( 10.0 / 3.0 )", False),
    ],
)
def test_value_match_compares_what_equations_come_to(prediction, label, same):
    assert accuracy([prediction], [label], "value_match") == same


def test_accuracy_is_a_share_of_all_rows():
    assert accuracy(["a", "b", "a", "a"], ["a", "a", "b", "a"], "text_match") == 0.5
    assert accuracy([], [], "text_match") == 0.0


def test_accuracy_refuses_lists_of_different_length():
    with pytest.raises(ValueError, match="shorter"):
        accuracy(["a", "b"], ["a"], "text_match")


def test_majority_baseline_counts_equal_values_together():
    labels = ["( 2 + 2 )", "4", "( 3 + 3 )"]
    assert majority_baseline(labels, "value_match") == pytest.approx(2 / 3)
    assert majority_baseline(labels, "text_match") == pytest.approx(1 / 3)
    assert majority_baseline([], "text_match") == 0.0


@given(st.lists(st.sampled_from(["a", "b ", "b", "c"]), min_size=1))
def test_majority_baseline_is_the_best_accuracy_of_a_constant_answer(labels):
    best = max(accuracy([answer] * len(labels), labels, "text_match") for answer in labels)
    assert majority_baseline(labels, "text_match") == best


@given(st.lists(st.sampled_from("aaaabcdefghijklm"), max_size=60), st.integers(1, 8))
def test_counts_of_more_labels_than_fit_are_low_by_a_known_share_at_most(labels, most):
    counts = LabelCounts("text_match")
    counts.MOST = most
    for label in labels:
        counts.add(label)
        assert len(counts._counts) <= most
    exact = majority_baseline(labels, "text_match")
    assert exact - 1 / (most + 1) <= counts.majority() <= exact


def test_a_valid_answer_is_a_choice_of_the_row_if_it_has_some():
    ask = {"metric": "text_match", "labels": ("yes", "no"), "choices": ("zoo", "lake")}
    assert is_valid("lake ", **ask) is True
    assert is_valid("yes", **ask) is False


def test_without_choices_the_labels_of_train_say_what_is_valid():
    assert is_valid("yes", metric="text_match", labels=("yes", "no")) is True
    assert is_valid("maybe", metric="text_match", labels=("yes", "no")) is False
    assert is_valid("anything", metric="text_match") is None


def test_an_equation_is_valid_if_it_has_a_value():
    assert is_valid("( 3 + 4 )", metric="value_match", labels=("5",)) is True
    assert is_valid("( 3 + x )", metric="value_match") is False


def test_an_unknown_metric_names_the_nearest():
    with pytest.raises(InputError, match="did you mean 'text_match'"):
        accuracy(["a"], ["a"], "text_mach")
