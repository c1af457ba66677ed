"""Rows that cannot be used: all are found before `prepare` stops, and listed like defects."""

import os
import pathlib
from collections.abc import Sequence
from typing import Any

from stepdistill_jax.data.defects import BAD_ROW, Defect
from stepdistill_jax.data.labels import EXAMPLES
from stepdistill_jax.data.rows import BadRow, place
from stepdistill_jax.errors import InputError, printable
from stepdistill_jax.runtime.overwriting import Made, check_outputs
from stepdistill_jax.runtime.progress import translated

DEFECTS = "defects.jsonl"
LIST = Made("prepare", b'{"split": ', ("split", "id", "kind", "file", "row", "text"))
SHOWN = 20  # in a table; all are in the list


class BadRows:
    """The bad rows of a reading.

    Attributes:
        count: of them.
        first: the first SHOWN.
    """

    def __init__(self):
        self.count = 0
        self.first: list[BadRow] = []

    def add(self, row: BadRow, split: str) -> dict[str, Any]:
        """Counts one row; returns its line of defects.jsonl."""
        self.count += 1
        if len(self.first) < SHOWN:
            self.first.append(row)
        defect = Defect(BAD_ROW, printable(row.file), row.line, printable(translated(row.reason)))
        return {"split": split, "id": "", **vars(defect)}

    def table(self) -> list[dict[str, Any]]:
        """Returns {"file", "row", "reason"} of the first ones."""
        return [
            {"file": x.file, "row": x.line, "reason": printable(translated(x.reason), 300)}
            for x in self.first
        ]

    def warnings(self, total: int) -> list[dict[str, Any]]:
        """Returns the warning of rows that were left out, as `data.labels` has others; none of none."""
        if not self.count:
            return []
        places = [place(row.file, row.line) for row in self.first[:EXAMPLES]]
        message = f"{self.of(total)}; such rows are left out, and listed in {DEFECTS}"
        return [{"kind": BAD_ROW, "count": self.count, "examples": places, "message": message}]

    def of(self, total: int) -> str:
        """Returns `7 of 1,680 rows cannot be used, the first at rows.csv:12: ...`."""
        cannot = "row cannot" if total == 1 else "rows cannot"
        return f"{self.count:,} of {total:,} {cannot} be used, the first at {translated(str(self.first[0]))}"


class UnusableRows(InputError):
    """A source with bad rows, which stop the command.

    Attributes:
        rows: the bad rows.
        path: the list of all defects.
        notices: what is odd about the good rows, a line each.
    """

    def __init__(self, rows: BadRows, total: int, path: pathlib.Path, notices: Sequence[str] = ()):
        if rows.count == 1:
            text = (
                f"{rows.first[0]}; it is listed in {path} (`on_error=skip` continues without such"
                " rows)"
            )
        else:
            text = (
                f"{rows.of(total)}; all are listed in {path}. Correct them, or give `on_error=skip`"
                " to continue without them"
            )
        super().__init__(text)
        self.rows, self.path, self.notices = rows, path, tuple(notices)


def list_beside(directory: pathlib.Path) -> pathlib.Path:
    """Path of the list of defects of a dataset that could not be prepared: `DATA_DIR/NAME.defects.jsonl`."""
    return directory.with_name(f"{directory.name}.{DEFECTS}")


def keep_list(new: pathlib.Path, directory: pathlib.Path) -> pathlib.Path:
    """Moves defects.jsonl of the folder `new` to `list_beside(directory)`; returns that path.

    Raises:
        InputError: a file of the user's is there.
    """
    path = list_beside(directory)
    check_outputs({path: LIST})
    os.replace(new / DEFECTS, path)
    return path


def remove_list(directory: pathlib.Path) -> None:
    """Removes the list of an earlier run that could not prepare `directory`."""
    path = list_beside(directory)
    if path.is_file() and not path.is_symlink() and LIST.wrote(path):
        path.unlink()
