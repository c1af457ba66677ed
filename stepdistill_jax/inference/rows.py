"""Input rows of `predict`: read one by one, a bad one named by file and line."""

import dataclasses
import json
import os
from collections.abc import Iterator
from typing import Any

from stepdistill_jax.errors import InputError

TEXT_FIELDS = ("input", "label", "rationale", "llm_label")
_BOM = b"\xef\xbb\xbf"


@dataclasses.dataclass(frozen=True)
class Row:
    """One question.

    Attributes:
        id: as given (text or number); the row's number from 1, as text, where it has none.
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


def read_rows(path: os.PathLike | str) -> Iterator[Row | InputError]:
    """Each row of a JSON-lines file, or what is wrong with it; blank lines are skipped."""
    number = 0
    with open(path, "rb") as file:
        for line, raw in enumerate(file, 1):
            raw = raw.removeprefix(_BOM) if line == 1 else raw
            if not raw.strip():
                continue
            number += 1
            try:
                yield parse_row(raw, number)
            except InputError as error:
                yield InputError(f"{path}:{line}: {error}")


def parse_row(raw: bytes, number: int) -> Row:
    """The row of one line.

    Raises:
        InputError: what is wrong, without file and line.
    """
    try:
        row = json.loads(raw.decode("utf-8"))
    except UnicodeDecodeError:
        raise InputError("not UTF-8") from None
    except json.JSONDecodeError as error:
        raise InputError(f"broken JSON ({error.msg})") from None
    except RecursionError:
        raise InputError("broken JSON (nested too deeply)") from None
    if not isinstance(row, dict):
        raise InputError(f"a JSON object is wanted, got {type(row).__name__}")
    if "input" not in row:
        raise InputError(f"`input` is missing (the row has {', '.join(row) or 'nothing'})")
    fields = {}
    for name in TEXT_FIELDS:
        value = row.get(name)
        if value is None and name != "input":
            continue
        fields[name] = _text(name, value)
    choices = row.get("choices") or ()
    if not isinstance(choices, (list, tuple)):
        raise InputError(f"`choices` must be a list of texts, got {choices!r}")
    row_id = row.get("id")
    if row_id is None:
        row_id = str(number)
    elif isinstance(row_id, bool) or not isinstance(row_id, (str, int)):
        raise InputError(f"`id` must be a text or a whole number, got {row_id!r}")
    elif isinstance(row_id, str):
        _text("id", row_id)
    return Row(row_id, fields, tuple(_text("choices", c) for c in choices))


def _text(name: str, value: Any) -> str:
    if not isinstance(value, str):
        raise InputError(f"`{name}` must be a text, got {value!r:.80}")
    try:
        value.encode()
    except UnicodeEncodeError:  # "\ud800" is JSON, and no text
        raise InputError(f"`{name}` holds half of a surrogate pair, which is no text") from None
    return value


def count_rows(path: os.PathLike | str, on_error: str) -> int:
    """Number of good rows: a bad one in the middle is known before the first is decoded.

    Args:
        path: a JSON-lines file.
        on_error: `stop` or `skip`.

    Raises:
        InputError: the file cannot be read, or under `stop` the first bad row: file and line.
    """
    try:
        good = 0
        for row in read_rows(path):
            if isinstance(row, Row):
                good += 1
            elif on_error == "stop":
                raise InputError(f"{row} (--on-error skip goes on without such rows)")
        return good
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except IsADirectoryError:
        raise InputError(f"{path}: is a folder, a JSON-lines file is wanted") from None
    except PermissionError:
        raise InputError(f"{path}: cannot be read (permission denied)") from None
