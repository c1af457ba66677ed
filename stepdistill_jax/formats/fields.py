"""Checks fields of a model directory's JSON files. Errors name the file, the field and its value."""

import pathlib
from typing import Any

from stepdistill_jax.errors import InputError
from stepdistill_jax.models.config import MAX_LAYERS, MAX_SIZE


def size(
    path: pathlib.Path | str,
    raw: dict,
    name: str,
    default: int | None = None,
    most: int | None = None,
) -> int:
    """Returns a field that must be a whole number from 1 to `most`. A missing field has the value `default`.

    If `most` is None, the limit is `MAX_LAYERS` for a count of layers, and `MAX_SIZE` for other sizes.
    """
    value = raw.get(name, default)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        found = f"got {value!r}" if name in raw else "but it is missing"
        raise InputError(f"{path}: {name} must be a whole number above 0, {found}")
    if value > (most := most or (MAX_LAYERS if name.endswith("_layers") else MAX_SIZE)):
        raise InputError(f"{path}: {name} must be at most {most}, got {value!r}")
    return value


def share(path: pathlib.Path | str, raw: dict, name: str, default: float) -> float:
    """Returns a field that must be a number of at least 0 and below 1."""
    value = raw.get(name, default)
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 <= value < 1:
        raise InputError(
            f"{path}: {name} must be a number of at least 0 and below 1, got {value!r}"
        )
    return float(value)


def positive(
    path: pathlib.Path | str, raw: dict, name: str, default: float | None = None
) -> float | None:
    """Returns a field that must be null (None) or a number above 0."""
    value = raw.get(name, default)
    if value is None:
        return None
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 < value < 1e12:
        raise InputError(f"{path}: {name} must be a number above 0, got {value!r}")
    return float(value)


def flag(path: pathlib.Path | str, raw: dict, name: str, default: bool) -> bool:
    """Returns a field that must be true or false."""
    if not isinstance(value := raw.get(name, default), bool):
        raise InputError(f"{path}: {name} must be true or false, got {value!r}")
    return value


def choice(path: pathlib.Path | str, raw: dict, name: str, default: Any, known: Any) -> Any:
    """Returns a field that must have one of the values in `known`."""
    value = raw.get(name, default)
    if value not in tuple(known):  # a tuple: the value may be a list, which has no hash
        words = ", ".join(str(one) for one in known)
        raise InputError(f"{path}: {name} must be one of {words}, got {value!r}")
    return value
