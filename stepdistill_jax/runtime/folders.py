"""Folders that are written aside and renamed when they are whole."""

import contextlib
import glob
import os
import pathlib
import shutil
import tempfile
from collections.abc import Iterator

from stepdistill_jax.runtime.locks import locked

REPLACED = "replaced"  # next to the new folder: the one whose place it takes


@contextlib.contextmanager
def staged_folder(target: pathlib.Path, tag: str = "") -> Iterator[pathlib.Path]:
    """Yields an empty folder to be filled and renamed to `target`; what is left at the end is removed.

    A writer that moves an older `target` to `REPLACED`, beside the new folder, gets it back unless
    another one has come in its place.

    Args:
        target: in a folder that is there.
        tag: of writers that may remove what a killed one of them left (`remove_leftovers`).
    """
    work = pathlib.Path(tempfile.mkdtemp(prefix=_prefix(target, tag), dir=target.parent))
    try:
        new = work / target.name
        new.mkdir()
        yield new
    finally:
        _remove(work, target)


@contextlib.contextmanager
def sole_writer(
    target: pathlib.Path, tag: str = "", *, name: object = None, wait: bool = False
) -> Iterator[None]:
    """One process at a time writes `target`; what killed ones left is removed first.

    Where the disk has no locks, all write at once and remove nothing.

    Args:
        target: a folder, which need not be there.
        tag: of `staged_folder`.
        name: what is written, for messages; None is `target`.
        wait: for another process, instead of refusing.

    Raises:
        InputError: another process is at work, or nothing can be written there.
    """
    lock = target.with_name(f".{target.name}.lock")
    with locked(lock, name or target, wait=wait) as held:
        if held:
            remove_leftovers(target, tag)
        yield


def remove_leftovers(target: pathlib.Path, tag: str = "") -> None:
    """Removes what killed writers of `target` left, as they would have; no other may be at work."""
    for work in target.parent.glob(glob.escape(_prefix(target, tag)) + "*"):
        with contextlib.suppress(OSError):  # another user's, who removes it with the next run
            # else it is not of our making
            if work.is_dir() and {path.name for path in work.iterdir()} <= {target.name, REPLACED}:
                _remove(work, target)


def _prefix(target: pathlib.Path, tag: str) -> str:
    return f".{target.name}.partial-{tag}"


def _remove(work: pathlib.Path, target: pathlib.Path) -> None:
    if (work / REPLACED).exists() and not target.exists():
        os.replace(work / REPLACED, target)
    shutil.rmtree(work, ignore_errors=True)
