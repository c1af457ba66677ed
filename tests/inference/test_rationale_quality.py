"""Figures of rationales on rows that are worked out by hand."""

import pytest

from stepdistill_jax.data.example import Example, Rationale
from stepdistill_jax.inference.rationale_quality import (
    RationaleCounts,
    in_words,
    named_answer,
    named_label,
    named_number,
    references,
)

CHOICES = ("fitness center", "country club", "club", "zoo")


@pytest.mark.parametrize(
    ("rationale", "named"),
    [
        ("Only the zoo.", "zoo"),
        ("Not a zoo but a ClUb.", "club"),  # the last one, whatever the case
        ("A country\n club.", "country club"),  # not the `club` in it
        ("Country clubs and fitness centers have courts.", "fitness center"),
        ("A zoologist clubbed them.", None),  # whole words only
        ("", None),
    ],
)
def test_the_label_named_last(rationale, named):
    assert named_label(rationale, CHOICES) == named


def test_labels_are_text_not_patterns():
    assert named_label("it is c++ or (a.)", ["c++", "(a.)"]) == "(a.)"
    assert named_label("abc", ["a.c", ""]) is None and named_label("abc", [""]) is None


@pytest.mark.parametrize(
    ("rationale", "number"),
    [
        ("12 - 2 = 10 more cups.", "10"),
        ("So he had 13 - 91 = -78 cakes", "-78"),
        ("22 * 569 = 12,598 pages", "12598"),
        ("$133 / 19 = $6.95.", "6.95"),
        ("79-53", "53"),
        ("a1 b2", None),
    ],
)
def test_the_number_named_last(rationale, number):
    assert named_number(rationale) == number


@pytest.mark.parametrize(
    ("rationale", "label", "metric", "labels", "found"),
    [
        ("the zoo", "zoo", "text_match", CHOICES, ("zoo", "consistent")),
        ("the ZOO", "Zoo", "text_match", CHOICES, ("zoo", "consistent")),
        ("the zoo", "club", "text_match", CHOICES, ("zoo", "inconsistent")),
        ("the farm", "zoo", "text_match", CHOICES, (None, "names_no_label")),
        # a model that stammers an invalid label in both is not consistent
        ("the farm", "farm", "text_match", CHOICES, (None, "names_no_label")),
        ("the zoo", "farm", "text_match", CHOICES, ("zoo", "inconsistent")),
        ("the farm", "farm", "text_match", (), (None, None)),
        ("12 - 2 = 10", "( 12 - 2 )", "value_match", (), ("10", "consistent")),
        ("12 - 2 = 10", "( 12 + 2 )", "value_match", (), ("10", "inconsistent")),
        ("12 - 2 = 10", "no idea", "value_match", (), ("10", "inconsistent")),
        ("no idea", "10", "value_match", (), (None, "names_no_label")),
    ],
)
def test_what_a_reason_leads_to(rationale, label, metric, labels, found):
    assert named_answer(rationale, label, metric=metric, labels=labels) == found


def example(number=1, **fields):
    return Example(str(number), "q", "smooth", **fields)


def test_all_rationales_of_a_row_are_references():
    both = (Rationale("a", "llm"), Rationale("b", "human"))
    assert references(example(rationale="a", rationales=both)) == ["a", "b"]
    assert references(example(rationale="a")) == ["a"] and references(example()) == []


def test_the_figures_of_a_worked_example():
    counted = RationaleCounts("text_match", ("smooth", "trouble"))
    both = (Rationale("x"), Rationale("The cat ran fast!"))
    # two of three and of four words in order: F1 = 2 * (2/3 * 1/2) / (2/3 + 1/2) = 4/7, of the better one
    counted.add(example(1, rationales=both), "smooth", "the cat sat")
    # one of two characters and none of one pair: both means are 1/4, and so is F
    counted.add(example(2, rationale="ac", llm_label="smooth"), "smooth", "ab")
    counted.add(
        example(3, rationale="a smooth ride", llm_label="trouble"), "smooth", "trouble ahead"
    )
    counted.add(example(4), "smooth", " ")
    counted.add(example(5), "smooth", "smooth")
    found = counted.summary()
    assert found.pop("rouge_l") == pytest.approx((4 / 7 + 0 + 0) / 3)
    chrf = found.pop("chrf")
    assert found == {
        "rows": 5,
        "empty": 1,
        "mean_words": (3 + 1 + 2 + 0 + 1) / 5,
        "references": 3,
        "consistent": 1,
        "inconsistent": 1,
        "names_no_label": 3,
        "teacher": {"consistent": 0, "inconsistent": 1, "names_no_label": 1},
        "disagreements": [
            {"id": "3", "label": "smooth", "named": "trouble", "rationale": "trouble ahead"}
        ],
    }
    one = RationaleCounts("text_match")
    one.add(example(2, rationale="ac"), "smooth", "ab")
    assert one.summary()["chrf"] == pytest.approx(25)
    assert 25 / 3 < chrf < 100
    said = in_words({**counted.summary(), "unfinished": 2})
    assert "ROUGE-L 0.190" in said and "(3 rows with a reference)" in said
    assert "1.4 words on average  empty 1  unfinished 2" in said
    assert "consistent 1 (20.0%)  inconsistent 1 (20.0%)  names no label 3 (60.0%)" in said
    assert "the teacher's own: consistent 0 (0.0%)" in said
    assert "3: label 'smooth', but rationale 'trouble ahead' names 'trouble'" in said


def test_a_perfect_copy_has_the_highest_figures():
    counted = RationaleCounts("text_match")
    counted.add(
        example(rationale="Wide roads suit heavy trucks."),
        "smooth",
        "Wide roads suit heavy trucks.",
    )
    assert (counted.summary()["rouge_l"], counted.summary()["chrf"]) == (1.0, pytest.approx(100))


def test_the_choices_of_a_row_go_before_the_tasks_labels():
    counted = RationaleCounts("text_match", ("zoo", "club"))
    counted.add(example(choices=("farm", "lake")), "farm", "a zoo by a lake near the zoo")
    assert counted.summary()["disagreements"][0]["named"] == "lake"


def test_nothing_is_said_of_what_cannot_be_measured():
    counted = RationaleCounts("text_match")
    counted.add(example(), "anything", "since it is so")
    found = counted.summary()
    for name in ("rouge_l", "chrf", "consistent", "inconsistent", "names_no_label", "teacher"):
        assert found[name] is None
    said = in_words({**found, "unfinished": 0})
    assert "ROUGE" not in said and "not compared" in said


def test_verdicts_are_shown_only_if_a_rationale_names_a_label():
    counted = RationaleCounts("text_match", ("smooth", "trouble"))
    counted.add(example(1, rationale="a wide road"), "smooth", "a fast pace")
    found = counted.summary()
    assert found["names_no_label"] == found["teacher"]["names_no_label"] == 1
    said = in_words({**found, "unfinished": 0})
    assert said.endswith("not compared, since no rationale names a label")
    # without a teacher's label, its rationale is compared with the gold label
    counted.add(example(2, rationale="so it is smooth"), "smooth", "a fast pace")
    said = in_words({**counted.summary(), "unfinished": 0})
    assert "label and rationale: consistent 0 (0.0%)" in said
    assert "the teacher's own: consistent 1 (50.0%)" in said


def test_only_the_first_disagreements_are_kept():
    counted = RationaleCounts("text_match", ("smooth", "trouble"))
    for number in range(20):
        counted.add(example(number), "smooth", "trouble")
    found = counted.summary()
    assert found["inconsistent"] == 20
    assert [row["id"] for row in found["disagreements"]] == ["0", "1", "2", "3", "4"]
