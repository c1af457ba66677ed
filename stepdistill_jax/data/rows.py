"""Reads JSON rows for `prepare`, `predict`, `evaluate`, `serve` and `annotate`.

A row of the generic format is {"id"?, "input", "label"?, "rationale"?, "rationales"?: [{"text", "source"?,
"label"?}], "llm_label"?, "weight"?, "choices"?}. Each command requires some of these fields.
"""

import dataclasses
import itertools
import math
import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from stepdistill_jax.data.example import FIELDS, Example, Rationale
from stepdistill_jax.errors import InputError, nearest
from stepdistill_jax.runtime.files import json_lines
from stepdistill_jax.runtime.fingerprints import hash64
from stepdistill_jax.runtime.stores import local_path

MAX_WEIGHT, MIN_WEIGHT = 1e30, 1e-30  # well within the range of float32, which the step computes in
MOST_NAMES = 20  # names of fields in a message
_KINDS = {bool: "true or false", list: "a list", dict: "an object", str: "text"}
_KINDS |= {int: "a number", float: "a number", type(None): "null"}


@dataclasses.dataclass(slots=True)  # a frozen one takes twice as long to construct
class JsonRow:
    """A JSON object whose fields are read with a type check.

    A null field counts as absent. An integer can be read as text; other numbers and booleans cannot.

    Attributes:
        where: the row's place, for messages: `PATH:LINE` for a row of a file. For a row of a list, it is
            `row NUMBER`, or `NAME:NUMBER` if the list has a name.
        number: index of the row, from 1. Blank lines are not counted.
        line: line number in the file, from 1. For a row of a list, it equals `number`.
    """

    fields: Mapping[str, Any]
    where: str
    number: int = 1
    line: int = 1

    def text(self, name: str, *, strip: bool = True, blank: bool = False, hint: str = "") -> str:
        """Returns the text of a required field.

        Args:
            blank: whether the text may be blank.
            hint: text to append to the error message if the field is absent.

        Raises:
            InputError: the field is absent, blank, not text or not valid Unicode.
        """
        if name not in self.fields:
            raise InputError(f"{self.where}: no field {name!r} (found: {self.names}){hint}")
        value = self.fields[name]
        value = None if value is None else as_text(value, name, self.where)
        if value is None or not (blank or value.strip()):
            raise self._wrong(name, "is empty")
        return value.strip() if strip else value

    def optional_text(self, name: str) -> str:
        """Returns the field's stripped text, or "" if the field is absent or blank."""
        value = self.fields.get(name)
        return "" if value is None else as_text(value, name, self.where).strip()

    def texts(self, name: str) -> tuple[str, ...]:
        """Returns the field's texts, each stripped and not blank, or () if the field is absent."""
        values = self.fields.get(name)
        if values is None:
            return ()
        if not isinstance(values, list):
            raise self._wrong(name, f"must be a list, got {_kind(values)}")
        found = tuple(as_text(x, f"{name}[{i}]", self.where).strip() for i, x in enumerate(values))
        if not all(found):
            raise self._wrong(f"{name}[{found.index('')}]", "is empty")
        return found

    def weight(self, name: str) -> float:
        """Returns the field's number, which must be above 0 and fit a float32; 1.0 if the field is absent."""
        value = self.fields.get(name)
        if value is None:
            return 1.0
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise self._wrong(name, f"must be a number, got {_kind(value)}")
        if not 0 < value < math.inf:
            raise self._wrong(name, f"must be above 0, got {value}")
        if not MIN_WEIGHT <= value <= MAX_WEIGHT:
            raise self._wrong(name, f"must be from {MIN_WEIGHT:g} to {MAX_WEIGHT:g}")
        return float(value)

    def objects(self, name: str) -> "list[JsonRow]":
        """Returns each object in the field's list as a row, or [] if the field is absent."""
        values = self.fields.get(name)
        if values is None:
            return []
        if not isinstance(values, list) or not all(isinstance(value, dict) for value in values):
            raise self._wrong(name, "must be a list of objects")
        return [JsonRow(x, f"{self.where}: in {name}[{i}]") for i, x in enumerate(values)]

    @property
    def path(self) -> str:
        """Path of the row's file; "" for a list."""
        return self.where.rpartition(":")[0]

    @property
    def file(self) -> str:
        """Name of the row's file, without folders; "" for a list."""
        return os.path.basename(self.path)

    @property
    def names(self) -> str:
        """Names of the row's fields for a message, such as `id, question`; `none` for a row without fields."""
        more = ["..."] if len(self.fields) > MOST_NAMES else []
        return ", ".join([*map(str, itertools.islice(self.fields, MOST_NAMES)), *more]) or "none"

    def _wrong(self, name: str, what: str) -> InputError:
        return InputError(f"{self.where}: the field {name!r} {what}")


class BadRow(InputError):
    """A row that cannot be used.

    Attributes:
        file: name of the file, without folders; "" for a list.
        line: 1-based line of the file, or position in the list.
        reason: the message without file and line.
    """

    def __init__(self, path: os.PathLike | str, line: int, reason: str):
        """`path` is the path of the file; "" for a list."""
        super().__init__(f"{place(path, line)}: {reason}")
        self.file, self.line, self.reason = os.path.basename(path), line, reason

    @classmethod
    def of(cls, row: JsonRow, error: InputError) -> "BadRow":
        """Returns a `BadRow` for `row`. `error` is what reading the row raised."""
        return cls(row.path, row.line, str(error).removeprefix(f"{row.where}: "))


def place(path: os.PathLike | str, line: int) -> str:
    """Returns `PATH:LINE`, or `row LINE` if `path` is empty."""
    return f"{os.fspath(path)}:{line}" if os.fspath(path) else f"row {line}"


