"""A file that is written row by row, and gets its name when it is whole."""

import contextlib
import json
import os
import pathlib
from typing import Any

from stepdistill_jax.errors import InputError
from stepdistill_jax.runtime.files import fsync_folder, naming, open_locked, partial_of
from stepdistill_jax.runtime.overwriting import Made

ROWS = Made("annotate", b'{"id": ', ("id", "input", "provenance"))
DEFECTS = Made("annotate", b'{"kind": "', ("kind", "row", "id", "sample", "text"))


def defects_of(output: pathlib.Path) -> pathlib.Path:
    """The list of defects of an output."""
    return output.with_name(f"{output.name.removesuffix('.jsonl')}.defects.jsonl")


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
        self.partial = partial_of(self.path)
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = open_locked(self.partial)
        except OSError as error:
            raise InputError(f"{path}: cannot be written ({error.strerror})") from None
        self._file.truncate(0)

    def add(self, row: dict[str, Any]) -> None:
        """Writes one row."""
        self._rows += 1
        with naming(self.partial):
            self._file.write(json.dumps(row, ensure_ascii=False, allow_nan=False).encode() + b"\n")

    def finish(self) -> None:
        """Gives the file its name."""
        with naming(self.partial):
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
        # a full disk has left rows in the buffer, and was told
        with contextlib.suppress(OSError):
            self._file.close()
