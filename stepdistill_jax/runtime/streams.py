"""Output files that grow in PATH.partial and get their name when they are whole."""

import contextlib
import json
import os
import pathlib
import zlib
from collections.abc import Iterator
from typing import IO, Any

from stepdistill_jax.runtime.files import naming, partial_of, publish, read_json, write_json
from stepdistill_jax.runtime.fingerprints import crc32, digest
from stepdistill_jax.runtime.locks import open_locked
from stepdistill_jax.runtime.on_processes import on_process_0
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
    """The files that a `ResumableFile` writes, and those known as ours, for `check_outputs`.

    The partial rows tell whose the sidecar is, and the other way round: one of them may be damaged.
    """
    partial, sidecar = pair = [partial_of(path), sidecar_of(path)]
    # an empty file says nothing of the other one
    ours = (_is_filled(partial) and ROWS.begins(partial)) or (
        _is_filled(sidecar) and SIDECAR.wrote(sidecar)
    )
    made = {local_path(path, "output"): ROWS, sidecar: SIDECAR}
    made |= {_quarantine_path(partial): ROWS, _quarantine_path(sidecar): SIDECAR}
    return made, pair if ours else []


def _is_filled(path: pathlib.Path) -> bool:
    return os.path.isfile(path) and os.path.getsize(path) > 0


def _quarantine_path(path: pathlib.Path) -> pathlib.Path:
    return path.with_name(path.name + ".old")


class StreamedFile:
    """JSON lines that are appended to PATH.partial, from scratch.

    The file is locked while it is open, so a second run on the same output is refused.

    Attributes:
        path: of the file once it is whole.
        partial: where it grows.
        state: `rows` written so far.
    """

    _file: Any = None  # open, in the process that writes

    def __init__(self, path: os.PathLike | str):
        """Opens PATH.partial.

        Raises:
            InputError: it cannot be written there, or another run is writing it.
        """
        self.path, self.partial = pathlib.Path(path), partial_of(path)
        self.state: dict[str, Any] = self._begin()

    def _begin(self) -> dict[str, Any]:
        self._open().truncate(0)
        return {"rows": 0}

    def _open(self) -> IO[bytes]:
        self._file = open_locked(self.partial)
        return self._file

    def add(self, row: dict[str, Any]) -> None:
        """Writes one row; it is on disk when the file is finished."""
        self.write(f"{_to_json(row)}\n".encode())
        self.state["rows"] += 1

    def write(self, data: bytes, *, sync: bool = False) -> None:
        """Appends bytes; with `sync` they survive a power loss once this returns."""
        with naming(self.partial):
            self._file.write(data)
            if sync:
                self._file.flush()
                os.fsync(self._file.fileno())

    def finish(self) -> None:
        """Gives the file its name."""
        with naming(self.partial):
            publish(self._file, self.partial, self.path)
        self._forget()
        self._file.close()

    def discard(self) -> None:
        """Removes PATH.partial: no later run may go on from it."""
        # under the lock, which the close ends: another run may make these files right after it
        self.partial.unlink(missing_ok=True)
        self._forget()
        self._file.close()

    def _forget(self) -> None:
        """Removes what else was kept of the unfinished file."""

    def close(self) -> None:
        """Leaves an unfinished file with rows in it; an empty one is removed."""
        if self._file is None:
            return
        # what a full disk has left in the buffer was told
        with contextlib.suppress(OSError), contextlib.closing(self._file):
            if not self._file.closed and not self.state["rows"]:
                StreamedFile.discard(self)


class ResumableFile(StreamedFile):
    """JSON lines that are appended window by window, and continued where an earlier run stopped.

    A small file beside PATH.partial says how many of its bytes are sound, their checksum, and what
    they were made from (`key`); a run with another key starts from scratch. With several processes
    all make the same calls, process 0 has the file, and what fails there is raised in all.

    Attributes:
        state: on every process: `rows` and `bytes` that are done, and the counts of `append`.
    """

    def __init__(self, path: os.PathLike | str, key: dict[str, str]):
        """Opens PATH.partial and cuts it back to its last whole window.

        Args:
            path: of the output.
            key: digests by the name of what each is of, for a message.

        Raises:
            InputError: as `StreamedFile`.
        """
        self.sidecar, self._key = sidecar_of(path), key
        super().__init__(path)

    def _begin(self) -> dict[str, Any]:
        return on_process_0(self._resume)

    def _resume(self) -> dict[str, Any]:
        file = self._open()
        state = self._valid_state()
        if state and state["key"] != self._key:
            self._quarantine(state)
            file.close()
            state, file = None, self._open()
        state = state or {"key": self._key, "bytes": 0, "rows": 0, "crc32": 0}
        file.truncate(state["bytes"])
        return state

    def _valid_state(self) -> dict[str, Any] | None:
        """What an earlier run left, if its sidecar and its bytes are as it wrote them."""
        size = os.path.getsize(self.partial)
        try:
            state = read_json(self.sidecar)
            if state.pop("digest") != digest(state):
                raise ValueError("another digest")
        # no file, no JSON, no object, no digest, text that is no Unicode
        except (ValueError, AttributeError, KeyError, TypeError, RecursionError):
            state = None
        if state and state["bytes"] <= size:
            with open(self.partial, "rb") as f:
                if crc32(f, state["bytes"]) == state["crc32"]:
                    return state
        if size and os.path.lexists(self.sidecar):
            log(f"warning: {self.partial}: it is damaged; starting from scratch")
        return None

    def _quarantine(self, state: dict[str, Any]) -> None:
        """Renames the rows of something else: to redo them may take hours, and a flag is soon mistyped."""
        for path in (self.partial, self.sidecar):
            os.replace(path, _quarantine_path(path))
        was = " and ".join(n for n, value in self._key.items() if state["key"].get(n) != value)
        log(
            f"warning: {self.partial}: {state['rows']} rows of another {was}; set aside as"
            f" {self.partial.name}.old, starting from scratch"
        )

    def rows(self) -> Iterator[dict[str, Any]]:
        """The rows that an earlier run wrote; none but on process 0, which counts the answers."""
        if self._file is not None:
            with open(self.partial, encoding="utf-8", newline="\n") as f:
                yield from map(json.loads, f)

    def append(self, rows: list[dict[str, Any]], **counts: int) -> None:
        """Writes one window; once this returns, it survives a power loss.

        Args:
            rows: one JSON object each.
            counts: kept in `state` for the next run.
        """
        self.state = on_process_0(lambda: self._append(rows, counts))

    def _append(self, rows: list[dict[str, Any]], counts: dict[str, int]) -> dict[str, Any]:
        data = "".join(f"{_to_json(row)}\n" for row in rows).encode()
        self.write(data, sync=True)
        # before the sidecar says so: a stop signal in between must not make `close` remove the rows
        self.state = {
            "key": self._key,
            "bytes": self.state["bytes"] + len(data),
            "rows": self.state["rows"] + len(rows),
            "crc32": zlib.crc32(data, self.state["crc32"]),
            **counts,
        }
        write_json(self.sidecar, self.state | {"digest": digest(self.state)})
        return self.state

    def finish(self) -> None:
        """Gives the file its name."""
        on_process_0(super().finish)

    def discard(self) -> None:
        """As `StreamedFile.discard`."""
        on_process_0(super().discard)

    def _forget(self) -> None:
        self.sidecar.unlink(missing_ok=True)
        partial_of(self.sidecar).unlink(missing_ok=True)  # a kill while it was being written
