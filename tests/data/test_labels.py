"""Warnings of `prepare` about labels and rows of a whole dataset."""

import dataclasses

import pytest

from stepdistill_jax.data.counts import SplitCounts, shared_inputs
from stepdistill_jax.data.example import Example, Rationale
from stepdistill_jax.data.labels import label_counts, warnings
from stepdistill_jax.data.reading import CheckedExample


def _splits(**splits):
    """Returns the counts of {split: [(input, label), ...]}; rows are in SPLIT.csv, from line 2 on."""
    made = {}
    for split, rows in splits.items():
        made[split] = SplitCounts()
        for line, (text, label, *why) in enumerate(rows, 2):
            example = Example(str(line), text, label, *why)
            made[split].add(CheckedExample(example, file=f"{split}.csv", line=line))
    return made


def _rows(counts):
    """Returns `count` rows of each label, all with different inputs."""
    return [(f"{label} {i}", label) for label, count in counts.items() for i in range(count)]


def _by_kind(splits):
    found = warnings(splits)
    assert len({warning["kind"] for warning in found}) == len(found)
    return {warning["kind"]: warning for warning in found}


def test_rows_of_each_label_are_counted_by_split_the_commonest_first():
    found = label_counts(
        _splits(train=_rows({"no": 6, "yes": 9}), test=[("x", "no"), ("y", "maybe")])
    )
    assert list(found) == ["yes", "no", "maybe"]
    assert found == {"yes": {"train": 9}, "no": {"train": 6, "test": 1}, "maybe": {"test": 1}}


@pytest.mark.parametrize(
    ("counts", "closed"),
    [
        ({"yes": 9, "no": 1}, True),
        ({f"intent {i}": 10 for i in range(150)}, True),
        ({str(i): 10 for i in range(5)}, True),  # ratings
        ({str(i): 10 for i in range(60)}, False),  # answers to sums
        ({f"a name {i}": 2 for i in range(60)}, False),  # answers in words
        ({f"{i}": 1 for i in range(1200)}, False),
        ({}, False),
    ],
    ids=["two", "intents", "ratings", "sums", "names", "many", "none"],
)
def test_a_closed_set_is_told_from_free_answers(counts, closed):
    splits = _splits(train=_rows(counts))
    assert bool(label_counts(splits)) == closed
    if not closed:  # a label with a single row is normal there
        assert warnings(splits) == []


def test_odd_labels_are_named_with_count_place_and_advice():
    odd = [("a", "Sound"), ("b", "Sound"), ("c", "7"), ("d", "crackd"), ("e", "no  more")]
    splits = _splits(
        train=_rows({"sound": 20, "cracked": 30, "no more": 5}) + odd, test=[("z", "SOUND")]
    )
    found = _by_kind(splits)
    assert set(found) == {"labels_alike", "numbers_among_labels", "labels_of_one_row"}
    alike = found["labels_alike"]
    assert (alike["count"], alike["examples"]) == (
        4,
        ["train.csv:57", "test.csv:2", "train.csv:61"],
    )
    assert (
        "'sound' in 20 rows (train.csv:2) and 'Sound' in 2 rows (train.csv:57) and 'SOUND' in 1 row"
        " (test.csv:2); 'no more' in 5 rows" in alike["message"]
    )
    assert found["numbers_among_labels"]["examples"] == ["train.csv:59"]
    single = found["labels_of_one_row"]
    assert single["count"] == 4
    assert "'crackd' (train.csv:60; did you mean 'cracked'?)" in single["message"]


def test_labels_that_are_all_fine_give_no_warning():
    assert warnings(_splits(train=_rows({"yes": 30, "no": 30}), test=[("x", "no")])) == []
    assert warnings({}) == []


def test_equal_rows_and_inputs_with_different_labels_are_found_in_all_splits():
    splits = _splits(
        train=[("a", "x"), ("b", "y"), ("a", "x"), ("a", "x"), ("c", "x", "why"), ("e", "")],
        test=[("b", "z"), ("c", "x", "since"), ("b", "y"), ("e", "x")],
    )
    found = _by_kind(splits)
    equal, different = found["duplicate_rows"], found["different_labels"]
    # two more of a, one more of b; c has another rationale, e's first row no label
    assert (equal["count"], equal["examples"]) == (3, ["train.csv:4", "train.csv:5", "test.csv:4"])
    assert "(train.csv:2 and train.csv:4, train.csv:2 and train.csv:5, train.csv:3 and test.csv:4)" in equal["message"]  # fmt: skip
    assert different["count"] == 1
    assert "1 input with conflicting labels, in 3 rows (train.csv:3 and test.csv:2)" in different["message"]  # fmt: skip


def test_rows_that_differ_in_any_field_are_not_equal():
    same = Example("1", "q", "a", rationale="r")
    second = Rationale("r"), Rationale("s")
    others = [
        dataclasses.replace(same, **field)
        for field in (
            {"weight": 2.0},
            {"choices": ("a", "b")},
            {"more": {"hint": "h"}},
            {"rationales": second},
            {"rationales": (second[0], Rationale("t"))},
            {"choices": ("a", "c"), "label": "c"},  # a different question
            {"more": {"hint": "i"}, "label": "c"},
        )
    ]
    counts = SplitCounts()
    for row in (same, *others):
        counts.add(CheckedExample(row))
    assert warnings({"train": counts}) == []
    counts.add(CheckedExample(dataclasses.replace(others[2], id="2", label="b")))
    counts.add(CheckedExample(dataclasses.replace(others[1], id="3")))
    kinds = {w["kind"]: w["count"] for w in warnings({"train": counts})}
    assert kinds == {"different_labels": 1, "duplicate_rows": 1}
    # an input is the same whatever its choices
    assert shared_inputs({"train": counts, "test": counts}) == [
        "10 inputs of test are also in train"
    ]


def test_the_labels_of_a_dataset_are_few_and_of_rows_without_choices():
    def labels(rows):
        counts = SplitCounts()
        for row in rows:
            counts.add(CheckedExample(row))
        return counts.labels

    rows = [Example(str(i), "q", f"label {i:02d}") for i in range(50)]
    assert labels(rows) == [f"label {i:02d}" for i in range(50)]
    assert labels([*rows, Example("51", "q", "another")]) == []
    assert labels([*rows[:9], Example("51", "q", "a", choices=("a", "b"))]) == []
