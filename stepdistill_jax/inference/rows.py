"""Input rows of `predict`: those of a generic dataset, read one by one, a bad one named by its line."""

import dataclasses
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from stepdistill_jax.data.corpora import fields
from stepdistill_jax.errors import InputError
from stepdistill_jax.runtime.files import json_lines
from stepdistill_jax.runtime.fingerprints import sha256
from stepdistill_jax.runtime.stores import local_path

OPTIONAL_TEXTS = ("label", "rationale", "llm_label")
WINDOW_CHARS = 16 * 2**20  # of a window's texts: rows of megabytes do not fill the memory


@dataclasses.dataclass(frozen=True)
class Row:
    """One question.

    Attributes:
        id: as given (text or number), so that answers can be joined to questions by it; the row's
            number from 1, as text, where it has none.
        fields: texts of the row that a template may name; `input` is always there.
        choices: the allowed answers; empty when the answer is free.
    """

    id: str | int
    fields: dict[str, str]
    choices: tuple[str, ...] = ()

    @property
    def label(self) -> str:
        """The gold answer; empty where it is not known."""
        return self.fields.get("label", "")

    @property
    def chars(self) -> int:
        """Length of its texts."""
        return sum(map(len, self.fields.values())) + sum(map(len, self.choices))


class BadRow(InputError):
    """What is wrong with a row.

    Attributes:
        line: of the file, from 1.
        reason: the message without file and line.
    """

    def __init__(self, where: str, line: int, reason: str):
        """`where` is the file's path."""
        super().__init__(f"{where}:{line}: {reason}")
        self.line, self.reason = line, reason


def read_rows(
    path: os.PathLike | str,
    check_row: Callable[[Row], None] | None = None,
    more: Sequence[str] = (),
) -> Iterator[Row | BadRow]:
    """Each row of a JSON-lines file, or what is wrong with it; blank lines are skipped.

    Args:
        path: of the file.
        check_row: raises InputError, the reason alone, at a row that will not do.
        more: as for `parse_row`.

    Raises:
        InputError: the file cannot be read.
    """
    path = local_path(path, "input")
    for number, (line, found) in enumerate(json_lines(path), 1):
        where = f"{path}:{line}"
        try:
            if isinstance(found, InputError):
                raise found
            row = parse_row(found, number, where, more)
            if check_row:
                check_row(row)
        except InputError as error:
            yield BadRow(str(path), line, str(error).removeprefix(f"{where}: "))
        else:
            yield row


def next_window(rows: Iterator[Row], most_rows: int) -> list[Row]:
    """The next rows: `most_rows`, or as many as have 16 million characters; empty at the end."""
    window, chars = [], 0
    for row in rows:
        window.append(row)
        chars += row.chars
        if len(window) == most_rows or chars >= WINDOW_CHARS:
            break
    return window


def parse_row(row: dict[str, Any], number: int, where: str, more: Sequence[str] = ()) -> Row:
    """The question of a JSON object; its texts are read as those of a dataset are.

    Args:
        row: the object.
        number: of the row, from 1.
        where: `file:line`.
        more: names of other texts that a prompt shows; a row may be without.

    Raises:
        InputError: a field that is missing or of a wrong type.
    """
    texts = {"input": fields.text(row, "input", where, strip=False, blank=True)}
    names = dict.fromkeys((*OPTIONAL_TEXTS, *more))
    texts |= {name: fields.optional_text(row, name, where) for name in names}
    has_id = fields.optional_text(row, "id", where) != ""
    return Row(
        row["id"] if has_id else str(number),
        {name: text for name, text in texts.items() if text or name == "input"},
        fields.texts(row, "choices", where),
    )


def count_rows(rows: Iterator[Row | BadRow], on_error: str) -> int:
    """Number of good rows: a bad one in the middle is known before the first is decoded.

    Args:
        rows: of `read_rows`.
        on_error: `stop` or `skip`.

    Raises:
        InputError: the file cannot be read, or under `stop` the first bad row: file and line.
    """
    good = 0
    for row in rows:
        if isinstance(row, Row):
            good += 1
        elif on_error == "stop":
            raise InputError(f"{row} (--on-error skip goes on without such rows)")
    return good


class InputFile:
    """A file of rows that must stay as it is while it is read; it is read several times.

    Attributes:
        path: of the file.
        total: number of good rows.
        digest: of its bytes.
    """

    def __init__(
        self,
        path: os.PathLike | str,
        on_error: str,
        check_row: Callable[[Row], None] | None = None,
        reads: Sequence[str] = (),
    ):
        """Raises InputError as `count_rows`, and where one of the fields `reads` is in no row.

        `check_row` as for `read_rows`; `reads` are what prompts show beside the input.
        """
        self.path, self._check_row, self._reads = path, check_row, tuple(reads)
        self._stamp = self._stat()
        self.total = count_rows(self.rows(), on_error)
        self._require_fields()
        self.digest = sha256(path)

    def rows(self) -> Iterator[Row | BadRow]:
        """`read_rows` of it."""
        return read_rows(self.path, self._check_row, self._reads)

    def _require_fields(self) -> None:
        absent = set(self._reads) if self.total else set()
        for row in self.rows() if absent else ():
            absent -= row.fields.keys() if isinstance(row, Row) else set()
            if not absent:
                return
        if absent:
            raise InputError(
                f"{self.path}: no row has a text in the field {min(absent)!r}, which this model reads"
                " beside the input (a teacher has to write it, at test time, too)"
            )

    def _stat(self) -> tuple[int, ...] | None:
        try:
            found = os.stat(self.path)
        except OSError:  # it has been removed
            return None
        return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns

    def check(self, rows: int | None = None) -> None:
        """Refuses a file that has changed; cheap while its size and time are as they were.

        Args:
            rows: how many good ones were read, at the end; all bytes are compared then.

        Raises:
            InputError: it is another file, has other bytes, or is gone.
        """
        stamp = self._stat()
        if rows is None and stamp == self._stamp:
            return
        if rows not in (None, self.total) or stamp is None or sha256(self.path) != self.digest:
            then = "" if rows in (None, self.total) else f", then {rows}"
            raise InputError(
                f"{self.path}: it changed while it was read ({self.total} good rows at first{then});"
                " start again when it is whole"
            )
        self._stamp = stamp
