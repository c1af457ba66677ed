"""Stores token ids on disk, once for each dataset, split and vocabulary, without TensorFlow.

A store is a folder. Each feature of each objective has two files, `ids` and `offsets`: row i is
`ids[offsets[i] : offsets[i + 1]]`. The files `weights`, `labels.jsonl` and `row_ids` have one entry for each
example. The file `manifest.json` contains digests.
"""

import contextlib
import dataclasses
import errno
import functools
import json
import os
import pathlib
import shutil
import socket
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from stepdistill_jax.errors import InputError
from stepdistill_jax.runtime.files import fsync
from stepdistill_jax.runtime.fingerprints import digest, digest_each, sampled_sha256, sha256
from stepdistill_jax.runtime.folders import REPLACED, staged_folder
from stepdistill_jax.runtime.progress import log
from stepdistill_jax.tasks.token_files import FEATURES, ROW_IDS, file_name, write_files

FORMAT_VERSION = 2  # raise it when the contents of a store change, including `about`
MANIFEST = "manifest.json"
SAMPLED = "sampled"  # manifest key of the digest that is compared when a store is opened


@dataclasses.dataclass(frozen=True)
class TokenRows:
    """One feature of one objective: row i is `ids[starts[i] : ends[i]]`.

    Example: with ids [5, 6, 1, 7, 1], starts [0, 3, 3] and ends [3, 3, 5], the rows are [5, 6, 1], [] (an
    absent target) and [7, 1].

    Attributes:
        ids: ids of all rows, with the end of sequence, not truncated, [tokens] int32.
        starts: index of each row's first id, [examples] int64.
        ends: index after each row's last id, [examples] int64.
        known_max_id: largest id; None if unknown.
    """

    ids: np.ndarray
    starts: np.ndarray
    ends: np.ndarray
    known_max_id: int | None = None

    @classmethod
    def of_offsets(
        cls, ids: np.ndarray, offsets: np.ndarray, known_max_id: int | None = None
    ) -> "TokenRows":
        """Returns rows that follow each other in `ids`: row i is `ids[offsets[i] : offsets[i + 1]]`.

        `offsets` is [examples + 1] int64.
        """
        return cls(ids, offsets[:-1], offsets[1:], known_max_id)

    @functools.cached_property
    def lengths(self) -> np.ndarray:
        """Token count of each row, [examples] int64."""
        return self.ends - self.starts

    @functools.cached_property
    def max_id(self) -> int:
        """Largest id, or 0 if there are no ids."""
        return int(self.ids.max(initial=0)) if self.known_max_id is None else self.known_max_id

    def take(self, rows: np.ndarray) -> "TokenRows":
        """Returns the rows with the given indices, without copying ids. Index -1 gives an empty row."""
        starts, ends = (np.where(rows < 0, 0, places[rows]) for places in (self.starts, self.ends))
        return TokenRows(self.ids, starts, ends, self.known_max_id)

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, row: int) -> np.ndarray:
        return self.ids[self.starts[row] : self.ends[row]]


@dataclasses.dataclass(frozen=True)
class TokenExample:
    """The rows of one example, for `write_store`.

    Attributes:
        rows: (input ids, target ids) for each objective. An empty target means that the row is absent.
        weight: factor of the example's loss.
        label_text: text to compare predictions with: the label or, without one, the first objective's target.
        row_id: value of the field `id`; None if there is no such field.
    """

    rows: Sequence[tuple[Sequence[int] | np.ndarray, Sequence[int] | np.ndarray]]
    weight: float = 1.0
    label_text: str = ""
    row_id: str | None = None


