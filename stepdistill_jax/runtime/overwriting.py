"""Makes every command replace only files that the same command wrote.

Before a command starts its work, it passes the paths of its outputs to `check_outputs` or `check_folder`. No
output may be an input of the command.
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
        by: name of the command.
        head: first bytes of each file.
        keys: keys that a JSON file, or the first line of a JSON-lines file, must have.
    """

    by: str
    head: bytes
    keys: Sequence[str] = ()

    def begins(self, path: _Path) -> bool:
        """Returns whether a file is empty, or is a complete or partial output of the command."""
        return self._matches(path, whole=False)

    def wrote(self, path: _Path) -> bool:
        """Returns whether a file is empty, or was completely written by the command."""
        return self._matches(path, whole=True)

    def _matches(self, path: _Path, *, whole: bool) -> bool:
        try:
            with open(path, "rb") as f:
                data = f.read(MAX_LINE_BYTES)
        except FileNotFoundError:  # a run that has just ended removed it
            return True
        except OSError as error:
            raise InputError(
                f"{path}: exists but cannot be read ({error.strerror}), so it is not overwritten;"
                " choose another name"
            ) from None
        # a partial file may be shorter than the head: then it must be the head's beginning
        if not data.startswith(self.head):
            return not data or (not whole and self.head.startswith(data))
        # the first line of a JSON-lines file, or a complete JSON file
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
    """Checks that outputs may be overwritten. Call this function before the work begins.

    For each output PATH, PATH.partial is checked, too.

    Args:
        outputs: {path on this machine: a `Made` for the command that will write this file}.
        inputs: files and folders; None is ignored.
        name: parameter with which the user named the first output, such as "`output`". Messages contain it.
        known: files that may be overwritten, whatever they contain.

    Raises:
        InputError: an output would overwrite an input, was not written by its command, is not a regular file,
            cannot be written, or is named .csv or .tsv.
    """
    inputs = list(inputs)
    for path, made in outputs.items():
        if made.keys and path.suffix.lower() in (".csv", ".tsv"):
            kind, suffix = (
                ("JSON", ".json") if made.head[:2] == b"{\n" else ("JSON lines", ".jsonl")
            )
            raise InputError(
                f"{path}: `{made.by}` writes {kind}; name the output {path.with_suffix(suffix).name}"
            )
        partial = partial_of(path)
        check_writable(path, name)
        check_apart([path, partial], inputs)
        for written, is_ours in ((path, made.wrote), (partial, made.begins)):
            check_plain(written)
            if os.path.exists(written) and written not in known and not is_ours(written):
                raise foreign_file(written, made.by)
        name = ""  # the user named only the first output


def check_apart(written: Iterable[_Path], inputs: Iterable[_Path | None]) -> None:
    """Checks that a command does not overwrite its inputs.

    Args:
        written: files to write and folders to replace.
        inputs: as in `check_outputs`.

    Raises:
        InputError: an input is one of the `written` files or folders, or lies in one of these folders. Links are
            followed.
    """
    for given in inputs:
        if given is None or "\0" in os.fspath(given):
            continue
        source = pathlib.Path(os.path.realpath(given))
        for path in written:
            if source.is_relative_to(os.path.realpath(path)) or _is_same(path, given):
                what = "holds" if os.path.isdir(path) else "is"
                raise InputError(
                    f"{path}: it {what} the input {given}, which would be overwritten; rename one of them"
                )


def _is_same(path: _Path, other: _Path) -> bool:
    """Returns whether two paths lead to the same file, directly or through links."""
    try:
        return os.path.samefile(path, other)
    except OSError:
        return False


def check_plain(path: _Path) -> None:
    """Raises InputError if an output at `path` would replace a link, folder, pipe or device."""
    if not os.path.lexists(path):
        return
    mode = os.lstat(path).st_mode
    if not stat.S_ISREG(mode):
        kind = (
            "link" if stat.S_ISLNK(mode) else "folder" if stat.S_ISDIR(mode) else "pipe or device"
        )
        raise InputError(f"{path}: is a {kind}, which would be replaced; choose another name")


def check_folder(folder: pathlib.Path, index: str, made: Made, names: Iterable[str]) -> None:
    """Checks that the outputs in a folder replace only files of the same command.

    Args:
        index: name of the file that the command writes first.
        names: names of the command's other files. If the index file is absent, none of them may exist.

    Raises:
        InputError: as for `check_outputs`.
    """
    check_outputs({folder / index: made})
    for path in (folder / name for name in names):
        check_plain(path)
        if path.exists() and not (folder / index).exists():
            raise foreign_file(path, made.by, f" (no {index} next to it)")


def foreign_file(path: _Path, by: str, why: str = "") -> InputError:
    """Returns the error for a file that the command `by` did not write and must not replace."""
    return InputError(
        f"{path}: exists and was not written by `{by}`{why}, so it is not overwritten; move it away,"
        " or choose another name"
    )
