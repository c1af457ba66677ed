"""Figures of a split, gathered row by row: nothing grows with the number of rows but eight bytes each."""

import array
import collections
from collections.abc import Mapping
from typing import Any

import numpy as np

from stepdistill_jax.data.defects import HARMLESS, Defect
from stepdistill_jax.data.reading import UNLABELLED, CheckedExample
from stepdistill_jax.runtime.fingerprints import hash64

TEACHER_FIGURES = {
    "teacher_accuracy": "as published: unparsed answers count as wrong, nothing repaired",
    "teacher_accuracy_by_text": "by the text after the letter",
    "teacher_accuracy_repaired": "after our repairs",
}
MAX_LABELS = 50
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
        self._labels: set[str] | None = set()
        self._inputs = array.array("Q")

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
            self.first_defects.setdefault(defect.kind, f"{defect.file}:{defect.row}")
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
        self._inputs.append(hash64(example.input + example.input_pair))
        if example.choices:
            self._labels = None
        elif self._labels is not None and example.label:
            self._labels.add(example.label)
            if len(self._labels) > MAX_LABELS:
                self._labels = None

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
        return sorted(self._labels or ())

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
    trained_on = [tallies[split]._inputs for split in ("train", UNLABELLED) if split in tallies]
    seen = np.unique(np.concatenate([np.frombuffer(x, np.uint64) for x in trained_on]))
    counts = {
        split: int(np.isin(np.frombuffer(tally._inputs, np.uint64), seen).sum())
        for split, tally in tallies.items()
        if split not in ("train", UNLABELLED)
    }
    return [f"{n} inputs of {split} stand in train, too" for split, n in counts.items() if n]
