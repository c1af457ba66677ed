"""What a reader hands over: checked examples one by one, and everything that was wrong with them."""

import collections
import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

from stepdistill_jax.data.example import Defect, Example
from stepdistill_jax.runtime.fingerprints import hash64

SPLITS = ("train", "validation", "test")
UNLABELLED = "unlabelled"  # more inputs to train on, with the teacher's labels only
DEFECT_TEXT_LENGTH = 200  # characters


@dataclasses.dataclass(frozen=True)
class Row:
    """One row of a source, with what was found out about it.

    Attributes:
        example: the row itself; it is kept whatever its defects.
        defects: what is wrong with it or its teacher text, each with file and row.
        right: for each teacher figure (`teacher_accuracy`, ...), whether this row counts as right;
            empty where no teacher was asked.
    """

    example: Example
    defects: tuple[Defect, ...] = ()
    right: dict[str, bool] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Reading:
    """What a reader finds in its source; rows come one by one, so that a large source needs no memory.

    Attributes:
        reader: its name, e.g. `cqa`.
        version: raised when the same source would give other rows or defects.
        metric: how a predicted label is compared: `text_match` or `value_match`.
        rows: starts reading: yields (split, row). The rows of a split come in the source's order;
            splits may alternate.
        sources: digest of each file that is read, by its name within the source.
        options: what else the rows depend on (field map, no teacher), JSON-like.
        notes: things to tell the user, e.g. that a split is left out; whole once `rows` is done.
        fields: names of the texts that `Example.more` may hold.
    """

    reader: str
    version: int
    metric: str
    rows: Callable[[], Iterator[tuple[str, Row]]]
    sources: dict[str, str] = dataclasses.field(default_factory=dict)
    options: dict[str, object] = dataclasses.field(default_factory=dict)
    notes: list[str] = dataclasses.field(default_factory=list)
    fields: tuple[str, ...] = ()

    @functools.cached_property
    def splits(self) -> dict[str, list[Row]]:
        """All rows in memory, by split: for small sources."""
        found: dict[str, list[Row]] = collections.defaultdict(list)
        for split, row in self.rows():
            found[split].append(row)
        return {split: found[split] for split in in_order(found)}


def rows_of(splits: Mapping[str, Sequence[Row]]) -> Callable[[], Iterator[tuple[str, Row]]]:
    """`Reading.rows` of rows that are in memory."""
    return lambda: ((split, row) for split, rows in splits.items() for row in rows)


def in_order(splits: Iterable[str]) -> list[str]:
    """Names of splits, train first."""
    return [split for split in (*SPLITS, UNLABELLED) if split in set(splits)]


def defect(kind: str, file: str, row: int, text: str = "") -> Defect:
    """A Defect whose text is cut to a readable length."""
    cut = text[: DEFECT_TEXT_LENGTH - 1] + "…" if len(text) > DEFECT_TEXT_LENGTH else text
    return Defect(kind, file, row, cut)


def tenth(example_id: str) -> int:
    """Which of ten equal parts, 0 to 9, an id falls into by its hash.

    It depends on nothing else: a row that is added to a source moves no other row to another split.
    """
    return hash64(example_id) % 10


def train_or_validation(row: Row) -> str:
    """`validation` for the rows whose id falls into tenth 0, where it has no file of its own."""
    return "validation" if tenth(row.example.id) == 0 else "train"
