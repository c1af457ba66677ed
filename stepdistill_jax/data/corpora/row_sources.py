"""Finds the user's own rows: in a file, a folder with a file for each split, or lists of dicts."""

import dataclasses
import functools
import json
import os
import pathlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from stepdistill_jax.data.csv_rows import SUFFIXES, each_csv_row, is_csv
from stepdistill_jax.data.reading import SPLITS, absent_notes
from stepdistill_jax.data.rows import BadRow, JsonRow, as_json, each_dict, each_row
from stepdistill_jax.errors import InputError, nearest
from stepdistill_jax.runtime.files import check_file
from stepdistill_jax.runtime.fingerprints import sha256, sha256_of_rows

ENDINGS = (".jsonl", *SUFFIXES)
Rows = Sequence[Mapping[str, Any]]
Source = os.PathLike | str | Rows | Mapping[str, Rows]


@dataclasses.dataclass(frozen=True)
class RowSource:
    """The rows of one split, or of a file that is still to be split.

    Attributes:
        name: name for messages.
        key: name in the dataset's fingerprint.
        rows: function that yields the rows from the start.
    """

    name: str
    key: str
    digest: str
    rows: Callable[[], Iterator[JsonRow | BadRow]]


def find_sources(
    source: Source, notes: list[str], numbers: Sequence[str] = ()
) -> tuple[dict[str, RowSource], bool]:
    """Returns {split: row source}, and whether the caller must still split the rows by their ids.

    Rows that are not yet split are all under the key `train`.

    Args:
        notes: list to which notes for the user are added.
        numbers: names of the CSV columns with numbers.

    Raises:
        InputError: there are no rows to read.
    """
    if isinstance(source, Mapping):
        return {split: _of_list(rows, split) for split, rows in _lists(source).items()}, False
    if not isinstance(source, str | os.PathLike):
        notes.append(_split_note("a list"))
        return {"train": _of_list(source, "")}, True
    one_file = not os.path.isdir(source)  # pathlib's `is_dir` raises for a name that is too long
    files = _one(pathlib.Path(source), notes) if one_file else _of_folder(source, notes)
    return {split: _of_file(path, numbers) for split, path in files.items()}, one_file


def split_lists(source: Any) -> dict[str, Rows] | None:
    """Returns a dict of lists unchanged, a list as {"train": list}, and None for anything else.

    Raises:
        InputError: a value of the dict is not a list, or a key is not the name of a split.
    """
    if isinstance(source, Mapping):
        return _lists(source)
    return {"train": source} if isinstance(source, list | tuple) else None


def _lists(source: Mapping[str, Any]) -> dict[str, Rows]:
    for split, rows in source.items():
        if split not in SPLITS:
            raise InputError(
                f"`source`: unknown split {split!r} (known: {', '.join(SPLITS)})"
                f"{nearest(str(split), SPLITS)}"
            )
        _check_list(rows, f"`source` {split!r}")
    if not source:
        raise InputError("`source`: expected {split: list of dicts}, got an empty dict")
    return dict(source)


def _check_list(rows: Any, name: str) -> None:
    if not isinstance(rows, list | tuple):
        raise InputError(f"{name}: expected a list of dicts, got {type(rows).__name__}")


def _of_list(rows: Rows, split: str) -> RowSource:
    _check_list(rows, "`source`")
    rows = tuple(rows)
    name = f"the list {split!r}" if split else "the list"
    key = f"rows of {split}" if split else "rows"
    digest = sha256_of_rows(_written(row, name, n) for n, row in enumerate(rows, 1))["sha256"]
    return RowSource(name, key, digest, functools.partial(each_dict, rows, split))


def _written(row: Any, name: str, number: int) -> bytes:
    """Returns a row of a list as JSON. Raises InputError for a row that contains itself or is nested too deeply."""
    try:
        # a value unknown to JSON is refused or ignored later: its type's name is enough here
        text = json.dumps(as_json(row), skipkeys=True, default=lambda value: type(value).__name__)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{name}: row {number} cannot be written as JSON ({error})") from None
    return text.encode()


def _of_file(path: pathlib.Path, numbers: Sequence[str]) -> RowSource:
    read = functools.partial(each_csv_row, path, numbers)
    return RowSource(
        str(path), path.name, sha256(path), read if is_csv(path) else lambda: each_row(path)
    )


def _split_note(what: str) -> str:
    return f"{what}, split by hashed ids into train (80%), validation (10%) and test (10%)"


def _one(source: pathlib.Path, notes: list[str]) -> dict[str, pathlib.Path]:
    if not os.path.exists(source):
        raise InputError(f"`source` {source}: no such file or folder")
    check_file(source)
    notes.append(_split_note(f"{source}: one file"))
    return {"train": source}


def _of_folder(folder: os.PathLike | str, notes: list[str]) -> dict[str, pathlib.Path]:
    source = pathlib.Path(folder)
    found = {
        split: [path for e in ENDINGS if (path := source / f"{split}{e}").exists()]
        for split in SPLITS
    }
    for split, paths in found.items():
        if len(paths) > 1:
            names = " and ".join(path.name for path in paths)
            raise InputError(f"`source` {source}: it has both {names}; keep one file for {split}")
    files = {split: paths[0] for split, paths in found.items() if paths}
    ignored = sorted(
        p.name for p in source.iterdir() if p.suffix in ENDINGS and p not in files.values()
    )
    expected_files = {split: source / f"{split}.jsonl" for split in SPLITS}
    if not files:
        raise InputError(
            f"`source` {source}: the folder has no file train, validation or test with the ending .jsonl, .csv"
            " or .tsv" + (f" (found: {', '.join(ignored)})" if ignored else "")
        )
    notes += absent_notes(expected_files, files)
    for path in files.values():
        check_file(path, "a file of rows")
    if ignored:
        notes.append(f"{source}: files that were not read: {', '.join(ignored)}")
    return files
