"""A streamed output file: `.partial` until it is whole, and continued where an earlier run stopped."""

import contextlib
import json
import os
import pathlib
import zlib
from collections.abc import Callable, Iterator
from typing import Any

from stepdistill_jax.errors import InputError
from stepdistill_jax.runtime.files import fsync_folder, naming, partial_of, read_json, write_json
from stepdistill_jax.runtime.fingerprints import digest
from stepdistill_jax.runtime.locks import open_locked
from stepdistill_jax.runtime.on_processes import on_first
from stepdistill_jax.runtime.overwriting import Made
from stepdistill_jax.runtime.progress import log
from stepdistill_jax.runtime.stores import local_path

ROWS = Made("predict", b'{"id": ', ("id", "label", "score"))
SIDECAR = Made("predict", b'{\n  "key": {', ("key", "bytes", "rows", "crc32", "digest"))
_to_json = json.JSONEncoder(ensure_ascii=False, allow_nan=False).encode


def sidecar_of(output: os.PathLike | str) -> pathlib.Path:
    """Where it is kept what is sound in `partial_of`."""
    return partial_of(output).with_name(partial_of(output).name + ".json")


def outputs_of(path: os.PathLike | str) -> tuple[dict[pathlib.Path, Made], list[pathlib.Path]]:
    """The files that a `PartialOutput` writes, and those known as ours, for `check_outputs`.

    The partial rows tell whose the sidecar is, and the other way round: one of them may be damaged.
    """
    partial, sidecar = pair = [partial_of(path), sidecar_of(path)]
    # an empty file says nothing of the other one
    ours = (_is_filled(partial) and ROWS.begins(partial)) or (
        _is_filled(sidecar) and SIDECAR.wrote(sidecar)
    )
    made = {local_path(path, "output"): ROWS, sidecar: SIDECAR}
    made |= {_aside(partial): ROWS, _aside(sidecar): SIDECAR}
    return made, pair if ours else []


def _is_filled(path: pathlib.Path) -> bool:
    return os.path.isfile(path) and os.path.getsize(path) > 0


def _aside(path: pathlib.Path) -> pathlib.Path:
    return path.with_name(path.name + ".old")


