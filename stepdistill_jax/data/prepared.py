"""Finds and opens prepared datasets. Does not import TensorFlow."""

import dataclasses
import functools
import os
import pathlib
import re
from collections.abc import Iterator, Mapping
from typing import Any

from stepdistill_jax.data.example import Example
from stepdistill_jax.data.text_metrics import METRICS
from stepdistill_jax.errors import InputError, nearest
from stepdistill_jax.runtime.files import check_file, read_json, read_jsonl
from stepdistill_jax.runtime.fingerprints import digest, sha256
from stepdistill_jax.runtime.stores import local_path

FILE = "dataset.json"
VOCABULARY = "spiece.model"
TFDS_VERSION = "1.0.0"  # version of the TFDS dataset, and name of the folder with its files
ORIGINALS = ("cqa", "svamp", "esnli", "anli")  # prepared from the paper's files or from exports
PUBLISHED = (*ORIGINALS, "asdiv")  # datasets of the paper's published code
PAPER_SUFFIX = "_paper"  # ends the name of a dataset prepared with `paper_exact`
EMBEDDED = "delivery"  # needs no source, so it is prepared on first use
GENERATED = "gsm_symbolic"  # needs no source, but a package
NAME = re.compile(r"[a-z][a-z0-9]*(_[a-z0-9]+)*")  # of a dataset and its folder; never a path
SPLIT = re.compile(r"[a-z]+")


@dataclasses.dataclass(frozen=True)
class PreparedDataset:
    """A dataset on disk.

    Attributes:
        directory: the folder `data_dir/name`.
        metric: `text_match` or `value_match`.
        splits: {split: number of rows}.
        labels: sorted labels of train; empty if there are over 50, or if rows have choices.
        fields: keys that `Example.more` may have.
        paper_exact: whether rows are read as in the paper's published code, which also trains on blank texts.
        draws_validation: whether the published code draws validation from a run's training rows.
        files: {path within `directory`: sha256}; empty in early versions.
    """

    name: str
    directory: pathlib.Path
    fingerprint: str
    metric: str
    splits: dict[str, int]
    labels: tuple[str, ...] = ()
    fields: tuple[str, ...] = ()
    paper_exact: bool = False
    draws_validation: bool = False
    files: Mapping[str, str] = dataclasses.field(default_factory=dict)

    @property
    def drawn(self) -> tuple[str, ...]:
        """Splits whose rows depend on a run's `data_fraction` and seed; empty unless `paper_exact`."""
        if not self.paper_exact:
            return ()
        return ("train", "validation") if self.draws_validation else ("train",)

    def check(self, *names: str) -> None:
        """Checks that files still have the stored digests.

        Args:
            names: keys of `files`, or their folders; all files if empty.

        Raises:
            InputError: a file is missing or has changed. The message names the file.
        """
        chosen = [
            f
            for f in self.files
            if not names or any(f == n or f.startswith(f"{n}/") for n in names)
        ]
        for name in chosen:
            path = self.directory / name
            check_file(path)
            stat = path.stat()
            if _digest(path, stat.st_size, stat.st_mtime_ns, stat.st_ino) != self.files[name]:
                raise InputError(
                    f"{path}: changed since `prepare` wrote it; {how_to_prepare(self.name)},"
                    " which rebuilds the dataset"
                )

    @property
    def spiece_model(self) -> pathlib.Path:
        """Path of the vocabulary that was trained on the train split.

        Raises:
            InputError: the dataset has no train split, and so no vocabulary.
        """
        path = self.directory / VOCABULARY
        if not path.is_file():
            raise InputError(
                f"{path}: there is no vocabulary, since {self.name} was prepared without a train split; use"
                " the vocabulary of a model directory (`init_from`), or `bytes`"
            )
        self.check(VOCABULARY)
        return path

    def file(self, split: str) -> pathlib.Path:
        """Returns the path of SPLIT.jsonl.

        Raises:
            InputError: the dataset has no such split, or the file has changed.
        """
        if split not in self.splits:
            raise InputError(
                f"{self.name}: there is no split {split!r} (the splits are {', '.join(self.splits)})"
                f"{nearest(split, self.splits)}"
            )
        self.check(f"{split}.jsonl")
        return self.directory / f"{split}.jsonl"

    def examples(self, split: str) -> Iterator[Example]:
        """Yields the rows of a split, in the order of the TFDS dataset.

        Raises:
            InputError: the dataset has no such split, or its file is missing or damaged.
        """
        path = self.file(split)  # checked at the call, not at the first row
        return (Example.from_json(row) for _, row in read_jsonl(path))


@functools.lru_cache(64)
def _digest(path: pathlib.Path, *_changes: int) -> str:
    return sha256(path)


def fingerprint(about: Mapping[str, Any], rows: Mapping[str, str]) -> str:
    """Returns a digest that changes whenever the sources, the reader, the options or the rows change.

    Args:
        about: the fields `format`, `reader`, `metric`, `options` and `sources` of dataset.json.
        rows: {split: sha256 of SPLIT.jsonl}.
    """
    reader = about["reader"]
    return digest(
        {
            "format": about["format"],
            "reader": [reader["name"], reader["version"], about["metric"]],
            "options": about["options"],
            "sources": about["sources"],
            # reveals a reader whose code gives other rows although its version is unchanged
            "splits": dict(rows),
        }
    )