@dataclasses.dataclass(frozen=True)
class TokenStore:
    """The examples of one split, tokenised for each objective.

    Attributes:
        fingerprint: digest of the contents.
        rows: a dict for each objective, with the `TokenRows` "inputs" and "targets". Row i belongs to example
            i. Optional entries: "weights", the objective's weight for each example, [examples] float32;
            "token_weights", the weight of each target id, [tokens] float32.
        weights: weight of each example, [examples] float32. An objective with its own "weights" uses those instead.
        about: JSON-like description of the source.
        labels: bytes of `labels.jsonl`.
        row_ids: hash of each example's id, [examples] uint64, or None if the task has no ids.
        others: folders of the stores that `pairing.paired` joined to this one; empty for a store that is not paired.
    """

    directory: pathlib.Path
    fingerprint: str
    objectives: tuple[str, ...]
    rows: tuple[Mapping[str, TokenRows], ...]
    weights: np.ndarray
    about: Mapping[str, Any]
    # memory-mapped, so that an open store survives a replacement of its files
    labels: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros(0, np.uint8))
    row_ids: np.ndarray | None = None
    others: tuple[pathlib.Path, ...] = ()

    @property
    def num_examples(self) -> int:
        """Number of examples. An example may have several rows."""
        return len(self.weights)

    @functools.cached_property
    def max_id(self) -> int:
        """Largest token id. In a plain SeqIO task, an extra id may exceed the ids of all the vocabulary's pieces."""
        return max(rows[feature].max_id for rows in self.rows for feature in FEATURES)

    @property
    def directories(self) -> tuple[pathlib.Path, ...]:
        """Folders of all stores that the rows come from."""
        return (self.directory, *self.others)

    @functools.cached_property
    def label_texts(self) -> list[str]:
        """Label text of each example (`TokenExample.label_text`), parsed at the first use."""
        return [json.loads(line) for line in self.labels.tobytes().splitlines()]


def write_store(
    directory: os.PathLike | str,
    objectives: Sequence[str],
    examples: Iterable[TokenExample],
    about: Mapping[str, Any] | None = None,
) -> TokenStore:
    """Writes a store. An existing store is replaced if it is damaged, or has other contents or another `about`.

    Several processes may write the same store at once, also on a shared disk.

    Args:
        objectives: names of the entries of `TokenExample.rows`, in order.
        examples: the examples, which are streamed to disk. If the iterable raises, nothing is left on disk.
        about: JSON-like description of the source.
    """
    directory = pathlib.Path(directory)
    directory.parent.mkdir(parents=True, exist_ok=True)
    with staged_folder(directory, own_tag()) as new:
        count, max_ids = write_files(new, len(objectives), examples)
        sizes = {p.name: p.stat().st_size for p in sorted(new.iterdir())}
        manifest = {
            "version": FORMAT_VERSION,
            "fingerprint": _fingerprint(new, objectives, sizes),
            "objectives": list(objectives),
            "num_examples": count,
            "max_ids": max_ids,
            "sizes": sizes,
            "about": dict(about or {}),
        }
        manifest[SAMPLED] = _sampled(new, manifest)
        with open(new / MANIFEST, "w", encoding="utf-8") as f:
            json.dump(manifest, f, indent=2, ensure_ascii=False)
        # The files must be on disk before the rename makes the store visible, or a crash could leave a
        # complete-looking store with empty files.
        for path in new.iterdir():
            fsync(path)
        return _publish(new, directory)


def _fingerprint(folder: pathlib.Path, objectives: Sequence[str], names: Iterable[str]) -> str:
    """Returns a digest of the objectives and of every byte of the files."""
    return digest([list(objectives), digest_each(sha256, folder, names)])


def _sampled(folder: pathlib.Path, manifest: Mapping[str, Any]) -> str:
    """Returns a digest of at most 4 MiB of each file, and of the manifest except its entry `SAMPLED`."""
    rest = {key: value for key, value in manifest.items() if key != SAMPLED}
    return digest([rest, digest_each(sampled_sha256, folder, manifest["sizes"])])


def own_tag() -> str:
    """Returns the `tag` that processes on this host pass to `folders.sole_writer`.

    Each host has its own tag, since on some file systems a lock does not exclude other hosts.
    """
    return f"{socket.gethostname()}-"


def _publish(new: pathlib.Path, directory: pathlib.Path) -> TokenStore:
    """Renames the folder of a new store to its final name, and returns the store.

    The store is opened before the rename, since another process may move the folder away afterwards.
    """
    store = open_store(new, every_byte=True)
    if store is None:
        raise OSError(f"{new}: was damaged while it was written")
    while True:
        try:
            os.rename(new, directory)  # fails if `directory` is a folder with files
            return dataclasses.replace(store, directory=directory)
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
        # another store exists: uses an equal one, whose files other processes may have open, and moves a
        # different or damaged one away
        there = open_store(directory, every_byte=True)
        if there is not None and is_same(there, store):
            return there
        old = new.parent / REPLACED
        with contextlib.suppress(FileNotFoundError):  # another process has just moved it away
            os.replace(directory, old)
        shutil.rmtree(old, ignore_errors=True)