def each_row(path: os.PathLike | str) -> Iterator[JsonRow | BadRow]:
    """Yields each row of a JSON-lines file: a `JsonRow`, or a `BadRow` if it is broken.

    Raises:
        InputError: the file cannot be read.
    """
    path = local_path(path, "input")
    for number, (line, found) in enumerate(json_lines(path), 1):
        where = f"{path}:{line}"
        if isinstance(found, InputError):
            yield BadRow(path, line, str(found).removeprefix(f"{where}: "))
        else:
            yield JsonRow(found, where, number, line)


def each_dict(rows: Sequence[Mapping[str, Any]], name: str = "") -> Iterator[JsonRow | BadRow]:
    """Yields each dict in a list as a `JsonRow`, and any other item as a `BadRow`.

    In messages, `name` takes the place of a file's name.
    """
    for number, row in enumerate(rows, 1):
        if isinstance(row, Mapping):
            yield JsonRow(as_json(row), place(name, number), number, number)
        else:
            yield BadRow(name, number, f"expected a dict, got {_kind(row)}")


def as_json(value: Any) -> Any:
    """Converts a value to JSON's types: NaN becomes None, and a NumPy scalar becomes a Python one.

    Types unknown to JSON are left unchanged.

    Example: `as_json({"a": (1, float("nan"))})` is {"a": [1, None]}.
    """
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, Mapping):
        return {name: as_json(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [as_json(inner) for inner in value]
    return None if isinstance(value, float) and math.isnan(value) else value


def read_rows(path: os.PathLike | str) -> Iterator[JsonRow]:
    """Yields each row of a JSON-lines file.

    Raises:
        InputError: the file cannot be read or has no rows.
        BadRow: the first row that cannot be used.
    """
    row = None
    for row in each_row(path):
        if isinstance(row, BadRow):
            raise row
        yield row
    if row is None:
        raise InputError(f"{path}: no rows in it")


def read_example(
    row: JsonRow,
    *,
    needs: Mapping[str, str],
    fields: Collection[str] = FIELDS,
    more: Sequence[str] = (),
    names: Mapping[str, str] = {},
) -> Example:
    """Returns the example of a row in the generic format. The row's number replaces a missing id.

    All texts but the input are stripped.

    Args:
        needs: {field that must not be absent or blank: hint that ends the message}. `input` must always be present.
        fields: fields to read in addition to `id`, `input`, `label` and `choices`, which are always read.
        more: optional text fields to read into `Example.more`.
        names: {our field: the file's field}.

    Raises:
        InputError: a required field is missing, or a field is wrong.
    """

    def text(name: str) -> str:
        theirs = names.get(name, name)
        if name in needs:
            return row.text(theirs, hint=needs[name])
        return row.optional_text(theirs)

    blank, hint = "input" not in needs, needs.get("input", "")
    several = row.objects(names.get("rationales", "rationales")) if "rationales" in fields else ()
    return Example(
        id=text("id") or str(row.number),
        input=row.text(names.get("input", "input"), strip=False, blank=blank, hint=hint),
        label=text("label"),
        rationale=text("rationale") if "rationale" in fields else "",
        rationales=tuple(
            Rationale(one.text("text"), one.optional_text("source"), one.optional_text("label"))
            for one in several
        ),
        llm_label=text("llm_label") if "llm_label" in fields else "",
        weight=row.weight(names.get("weight", "weight")) if "weight" in fields else 1.0,
        choices=row.texts(names.get("choices", "choices")),
        more={name: found for name in more if (found := text(name))},
    )


def check_field_map(field_map: Mapping[str, str], known: Sequence[str]) -> None:
    """Checks that all keys of `field_map` are `known` fields.

    Args:
        field_map: {our field: the file's field}.
        known: names of our fields.

    Raises:
        InputError: a key is unknown.
    """
    for name in field_map:
        if name not in known:
            theirs = field_map[name]
            hint = nearest(name, known)
            if theirs in known and not hint:
                hint = f"; the known field comes first: `field_map` {theirs}={name}"
            raise InputError(
                f"`field_map` {name}={theirs}: unknown field {name!r} (known: {', '.join(known)}){hint}"
            )


class UniqueIds:
    """Finds duplicate ids in a file, in 100 bytes of memory for each id."""

    def __init__(self):
        self._lines: dict[int, int] = {}

    def add(self, example_id: str, row: JsonRow) -> str:
        """Records the id of a row and returns it.

        Raises:
            InputError: an earlier row has the same id. The message names both lines.
        """
        first = self._lines.setdefault(hash64(example_id), row.line)
        if first != row.line:
            hint = " (a missing id becomes the row number)" if example_id.isdigit() else ""
            raise InputError(
                f"{row.where}: the id {example_id!r} is also at {place(row.path, first)}{hint}"
            )
        return example_id

    def of(self, row: JsonRow, name: str = "id") -> str:
        """Records and returns the row's id: the text of a field, or else the row's number."""
        return self.add(row.optional_text(name) or str(row.number), row)


def as_text(value: Any, name: str, where: str) -> str:
    """Returns `value` as text, without stripping it.

    Raises:
        InputError: `value` is neither text nor an integer, or is not valid Unicode.
    """
    if isinstance(value, int) and not isinstance(value, bool):
        value = str(value)
    if not isinstance(value, str):
        raise InputError(
            f"{where}: the field {name!r} must be text (or an integer), got {_kind(value)}"
        )
    try:
        value.encode()
    except UnicodeEncodeError:
        raise InputError(
            f"{where}: the field {name!r} contains half of a surrogate pair, which is not valid Unicode"
        ) from None
    return value


def _kind(value: Any) -> str:
    return _KINDS.get(type(value), type(value).__name__)
