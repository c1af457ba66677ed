"""What a reader hands over: checked examples one by one, and everything that was wrong with them."""

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
UNSEEN = "unseen"  # more to evaluate on, of kinds that are not in train
UNLABELLED = "unlabelled"  # more inputs to train on, with the teacher's labels only


@dataclasses.dataclass(frozen=True)
class CheckedExample:
    """One row of a source, with what was found out about it.

    Attributes:
        example: the row itself; it is kept whatever its defects.
        defects: what is wrong with it or its teacher text, each with file and row.
        right: for each teacher figure (`teacher_accuracy`, ...), whether this row counts as right;
            empty where no teacher was asked.
        file: name of its file, without folders; empty of a list.
        line: of the file, or position in the list, from 1; 0 where it is not known.
    """

    example: Example
    defects: tuple[Defect, ...] = ()
    right: dict[str, bool] = dataclasses.field(default_factory=dict)
    file: str = ""
    line: int = 0


@dataclasses.dataclass(frozen=True)
class Reading:
    """What a reader finds in its source; rows come one by one, so that a large source needs no memory.

    Attributes:
        reader: its name, e.g. `cqa`.
        version: raised when the same source would give other rows or defects.
        metric: how a predicted label is compared: `text_match` or `value_match`.
        rows: starts reading: yields (split, row). The rows of a split come in the source's order;
            splits may alternate. Some readers yield a `BadRow` for a row that cannot be used, with
            an empty split where it would have none.
        sources: digest of each file that is read, by its name within the source.
        options: what else the rows depend on (field map, no teacher), JSON-like.
        notes: things to tell the user, e.g. that a split is left out; whole once `rows` is done.
        fields: names of the texts that `Example.more` may hold.
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
        """All rows in memory, by split: for small sources.

        Raises:
            BadRow: the first one.
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
    """Names of splits, train first."""
    return [split for split in (*SPLITS, UNSEEN, UNLABELLED) if split in set(splits)]


def tenth(example_id: str) -> int:
    """Which of ten equal parts, 0 to 9, an id falls into by its hash.

    It depends on nothing else: a row that is added to a source moves no other row to another split.
    """
    return hash64(example_id) % 10


def split_of(number: int, split: str, files: Container[str]) -> str:
    """The split of a row: validation takes tenth 0 of train where it has no file of its own.

    Args:
        number: the tenth of the row's id.
        split: that of its file.
        files: the splits that have files.
    """
    return "validation" if split == "train" and "validation" not in files and not number else split


def absent_notes(paths: Mapping[str, pathlib.Path], files: Container[str]) -> list[str]:
    """Notes about splits without a file.

    Args:
        paths: where the file of each split would be.
        files: the splits that have one.
    """
    return [
        f"{path}: no such file, so "
        + (
            "validation is the tenth of train whose hashed id falls there"
            if split == "validation" and "train" in files
            else f"the split {split} is left out"
        )
        for split, path in paths.items()
        if split not in files
    ]
