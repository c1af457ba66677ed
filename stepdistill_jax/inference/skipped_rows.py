"""Logs the first rows that `on_error=skip` leaves out, and lists all of them in a file."""

import contextlib
import json
import os
import pathlib

import jax

from stepdistill_jax.inference.input_rows import BadRow
from stepdistill_jax.runtime.files import partial_of
from stepdistill_jax.runtime.overwriting import Made
from stepdistill_jax.runtime.progress import log, translated
from stepdistill_jax.runtime.stores import local_path
from stepdistill_jax.runtime.streams import StreamedFile

LIST = Made("predict", b'{"line": ', ("line", "error"))
SHOWN = 20
_MOST_CHARS = 500  # characters of a message, which may quote the names of all fields


def skipped_of(output: os.PathLike | str) -> pathlib.Path:
    """Returns the path of the list of skipped rows, next to the output.

    Each line of the list is a JSON object with `line` and `error`.
    """
    output = local_path(output, "output")
    return output.with_name(output.name + ".skipped.jsonl")


class SkippedRows:
    """Counts bad rows. Process 0 also logs them and lists them in a file, if there are any.

    A resumed run writes the complete list again.
    """

    def __init__(self, output: os.PathLike | str):
        self.path = skipped_of(output)
        self._file: StreamedFile | None = None
        self.count = 0

    def add(self, bad: BadRow) -> None:
        """Counts a bad row, and adds it to the list."""
        self.count += 1
        if jax.process_index() != 0:
            return
        if self.count <= SHOWN:
            log(f"skipped: {' '.join(str(bad).split())[:_MOST_CHARS]}")
        elif self.count == SHOWN + 1:
            log(
                f"skipped: more rows, which are not logged; {self.path.name} will list all skipped rows"
            )
        if self._file is None:
            self._file = StreamedFile(self.path)
        row = {"line": bad.line, "error": translated(bad.reason)[:_MOST_CHARS]}
        self._file.write(json.dumps(row).encode() + b"\n")

    def finish(self) -> None:
        """Gives the list its final name, or removes an older list if no row was skipped.

        Process 0 calls this right before the output gets its final name.
        """
        if self._file is None:
            self.path.unlink(missing_ok=True)
            partial_of(self.path).unlink(missing_ok=True)  # left by a run that was killed
            return
        self._file.finish()
        self._file = None  # after the output's rename, another run may write its own list
        log(f"{self.count} bad rows were skipped; all are listed in {self.path}")

    def close(self) -> None:
        """Removes an unfinished list."""
        if self._file is not None:
            with contextlib.suppress(OSError):  # a full disk, which was reported already
                self._file.discard()