def default_data_dir() -> pathlib.Path:
    """Returns `$STEPDISTILL_DATA_DIR` or, if it is not set, `stepdistill` in the user's cache folder."""
    if folder := os.environ.get("STEPDISTILL_DATA_DIR"):
        return pathlib.Path(folder).expanduser()
    import platformdirs

    return pathlib.Path(platformdirs.user_cache_dir("stepdistill", appauthor=False))


def data_folder(data_dir: os.PathLike | str | None) -> pathlib.Path:
    """Returns `data_dir` as a path, or the default folder if it is None.

    Raises:
        InputError: `data_dir` is a URL. The tokenised data is memory-mapped, so it must be in local files.
    """
    return local_path(default_data_dir() if data_dir is None else data_dir, "`data_dir`")


def prepared_names(data_dir: os.PathLike | str) -> list[str]:
    """Returns the names of the datasets prepared in `data_dir`."""
    return sorted(path.parent.name for path in pathlib.Path(data_dir).glob(f"[!.]*/{FILE}"))


def open_prepared(name: str, data_dir: os.PathLike | str | None = None) -> PreparedDataset:
    """Opens the prepared dataset `name`.

    Args:
        data_dir: None means the default folder.

    Raises:
        InputError: the dataset is missing or damaged. The message says how to prepare it.
    """
    directory = data_folder(data_dir) / name
    path = directory / FILE
    if not is_prepared(name, directory.parent):
        names = prepared_names(directory.parent)
        raise InputError(
            f"dataset {name!r} is not prepared in {directory.parent}"
            f" (prepared: {', '.join(names) or 'none'}){nearest(name, names)};"
            f" {how_to_prepare(name)}"
        )
    stored = read_json(path)
    try:
        dataset = _described(name, directory, stored)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise InputError(f"{path}: damaged ({error!r}); {how_to_prepare(name)}") from None
    needed = [*(f"{split}.jsonl" for split in dataset.splits), TFDS_VERSION]
    if "train" in dataset.splits:
        needed.append(VOCABULARY)
    for file in (directory / part for part in needed):
        if not file.exists():
            raise InputError(f"{file}: missing; {how_to_prepare(name)}")
    return dataset


def is_prepared(name: str, data_dir: pathlib.Path) -> bool:
    """Returns whether `data_dir` contains a prepared dataset of this name, even a damaged one."""
    # os.path returns False for a name that no file can have; pathlib raises
    return bool(NAME.fullmatch(name)) and os.path.isfile(data_dir / name / FILE)


def prepared_fingerprint(name: str, data_dir: pathlib.Path) -> str | None:
    """Returns the fingerprint of a prepared dataset, or None if `data_dir` has none of this name."""
    return open_prepared(name, data_dir).fingerprint if is_prepared(name, data_dir) else None


def _described(name: str, directory: pathlib.Path, stored: dict[str, Any]) -> PreparedDataset:
    """Returns the dataset that a dataset.json describes."""
    splits, labels, files = stored["splits"], stored["labels"], stored.get("files", {})
    if not splits:
        raise ValueError("it has no split")
    for split, count in splits.items():
        if not SPLIT.fullmatch(split) or not isinstance(count, int) or count < 1:
            raise ValueError(f"the split {split!r} with {count!r} rows is not valid")
    if not isinstance(labels, list) or not all(isinstance(label, str) for label in labels):
        raise TypeError("the labels are not a list of strings")
    options = stored.get("options", {})
    more = options.get("fields", [])
    if not isinstance(more, list) or not all(isinstance(field, str) for field in more):
        raise TypeError("the fields are not a list of names")
    if stored["metric"] not in METRICS:
        raise ValueError(f"the metric {stored['metric']!r} is unknown")
    for file in files:
        if pathlib.PurePosixPath(file).is_absolute() or ".." in pathlib.PurePosixPath(file).parts:
            raise ValueError(f"the file {file!r} is outside the folder")
    rows = {split: files.get(f"{split}.jsonl") for split in splits}
    if files and fingerprint(stored, rows) != stored["fingerprint"]:
        raise ValueError("the fingerprint does not fit the other fields")
    return PreparedDataset(
        name,
        directory,
        str(stored["fingerprint"]),
        stored["metric"],
        splits,
        tuple(labels),
        tuple(more),
        bool(options.get("paper_exact")),
        options.get("validation") == "drawn",
        files,
    )


def how_to_prepare(name: str) -> str:
    """Returns the end of an error message, with the command that prepares `name`."""
    if name in (EMBEDDED, GENERATED):
        return f"run `stepdistill prepare {name}`"
    original = name.removesuffix(PAPER_SUFFIX)
    if name != original and original in PUBLISHED:
        return f"run `stepdistill prepare {original} --source DIR --paper-exact`"
    if name in ORIGINALS:
        return f"run `stepdistill prepare {name} --source DIR`"
    return f"run `stepdistill prepare jsonl --source FILE --name {name}`"
