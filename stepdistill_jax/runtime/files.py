"""Reads and writes files safely: outputs appear complete or not at all, and bad inputs raise InputError."""

import collections
import contextlib
import errno
import io
import json
import os
import pathlib
import stat
from collections.abc import Iterator
from typing import IO, Any

from stepdistill_jax.errors import InputError
from stepdistill_jax.runtime.stores import as_path, is_remote, local_path

DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS)
MAX_LINE_BYTES = 16 << 20  # longer lines of a JSON-lines file are refused
TOO_LONG = f"a line of more than {MAX_LINE_BYTES >> 20} MiB; write each row on its own line"
_NO_TEXT = {  # first bytes of files that are not text, and what to do with such a file
    b"\x1f\x8b": "it is a gzip file, so unpack it first",
    b"PK\x03\x04": "it is a zip archive, so unpack it first",
    b"PAR1": "it is a Parquet file, so convert it to JSON lines first",
    b"SQLite format 3": "it is an SQLite file",
    b"\xff\xfe": "it looks like UTF-16, so save it as UTF-8",
    b"\xfe\xff": "it looks like UTF-16, so save it as UTF-8",
}


def fsync(path: os.PathLike | str) -> None:
    """Forces the data of a file, or the file names in a folder, to disk. They then survive a power loss."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextlib.contextmanager
def naming(path: os.PathLike | str) -> Iterator[None]:
    """A context that adds `path` to errors of a full or broken disk.

    When a write to an open file fails, Python's error names no path.
    """
    try:
        yield
    except OSError as error:
        if error.filename is not None or error.errno not in DISK_ERRORS:
            raise
        raise OSError(error.errno, error.strerror, os.fspath(path)) from error


def partial_of(path: os.PathLike | str) -> pathlib.Path:
    """Returns PATH.partial, the path of a file while it is being written."""
    path = local_path(path, "output")
    return path.with_name(path.name + ".partial")


def opener(path: str, flags: int) -> int:
    """Opens a file for writing without following a link or waiting for a pipe. Pass it to `open` as `opener`.

    Raises:
        InputError: the path is a link, hard link, pipe or device.
    """
    refused = InputError(
        f"{path}: is a link, hard link, pipe or device, which is never overwritten; remove it"
    )
    # without O_TRUNC: the content may be somebody's data, so truncate only after the checks below
    wanted = (flags & ~os.O_TRUNC) | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
    try:
        handle = os.open(path, wanted, 0o666)
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.ENXIO):
            raise refused from None
        raise
    try:
        found = os.fstat(handle)
        if not stat.S_ISREG(found.st_mode) or found.st_nlink > 1:
            raise refused
        if flags & os.O_TRUNC:
            os.ftruncate(handle, 0)
    except BaseException:
        os.close(handle)
        raise
    return handle


def publish(file: IO[Any], partial: pathlib.Path, path: pathlib.Path) -> None:
    """Forces the open `file` to disk, and renames it from `partial` to `path`.

    After a power loss, `path` is either complete or unchanged.
    """
    file.flush()
    os.fsync(file.fileno())
    os.replace(partial, path)
    fsync(path.parent)  # the rename is a change of the folder, so a power loss could undo it


@contextlib.contextmanager
def atomic_write(path: os.PathLike | str, mode: str = "w") -> Iterator[IO[Any]]:
    """A context that yields a file to write to, and makes it appear at `path` at the end.

    Until then, the data is in PATH.partial, or in memory if `path` is in an object store. After an error in the
    context, `path` is unchanged.
    """
    path = as_path(path)
    if is_remote(path):
        with io.BytesIO() if "b" in mode else io.StringIO() as f:
            yield f
            whole = f.getvalue()
        path.write_bytes(whole if isinstance(whole, bytes) else whole.encode())
        return
    partial = partial_of(path)
    partial.parent.mkdir(parents=True, exist_ok=True)
    encoding = None if "b" in mode else "utf-8"
    with naming(path), open(partial, mode, encoding=encoding, opener=opener) as f:
        yield f
        publish(f, partial, path)


def write_json(path: os.PathLike | str, value: Any) -> None:
    """Writes `value` as indented JSON, atomically."""
    with atomic_write(path) as f:
        json.dump(value, f, indent=2, ensure_ascii=False)
        f.write("\n")


def read_json(path: os.PathLike | str) -> Any:
    """Returns the parsed JSON of a file.

    Raises:
        InputError: the file is missing, not UTF-8, or not JSON.
    """
    if not is_remote(path):
        check_file(path, "a JSON file")
    try:
        return json.loads(as_path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 ({error.reason} at byte {error.start})") from None
    except json.JSONDecodeError as error:
        raise InputError(f"{path}:{error.lineno}: broken JSON ({error.msg})") from None
    except (ValueError, RecursionError) as error:  # a number of 5,000 digits, 10,000 brackets
        raise InputError(f"{path}: unreadable JSON ({error})") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from None


def parse_json_line(raw: bytes) -> dict[str, Any]:
    """Parses one line of a JSON-lines file.

    Raises:
        InputError: the line is not UTF-8, not a JSON object, or repeats a key. The message does not name the
            line.
    """
    try:
        row = json.loads(raw.decode("utf-8"), object_pairs_hook=_object)
    except UnicodeDecodeError:
        raise InputError(f"not UTF-8{not_text(raw)}") from None
    except json.JSONDecodeError as error:
        what = f"{error.msg.removesuffix(' at')}, column {error.colno}"
        raise InputError(f"broken JSON ({what}){not_text(raw)}") from None
    except (ValueError, RecursionError) as error:  # a number of 5,000 digits, 10,000 brackets
        raise InputError(f"unreadable JSON ({error})") from None
    if not isinstance(row, dict):
        raise InputError(f"expected a JSON object, got {type(row).__name__}")
    return row


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):  # Python would silently take the last one
        counts = collections.Counter(name for name, _ in pairs)
        raise ValueError(f"duplicate key {counts.most_common(1)[0][0]!r} in one object")
    return found


def not_text(raw: bytes) -> str:
    """Returns a hint for a message, such as "; it is a zip archive, so unpack it first", or ""."""
    return next((f"; {what}" for magic, what in _NO_TEXT.items() if raw.startswith(magic)), "")


def check_file(path: os.PathLike | str, wanted: str = "a file") -> None:
    """Checks that `path` is a regular file that may be read.

    Args:
        wanted: kind of the expected file, for the message.

    Raises:
        InputError: there is no such file, or it is something else, or may not be read.
    """
    try:
        mode = os.stat(path).st_mode
    except (FileNotFoundError, ValueError):  # ValueError: a NUL in the name
        raise InputError(f"{path}: no such file") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from None
    if stat.S_ISDIR(mode):
        raise InputError(f"{path}: expected {wanted}, got a folder")
    if not stat.S_ISREG(mode):
        raise InputError(
            f"{path}: is a pipe or device; save it to a file first, since it is read more than once"
        )
    if not os.access(path, os.R_OK):
        raise InputError(f"{path}: cannot be read (no permission)")


def json_lines(path: os.PathLike | str) -> Iterator[tuple[int, dict[str, Any] | InputError]]:
    """Yields (line number from 1, object or error) for each non-blank line of a JSON-lines file.

    Raises:
        InputError: the file does not exist, or is a folder, pipe or device.
    """
    path = local_path(path, "input")
    check_file(path, "a JSON-lines file")
    try:
        with open(path, "rb") as file:
            for number, raw in raw_lines(file):
                if raw is None:
                    yield number, InputError(f"{path}:{number}: {TOO_LONG}")
                    continue
                if number == 1:  # a byte order mark, which some editors write
                    raw = raw.removeprefix(b"\xef\xbb\xbf")
                if not raw.strip():
                    continue
                try:
                    row: dict[str, Any] | InputError = parse_json_line(raw)
                except InputError as error:
                    row = InputError(f"{path}:{number}: {error}")
                yield number, row
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from None


def raw_lines(file: IO[bytes]) -> Iterator[tuple[int, bytes | None]]:
    """Yields (line number from 1, line) for each line of a file, with None for a line that is too long."""
    number = 0
    while raw := file.readline(MAX_LINE_BYTES + 1):
        number += 1
        if len(raw) <= MAX_LINE_BYTES:
            yield number, raw
            continue
        yield number, None
        while raw and not raw.endswith(b"\n"):
            raw = file.readline(MAX_LINE_BYTES)


def read_jsonl(path: os.PathLike | str) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yields (line number from 1, object) for each non-blank line of a JSON-lines file.

    Raises:
        InputError: the first error that `json_lines` yields or raises.
    """
    for number, row in json_lines(path):
        if isinstance(row, InputError):
            raise row
        yield number, row


def check_writable(path: os.PathLike | str, name: str = "", *, folder: bool = False) -> None:
    """Checks that an output can be written at `path`. Call this function before the work begins.

    Args:
        path: where the output will be written. The output and its folder need not exist yet.
        name: name of the parameter in messages, with backticks: "`output`".
        folder: whether the output is a folder.

    Raises:
        InputError: the path cannot be written, or is a folder where a file is expected, or the reverse.
    """
    path, name = local_path(path, name or "output"), f"{name} {path}" if name else f"{path}"
    path = path.absolute()
    if path.is_dir() and not folder:
        raise InputError(f"{name}: expected a file to write, got a folder")
    folders = (path, *path.parents) if folder else path.parents
    nearest = next(parent for parent in folders if os.path.lexists(parent))
    if not nearest.is_dir():
        raise InputError(f"{name}: cannot be written ({nearest} is not a folder)")
    if not os.access(nearest, os.W_OK | os.X_OK):
        read_only = os.statvfs(nearest).f_flag & os.ST_RDONLY  # applies to root, too
        reason = "read-only file system" if read_only else "no permission"
        raise InputError(f"{name}: cannot be written ({reason} in {nearest})")
