"""Handles paths on this machine and in an object store (`gs://`)."""

import atexit
import contextlib
import functools
import importlib.util
import logging
import os
import pathlib
import re
import shutil
import tempfile
from collections.abc import Iterator
from typing import cast

from stepdistill_jax.errors import InputError, how_to_install, nearest

_GS = "gs://"
# a URL, or a store's URL that went through pathlib: `gs:/bucket/run`
_URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+)://|(gs|s3):/(?!/)")


def _url(path: os.PathLike | str) -> str | None:
    """Returns `path` in the form `SCHEME://REST`, or None if it is not a URL."""
    text = os.fspath(path)
    if (match := _URL.match(text)) is None:
        return None
    return f"{match[1] or match[2]}://{text[match.end() :].strip('/')}"


def is_remote(path: os.PathLike | str) -> bool:
    """Returns whether a path is in an object store (`gs://`)."""
    return (_url(path) or "").startswith(_GS)


def as_path(path: os.PathLike | str) -> pathlib.Path:
    """Returns a user's path as a `pathlib.Path`, or as a `StorePath` if it is in a store.

    In a store, files cannot be appended to, renamed or locked, and there are no empty folders.

    Raises:
        InputError: the path is another kind of URL, or the store's package is missing.
    """
    if (url := _url(path)) is None:
        return pathlib.Path(path)
    if not url.startswith(_GS):
        raise InputError(
            f"{url}: this kind of URL is not supported; use a local path or gs://BUCKET/..."
        )
    if url == _GS:
        raise InputError(f"{url}: the bucket is missing; expected gs://BUCKET/FOLDER")
    _prepare_stores()
    if importlib.util.find_spec("gcsfs") is None:
        raise InputError(f"{url}: gs:// needs the package gcsfs; {how_to_install('gcs')}")
    from stepdistill_jax.runtime.store_path import StorePath

    return cast(pathlib.Path, StorePath(url))


class StoreError(Exception):
    """A store did not answer, even after retries. The message is one line with the URL.

    Attributes:
        reason: the message without the URL.
    """

    # not an OSError, since code that treats an unreadable file as damaged must not catch it

    def __init__(self, url: os.PathLike | str, error: Exception):
        self.reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        super().__init__(
            f"{os.fspath(url)}: {self.reason}; does the bucket exist, can it be reached, and do the"
            " credentials allow access?"
        )


@contextlib.contextmanager
def store_errors(path: os.PathLike | str) -> Iterator[None]:
    """A context that turns the errors of a store's client into `StoreError`, which names the URL.

    FileNotFoundError, IsADirectoryError, NotADirectoryError and all errors of a local path stay as they are.
    """
    try:
        yield
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError, StoreError):
        raise
    except Exception as error:
        if not is_remote(path):
            raise
        raise StoreError(path, error) from error


def local_path(path: os.PathLike | str, name: str) -> pathlib.Path:
    """Returns the path of a file or folder that must be on this machine.

    Args:
        name: name of the parameter in messages, with backticks: "`data_dir`".

    Raises:
        InputError: the path is a URL.
    """
    if (url := _url(path)) is not None:
        raise InputError(
            f"{name} {url}: must be a path on this machine, since only a workdir may be a URL"
        )
    return pathlib.Path(path)


def existing_folder(path: os.PathLike | str) -> pathlib.Path:
    """Returns the path of a folder, which may be in a store.

    Raises:
        InputError: there is no such folder. The message names a local folder next to it with a similar name.
    """
    path = as_path(path)
    if path.is_dir():
        return path
    what = "is a file, not a folder" if path.is_file() else f"no such folder{nearby(path)}"
    raise InputError(f"{path}: {what}")


def nearby(path: os.PathLike | str) -> str:
    """Returns a hint such as `; did you mean 'mine'?` at a local folder next to `path`, or ""."""
    path = as_path(path)
    try:
        folders = [] if is_remote(path) else [p.name for p in path.parent.iterdir() if p.is_dir()]
    except (OSError, ValueError):  # no such folder, or a null byte in its name
        folders = []
    return nearest(path.name, folders)


@functools.cache
def _prepare_stores() -> None:
    """Configures the libraries for stores once, before the first access."""
    # epath would use an installed TensorFlow, which `predict` must not import
    os.environ.setdefault("EPATH_USE_TF", "false")
    import fsspec.config

    # gcsfs logs the traceback of each error that it also raises
    logging.getLogger("gcsfs").setLevel(logging.CRITICAL)
    # a cached listing lacks files that TensorStore or another process has written since
    for scheme in ("gs", "gcs"):
        fsspec.config.conf.setdefault(scheme, {}).setdefault("use_listings_cache", False)


@functools.cache
def local_copy(path: pathlib.Path, *siblings: str) -> pathlib.Path:
    """Returns the path itself if it is local, otherwise the path of a local copy.

    The copy is removed when this process ends.

    Args:
        siblings: names of other files in the same folder to copy, if they exist.
    """
    if not is_remote(path):
        return path
    folder = pathlib.Path(tempfile.mkdtemp(prefix="stepdistill-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    copy = folder / path.name
    copy.write_bytes(path.read_bytes())
    for name in siblings:
        if (path.parent / name).is_file():
            (folder / name).write_bytes((path.parent / name).read_bytes())
    return copy


def upload(folder: pathlib.Path, target: pathlib.Path) -> None:
    """Copies all files below a local folder into a store, and replaces existing files."""
    for file in sorted(p for p in folder.rglob("*") if p.is_file()):
        (target / file.relative_to(folder).as_posix()).write_bytes(file.read_bytes())
