"""Rows that `on_error=skip` left out: the first ones are said, all are listed beside the output."""

import contextlib
import json
import os
import pathlib

import jax

from stepdistill_jax.inference.input_rows import BadRow
from stepdistill_jax.runtime.files import partial_of
from stepdistill_jax.runtime.overwriting import Made
from stepdistill_jax.runtime.progress import log
from stepdistill_jax.runtime.stores import local_path
from stepdistill_jax.runtime.streams import StreamedFile

LIST = Made("predict", b'{"line": ', ("line", "error"))
SHOWN = 20
_MOST_CHARS = 500  # of a message: it may quote the names of all fields


def skipped_of(output: os.PathLike | str) -> pathlib.Path:
    """The list beside an output: JSON lines `line`, `error`."""
    output = local_path(output, "output")
    return output.with_name(output.name + ".skipped.jsonl")


class SkippedRows:
    """Counts bad rows; process 0 also says and lists them.

    A run that goes on reads the input from its start, so the list is always made anew. It gets its
    name with the output, and is there only where rows were skipped.

    Attributes:
        count: of them so far.
    """

    def __init__(self, output: os.PathLike | str):
        self.path = skipped_of(output)
        self._file: StreamedFile | None = None
        self.count = 0

    def add(self, bad: BadRow) -> None:
        """One more."""
        self.count += 1
        if jax.process_index() != 0:
            return
        if self.count <= SHOWN:
            log(f"skipped: {' '.join(str(bad).split())[:_MOST_CHARS]}")
        elif self.count == SHOWN + 1:
            log(f"skipped: more rows, which {self.path.name} will list")
        if self._file is None:
            self._file = StreamedFile(self.path)
        row = {"line": bad.line, "error": bad.reason[:_MOST_CHARS]}
        self._file.write(json.dumps(row).encode() + b"\n")

    def finish(self) -> None:
        """Names the list, or removes that of a former output; on process 0, right before the output."""
        if self._file is None:
            self.path.unlink(missing_ok=True)
            partial_of(self.path).unlink(missing_ok=True)  # of a run that was killed
            return
        self._file.finish()
        self._file = None  # from the output's last rename on, another run may have its own
        log(f"{self.count} bad rows were skipped; all are listed in {self.path}")

    def close(self) -> None:
        """Removes a list that was not finished."""
        if self._file is not None:
            with contextlib.suppress(OSError):  # of a full disk, which was told
                self._file.discard()
