"""Figures of a split, gathered row by row: only 40 bytes a row are kept.

While rows are compared at the end (`data.labels`), 80 bytes more of each are in use.
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

TEACHER_FIGURES = {
    "teacher_accuracy": "as published: unparsed answers count as wrong, nothing repaired",
    "teacher_accuracy_by_text": "by the text after the letter",
    "teacher_accuracy_repaired": "after our repairs",
}
MAX_LABELS = 50
COUNTED_LABELS, LONG_LABEL = 1000, 200  # different ones of a split; characters
LINE_BITS = 40  # of a place, below the number of its file
SHOWN = 3  # examples of each defect
LENGTH_FIELDS = ("input", "label", "rationale")


class Tally:
    """What is told of a split.

    Attributes:
        rows, with_rationale: their numbers.
        right: rows that count as right, by teacher figure; a figure that was never asked is absent.
        defects: by kind.
        first_defects: `file:row` of the first of each kind.
        examples: the first few of each kind with their rows' ids.
        kept: rows that a filter would keep, by its description.
        lengths: for input, label and rationale how many rows have so many words.
        labelled: rows with a gold label, which the teacher's accuracy is over.
        human: rows with an explanation by people.
        texts, characters: of what a vocabulary would learn from.
        label_rows: for each gold label its number of rows, and which row of the split (from 0) is the first; None where
            there are more than COUNTED_LABELS, or more than MAX_LABELS and long ones among them.
        hashes: of each row its input; its question, which is the input with the choices and further
            texts; its label (0 for none); and all of it but the id.
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
        """Counts one row."""
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
        """Keeps what `data.labels` compares rows by, and where each stands."""
        example, at = row.example, len(self._places)
        asked = example.input + example.input_pair
        question = (example.input, sorted(example.more.items()), example.choices)
        answer = (example.label, example.rationale, example.rationales, example.llm_label)
        self.hashes["input"].append(hash64(asked))
        self.hashes["question"].append(hash64(repr(question)))
        self.hashes["label"].append(hash64(example.label) if example.label else 0)
        self.hashes["row"].append(hash64(repr((question, answer, example.weight))))
        file = self._files.setdefault(row.file, len(self._files))
        self._places.append(file << LINE_BITS | row.line)
        if self.label_rows is None or not example.label:
            return
        self.label_rows.setdefault(example.label, [0, at])[0] += 1
        many = len(self.label_rows)
        if many > COUNTED_LABELS or (many > MAX_LABELS and len(example.label) > LONG_LABEL):
            self.label_rows = None

    def place(self, number: int) -> str:
        """Returns `file:line` of a row, counted from 0 in this split; empty where it is not known."""
        file, line = divmod(self._places[number], 1 << LINE_BITS)
        return place([*self._files][file], line) if line else ""

    def _filter(self, row: CheckedExample) -> None:
        agrees = row.right.get("teacher_accuracy_repaired", row.right.get("teacher_accuracy"))
        sound = all(defect.kind in HARMLESS for defect in row.defects)
        for name, keeps in (
            ("with a rationale", bool(row.example.rationale.strip())),
            ("the teacher's answer is the gold label (after repairs)", agrees),
            ("no defect but runs_on", sound),
            (
                "with a rationale, the gold label as its answer, no defect but runs_on",
                row.example.rationale and agrees and sound,
            ),
        ):
            self.kept[name] += bool(keeps)

    @property
    def labels(self) -> list[str]:
        """The labels where they are few and the same for every row; else none."""
        few = self.label_rows is not None and len(self.label_rows) <= MAX_LABELS
        return sorted(self.label_rows or ()) if few and not self._choices else []

    def figures(self) -> dict[str, Any]:
        """The split's entry of `prepare`'s result."""
        return {
            "rows": self.rows,
            "with_rationale": self.with_rationale,
            **{
                f: self.right[f] / self.labelled if f in self.right else None
                for f in TEACHER_FIGURES
            },
            "defects": dict(self.defects.most_common()),
            "first_defects": self.first_defects,
        }


def shared_inputs(tallies: Mapping[str, Tally]) -> list[str]:
    """Warns of inputs that are trained on and then asked for again."""
    if "train" not in tallies:
        return []
    trained_on = [
        tallies[split].hashes["input"] for split in ("train", UNLABELLED) if split in tallies
    ]
    seen = np.unique(np.concatenate([np.frombuffer(x, np.uint64) for x in trained_on]))
    told = []
    for split, tally in tallies.items():
        again = np.flatnonzero(np.isin(np.frombuffer(tally.hashes["input"], np.uint64), seen))
        if split in ("train", UNLABELLED) or not len(again):
            continue
        n, first = len(again), tally.place(int(again[0]))
        one = "inputs of {} stand" if n > 1 else "input of {} stands"
        at = "" if not first else f", the first at {first}" if n > 1 else f" ({first})"
        told.append(f"{n} {one.format(split)} in train, too{at}")
    return told
