"""Defines the interface of readers, which yield checked examples one by one."""

import collections
import dataclasses
import functools
import pathlib
from collections.abc import Callable, Container, Iterable, Iterator, Mapping

from stepdistill_jax.data.defects import Defect
from stepdistill_jax.data.example import Example
from stepdistill_jax.data.rows import BadRow
from stepdistill_jax.runtime.fingerprints import hash64

SPLITS = ("train", "validation", "test")
UNSEEN = "unseen"  # rows to evaluate on, of kinds that are not in train
UNLABELLED = "unlabelled"  # further inputs to train on, with the teacher's labels only


@dataclasses.dataclass(frozen=True)
class CheckedExample:
    """One row of a source after its checks. A row with defects is kept.

    Attributes:
        right: {teacher metric, such as `teacher_accuracy`: whether the teacher is right}.
        file: name without folders; "" for a list.
        line: line of the file, or index in the list, from 1; 0 if unknown.
    """

    example: Example
    defects: tuple[Defect, ...] = ()
    right: dict[str, bool] = dataclasses.field(default_factory=dict)
    file: str = ""
    line: int = 0


@dataclasses.dataclass(frozen=True)
class Reading:
    """A reader's result.

    Attributes:
        version: increased when the same source would give different rows or defects.
        rows: function that yields (split, row). A split's rows keep their order, but splits may alternate. A bad
            row's split may be "".
        sources: {name of each file within the source: digest}.
        options: further settings that the rows depend on, as JSON values.
        notes: notes for the user, complete once all rows have been read.
        fields: keys that `Example.more` may have.
    """

    reader: str
    version: int
    metric: str
    rows: Callable[[], Iterator[tuple[str, CheckedExample | BadRow]]]
    sources: dict[str, str] = dataclasses.field(default_factory=dict)
    options: dict[str, object] = dataclasses.field(default_factory=dict)
    notes: list[str] = dataclasses.field(default_factory=list)
    fields: tuple[str, ...] = ()

    @functools.cached_property
    def splits(self) -> dict[str, list[CheckedExample]]:
        """{split: all its rows}. All rows are kept in memory, so the source must be small.

        Raises:
            BadRow: the first row that cannot be used.
        """
        found: dict[str, list[CheckedExample]] = collections.defaultdict(list)
        bad: list[BadRow] = []
        for split, row in self.rows():
            if isinstance(row, BadRow):
                bad.append(row)
            else:
                found[split].append(row)
        if bad:
            raise bad[0]
        return {split: found[split] for split in in_order(found)}


def in_order(splits: Iterable[str]) -> list[str]:
    """Returns the names of splits in their usual order, train first."""
    return [split for split in (*SPLITS, UNSEEN, UNLABELLED) if split in set(splits)]


def tenth(example_id: str) -> int:
    """Returns a number from 0 to 9 that depends only on the id.

    It decides the split of a row, so a row stays in its split when rows are added to the data.
    """
    return hash64(example_id) % 10


def split_of(number: int, split: str, files: Container[str]) -> str:
    """Returns the split of a row. If validation has no file, train rows with number 0 become validation.

    Args:
        number: result of `tenth` for the row's id.
        split: the split of its file.
        files: splits with files.
    """
    return "validation" if split == "train" and "validation" not in files and not number else split


def absent_notes(paths: Mapping[str, pathlib.Path], files: Container[str]) -> list[str]:
    """Returns a note about each split without a file.

    Args:
        paths: {split: expected path}.
        files: the splits that have files.
    """
    return [
        f"{path}: no such file, so "
        + (
            "validation is a tenth of train, chosen by hashed ids"
            if split == "validation" and "train" in files
            else f"the split {split} is left out"
        )
        for split, path in paths.items()
        if split not in files
    ]