class PartialOutput:
    """JSON lines that are appended window by window.

    A small file beside OUTPUT.partial says how many of its bytes are sound, their checksum, and what
    they were made from (`key`); a run with another key starts anew. The file is locked while it is
    open, so a second run on the same output is refused.

    Attributes:
        path: of the output.
        state: `rows` and `bytes` that are done, and the counts of `append`.
    """

    def __init__(self, path: os.PathLike | str, key: dict[str, str]):
        """Opens OUTPUT.partial and cuts it back to its last whole window.

        Args:
            path: of the output.
            key: digests by the name of what each is of, for a message.

        Raises:
            InputError: the output cannot be written there, or another run is writing it.
        """
        self.path = pathlib.Path(path)
        self.partial, self.sidecar = partial_of(path), sidecar_of(path)
        self._open()
        state = self._sound_state()
        if state and state["key"] != key:
            self._set_aside(state, key)
            state = None
        self.state = state or {"key": key, "bytes": 0, "rows": 0, "crc32": 0}
        self._file.truncate(self.state["bytes"])

    def _open(self) -> None:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = open_locked(self.partial)
        except OSError as error:
            raise InputError(f"{self.path}: cannot be written ({error.strerror})") from None

    def _sound_state(self) -> dict[str, Any] | None:
        """What an earlier run left, if its sidecar and its bytes are as it wrote them."""
        try:
            state = read_json(self.sidecar)
            if state.pop("digest") != digest(state):
                raise ValueError("another digest")
        # no file, no JSON, no object, no digest, text that is no Unicode
        except (ValueError, AttributeError, KeyError, TypeError, RecursionError):
            state = None
        if state and _crc32(self.partial, state["bytes"]) == state["crc32"]:
            return state
        if os.path.getsize(self.partial) and os.path.lexists(self.sidecar):
            log(f"warning: {self.partial}: it is not as it was written; begun anew")
        return None

    def _set_aside(self, state: dict[str, Any], key: dict[str, str]) -> None:
        """Renames the rows of something else: to redo them may take hours, and a flag is soon mistyped."""
        for path in (self.partial, self.sidecar):
            os.replace(path, _aside(path))
        was = " and ".join(name for name in key if state["key"].get(name) != key[name])
        log(
            f"warning: {self.partial}: {state['rows']} rows of another {was}; set aside as"
            f" {self.partial.name}.old, begun anew"
        )
        self._file.close()
        self._open()

    def rows(self) -> Iterator[dict[str, Any]]:
        """The rows that an earlier run wrote."""
        with open(self.partial, encoding="utf-8", newline="\n") as f:
            for line in f:
                yield json.loads(line)

    def append(self, rows: list[dict[str, Any]], **counts: int) -> None:
        """Writes one window; once this returns, it survives a power loss.

        Args:
            rows: one JSON object each.
            counts: kept in `state` for the next run.
        """
        data = "".join(f"{_to_json(row)}\n" for row in rows).encode()
        with naming(self.partial):
            self._file.write(data)
            self._file.flush()
            os.fsync(self._file.fileno())
        self.state = {
            "key": self.state["key"],
            "bytes": self.state["bytes"] + len(data),
            "rows": self.state["rows"] + len(rows),
            "crc32": zlib.crc32(data, self.state["crc32"]),
            **counts,
        }
        write_json(self.sidecar, self.state | {"digest": digest(self.state)})

    def finish(self) -> None:
        """Gives the output its name."""
        self._file.flush()
        os.fsync(self._file.fileno())
        os.replace(self.partial, self.path)
        fsync_folder(self.path.parent)
        self._remove_sidecar()
        self._file.close()

    def discard(self) -> None:
        """Removes what is there: no later run may go on from it."""
        # under the lock, which the close ends: another run may make these files right after it
        self.partial.unlink(missing_ok=True)
        self._remove_sidecar()
        self._file.close()

    def _remove_sidecar(self) -> None:
        self.sidecar.unlink(missing_ok=True)
        partial_of(self.sidecar).unlink(missing_ok=True)  # a kill while it was being written

    def close(self) -> None:
        """Leaves what is there for a later run; an empty beginning is removed."""
        # what a full disk has left in the buffer is of a window that is not sound, and was told
        with contextlib.suppress(OSError):
            if not self._file.closed and self.state["rows"] == 0:
                self.discard()
        with contextlib.suppress(OSError):
            self._file.close()


def _crc32(path: pathlib.Path, size: int) -> int | None:
    """Of the first bytes of a file; None where it has fewer."""
    checksum = 0
    with open(path, "rb") as f:
        while size and (data := f.read(min(size, 2**20))):
            checksum, size = zlib.crc32(data, checksum), size - len(data)
    return None if size else checksum


class SharedOutput:
    """A `PartialOutput` of several processes: process 0 has the file, all make the same calls.

    What fails on process 0 is raised on all. With one process it is the `PartialOutput`.

    Attributes:
        path: of the output.
        state: of the file, on every process: `rows` that are done, and the counts of `append`.
    """

    def __init__(self, path: os.PathLike | str, key: dict[str, str]):
        """As `PartialOutput`."""
        self.path = pathlib.Path(path)
        self._partial: PartialOutput | None = None

        def open_partial() -> dict[str, Any]:
            self._partial = PartialOutput(path, key)
            return self._partial.state

        self.state: dict[str, Any] = on_first(open_partial)

    def rows(self) -> Iterator[dict[str, Any]]:
        """The rows that an earlier run wrote; none but on process 0, which counts the answers."""
        return self._partial.rows() if self._partial else iter(())

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
