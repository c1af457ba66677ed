"""Token ids on disk, written once per dataset, split and vocabulary; no TensorFlow."""

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

FORMAT_VERSION = 2  # raised when a store holds other things, `about` included
MANIFEST = "manifest.json"
SAMPLED = "sampled"  # of a manifest: the digest that is compared when a store is opened


@dataclasses.dataclass(frozen=True)
class TokenRows:
    """One feature of one objective: row i is `ids[starts[i] : ends[i]]`.

    Example: ids `[5, 6, 1, 7, 1]`, starts `[0, 3, 3]` and ends `[3, 3, 5]` hold the rows `5 6 1`, an
    empty one (an absent target) and `7 1`.

    Attributes:
        ids: [tokens] int32, memory-mapped, uncut, each row with its end of sequence.
        starts, ends: [examples] int64.
        known_max_id: the largest of `ids`; None where all must be read for it.
    """

    ids: np.ndarray
    starts: np.ndarray
    ends: np.ndarray
    known_max_id: int | None = None

    @classmethod
    def of_offsets(
        cls, ids: np.ndarray, offsets: np.ndarray, known_max_id: int | None = None
    ) -> "TokenRows":
        """Returns rows that follow each other; `offsets` are [examples + 1] int64."""
        return cls(ids, offsets[:-1], offsets[1:], known_max_id)

    @functools.cached_property
    def lengths(self) -> np.ndarray:
        """[examples] int64: tokens of each row."""
        return self.ends - self.starts

    @functools.cached_property
    def max_id(self) -> int:
        """The largest of `ids`; 0 of none."""
        return int(self.ids.max(initial=0)) if self.known_max_id is None else self.known_max_id

    def take(self, rows: np.ndarray) -> "TokenRows":
        """Returns these rows in this order; -1 is an empty one."""
        starts, ends = (np.where(rows < 0, 0, places[rows]) for places in (self.starts, self.ends))
        return TokenRows(self.ids, starts, ends, self.known_max_id)

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, row: int) -> np.ndarray:
        return self.ids[self.starts[row] : self.ends[row]]


@dataclasses.dataclass(frozen=True)
class TokenExample:
    """What `write_store` takes: the rows of one example.

    Attributes:
        rows: (input ids, target ids) for each objective; an empty target means the row is absent.
        weight: factor of its tokens' loss.
        label_text: the label, which predictions are compared with; the first objective's target
            where it holds none.
        row_id: the field `id` of a task that has one; it pairs the rows of several tasks.
    """

    rows: Sequence[tuple[Sequence[int] | np.ndarray, Sequence[int] | np.ndarray]]
    weight: float = 1.0
    label_text: str = ""
    row_id: str | None = None


@dataclasses.dataclass(frozen=True)
class TokenStore:
    """The examples of one split, tokenised for each objective.

    Attributes:
        directory: where the files lie.
        fingerprint: digest of the contents; equal contents have equal fingerprints.
        objectives: names, in order.
        rows: for each objective `{"inputs": TokenRows, "targets": TokenRows}`; row i of each
            belongs to example i. An objective with factors of its own has them as "weights",
            [examples] float32, and per token as "token_weights".
        weights: [examples] float32.
        about: what the store was made from.
        labels: bytes of `labels.jsonl`, memory-mapped like the ids, so that a store that is
            replaced while it is open stays whole.
        row_ids: [examples] uint64, a hash of each example's id; None where the task gives none.
        others: folders of the stores that were paired with this one.
    """

    directory: pathlib.Path
    fingerprint: str
    objectives: tuple[str, ...]
    rows: tuple[Mapping[str, TokenRows], ...]
    weights: np.ndarray
    about: Mapping[str, Any]
    labels: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros(0, np.uint8))
    row_ids: np.ndarray | None = None
    others: tuple[pathlib.Path, ...] = ()

    @property
    def num_examples(self) -> int:
        """Examples, whatever the number of their rows."""
        return len(self.weights)

    @functools.cached_property
    def max_id(self) -> int:
        """The largest id: a plain SeqIO task may use extra ids beyond its vocabulary's pieces."""
        return max(rows[feature].max_id for rows in self.rows for feature in FEATURES)

    @property
    def directories(self) -> tuple[pathlib.Path, ...]:
        """All folders that the rows come from."""
        return (self.directory, *self.others)

    @functools.cached_property
    def label_texts(self) -> list[str]:
        """`TokenExample.label_text` of each example; parsed when it is asked for."""
        return [json.loads(line) for line in self.labels.tobytes().splitlines()]