def is_same(a: TokenStore, b: TokenStore) -> bool:
    """Returns whether two stores have the same contents and the same description of their source."""
    return (a.fingerprint, a.about) == (b.fingerprint, b.about)


def open_store(directory: os.PathLike | str, *, every_byte: bool = False) -> TokenStore | None:
    """Opens the store in a folder. Returns None if it is missing, damaged, or of another format.

    The result is also None if another process replaces the store at the same time. Damage is logged.
    At most 4 MiB of each file are checked; `every_byte` checks all bytes.
    """
    directory = pathlib.Path(directory)
    if not (directory / MANIFEST).is_file():
        return None
    identity = None
    try:
        identity = _identity(directory)
        with open(directory / MANIFEST, encoding="utf-8") as f:
            manifest = json.load(f)
        if manifest["version"] != FORMAT_VERSION:
            return None
        problem = _damage(directory, manifest, every_byte)
        if problem is None:
            store = _opened(directory, manifest)
            # a changed identity means that the files may come from two stores
            return store if _identity(directory) == identity else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        problem = " ".join(f"{type(error).__name__}: {error}".split())
    with contextlib.suppress(FileNotFoundError):
        if problem and _identity(directory) == identity:
            log(f"warning: {directory}: {problem}; the task is tokenised again")
    return None


def _opened(directory: pathlib.Path, manifest: Mapping[str, Any]) -> TokenStore:
    objectives = tuple(manifest["objectives"])
    rows = tuple(
        {
            feature: TokenRows.of_offsets(
                _map(directory / (name := file_name(i, feature, "ids")), np.int32),
                _map(directory / file_name(i, feature, "offsets"), np.int64),
                manifest.get("max_ids", {}).get(name),
            )
            for feature in FEATURES
        }
        for i in range(len(objectives))
    )
    return TokenStore(
        directory,
        manifest["fingerprint"],
        objectives,
        rows,
        _map(directory / "weights", np.float32),
        manifest["about"],
        _map(directory / "labels.jsonl", np.uint8),
        _map(directory / ROW_IDS, np.uint64) if ROW_IDS in manifest["sizes"] else None,
    )


def verify_store(directory: pathlib.Path) -> dict[str, Any]:
    """Compares every byte of a store's files with its fingerprint.

    Returns:
        `store`: the folder.
        `files`: count of files.
        `bytes`: their total size.

    Raises:
        InputError: the files differ from the fingerprint, or cannot be read.
    """
    try:
        with open(directory / MANIFEST, encoding="utf-8") as f:
            manifest = json.load(f)
        problem = _damage(directory, manifest, every_byte=True)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        problem = " ".join(f"{type(error).__name__}: {error}".split())
    if problem:
        raise InputError(
            f"{directory}: {problem}; delete this folder, so that the next start tokenises the task again"
        )
    sizes = manifest["sizes"].values()
    return {"store": os.fspath(directory), "files": len(sizes), "bytes": sum(sizes)}


def _damage(directory: pathlib.Path, manifest: Mapping[str, Any], every_byte: bool) -> str | None:
    """Returns a description of the damage to a store, or None if the store is undamaged."""
    if not isinstance(manifest["about"], dict):
        return "its manifest has no description of its source"
    for name, size in manifest["sizes"].items():
        if (found := (directory / name).stat().st_size) != size:
            return f"{name}: expected {size} bytes, got {found}"
    # an older version wrote no digest of samples, so every byte is read
    old = SAMPLED not in manifest
    same = old or _sampled(directory, manifest) == manifest[SAMPLED]
    if same and (old or every_byte):
        found = _fingerprint(directory, manifest["objectives"], manifest["sizes"])
        same = found == manifest["fingerprint"]
    return None if same else "its files have changed since they were written"


def _identity(folder: pathlib.Path) -> tuple[int, int]:
    stat = folder.stat()
    return stat.st_ino, stat.st_mtime_ns


def _map(path: pathlib.Path, dtype: Any) -> np.ndarray:
    if not path.stat().st_size:  # an empty file cannot be mapped
        return np.zeros(0, dtype)
    return np.asarray(np.memmap(path, dtype, mode="r"))
