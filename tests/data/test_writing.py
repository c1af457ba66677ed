import dataclasses
import json
import tracemalloc

import pytest

from stepdistill_jax.data import writing
from stepdistill_jax.data.defects import Defect
from stepdistill_jax.data.example import Example, Rationale
from stepdistill_jax.data.reading import CheckedExample, Reading
from stepdistill_jax.data.writing import write_rows

ROW = CheckedExample(
    Example("1", "question", "yes", rationales=(Rationale("because", "human", "yes"),)),
    (Defect("runs_on", "a.jsonl", 1, "text"),),
)
READING = Reading(
    "jsonl", 1, "text_match", lambda: iter([("train", ROW)]), {"a.jsonl": "0" * 64}, {"cut": True}
)


@pytest.fixture
def fingerprint(tmp_path):
    return lambda reading: write_rows(reading, tmp_path)[1]


def test_the_fingerprint_changes_with_sources_reader_options_and_rows(fingerprint):
    other_row = dataclasses.replace(ROW, example=Example("1", "question", "no"))
    changed = [
        {"reader": "cqa"},
        {"version": 2},
        {"metric": "value_match"},
        {"sources": {"a.jsonl": "1" * 64}},
        {"options": {"cut": False}},
        {
            "rows": lambda: iter([("train", other_row)])
        },  # a reader that was changed without a new version
        {"rows": lambda: iter([("test", ROW)])},
    ]
    prints = {fingerprint(dataclasses.replace(READING, **change)) for change in changed}
    assert len(prints | {fingerprint(READING)}) == len(changed) + 1


def test_the_fingerprint_does_not_change_with_what_is_only_told(fingerprint):
    assert fingerprint(dataclasses.replace(READING, notes=["a note"])) == fingerprint(READING)


def test_the_order_in_which_splits_alternate_is_no_part_of_the_fingerprint(fingerprint):
    other = dataclasses.replace(ROW, example=Example("2", "question", "no"))
    pairs = [("train", ROW), ("test", other), ("train", other)]
    one, two = (
        fingerprint(dataclasses.replace(READING, rows=lambda found=found: iter(found)))
        for found in (pairs, [pairs[0], pairs[2], pairs[1]])
    )
    assert one == two


def test_rows_and_defects_are_written_as_they_were_read(tmp_path):
    splits, *_ = write_rows(READING, tmp_path)
    assert list(splits) == ["train"]
    assert json.loads((tmp_path / "train.jsonl").read_text()) == {
        "id": "1",
        "input": "question",
        "label": "yes",
        "rationales": [{"text": "because", "source": "human", "label": "yes"}],
    }
    assert json.loads((tmp_path / "defects.jsonl").read_text()) == {
        "split": "train",
        "id": "1",
        "kind": "runs_on",
        "file": "a.jsonl",
        "line": 1,
        "text": "text",
    }


def test_memory_does_not_grow_with_the_rows(tmp_path):
    def rows():
        for i in range(4_000):
            text = f"{i} " + "x" * 2500
            yield "train", CheckedExample(Example(str(i), text, "yes", text))

    tracemalloc.start()
    write_rows(dataclasses.replace(READING, rows=rows), tmp_path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    # measured 0.08 MB, of which 8 bytes a row are hashes of the inputs
    assert (tmp_path / "train.jsonl").stat().st_size > 20e6
    assert peak < 5e5


def test_of_a_large_dataset_every_kth_row_teaches_the_vocabulary(tmp_path, monkeypatch):
    rows = [
        ("train", CheckedExample(Example(str(i), f"question {i}", "yes", f"reason {i}")))
        for i in range(10)
    ]
    splits, *_ = write_rows(dataclasses.replace(READING, rows=lambda: iter(rows)), tmp_path)
    path, counts = tmp_path / "train.jsonl", splits["train"]
    assert len(writing.vocabulary_texts(path, counts.texts, counts.characters)) == 40
    monkeypatch.setattr(writing, "MAX_VOCABULARY_CHARACTERS", counts.characters // 3)
    found = writing.vocabulary_texts(path, counts.texts, counts.characters)[::4]
    assert found == [f"predict: question {i}" for i in (0, 4, 8)]
