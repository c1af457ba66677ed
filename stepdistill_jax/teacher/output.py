"""A file that is written row by row, and gets its name when it is whole."""

import json
import os
import pathlib
from typing import Any

from stepdistill_jax.errors import InputError
from stepdistill_jax.files import PARTIAL, check_writable, fsync_folder


class RowFile:
    """JSON lines in PATH.partial, begun anew by each run: what was paid for is in the cache.

    Locked while it is open, so a second run on the same output is refused.
    """

    def __init__(self, path: os.PathLike | str):
        """Opens PATH.partial.

        Raises:
            InputError: it cannot be written there, or another run is writing it.
        """
        self._rows = 0
        self.path = pathlib.Path(path)
        self.partial = self.path.with_name(self.path.name + PARTIAL)
        check_writable(path)
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = open(self.partial, "ab")  # noqa: SIM115
        except OSError as error:
            raise InputError(f"{path}: cannot be written ({error.strerror})") from None
        try:
            self._lock()
            self._file.truncate(0)
        except BaseException:
            self._file.close()
            raise

    def add(self, row: dict[str, Any]) -> None:
        """Writes one row."""
        self._rows += 1
        self._file.write(json.dumps(row, ensure_ascii=False, allow_nan=False).encode() + b"\n")

    def finish(self) -> None:
        """Gives the file its name."""
        self._file.flush()
        os.fsync(self._file.fileno())
        os.replace(self.partial, self.path)
        fsync_folder(self.path.parent)
        self._file.close()

    def close(self) -> None:
        """Leaves the rows so far in PATH.partial, to be looked at; an empty one is removed."""
        if not self._file.closed and not self._rows:
            # under the lock, which the close ends
            self.partial.unlink(missing_ok=True)
        self._file.close()

    def _lock(self) -> None:
        try:
            import fcntl
        except ImportError:  # no POSIX system
            return
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # a run that ended in between has renamed what was opened
            if os.path.exists(self.partial) and os.path.samestat(
                os.stat(self.partial), os.fstat(self._file.fileno())
            ):
                return
        except BlockingIOError:
            pass
        except OSError:  # some network file systems have no locks
            return
        raise InputError(
            f"{self.partial}: another run is writing it; wait for that one, or give another output"
        )
