"""Folders that are written aside and renamed when they are whole."""

import contextlib
import glob
import os
import pathlib
import shutil
import tempfile
from collections.abc import Iterator

REPLACED = "replaced"  # next to the new folder: the one whose place it takes


@contextlib.contextmanager
def folder_aside(target: pathlib.Path, tag: str = "") -> Iterator[pathlib.Path]:
    """Yields an empty folder to be filled and renamed to `target`; what is left at the end is removed.

    A writer that moves an older `target` to `REPLACED`, beside the new folder, gets it back unless
    another one has come in its place.

    Args:
        target: in a folder that is there.
        tag: of writers that may remove what a killed one of them left (`remove_left`).
    """
    work = pathlib.Path(tempfile.mkdtemp(prefix=_prefix(target, tag), dir=target.parent))
    try:
        new = work / target.name
        new.mkdir()
        yield new
    finally:
        _remove(work, target)


def remove_left(target: pathlib.Path, tag: str = "") -> None:
    """Removes what killed writers of `target` left, as they would have; no other may be at work."""
    for work in target.parent.glob(glob.escape(_prefix(target, tag)) + "*"):
        # else it is not of our making
        if work.is_dir() and {path.name for path in work.iterdir()} <= {target.name, REPLACED}:
            _remove(work, target)


def _prefix(target: pathlib.Path, tag: str) -> str:
    return f".{target.name}.partial-{tag}"


def _remove(work: pathlib.Path, target: pathlib.Path) -> None:
    if (work / REPLACED).exists() and not target.exists():
        os.replace(work / REPLACED, target)
    shutil.rmtree(work, ignore_errors=True)
