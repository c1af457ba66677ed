"""What a reader hands over: checked examples per split, and everything that was wrong with them."""

import collections
import dataclasses
import hashlib
from collections.abc import Iterable

from stepdistill_jax.data.example import Defect, Example

SPLITS = ("train", "validation", "test")
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
    """All that a reader found in its source.

    Attributes:
        reader: its name, e.g. `cqa`.
        version: raised when the same source would give other rows.
        metric: how a predicted label is compared: `text_match` or `value_match`.
        splits: rows by split, in the order of the source.
        sources: digest of each file that was read, by its name within the source.
        options: what else the rows depend on (field map, no teacher), JSON-like.
        notes: things to tell the user, e.g. that a split was left out.
    """

    reader: str
    version: int
    metric: str
    splits: dict[str, list[Row]]
    sources: dict[str, str] = dataclasses.field(default_factory=dict)
    options: dict[str, object] = dataclasses.field(default_factory=dict)
    notes: tuple[str, ...] = ()


def defect(kind: str, file: str, row: int, text: str = "") -> Defect:
    """A Defect whose text is cut to a readable length."""
    cut = text[: DEFECT_TEXT_LENGTH - 1] + "…" if len(text) > DEFECT_TEXT_LENGTH else text
    return Defect(kind, file, row, cut)


def defect_counts(rows: Iterable[Row]) -> dict[str, int]:
    """Number of rows' defects by kind, the commonest first."""
    return dict(collections.Counter(d.kind for row in rows for d in row.defects).most_common())


def tenth(example_id: str) -> int:
    """Which of ten equal parts, 0 to 9, an id falls into by its hash.

    It depends on nothing else: a row that is added to a source moves no other row to another split.
    """
    return int.from_bytes(hashlib.sha256(example_id.encode()).digest()[:8], "big") % 10


def take_validation(rows: Iterable[Row]) -> tuple[list[Row], list[Row]]:
    """(train, validation): the rows whose id falls into tenth 0 are held out."""
    parts: tuple[list[Row], list[Row]] = ([], [])
    for row in rows:
        parts[tenth(row.example.id) == 0].append(row)
    return parts
