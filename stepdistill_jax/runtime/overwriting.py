"""The one rule of every command that writes: it replaces its own files, and no other file.

Before its work a command names the files that it will write (`check_outputs`, `check_folder`). None
may be one of its inputs, and a file that is there must be of its own making.
"""

import contextlib
import dataclasses
import os
import pathlib
import stat
from collections.abc import Collection, Iterable, Mapping, Sequence

from stepdistill_jax.errors import InputError
from stepdistill_jax.runtime.files import (
    MAX_LINE_BYTES,
    check_writable,
    parse_json_line,
    partial_of,
)

_Path = os.PathLike | str


@dataclasses.dataclass(frozen=True)
class Made:
    """Recognises the files that a command writes.

    Attributes:
        by: the command.
        head: bytes that each of them begins with.
        keys: fields of its JSON object, or of the object in its first line.
    """

    by: str
    head: bytes
    keys: Sequence[str] = ()

    def begins(self, path: _Path) -> bool:
        """Whether a file is empty, or the beginning of one that the command writes, or all of it."""
        return self._matches(path, whole=False)

    def wrote(self, path: _Path) -> bool:
        """Whether a file is empty, or one that the command writes."""
        return self._matches(path, whole=True)

    def _matches(self, path: _Path, *, whole: bool) -> bool:
        try:
            with open(path, "rb") as f:
                data = f.read(MAX_LINE_BYTES)
        except FileNotFoundError:  # a run that has just ended removed it
            return True
        except OSError as error:
            raise InputError(
                f"{path}: is there and cannot be read ({error.strerror}), so it is left as it is;"
                " give another name"
            ) from None
        if not data.startswith(self.head):
            return not data or (not whole and self.head.startswith(data))
        for text in (data.split(b"\n", 1)[0], data) if self.keys else ():
            with contextlib.suppress(InputError):
                return set(self.keys) <= parse_json_line(text).keys()
        return not (whole and self.keys)


def check_outputs(
    outputs: Mapping[pathlib.Path, Made],
    inputs: Iterable[_Path | None] = (),
    name: str = "",
    known: Collection[pathlib.Path] = (),
) -> None:
    """Refuses, before the work, files that must not be written.

    Each output is written as its `.partial` first, so both are looked at.

    Args:
        outputs: files on this machine, and what tells them from others.
        inputs: files and folders that are read; None counts for nothing.
        name: what the first output is called in a message, e.g. "`output`".
        known: files that are the command's own whatever they hold; another one says so.

    Raises:
        InputError: one is an input under any of its names, is there and was not written by the same
            command, is a link or a device, or cannot be written.
    """
    inputs = list(inputs)
    for path, made in outputs.items():
        partial = partial_of(path)
        check_writable(path, name)
        check_apart([path, partial], inputs)
        for written, is_ours in ((path, made.wrote), (partial, made.begins)):
            check_plain(written)
            if os.path.exists(written) and written not in known and not is_ours(written):
                raise foreign_file(written, made.by)
        name = ""


def check_apart(written: Iterable[_Path], inputs: Iterable[_Path | None]) -> None:
    """Refuses to write to an input.

    Args:
        written: files that will be written, folders that will be replaced.
        inputs: as in `check_outputs`.

    Raises:
        InputError: an input is one of them or lies in one, whatever links lead there; names both.
    """
    for given in inputs:
        if given is None or "\0" in os.fspath(given):
            continue
        source = pathlib.Path(os.path.realpath(given))
        for path in written:
            if source.is_relative_to(os.path.realpath(path)) or _is_same(path, given):
                what = "holds" if os.path.isdir(path) else "is"
                raise InputError(
                    f"{path}: it {what} the input {given}, and would be written to; rename one of them"
                )


def _is_same(path: _Path, other: _Path) -> bool:
    """Whether two names, hard links among them, lead to one file."""
    try:
        return os.path.samefile(path, other)
    except OSError:
        return False


def check_plain(path: _Path) -> None:
    """Refuses a path where a link, pipe, device or folder is: a file there would take its place.

    Raises:
        InputError: says which.
    """
    if not os.path.lexists(path):
        return
    mode = os.lstat(path).st_mode
    if not stat.S_ISREG(mode):
        kind = (
            "link" if stat.S_ISLNK(mode) else "folder" if stat.S_ISDIR(mode) else "pipe or device"
        )
        raise InputError(f"{path}: is a {kind}, which would be replaced; give another name")


def check_folder(folder: pathlib.Path, index: str, made: Made, names: Iterable[str]) -> None:
    """Refuses a folder with a file of the names of a command that the command did not write.

    Args:
        folder: of the outputs.
        index: file that the command writes first; without it no other one is of its making.
        made: what tells it from others.
        names: of the other files.

    Raises:
        InputError: as `check_outputs`; names the file.
    """
    check_outputs({folder / index: made})
    for path in (folder / name for name in names):
        check_plain(path)
        if path.exists() and not (folder / index).exists():
            raise foreign_file(path, made.by, f" (no {index} beside it)")


def foreign_file(path: _Path, by: str, why: str = "") -> InputError:
    """The refusal of a file that is not ours to replace."""
    return InputError(
        f"{path}: is there and was not written by `{by}`{why}, so it is left as it is; move it away,"
        " or give another name"
    )
