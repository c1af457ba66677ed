"""A path in an object store, whose methods raise an error if the store does not answer.

gcsfs itself reports an unreachable folder as missing, so an existing run would look like a new one.
"""

import dataclasses
from collections.abc import Iterator

from etils.epath import gpath, stat_utils

from stepdistill_jax.runtime.stores import store_errors


class _Stat(stat_utils.StatResult):
    """The result of epath's `stat`, with the size also in `st_size`, as in pathlib."""

    @property
    def st_size(self) -> int:
        return self.length


class StorePath(gpath.PosixGPath):
    """An `epath.Path` for `gs://` URLs. Errors of the store's client become `StoreError`s."""

    def stat(self) -> _Stat:
        with store_errors(self):
            found = super().stat()
        return _Stat(**{f.name: getattr(found, f.name) for f in dataclasses.fields(found)})

    def _is_folder(self) -> bool | None:
        try:
            return self.stat().is_directory
        except FileNotFoundError:
            return None

    def exists(self) -> bool:
        return self._is_folder() is not None

    def is_dir(self) -> bool:
        return self._is_folder() is True

    def is_file(self) -> bool:
        return self._is_folder() is False

    def iterdir(self) -> Iterator["StorePath"]:
        with store_errors(self):
            yield from list(super().iterdir())

    def read_bytes(self) -> bytes:
        with store_errors(self):
            return super().read_bytes()

    def read_text(self, encoding: str | None = None) -> str:
        with store_errors(self):
            return super().read_text(encoding)

    def write_bytes(self, data: bytes) -> int:
        with store_errors(self):
            return super().write_bytes(data)

    def unlink(self, missing_ok: bool = False) -> None:
        with store_errors(self):
            super().unlink(missing_ok)
