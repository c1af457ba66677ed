"""Writes output files as PATH.partial, which are renamed to PATH when they are complete."""

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
    """Returns the path of the sidecar, a JSON file with the count of valid bytes in `partial_of(output)`."""
    return partial_of(output).with_name(partial_of(output).name + ".json")


def outputs_of(path: os.PathLike | str) -> tuple[dict[pathlib.Path, Made], list[pathlib.Path]]:
    """Returns the arguments `outputs` and `known` of `check_outputs` for a `ResumableFile`.

    If PATH.partial or its sidecar is recognised as an output of `ResumableFile`, `known` contains both paths, so
    that both may be overwritten even if one is damaged. Otherwise, `known` is empty.
    """
    partial, sidecar = pair = [partial_of(path), sidecar_of(path)]
    # an empty file does not prove that the other file is ours
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
    """Writes JSON lines to PATH.partial, which is emptied first and locked while it is open.

    Attributes:
        path: the complete file.
        partial: the growing file.
        state: {"rows": count of rows written so far}.
    """

    _file: Any = None  # open only in the process that writes

    def __init__(self, path: os.PathLike | str):
        """Opens PATH.partial.

        Raises:
            InputError: the file cannot be written, or another run is writing it.
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
        """Writes one row. The row survives a power loss once `finish` has returned."""
        self.write(f"{_to_json(row)}\n".encode())
        self.state["rows"] += 1

    def write(self, data: bytes, *, sync: bool = False) -> None:
        """Appends bytes. With `sync`, they survive a power loss once this method has returned."""
        with naming(self.partial):
            self._file.write(data)
            if sync:
                self._file.flush()
                os.fsync(self._file.fileno())

    def finish(self) -> None:
        """Renames PATH.partial to PATH."""
        with naming(self.partial):
            publish(self._file, self.partial, self.path)
        self._forget()
        self._file.close()

    def discard(self) -> None:
        """Removes PATH.partial, so that no later run continues it."""
        # removed while still locked: after the close another run may create these files
        self.partial.unlink(missing_ok=True)
        self._forget()
        self._file.close()

    def _forget(self) -> None:
        """Removes the files that accompany PATH.partial. A `StreamedFile` has none."""

    def close(self) -> None:
        """Closes an unfinished file. Removes it if it is empty."""
        if self._file is None:
            return
        # closing flushes the buffer again; `write` has already raised the error of a full disk
        with contextlib.suppress(OSError), contextlib.closing(self._file):
            if not self._file.closed and not self.state["rows"]:
                StreamedFile.discard(self)


class ResumableFile(StreamedFile):
    """Writes JSON lines in groups, called windows, and continues where an earlier run stopped.

    A run with a different `key` starts from scratch. All processes must make the same calls. Only process 0
    opens the file, and all processes raise its errors.

    Attributes:
        state: content of the JSON file next to PATH.partial, the same on all processes. It has the numbers of
            `rows` and `bytes` written so far, the `crc32` of these bytes, the `key`, and the `counts` that the
            last call of `append` was given.
    """

    def __init__(self, path: os.PathLike | str, key: dict[str, str]):
        """Opens PATH.partial and truncates it after the last complete window.

        Args:
            path: path of the output.
            key: {name of an input: its digest}. Messages use the names.

        Raises:
            InputError: the file cannot be written, or another run is writing it.
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
        """Returns the state that an earlier run saved, or None if the sidecar or rows are missing or damaged."""
        size = os.path.getsize(self.partial)
        try:
            state = read_json(self.sidecar)
            if state.pop("digest") != digest(state):
                raise ValueError("digest does not match")
        # causes, in this order: no file or not JSON; not an object; no digest; not Unicode; nested too deeply
        except (ValueError, AttributeError, KeyError, TypeError, RecursionError):
            state = None
        if state and state["bytes"] <= size:
            with open(self.partial, "rb") as f:
                if crc32(f, state["bytes"]) == state["crc32"]:
                    return state
        if size and os.path.lexists(self.sidecar):
            log(f"warning: {self.partial}: is damaged, so this run starts from scratch")
        return None

    def _quarantine(self, state: dict[str, Any]) -> None:
        """Renames PATH.partial and its sidecar.

        They are not removed, since the rows may have taken hours to compute.
        """
        for path in (self.partial, self.sidecar):
            os.replace(path, _quarantine_path(path))
        was = " and ".join(n for n, value in self._key.items() if state["key"].get(n) != value)
        log(
            f"warning: {self.partial}: holds {state['rows']} rows from a different {was}; renamed it to"
            f" {self.partial.name}.old, and started from scratch"
        )

    def rows(self) -> Iterator[dict[str, Any]]:
        """Yields the rows that an earlier run wrote. On processes other than 0, yields nothing."""
        if self._file is not None:
            with open(self.partial, encoding="utf-8", newline="\n") as f:
                yield from map(json.loads, f)

    def append(self, rows: list[dict[str, Any]], **counts: int) -> None:
        """Appends rows to PATH.partial as one window. They survive a power loss once this method has returned.

        Args:
            counts: integers that are saved in `state` for the next run.
        """
        self.state = on_process_0(lambda: self._append(rows, counts))

    def _append(self, rows: list[dict[str, Any]], counts: dict[str, int]) -> dict[str, Any]:
        data = "".join(f"{_to_json(row)}\n" for row in rows).encode()
        self.write(data, sync=True)
        # `state` first, then the sidecar: `close` removes a file of 0 rows, and a signal may arrive
        # in between. The checksum continues over windows: crc32(a + b) == crc32(b, crc32(a)).
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
        """Renames PATH.partial to PATH."""
        on_process_0(super().finish)

    def discard(self) -> None:
        """Removes PATH.partial and its sidecar, so that no later run continues it."""
        on_process_0(super().discard)

    def _forget(self) -> None:
        self.sidecar.unlink(missing_ok=True)
        partial_of(self.sidecar).unlink(missing_ok=True)  # left by a kill during its write
