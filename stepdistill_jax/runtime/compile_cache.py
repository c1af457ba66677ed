"""Configures JAX's persistent cache of compiled programs, and limits its size. Later runs load programs from it."""

import contextlib
import os
import pathlib
from typing import Any

import jax

from stepdistill_jax.runtime.progress import log
from stepdistill_jax.runtime.stores import as_path, is_remote

FOLDER = ".jax_cache"
MAX_BYTES = (
    4 * 2**30
)  # largest size of the default folder; a folder that the user names is never pruned


def folder_for(workdir: os.PathLike | str) -> str:
    """Returns the cache folder of a workdir, which is next to the workdir.

    If the workdir is the root of a bucket, such as `gs://my-bucket`, the cache folder is inside the workdir.
    """
    path = as_path(workdir)
    if not is_remote(path):
        return os.fspath(path.absolute().parent / FOLDER)
    # `/`, `gs` and the bucket's name are three parts; next to a bucket, nothing can be written
    in_bucket_root = len(path.parts) <= 3
    return os.fspath((path if in_bucket_root else path.parent) / FOLDER)


def enable(folder: os.PathLike | str) -> None:
    """Makes JAX store compiled programs in `folder` and reuse them.

    Call this function before anything is compiled. JAX_COMPILATION_CACHE_DIR takes precedence over `folder`,
    and JAX_ENABLE_COMPILATION_CACHE=0 turns the cache off. All processes must see the same folder, since only
    process 0 writes. If the folder is read-only, its programs are reused, but no new ones are stored.
    """
    settings: Any = jax.config  # its attributes are created at run time
    if not settings.jax_enable_compilation_cache:
        return
    if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
        # keep small programs, too, so that a second start compiles nothing
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    first = jax.process_index() == 0
    given: str | None = settings.jax_compilation_cache_dir
    folder = given or os.fspath(folder)
    if "://" not in folder and not _may_write(pathlib.Path(folder)):
        if first:
            log(
                f"warning: cannot write to the compile cache {folder}; saved programs are reused, but new"
                " ones are not saved"
            )
        # otherwise JAX warns once per program
        jax.config.update("jax_persistent_cache_min_compile_time_secs", float("inf"))
        if not os.path.isdir(folder):
            return
    jax.config.update("jax_compilation_cache_dir", folder)
    # JAX's own limit, `jax_compilation_cache_max_size`, makes each lookup write a file, which fails in read-only or
    # shared folders
    if not given and "://" not in folder and first:
        prune(pathlib.Path(folder), MAX_BYTES)


def prune(folder: pathlib.Path, max_bytes: int) -> None:
    """Removes the least recently used programs until `folder` holds at most `max_bytes` bytes of programs."""
    found = []
    for path in folder.glob("*-cache"):
        with contextlib.suppress(OSError):  # another run removed it
            status = path.stat()
            found.append((max(status.st_atime, status.st_mtime), status.st_size, path))
    total = sum(size for _, size, _ in found)
    for _, size, path in sorted(found):
        if total <= max_bytes:
            return
        with contextlib.suppress(OSError):
            path.unlink()
        total -= size


def _may_write(folder: pathlib.Path) -> bool:
    nearest = next(p for p in (folder.absolute(), *folder.absolute().parents) if p.exists())
    return nearest.is_dir() and os.access(nearest, os.W_OK | os.X_OK)
