"""Opens files with a lock, which the kernel releases when the process ends."""

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
    """Opens `path` for appending, and locks the file until it is closed. Creates a missing folder.

    Args:
        name: name of the output in messages; None means `path`.

    Raises:
        InUse: another process has locked the file.
        InputError: the file is a link, is not a regular file, or cannot be written.
    """
    return _open(path, name, wait=False)[0]


@contextlib.contextmanager
def locked(
    path: pathlib.Path, name: object = None, *, note: bytes = b"", wait: bool = False
) -> Iterator[bool]:
    """A context that holds a lock. Yields False if the file system has no locks.

    Args:
        path: lock file. It is removed at the end, unless `wait` is true or the file contains more than `note`.
        name: as in `open_locked`.
        note: bytes to write to the file, for processes that do not get the lock.
        wait: whether to wait for the lock, instead of raising InUse.

    Raises:
        InUse, InputError: as for `open_locked`.
    """
    file, held = _open(path, name, wait)
    with file:
        try:
            if note:
                file.truncate(0)
                with _named(name or path):
                    os.write(
                        file.fileno(), note
                    )  # unbuffered: a full disk raises here, not at close
            yield held
        finally:
            # a file with more than the note is not only a lock: it is somebody's data
            if not wait and os.fstat(file.fileno()).st_size <= len(note):
                path.unlink(missing_ok=True)


def _open(path: pathlib.Path, name: object, wait: bool) -> tuple[IO[bytes], bool]:
    # An append handle creates a missing file and leaves an existing one unchanged: `path` may be another
    # run's output, and it must not be truncated before the lock is held.
    while True:
        with _named(name or path):
            path.parent.mkdir(parents=True, exist_ok=True)
            file = open(path, "ab", opener=opener)  # noqa: SIM115
        try:
            held = _lock(file, name or path, wait)
            # Between the open and the lock, a run that ended may have renamed or removed the file. Then
            # `path` is another inode, and nobody else would see this lock: try again.
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
            f"{name}: another run is writing it; wait for it to end, or choose another output"
        ) from None
    except (ImportError, OSError):  # no POSIX system, or a disk without locks
        return False
    return True
