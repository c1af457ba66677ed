"""A streamed output file: `.partial` until it is whole, and continued where an earlier run stopped."""

import json
import os
import pathlib
from collections.abc import Callable
from typing import Any

from stepdistill_jax.errors import InputError
from stepdistill_jax.files import (
    PARTIAL,
    check_writable,
    fsync_folder,
    open_locked,
    read_json,
    write_json,
)
from stepdistill_jax.inference.together import on_first


class PartialOutput:
    """JSON lines that are appended window by window.

    A small file beside OUTPUT.partial says how many of its bytes are sound, and what it was made
    from (`key`); a run with another key starts anew. The file is locked while it is open, so a
    second run on the same output is refused.
    """

    def __init__(self, path: os.PathLike | str, key: str):
        """Opens OUTPUT.partial and cuts it back to its last whole window.

        Raises:
            InputError: the output cannot be written there, or another run is writing it.
        """
        self.path = pathlib.Path(path)
        self.partial = self.path.with_name(self.path.name + PARTIAL)
        self.sidecar = self.path.with_name(self.path.name + PARTIAL + ".json")
        self._key = key
        check_writable(path)
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = open_locked(self.partial)
        except OSError as error:
            raise InputError(f"{path}: cannot be written ({error.strerror})") from None
        self.state = self._sound_state()
        self._file.truncate(self.state["bytes"])

    def _sound_state(self) -> dict[str, Any]:
        try:
            state = read_json(self.sidecar)
        except InputError:
            state = None
        if not isinstance(state, dict) or state.get("key") != self._key:
            state = {"bytes": 0}
        if 0 < state["bytes"] <= os.path.getsize(self.partial):
            return state
        return {"key": self._key, "bytes": 0, "rows": 0}

    def rows(self) -> list[dict[str, Any]]:
        """The rows that an earlier run wrote."""
        with open(self.partial, encoding="utf-8") as f:
            return [json.loads(line) for line in f]

    def append(self, rows: list[dict[str, Any]], **counts: int) -> None:
        """Writes one window; once this returns, it survives a power loss.

        Args:
            rows: one JSON object each.
            counts: kept in `state` for the next run.
        """
        for row in rows:
            self._file.write(json.dumps(row, ensure_ascii=False, allow_nan=False).encode() + b"\n")
        self._file.flush()
        os.fsync(self._file.fileno())
        self.state = {
            "key": self._key,
            "bytes": self._file.tell(),
            "rows": self.state["rows"] + len(rows),
            **counts,
        }
        write_json(self.sidecar, self.state)

    def finish(self) -> None:
        """Gives the output its name."""
        self._file.flush()
        os.fsync(self._file.fileno())
        os.replace(self.partial, self.path)
        fsync_folder(self.path.parent)
        self.sidecar.unlink(missing_ok=True)
        self._file.close()

    def discard(self) -> None:
        """Removes what is there: no later run may go on from it."""
        # under the lock, which the close ends: another run may make these files right after it
        self.partial.unlink(missing_ok=True)
        self.sidecar.unlink(missing_ok=True)
        self._file.close()

    def close(self) -> None:
        """Leaves what is there for a later run; an empty beginning is removed."""
        if not self._file.closed and self.state["rows"] == 0:
            self.discard()
        self._file.close()


class SharedOutput:
    """A `PartialOutput` of several processes: process 0 has the file, all make the same calls.

    What fails on process 0 is raised on all. With one process it is the `PartialOutput`.

    Attributes:
        path: of the output.
        state: of the file, on every process: `rows` that are done, and the counts of `append`.
    """

    def __init__(self, path: os.PathLike | str, key: str):
        """As `PartialOutput`."""
        self.path = pathlib.Path(path)
        self._partial: PartialOutput | None = None

        def open_partial() -> dict[str, Any]:
            self._partial = PartialOutput(path, key)
            return self._partial.state

        self.state: dict[str, Any] = on_first(open_partial)

    def rows(self) -> list[dict[str, Any]]:
        """The rows that an earlier run wrote; none but on process 0, which counts the answers."""
        return self._partial.rows() if self._partial else []

    def append(self, rows: list[dict[str, Any]], **counts: int) -> None:
        """As `PartialOutput.append`."""

        def append(partial: PartialOutput) -> dict[str, Any]:
            partial.append(rows, **counts)
            return partial.state

        self.state = self._do(append)

    def finish(self) -> None:
        """As `PartialOutput.finish`."""
        self._do(PartialOutput.finish)

    def discard(self) -> None:
        """As `PartialOutput.discard`."""
        self._do(PartialOutput.discard)

    def close(self) -> None:
        """As `PartialOutput.close`; waits for nobody, so it may be called while an error is raised."""
        if self._partial:
            self._partial.close()

    def _do(self, action: Callable[[PartialOutput], Any]) -> Any:
        return on_first(lambda: action(self._partial) if self._partial else None)
