from collections import Counter

import pytest

from stepdistill_jax.data.example import Example
from stepdistill_jax.errors import InputError
from stepdistill_jax.experiments.controls import prepare_control, prepare_variant, spoil

ROWS = [Example(f"r{i}", f"question {i}", "yes" if i % 3 else "no", f"why {i}") for i in range(60)]


def changed(rows):
    return [i for i, row in enumerate(rows) if row.get("rationale") != f"why {i}"]


def test_shuffled_rationales_are_all_there_and_none_at_home():
    rows = spoil(ROWS, "shuffled")
    assert Counter(r["rationale"] for r in rows) == Counter(e.rationale for e in ROWS)
    assert len(changed(rows)) == 60


def test_wrong_ones_come_from_a_row_with_another_label():
    rows = spoil(ROWS, "wrong", 0.3)
    assert len(changed(rows)) == 18
    for i in changed(rows):
        assert ROWS[int(rows[i]["rationale"].split()[1])].label != ROWS[i].label


def test_missing_ones_are_no_field():
    rows = spoil(ROWS, "missing", 0.5)
    assert sum("rationale" not in row for row in rows) == 30
    assert len(changed(rows)) == 30


def test_a_teacher_that_errs_gives_label_and_rationale_of_another_row():
    rows = spoil(ROWS, "teacher_errs", 0.2)
    assert len(changed(rows)) == 12
    for i, row in enumerate(rows):
        source = ROWS[int(row["rationale"].split()[1])]
        assert row["llm_label"] == source.label
        assert (source.label != ROWS[i].label) == (i in changed(rows))


def test_a_variant_has_rows_and_fields_of_its_own(tmp_path):
    def more(examples):
        assert len(examples) == 1500
        return [e.to_json() | {"why_not": "no .", "id": f"v{e.id}"} for e in examples[:40]]

    made = prepare_variant("delivery", "variant", more, fields=["why_not"], data_dir=tmp_path)
    train = list(made.examples("train"))
    assert len(train) == 40 and {e.more["why_not"] for e in train} == {"no ."}
    assert made.splits["test"] == 500 and "why_not" in made.fields
    again = prepare_variant("delivery", "variant", lambda _: [], data_dir=tmp_path)
    assert again.fingerprint == made.fingerprint, "prepared once"


@pytest.mark.parametrize("kind", ["shuffled", "wrong", "missing", "teacher_errs"])
def test_all_else_stays_and_a_seed_says_which(kind):
    rows = spoil(ROWS, kind, 0.5, seed=3)
    assert [(r["id"], r["input"], r["label"]) for r in rows] == [
        (e.id, e.input, e.label) for e in ROWS
    ]
    assert rows == spoil(ROWS, kind, 0.5, seed=3) != spoil(ROWS, kind, 0.5, seed=4)


def test_what_cannot_be_spoilt_is_said():
    with pytest.raises(InputError, match="shuffled, wrong, missing"):
        spoil(ROWS, "shuffeld")
    with pytest.raises(InputError, match="the same label"):
        spoil(ROWS[1:3], "wrong")


@pytest.mark.slow
def test_a_control_has_the_test_rows_of_its_dataset(delivery_data_dir):
    control = prepare_control("delivery", "missing", 0.5, data_dir=delivery_data_dir)
    assert control.name == "delivery_missing_50" and control.metric == "text_match"
    from stepdistill_jax.data.prepared import open_prepared

    whole = open_prepared("delivery", delivery_data_dir)
    assert list(control.examples("test")) == list(whole.examples("test"))
    train = list(control.examples("train"))
    assert sum(not e.rationale for e in train) == 750 and len(train) == 1500
    again = prepare_control("delivery", "missing", 0.5, data_dir=delivery_data_dir)
    assert again.fingerprint == control.fingerprint
