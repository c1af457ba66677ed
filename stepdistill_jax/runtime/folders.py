"""Writes folders under a temporary name, and renames them when they are complete."""

import contextlib
import glob
import os
import pathlib
import shutil
import tempfile
from collections.abc import Iterator

from stepdistill_jax.runtime.locks import locked

REPLACED = "replaced"  # temporary name of an older target, next to the new folder


@contextlib.contextmanager
def staged_folder(target: pathlib.Path, tag: str = "") -> Iterator[pathlib.Path]:
    """Yields an empty folder, which the caller fills and renames to `target`.

    If `target` already exists, the caller first moves it into the parent of the empty folder, as `REPLACED`.
    On exit, if there is no `target`, the old one is moved back. Then the temporary files are removed.

    Args:
        target: final path. Its parent must exist.
        tag: part of the temporary folder's name, by which `remove_leftovers` finds it.
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
    """A context in which only this process writes `target`. Removes leftovers of killed writers first.

    On a disk without locks, other processes are not kept out, and nothing is removed.

    Args:
        tag: as in `staged_folder`.
        name: name of the output in messages; None means `target`.
        wait: whether to wait for another writer.

    Raises:
        InputError: another process is writing `target` and `wait` is False, or the folder cannot be written.
    """
    lock = target.with_name(f".{target.name}.lock")
    with locked(lock, name or target, wait=wait) as held:
        if held:
            remove_leftovers(target, tag)
        yield


def remove_leftovers(target: pathlib.Path, tag: str = "") -> None:
    """Removes leftovers of killed writers of `target`. Call it only if no writer is running."""
    for work in target.parent.glob(glob.escape(_prefix(target, tag)) + "*"):
        with contextlib.suppress(
            OSError
        ):  # another user's folder, which that user's next run removes
            # a folder with anything else in it was not made by `staged_folder`
            if work.is_dir() and {path.name for path in work.iterdir()} <= {target.name, REPLACED}:
                _remove(work, target)


def _prefix(target: pathlib.Path, tag: str) -> str:
    return f".{target.name}.partial-{tag}"


def _remove(work: pathlib.Path, target: pathlib.Path) -> None:
    if (work / REPLACED).exists() and not target.exists():
        os.replace(work / REPLACED, target)
    shutil.rmtree(work, ignore_errors=True)
