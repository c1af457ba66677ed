"""Typed fields of a JSON row; every complaint names file, line and field."""

import itertools
import math
from collections.abc import Mapping
from typing import Any

from stepdistill_jax.errors import InputError
from stepdistill_jax.runtime.fingerprints import hash64

MAX_WEIGHT, MIN_WEIGHT = 1e30, 1e-30  # well within a float32, which the step computes in
MOST_NAMES = 20  # of a row's fields in a message


def text(
    row: Mapping[str, Any], name: str, where: str, *, strip: bool = True, blank: bool = False
) -> str:
    """A text that must be there and not be blank.

    An integer is taken as its digits. Other numbers, true and false have more than one way to be
    written (1e3, 1000.0; true, True), so they are refused.

    Args:
        row: the JSON object.
        name: field of it.
        where: `file:line`.
        strip: whether outer whitespace goes; an input is kept as it is.
        blank: whether a text without letters will do, as an input that `predict` asks about; null
            will not.

    Raises:
        InputError: it is absent, empty, no text, or no valid Unicode.
    """
    if name not in row:
        raise InputError(f"{where}: no field {name!r} (found: {names_of(row)})")
    value = None if row[name] is None else as_text(row[name], name, where)
    if value is None or not (blank or value.strip()):
        raise InputError(f"{where}: the field {name!r} is empty")
    return value.strip() if strip else value


def names_of(row: Mapping[str, Any]) -> str:
    """The names of a row's fields for a message: `id, question`, or `none`."""
    names = [*itertools.islice(row, MOST_NAMES), *(["..."] if len(row) > MOST_NAMES else [])]
    return ", ".join(names) or "none"


def optional_text(row: Mapping[str, Any], name: str, where: str) -> str:
    """A stripped text as `text`, but empty where it is absent, null or blank."""
    value = row.get(name)
    return "" if value is None else as_text(value, name, where).strip()


def as_text(value: Any, name: str, where: str) -> str:
    """`value` as text, untouched; see `text`."""
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
            f"{where}: the field {name!r} holds half of a surrogate pair, which is no valid Unicode"
        ) from None
    return value


def texts(row: Mapping[str, Any], name: str, where: str) -> tuple[str, ...]:
    """A list of stripped texts, none of them empty; empty where it is absent or null."""
    values = row.get(name)
    if values is None:
        return ()
    if not isinstance(values, list):
        raise InputError(f"{where}: the field {name!r} must be a list, got {_kind(values)}")
    found = tuple(as_text(value, f"{name}[{i}]", where).strip() for i, value in enumerate(values))
    if not all(found):
        raise InputError(f"{where}: the field '{name}[{found.index('')}]' is empty")
    return found


def weight(row: Mapping[str, Any], name: str, where: str) -> float:
    """A number above 0 that a float32 holds; 1.0 where it is absent or null."""
    value = row.get(name)
    if value is None:
        return 1.0
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise InputError(f"{where}: the field {name!r} must be a number, got {_kind(value)}")
    if not 0 < value < math.inf:
        raise InputError(f"{where}: the field {name!r} must be above 0, got {value}")
    if not MIN_WEIGHT <= value <= MAX_WEIGHT:
        raise InputError(
            f"{where}: the field {name!r} must be from {MIN_WEIGHT:g} to {MAX_WEIGHT:g}"
        )
    return float(value)


class UniqueIds:
    """Notices an id that stands twice in a file; keeps a hash and a line of each, 100 bytes a row."""

    def __init__(self):
        self._lines: dict[int, int] = {}

    def add(self, example_id: str, where: str) -> str:
        """The id.

        Args:
            example_id: a text.
            where: `file:line`, always of the same file.

        Raises:
            InputError: it was added before; names both places.
        """
        file, _, line = where.rpartition(":")
        first = self._lines.setdefault(hash64(example_id), int(line))
        if first != int(line):
            raise InputError(
                f"{where}: the id {example_id!r} stands at {file}:{first}, too;"
                " a missing id is the row's number"
            )
        return example_id


def _kind(value: Any) -> str:
    kinds = {
        bool: "true or false",
        float: "a number",
        dict: "an object",
        list: "a list",
        str: "text",
    }
    return "null" if value is None else kinds.get(type(value), type(value).__name__)
