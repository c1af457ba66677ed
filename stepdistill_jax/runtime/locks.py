"""The one lock: on a file that is held open. The kernel drops it with the process, however that ends."""

import contextlib
import os
import pathlib
from collections.abc import Iterator
from typing import IO

from stepdistill_jax.errors import InputError
from stepdistill_jax.runtime.files import opener


class InUse(InputError):
    """Another process holds the lock."""


def open_locked(path: pathlib.Path, name: object = None) -> IO[bytes]:
    """Opens `path` to append, and makes its folder; no other process can until it is closed.

    Args:
        path: of the file.
        name: what is written, for messages; None is `path`.

    Raises:
        InUse: another process has it open.
        InputError: it is a link or no file, or cannot be written.
    """
    return _open(path, name, wait=False)[0]


@contextlib.contextmanager
def locked(
    path: pathlib.Path, name: object = None, *, note: bytes = b"", wait: bool = False
) -> Iterator[bool]:
    """Holds a lock; yields False where the file system has none, as some network disks.

    Args:
        path: of a file without another use. It is removed at the end, or with `wait` left to the others.
        name: as `open_locked`.
        note: written into the file, for those who are refused.
        wait: for another process that holds the lock, instead of refusing.

    Raises:
        InUse, InputError: as `open_locked`.
    """
    file, held = _open(path, name, wait)
    with file:
        try:
            if note:
                file.truncate(0)
                with _named(name or path):
                    os.write(file.fileno(), note)  # a buffer would fail again when it is closed
            yield held
        finally:
            # a longer file is somebody's
            if not wait and os.fstat(file.fileno()).st_size <= len(note):
                path.unlink(missing_ok=True)


def _open(path: pathlib.Path, name: object, wait: bool) -> tuple[IO[bytes], bool]:
    while True:
        with _named(name or path):
            path.parent.mkdir(parents=True, exist_ok=True)
            file = open(path, "ab", opener=opener)  # noqa: SIM115
        try:
            held = _lock(file, name or path, wait)
            # a run that ended in between has renamed or removed what we opened
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.stat(path), os.fstat(file.fileno())):
                    return file, held
        except BaseException:
            file.close()
            raise
        file.close()


@contextlib.contextmanager
def _named(name: object) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise InputError(f"{name}: cannot be written ({error.strerror})") from None


def _lock(file: IO[bytes], name: object, wait: bool) -> bool:
    try:
        import fcntl

        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        raise InUse(
            f"{name}: another run is writing it; wait for that one, or give another output"
        ) from None
    except (ImportError, OSError):  # no POSIX system, or a disk without locks
        return False
    return True
