"""Reads the input rows of `predict` and `serve`."""

import dataclasses
import os
from collections.abc import Callable, Iterator, Mapping, Sequence

from stepdistill_jax.data.csv_rows import each_csv_row, is_csv
from stepdistill_jax.data.example import Example
from stepdistill_jax.data.rows import BadRow, JsonRow, each_row, read_example
from stepdistill_jax.errors import InputError, nearest
from stepdistill_jax.inference.allowed_answers import OTHER_CHOICES
from stepdistill_jax.runtime.fingerprints import sha256
from stepdistill_jax.runtime.stores import local_path

FIELDS = ("rationale", "llm_label")  # optional fields of a question
KNOWN_FIELDS = ("id", "input", "label", "choices", *FIELDS)
WINDOW_CHARS = (
    16 * 2**20
)  # characters of a window's texts; the limit keeps rows of megabytes from filling the memory


def question(
    row: JsonRow, more: Sequence[str] = (), field_map: Mapping[str, str] | None = None
) -> Example:
    """Returns a row's fields as an `Example`. The input may be blank, and the id may be a number.

    Args:
        more: names of further fields to read.
        field_map: {our field: the row's field}, for fields with other names in the row. None also means that
            messages do not suggest `field_map`, since the user cannot set it.

    Raises:
        InputError: a field is missing or has the wrong type.
    """
    names = field_map or {}
    if (name := names.get("input", "input")) not in row.fields:
        row.text(name, hint=_rename(row, field_map))
    found = read_example(row, needs={}, fields=FIELDS, more=more, names=names)
    name = names.get("id", "id")
    given = row.fields.get(name)
    if given == found.id or not row.optional_text(name):
        return found
    return dataclasses.replace(found, id=given)


def _rename(row: JsonRow, field_map: Mapping[str, str] | None) -> str:
    """Returns the hint at the end of the message about a row without an input."""
    if field_map and "input" in field_map:
        return nearest(field_map["input"], map(str, row.fields))
    also = "" if field_map is None else ", or pass `field_map` input=FIELD"
    if is_csv(row.path):
        return f"; its first line names the columns, and one of them must be 'input'{also}"
    if len(row.fields) == 1 and not row.fields.keys() & set(KNOWN_FIELDS):
        return f"; rename {next(iter(row.fields))!r} to 'input'{also}"
    return f"; rows need the field input, and may have the fields id, label and choices{also}"


def read_questions(
    path: os.PathLike | str,
    check_row: Callable[[Example], None] | None = None,
    more: Sequence[str] = (),
    field_map: Mapping[str, str] | None = None,
) -> Iterator[Example | BadRow]:
    """Yields each row of a file as an `Example`, or as a `BadRow` if it is unusable.

    Args:
        path: a .csv or .tsv file; any other file is read as JSON lines.
        check_row: raises InputError for an unusable row.
        more, field_map: see `question`.

    Raises:
        InputError: the file cannot be read.
    """
    path = local_path(path, "input")
    for row in each_csv_row(path) if is_csv(path) else each_row(path):
        if isinstance(row, BadRow):
            yield row
            continue
        try:
            found = question(row, more, field_map)
            if check_row:
                check_row(found)
        except InputError as error:
            yield BadRow.of(row, error)
        else:
            yield found


def next_window(rows: Iterator[Example], most_rows: int) -> list[Example]:
    """Returns the next rows, at most `most_rows`; empty after the last row.

    The window ends early at 16 Mi characters of text.
    """
    window, chars = [], 0
    for row in rows:
        window.append(row)
        chars += sum(map(len, row.texts.values())) + sum(map(len, row.choices))
        if len(window) == most_rows or chars >= WINDOW_CHARS:
            break
    return window


class InputFile:
    """A file of rows that is read several times and must not change in the meantime.

    Attributes:
        total: count of good rows.
        with_choices: count of good rows that have choices.
    """

    def __init__(
        self,
        path: os.PathLike | str,
        on_error: str,
        check_row: Callable[[Example], None] | None = None,
        reads: Sequence[str] = (),
        field_map: Mapping[str, str] | None = None,
    ):
        """Reads the whole file once, and counts its good rows.

        Args:
            on_error: `stop` or `skip` at a bad row.
            check_row, field_map: see `read_questions`. `check_row` only checks a row's choices.
            reads: names of the fields that the prompts need in addition to the input.

        Raises:
            InputError: the file cannot be read or has no good row; a field of `reads` or `field_map` is
                empty in all rows; or a row is bad and `on_error` is `stop`.
        """
        self.path, self._check_row, self._reads = path, check_row, tuple(reads)
        self._map = dict(field_map or {})
        self._stamp = self._stat()
        mapped = {name for name in KNOWN_FIELDS if name in self._map and name != "id"}
        self.total, self.with_choices, absent = 0, 0, mapped.union(self._reads)
        first_bad, bad = None, 0
        for row in self.rows():
            if not isinstance(row, BadRow):
                self.total += 1
                self.with_choices += bool(row.choices)
                absent -= {
                    n for n in absent if row.texts.get(n) or (n == "choices" and row.choices)
                }
            elif on_error == "stop":
                hint = "`predict` leaves out such rows with `on_error=skip`"
                raise InputError(f"{row} ({f'{OTHER_CHOICES}; {hint}' if check_row else hint})")
            else:
                first_bad, bad = first_bad or row, bad + 1
        if first_bad and not self.total:
            none = f"; none of its {bad:,} rows can be used" if bad > 1 else ""
            raise InputError(f"{first_bad}{none}")
        if self.total and (name := min(absent & self._map.keys(), default=None)):
            raise InputError(
                f"`field_map` {name}={self._map[name]}: this field is missing or empty in all rows of {self.path}"
            )
        if absent and self.total:
            raise InputError(
                f"{self.path}: the field {min(absent)!r} is missing or empty in all rows, but this model reads"
                " it; add the field to the rows, for example with a teacher"
            )
        self.digest = sha256(path)

    def rows(self) -> Iterator[Example | BadRow]:
        """Yields the result of `read_questions` for the file."""
        return read_questions(self.path, self._check_row, self._reads, self._map)

    def _stat(self) -> tuple[int, ...] | None:
        try:
            found = os.stat(self.path)
        except OSError:  # it has been removed
            return None
        return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns

    def check(self, rows: int | None = None) -> None:
        """Refuses a file that has changed since it was opened.

        Args:
            rows: number of good rows that were read; None before all have been read.

        Raises:
            InputError: the file has other bytes or rows, or was removed.
        """
        # with `rows`, the bytes are always compared; before that, only if the file's stamp has changed
        stamp = self._stat()
        if rows is None and stamp == self._stamp:
            return
        if rows not in (None, self.total) or stamp is None or sha256(self.path) != self.digest:
            then = "" if rows in (None, self.total) else f", then {rows}"
            raise InputError(
                f"{self.path}: the file changed while it was read (it had {self.total} good rows at first{then});"
                " start again when the file is complete"
            )
        self._stamp = stamp
