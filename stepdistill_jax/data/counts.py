"""Counts the rows of a split one by one.

Memory for each row: 40 bytes, and another 80 when `data.labels` compares all rows at the end.
"""

import array
import collections
from collections.abc import Mapping
from typing import Any

import numpy as np

from stepdistill_jax.data.defects import HARMLESS, Defect
from stepdistill_jax.data.reading import UNLABELLED, CheckedExample
from stepdistill_jax.data.rows import place
from stepdistill_jax.runtime.fingerprints import hash64

TEACHER_METRICS = {
    "teacher_accuracy": "the answers as given; a missing or unreadable one counts as wrong",
    "teacher_accuracy_by_text": "judged by the text after the letter",
    "teacher_accuracy_repaired": "after our repairs",
}
MAX_LABELS = 50
COUNTED_LABELS, LONG_LABEL = 1000, 200  # different labels of a split; characters
LINE_BITS = 40  # low bits of a place hold the line, the bits above them the index of the file
SHOWN = 3  # examples of each kind of defect
LENGTH_FIELDS = ("input", "label", "rationale")


class SplitCounts:
    """Counts of one split.

    Attributes:
        right: {teacher metric: number of rows in which the teacher's answer is right}.
        first_defects: {kind: `file:line`}.
        examples: {kind: [(row id, defect), ...]}, at most three of each kind.
        kept: {description of a filter: number of rows that it would keep}.
        lengths: {`input`, `label` or `rationale`: {number of words: number of rows}}.
        labelled: number of rows with a gold label.
        human: number of rows with an explanation written by a person.
        texts, characters: approximate number of texts, and of characters, to train a vocabulary on.
        label_rows: {gold label: [number of its rows, 0-based index of the first]}; None for free text.
        hashes: {`input`, `question`, `label` or `row`: a 64-bit hash for each row}. A missing label has the hash 0.
            The hashes under `row` are of complete rows without their ids.
    """

    def __init__(self):
        self.rows = self.labelled = self.with_rationale = self.human = self.texts = (
            self.characters
        ) = 0
        self.right: collections.Counter[str] = collections.Counter()
        self.defects: collections.Counter[str] = collections.Counter()
        self.first_defects: dict[str, str] = {}
        self.examples: dict[str, list[tuple[str, Defect]]] = {}
        self.kept: collections.Counter[str] = collections.Counter()
        self.lengths = {name: collections.Counter[int]() for name in LENGTH_FIELDS}
        self.label_rows: dict[str, list[Any]] | None = {}
        self.hashes = {name: array.array("Q") for name in ("input", "question", "label", "row")}
        self._choices = False
        self._files: dict[str, int] = {}
        self._places = array.array("Q")

    def add(self, row: CheckedExample) -> None:
        """Adds one row to the counts."""
        example = row.example
        self.rows += 1
        self.labelled += bool(example.label)
        self.with_rationale += bool(example.rationale.strip())
        self.human += any(r.source == "human" for r in example.rationales)
        self.right.update(row.right)
        for defect in row.defects:
            self.defects[defect.kind] += 1
            self.first_defects.setdefault(defect.kind, defect.where)
            shown = self.examples.setdefault(defect.kind, [])
            if len(shown) < SHOWN:
                shown.append((example.id, defect))
        self._filter(row)
        for name in LENGTH_FIELDS:
            if text := getattr(example, name):
                self.lengths[name][len(text.split())] += 1
        self.texts += 2 + bool(example.label) + max(len(example.rationales), 1)
        self.characters += 2 * len(example.input) + len(example.rationale)
        self.characters += sum(len(r.text) for r in example.rationales)
        self._choices |= bool(example.choices)
        self._note(row)

    def _note(self, row: CheckedExample) -> None:
        """Records the hashes, place and gold label of a row."""
        example, at = row.example, len(self._places)
        text = example.input + example.input_pair
        question = (example.input, sorted(example.more.items()), example.choices)
        answer = (example.label, example.rationale, example.rationales, example.llm_label)
        self.hashes["input"].append(hash64(text))
        self.hashes["question"].append(hash64(repr(question)))
        self.hashes["label"].append(hash64(example.label) if example.label else 0)
        self.hashes["row"].append(hash64(repr((question, answer, example.weight))))
        # one integer a row: line 7 of the third file (number 2) is 2 * 2**40 + 7
        file = self._files.setdefault(row.file, len(self._files))
        self._places.append(file << LINE_BITS | row.line)
        if self.label_rows is None or not example.label:
            return
        self.label_rows.setdefault(example.label, [0, at])[0] += 1
        # free text: over 1,000 labels, or a long label when there are over 50
        many = len(self.label_rows)
        if many > COUNTED_LABELS or (many > MAX_LABELS and len(example.label) > LONG_LABEL):
            self.label_rows = None

    def place(self, number: int) -> str:
        """Returns `file:line` of the row with this 0-based index, or "" if it is unknown."""
        file, line = divmod(self._places[number], 1 << LINE_BITS)
        return place([*self._files][file], line) if line else ""

    def _filter(self, row: CheckedExample) -> None:
        agrees = row.right.get("teacher_accuracy_repaired", row.right.get("teacher_accuracy"))
        harmless = all(defect.kind in HARMLESS for defect in row.defects)
        for name, keeps in (
            ("with a rationale", bool(row.example.rationale.strip())),
            ("the teacher's answer is the gold label (after repairs)", agrees),
            ("no defect other than runs_on", harmless),
            (
                "all three filters above at once",
                row.example.rationale and agrees and harmless,
            ),
        ):
            self.kept[name] += bool(keeps)

    @property
    def labels(self) -> list[str]:
        """The sorted labels; [] if there are more than 50 or a row has its own choices."""
        few = self.label_rows is not None and len(self.label_rows) <= MAX_LABELS
        return sorted(self.label_rows or ()) if few and not self._choices else []

    def summary(self) -> dict[str, Any]:
        """Returns the split's entry in the result of `prepare`."""
        return {
            "rows": self.rows,
            "with_label": self.labelled,
            "with_rationale": self.with_rationale,
            **{
                f: self.right[f] / self.labelled if f in self.right else None
                for f in TEACHER_METRICS
            },
            "defects": dict(self.defects.most_common()),
            "first_defects": self.first_defects,
        }


def shared_inputs(splits: Mapping[str, SplitCounts]) -> list[str]:
    """Returns a note about each evaluation split that shares inputs with the training data."""
    if "train" not in splits:
        return []
    trained_on = [
        splits[split].hashes["input"] for split in ("train", UNLABELLED) if split in splits
    ]
    seen = np.unique(np.concatenate([np.frombuffer(x, np.uint64) for x in trained_on]))
    notes = []
    for split, counts in splits.items():
        again = np.flatnonzero(np.isin(np.frombuffer(counts.hashes["input"], np.uint64), seen))
        if split in ("train", UNLABELLED) or not len(again):
            continue
        n, first = len(again), counts.place(int(again[0]))
        one = "inputs of {} are" if n > 1 else "input of {} is"
        at = "" if not first else f", the first at {first}" if n > 1 else f" ({first})"
        notes.append(f"{n} {one.format(split)} also in train{at}")
    return notes