def write_store(
    directory: os.PathLike | str,
    objectives: Sequence[str],
    examples: Iterable[TokenExample],
    about: Mapping[str, Any] | None = None,
) -> TokenStore:
    """Writes a store beside `directory` and renames it there; another one is replaced.

    Several processes may write at once, on a shared folder, too: each gets a whole store, and one
    that was written in the meantime and is the same is taken instead of being replaced, since
    others may have its files open.

    Args:
        directory: the store's own folder.
        objectives: a name for each of an example's rows.
        examples: streamed to disk; their errors are passed on and leave nothing behind.
        about: JSON-like; kept in the manifest.
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
        for path in new.iterdir():  # whole on disk before the name says so
            fsync(path)
        return _put(new, directory)


def _fingerprint(folder: pathlib.Path, objectives: Sequence[str], names: Iterable[str]) -> str:
    """Digest of the objectives and of every byte of the files."""
    return digest([list(objectives), digest_each(sha256, folder, names)])


def _sampled(folder: pathlib.Path, manifest: Mapping[str, Any]) -> str:
    """Digest of the rest of the manifest and of at most 4 MiB of each file."""
    rest = {key: value for key, value in manifest.items() if key != SAMPLED}
    return digest([rest, digest_each(sampled_sha256, folder, manifest["sizes"])])


def own_tag() -> str:
    """Tag of this host's writers (`folders.alone`): some disks grant a lock to one process of each host."""
    return f"{socket.gethostname()}-"


def _put(new: pathlib.Path, directory: pathlib.Path) -> TokenStore:
    """Puts a written folder in its place; readers of another one there keep their open files.

    The store is opened before it is moved: afterwards another process may move it on.
    """
    store = open_store(new, every_byte=True)
    if store is None:
        raise OSError(f"{new}: was damaged while it was written")
    while True:
        try:
            os.rename(new, directory)  # fails where a folder with files is
            return dataclasses.replace(store, directory=directory)
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
        there = open_store(directory, every_byte=True)
        if there is not None and is_same(there, store):
            return there
        old = new.parent / REPLACED
        with contextlib.suppress(FileNotFoundError):  # another process has just moved it
            os.replace(directory, old)
        shutil.rmtree(old, ignore_errors=True)


def is_same(a: TokenStore, b: TokenStore) -> bool:
    """Whether two stores hold the same and were made from the same."""
    return (a.fingerprint, a.about) == (b.fingerprint, b.about)


def open_store(directory: os.PathLike | str, *, every_byte: bool = False) -> TokenStore | None:
    """The store in a folder; None where none of this format is, or a damaged one.

    The manifest, the files' sizes and at most 4 MiB of each file are compared with what was written,
    so that opening a store costs the same however large it is; damage is reported in a warning. None,
    too, where another process replaces it at that moment: whoever then writes one finds the other's
    in place.

    Args:
        directory: the store's own folder.
        every_byte: read all of it, as `verify_store` does.
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
            # else the files may be of two stores
            return store if _identity(directory) == identity else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        problem = " ".join(f"{type(error).__name__}: {error}".split())
    with contextlib.suppress(FileNotFoundError):
        if problem and _identity(directory) == identity:
            log(f"warning: {directory}: {problem}; the task is tokenised anew")
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
        `store` (its folder), and the `files` and `bytes` that were compared.

    Raises:
        InputError: they differ, or cannot be read.
    """
    try:
        with open(directory / MANIFEST, encoding="utf-8") as f:
            manifest = json.load(f)
        problem = _damage(directory, manifest, every_byte=True)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        problem = " ".join(f"{type(error).__name__}: {error}".split())
    if problem:
        raise InputError(
            f"{directory}: {problem}; delete this folder, and the next start tokenises the task again"
        )
    sizes = manifest["sizes"].values()
    return {"store": os.fspath(directory), "files": len(sizes), "bytes": sum(sizes)}


def _damage(directory: pathlib.Path, manifest: Mapping[str, Any], every_byte: bool) -> str | None:
    """What is not as it was written."""
    if not isinstance(manifest["about"], dict):
        return "its manifest does not say what it was made from"
    for name, size in manifest["sizes"].items():
        if (found := (directory / name).stat().st_size) != size:
            return f"{name} has {found} bytes, {size} were written"
    old = SAMPLED not in manifest  # of a version before it: read as a whole
    same = old or _sampled(directory, manifest) == manifest[SAMPLED]
    if same and (old or every_byte):
        found = _fingerprint(directory, manifest["objectives"], manifest["sizes"])
        same = found == manifest["fingerprint"]
    return None if same else "its files have other bytes than were written"


def _identity(folder: pathlib.Path) -> tuple[int, int]:
    stat = folder.stat()
    return stat.st_ino, stat.st_mtime_ns


def _map(path: pathlib.Path, dtype: Any) -> np.ndarray:
    if not path.stat().st_size:  # an empty file can not be mapped
        return np.zeros(0, dtype)
    return np.asarray(np.memmap(path, dtype, mode="r"))
