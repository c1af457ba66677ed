"""Paths on this machine and in an object store (`gs://`)."""

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

from stepdistill_jax.errors import InputError

_GS = "gs://"
# a URL, or what pathlib makes of one of a store: `gs:/bucket/run`
_URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+)://|(gs|s3):/(?!/)")


def _url(path: os.PathLike | str) -> str | None:
    """`SCHEME://REST` of a path that is a URL."""
    text = os.fspath(path)
    if (match := _URL.match(text)) is None:
        return None
    return f"{match[1] or match[2]}://{text[match.end() :].strip('/')}"


def is_remote(path: os.PathLike | str) -> bool:
    """Whether a path is in an object store (`gs://`) rather than on this machine."""
    return (_url(path) or "").startswith(_GS)


def as_path(path: os.PathLike | str) -> pathlib.Path:
    """A user's path: pathlib's, or one with its methods (`StorePath`) in an object store.

    In a store there are no appends, no renames, no locks, and no folder without a file in it.

    Raises:
        InputError: another kind of URL, or a package is missing that reads the store.
    """
    if (url := _url(path)) is None:
        return pathlib.Path(path)
    if not url.startswith(_GS):
        raise InputError(f"{url}: cannot be read or written; give a local path or gs://BUCKET/...")
    if url == _GS:
        raise InputError(f"{url}: the bucket is missing; gs://BUCKET/FOLDER is wanted")
    _prepare_stores()
    if importlib.util.find_spec("gcsfs") is None:
        raise InputError(f"{url}: gs:// needs a package: pip install gcsfs")
    from stepdistill_jax.runtime.store_path import StorePath

    return cast(pathlib.Path, StorePath(url))


class StoreError(Exception):
    """A store that gave no answer, after its client has tried again for a while; one line with the URL.

    No OSError: who takes a file that cannot be read for a damaged one must not take this for one.

    Attributes:
        reason: without the URL.
    """

    def __init__(self, url: os.PathLike | str, error: Exception):
        self.reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        super().__init__(
            f"{os.fspath(url)}: {self.reason}; is the bucket there, can it be reached, and do the"
            " credentials allow it?"
        )


@contextlib.contextmanager
def asked(path: os.PathLike | str) -> Iterator[None]:
    """Around what asks a store about `path`: each client has errors of its own, most without the URL.

    Raises:
        StoreError: for all of them but "no such file" and the like; of a local path nothing is changed.
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
    """The pathlib path of what must be on this machine.

    Args:
        path: as the user gave it.
        name: what it is called in a message, with its backticks: "`data_dir`".

    Raises:
        InputError: it is a URL.
    """
    if (url := _url(path)) is not None:
        raise InputError(
            f"{name} {url}: must be on this machine, copy it here; only a workdir may be in a store"
        )
    return pathlib.Path(path)


@functools.cache
def _prepare_stores() -> None:
    """Once, before the first path in a store is touched."""
    # epath would read them by TensorFlow wherever that is installed; predict must not import it
    os.environ.setdefault("EPATH_USE_TF", "false")
    import fsspec.config

    # it writes the traceback of each error that it also raises
    logging.getLogger("gcsfs").setLevel(logging.CRITICAL)
    # a listing that is kept does not show what TensorStore or another process wrote since
    for scheme in ("gs", "gcs"):
        fsspec.config.conf.setdefault(scheme, {}).setdefault("use_listings_cache", False)


@functools.cache
def local_copy(path: pathlib.Path, *beside: str) -> pathlib.Path:
    """Returns a file for a library that reads local ones only: `path`, or a copy until we exit.

    Args:
        path: on this machine or in a store.
        beside: names of files next to it that are copied, too, where they exist.
    """
    if not is_remote(path):
        return path
    folder = pathlib.Path(tempfile.mkdtemp(prefix="stepdistill-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    copy = folder / path.name
    copy.write_bytes(path.read_bytes())
    for name in beside:
        if (path.parent / name).is_file():
            (folder / name).write_bytes((path.parent / name).read_bytes())
    return copy


def upload(folder: pathlib.Path, target: pathlib.Path) -> None:
    """Puts every file below a local folder into a store, whole; what is there is replaced."""
    for file in sorted(p for p in folder.rglob("*") if p.is_file()):
        (target / file.relative_to(folder).as_posix()).write_bytes(file.read_bytes())
