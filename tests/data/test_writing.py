import dataclasses

from stepdistill_jax.data.example import Example
from stepdistill_jax.data.reading import Reading, Row
from stepdistill_jax.data.writing import fingerprint

ROW = Row(Example("1", "question", "yes"))
READING = Reading("jsonl", 1, "text_match", {"train": [ROW]}, {"a.jsonl": "0" * 64}, {"cut": True})


def test_the_fingerprint_changes_with_sources_reader_options_and_rows():
    other_row = dataclasses.replace(ROW, example=Example("1", "question", "no"))
    changed = [
        {"reader": "cqa"},
        {"version": 2},
        {"metric": "value_match"},
        {"sources": {"a.jsonl": "1" * 64}},
        {"options": {"cut": False}},
        {"splits": {"train": [other_row]}},  # a reader that was changed without a new version
        {"splits": {"test": [ROW]}},
    ]
    prints = {fingerprint(dataclasses.replace(READING, **change)) for change in changed}
    assert len(prints | {fingerprint(READING)}) == len(changed) + 1


def test_the_fingerprint_does_not_change_with_what_is_only_told():
    assert fingerprint(dataclasses.replace(READING, notes=("a note",))) == fingerprint(READING)
