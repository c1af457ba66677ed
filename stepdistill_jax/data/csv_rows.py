"""Reads CSV and TSV files, as `data.rows` reads JSON lines."""

import collections
import csv
import itertools
import os
import re
from collections.abc import Collection, Iterator
from typing import IO, Any, NamedTuple

from stepdistill_jax.data.rows import BadRow, JsonRow
from stepdistill_jax.errors import InputError
from stepdistill_jax.runtime.files import (
    MAX_LINE_BYTES,
    TOO_LONG,
    check_file,
    not_text,
    raw_lines,
)

SUFFIXES = {".csv": ",", ".tsv": "\t"}  # suffix -> separator of cells
_SEPARATOR = re.compile(r"sep=([^\w\s\"]|\t)\s*", re.IGNORECASE)  # Excel's line, not a row


class _Line(NamedTuple):
    number: int  # in the file, from 1
    text: str  # of a bad line, the readable part
    problem: str  # "" for a good line


def is_csv(path: os.PathLike | str) -> bool:
    """Returns whether a file has a suffix of CSV or TSV."""
    return os.path.splitext(path)[1].lower() in SUFFIXES


def each_csv_row(
    path: os.PathLike | str, numbers: Collection[str] = ()
) -> Iterator[JsonRow | BadRow]:
    """Yields each row below the header of a CSV or TSV file in UTF-8. A broken row gives a `BadRow`.

    Blank cells are None, and blank rows are skipped. A CSV file may use semicolons, if its header has no comma. A
    first line such as `sep=;` sets the separator.

    An unclosed quote spoils one row only:

        input,label
        "a,yes         <- bad row, line 2
        b,no           <- row 2, line 3

    Args:
        numbers: names of the columns whose cells are numbers.

    Raises:
        InputError: the file cannot be read, or its header is damaged or not UTF-8.
    """
    check_file(path, "a CSV file")
    csv.field_size_limit(MAX_LINE_BYTES)  # Python's limit is 131,072 characters
    try:
        with open(path, "rb") as file:
            yield from _rows(path, _decoded(file, path), numbers)
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from None


def _rows(
    path: os.PathLike | str, decoded: Iterator[_Line], numbers: Collection[str]
) -> Iterator[JsonRow | BadRow]:
    first = next((x for x in decoded if x.problem or x.text.strip()), _Line(1, "", ""))
    if named := _SEPARATOR.fullmatch(first.text):
        lines, delimiter = _Lines(decoded), named[1]
    else:
        lines, delimiter = _Lines(itertools.chain([first], decoded)), _delimiter(path, first.text)
    reader = csv.reader(lines, delimiter=delimiter, strict=True)
    header: list[str] | None = None
    count = 0
    while (cells := _next_row(reader, lines)) is not None:
        line = lines.row[0].number
        if bad := next((x for x in lines.row if x.problem), None):
            cells = bad.problem if bad.number == line else f"line {bad.number}: {bad.problem}"
        if isinstance(cells, list) and not any(map(str.strip, cells)):
            continue
        if header is None:
            if isinstance(cells, str):
                raise InputError(f"{path}:{line}: {cells}")
            header = _header(path, line, cells)
            continue
        count += 1
        if isinstance(cells, str):
            yield BadRow(path, line, cells)
        elif len(cells) != len(header):
            s = "" if len(cells) == 1 else "s"
            wrong = f"the row has {len(cells)} cell{s}, but the header has {len(header)} columns"
            yield BadRow(path, line, wrong)
        else:
            pairs = zip(header, cells, strict=True)
            fields = {name: _value(cell, name in numbers) for name, cell in pairs}
            yield JsonRow(fields, f"{path}:{line}", count, line)


def _next_row(reader: Iterator[list[str]], lines: "_Lines") -> list[str] | str | None:
    """Returns the next row's cells, the reason why the row is broken, or None at the end.

    Sets `lines.row` to the lines of this row.
    """
    lines.row.clear()
    try:
        return next(reader, None)
    except csv.Error as error:
        second = lines.row[1].number if len(lines.row) > 1 else None
        lines.end_row()
        # only the message of a `csv.Error` tells which kind it is
        if second or "unexpected end" in str(error):
            again = f" (line {second} is read as a separate row)" if second else ""
            return f"a quote is opened and never closed{again}"
        if "expected after" in str(error):
            return 'a quoted cell continues after its closing quote; write a quote inside a cell twice ("")'
        if "new-line" in str(error):
            return "a line ends with a carriage return alone; save the file with LF or CRLF"
        return f"broken CSV ({error})"


class _Lines:
    """Feeds lines to a CSV reader.

    An unclosed quote makes the reader take too many lines. `end_row` puts back all but the first of them.
    """

    def __init__(self, lines: Iterator[_Line]):
        self._lines, self._again = lines, collections.deque[_Line]()
        self.row: list[_Line] = []  # lines of the current row

    def __iter__(self) -> "_Lines":
        return self

    def __next__(self) -> str:
        self.row.append(self._again.popleft() if self._again else next(self._lines))
        return self.row[-1].text

    def end_row(self) -> None:
        """Ends the current row after its first line. The reader gets the row's other lines again."""
        self._again.extendleft(reversed(self.row[1:]))
        del self.row[1:]


def _decoded(file: IO[bytes], path: os.PathLike | str) -> Iterator[_Line]:
    for number, raw in raw_lines(file):
        if raw is None:
            yield _Line(number, "\n", TOO_LONG)
            continue
        if number == 1:
            raw = raw.removeprefix(b"\xef\xbb\xbf")
        try:
            text, problem = raw.decode("utf-8"), ""
        except UnicodeDecodeError as error:
            text, problem = raw.decode("utf-8", errors="replace"), _not_utf8(raw, error.start, path)
        if "\0" in text and not problem:
            problem = f"contains NUL bytes, so it is not text{not_text(raw)}"
        yield _Line(number, text, problem)


def _not_utf8(raw: bytes, at: int, path: os.PathLike | str) -> str:
    hint = not_text(raw) or (
        "; save the file as UTF-8 (in a spreadsheet, choose `CSV UTF-8`; convert a Western European file with"
        f" `iconv -f WINDOWS-1252 -t UTF-8 {path}`)"
    )
    return f"not UTF-8 (byte 0x{raw[at]:02x} at column {at + 1}){hint}"


def _delimiter(path: os.PathLike | str, header: str) -> str:
    usual = SUFFIXES[os.path.splitext(path)[1].lower()]
    return ";" if usual == "," and ";" in header and "," not in header else usual


def _header(path: os.PathLike | str, line: int, cells: list[str]) -> list[str]:
    names = [cell.strip() or f"column {i}" for i, cell in enumerate(cells, 1)]
    if twice := [name for name, count in collections.Counter(names).items() if count > 1]:
        raise InputError(f"{path}:{line}: the header has the column {twice[0]!r} twice")
    return names


def _value(cell: str, number: bool) -> Any:
    """Returns None for a blank cell, a float for a number in a column of numbers, or else the cell's text."""
    if not cell.strip():
        return None
    if number:
        try:
            return float(cell)
        except ValueError:
            pass
    return cell
