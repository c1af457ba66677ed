"""Collects all rows that `prepare` cannot use, so that one run lists them all."""

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
LIST = Made("prepare", b'{"split": ', ("split", "id", "kind", "file", "line", "text"))
SHOWN = 20  # rows in the table; defects.jsonl lists all


class BadRows:
    """The rows of one source that cannot be used.

    Attributes:
        first: the first 20 bad rows.
    """

    def __init__(self):
        self.count = 0
        self.first: list[BadRow] = []

    def add(self, row: BadRow, split: str) -> dict[str, Any]:
        """Counts a bad row and returns its entry for defects.jsonl."""
        self.count += 1
        if len(self.first) < SHOWN:
            self.first.append(row)
        defect = Defect(BAD_ROW, printable(row.file), row.line, printable(translated(row.reason)))
        return {"split": split, "id": "", **vars(defect)}

    def table(self) -> list[dict[str, Any]]:
        """Returns {"file", "line", "reason"} for each row in `first`."""
        return [
            {"file": x.file, "line": x.line, "reason": printable(translated(x.reason), 300)}
            for x in self.first
        ]

    def warnings(self, total: int) -> list[dict[str, Any]]:
        """Returns a list with one warning about the skipped rows, or []. See `data.labels.warnings`."""
        if not self.count:
            return []
        places = [place(row.file, row.line) for row in self.first[:EXAMPLES]]
        message = f"{self.of(total)}; bad rows are skipped, and listed in {DEFECTS}"
        return [{"kind": BAD_ROW, "count": self.count, "examples": places, "message": message}]

    def of(self, total: int) -> str:
        """Returns a summary such as `7 of 1,680 rows cannot be used, the first at rows.csv:12: ...`."""
        cannot = "row cannot" if total == 1 else "rows cannot"
        return f"{self.count:,} of {total:,} {cannot} be used, the first at {translated(str(self.first[0]))}"


class UnusableRows(InputError):
    """Raised for a source with bad rows.

    Attributes:
        path: file that lists the bad rows and all other defects.
        notices: warnings about the good rows, one line each.
    """

    def __init__(self, rows: BadRows, total: int, path: pathlib.Path, notices: Sequence[str] = ()):
        if rows.count == 1:
            text = (
                f"{rows.first[0]}; the row is listed in {path}. Correct it, or pass `on_error=skip` to skip"
                " bad rows"
            )
        else:
            text = (
                f"{rows.of(total)}; all are listed in {path}. Correct them, or pass `on_error=skip`"
                " to skip them"
            )
        super().__init__(text)
        self.rows, self.path, self.notices = rows, path, tuple(notices)


def failed_list(directory: pathlib.Path) -> pathlib.Path:
    """Returns the path of a failed run's list of defects: `DATA_DIR/NAME.defects.jsonl`."""
    return directory.with_name(f"{directory.name}.{DEFECTS}")


def keep_list(new: pathlib.Path, directory: pathlib.Path) -> pathlib.Path:
    """Moves defects.jsonl from the folder `new` to `failed_list(directory)`, and returns that path.

    Raises:
        InputError: that path already holds a file that `prepare` did not write.
    """
    path = failed_list(directory)
    check_outputs({path: LIST})
    os.replace(new / DEFECTS, path)
    return path


def remove_list(directory: pathlib.Path) -> None:
    """Removes `failed_list(directory)`, if an earlier run wrote this file."""
    path = failed_list(directory)
    if path.is_file() and not path.is_symlink() and LIST.wrote(path):
        path.unlink()
