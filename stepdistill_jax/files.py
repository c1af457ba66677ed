"""Reading and writing files that a later reader may trust; paths in an object store."""

import contextlib
import functools
import hashlib
import importlib.util
import io
import json
import os
import pathlib
import re
import shutil
import stat
import tempfile
from collections.abc import Iterator
from typing import IO, Any, cast

from stepdistill_jax.errors import InputError

PARTIAL = ".partial"
_STORES = {"gs": "gcsfs", "s3": "s3fs"}  # what fsspec reads each with
# a URL, or what pathlib makes of one of ours: `gs:/bucket/run`
_URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+)://|(gs|s3):/(?!/)")


def _url(path: os.PathLike | str) -> str | None:
    """`SCHEME://REST` of a path that is a URL."""
    text = os.fspath(path)
    if (match := _URL.match(text)) is None:
        return None
    return f"{match[1] or match[2]}://{text[match.end() :].strip('/')}"


def is_remote(path: os.PathLike | str) -> bool:
    """Whether a path is in an object store (`gs://`, `s3://`) rather than on this machine."""
    return (_url(path) or "").partition("://")[0] in _STORES


def as_path(path: os.PathLike | str) -> pathlib.Path:
    """A user's path: pathlib's, or one with its methods (`etils.epath`) in an object store.

    In a store there are no appends, no renames, no locks, and no folder without a file in it.

    Raises:
        InputError: another kind of URL, or a package is missing that reads the store.
    """
    if (url := _url(path)) is None:
        return pathlib.Path(path)
    scheme, _, rest = url.partition("://")
    if scheme not in _STORES:
        raise InputError(f"{url}: a local path, gs://BUCKET/... or s3://BUCKET/... is wanted")
    if not rest:
        raise InputError(f"{url}: the bucket is missing; {scheme}://BUCKET/FOLDER is wanted")
    _prepare_stores()
    if importlib.util.find_spec(_STORES[scheme]) is None:
        raise InputError(f"{url}: {scheme}:// needs a package: pip install {_STORES[scheme]}")
    from etils import epath

    return cast(pathlib.Path, epath.Path(url))


def local_path(path: os.PathLike | str, name: str) -> pathlib.Path:
    """The pathlib path of what must be on this machine.

    Args:
        path: as the user gave it.
        name: what it is called in a message, e.g. `--data-dir`.

    Raises:
        InputError: it is a URL.
    """
    if (url := _url(path)) is not None:
        raise InputError(
            f"{name} {url}: must be on this machine, copy it here; only a workdir may be in a store"
        )
    return pathlib.Path(path)


@functools.cache
def _prepare_stores() -> None:
    """Once, before the first path in a store is touched."""
    # epath would read them by TensorFlow wherever that is installed; predict must not import it
    os.environ.setdefault("EPATH_USE_TF", "false")
    import fsspec.config

    # a listing that is kept does not show what TensorStore or another process wrote since
    for scheme in ("gs", "gcs", "s3"):
        fsspec.config.conf.setdefault(scheme, {}).setdefault("use_listings_cache", False)


@functools.cache
def local_copy(path: pathlib.Path) -> pathlib.Path:
    """A file for a library that reads local ones only: `path`, or a copy that lives as long as we do."""
    if not is_remote(path):
        return path
    import atexit

    folder = pathlib.Path(tempfile.mkdtemp(prefix="stepdistill-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    copy = folder / path.name
    copy.write_bytes(path.read_bytes())
    return copy


def fsync_folder(folder: pathlib.Path) -> None:
    """Makes a rename inside `folder` survive a power loss."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def upload(folder: pathlib.Path, target: pathlib.Path) -> None:
    """Puts every file below a local folder into a store, whole; what is there is replaced."""
    for file in sorted(p for p in folder.rglob("*") if p.is_file()):
        (target / file.relative_to(folder).as_posix()).write_bytes(file.read_bytes())


@contextlib.contextmanager
def atomic_write(path: os.PathLike | str, mode: str = "w") -> Iterator[IO[Any]]:
    """Opens `path`.partial; on success it is fsynced and renamed, on an error `path` stays as it was.

    In an object store the whole file is one put, which is atomic there.
    """
    path = as_path(path)
    if is_remote(path):
        with io.BytesIO() if "b" in mode else io.StringIO() as f:
            yield f
            whole = f.getvalue()
        path.write_bytes(whole if isinstance(whole, bytes) else whole.encode())
        return
    partial = path.with_name(path.name + PARTIAL)
    partial.parent.mkdir(parents=True, exist_ok=True)
    with open(partial, mode, encoding=None if "b" in mode else "utf-8") as f:
        yield f
        f.flush()
        os.fsync(f.fileno())
    os.replace(partial, path)
    fsync_folder(path.parent)


def write_json(path: os.PathLike | str, value: Any) -> None:
    """`value` as indented JSON, atomically."""
    with atomic_write(path) as f:
        json.dump(value, f, indent=2, ensure_ascii=False)
        f.write("\n")


def read_json(path: os.PathLike | str) -> Any:
    """Parsed JSON of a file.

    Raises:
        InputError: the file is missing, not UTF-8, or not JSON; names path and line.
    """
    try:
        return json.loads(as_path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except IsADirectoryError:
        raise InputError(f"{path}: is a folder, a JSON file is wanted") from None
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 ({error.reason} at byte {error.start})") from None
    except json.JSONDecodeError as error:
        raise InputError(f"{path}:{error.lineno}: broken JSON ({error.msg})") from None
    except (ValueError, RecursionError) as error:  # a number of 5,000 digits, 10,000 brackets
        raise InputError(f"{path}: JSON that cannot be read ({error})") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from None


def parse_json_line(raw: bytes) -> dict[str, Any]:
    """The object of one line of a JSON-lines file.

    Raises:
        InputError: it is not UTF-8 or not a JSON object; says what is wrong, without file and line.
    """
    try:
        row = json.loads(raw.decode("utf-8"))
    except UnicodeDecodeError:
        raise InputError("not UTF-8") from None
    except json.JSONDecodeError as error:
        raise InputError(f"broken JSON ({error.msg})") from None
    except (ValueError, RecursionError) as error:  # a number of 5,000 digits, 10,000 brackets
        raise InputError(f"JSON that cannot be read ({error})") from None
    if not isinstance(row, dict):
        raise InputError(f"a JSON object is wanted, got {type(row).__name__}")
    return row


def json_lines(path: os.PathLike | str) -> Iterator[tuple[int, dict[str, Any] | InputError]]:
    """Yields (line number from 1, object or what is wrong with it); blank lines are skipped.

    Raises:
        InputError: there is no such file, or it is one that cannot be read twice; names the path.
    """
    path = local_path(path, "input")
    try:
        # before it is opened: the open of a pipe waits for its writer
        if stat.S_ISDIR(mode := os.stat(path).st_mode):
            raise InputError(f"{path}: is a folder, a JSON-lines file is wanted")
        if not stat.S_ISREG(mode):
            raise InputError(
                f"{path}: is a pipe or device; it is read more than once, so save it to a file first"
            )
        file = open(path, "rb")  # noqa: SIM115  (closed below)
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from None
    with file:
        for number, raw in enumerate(file, 1):
            if number == 1:
                raw = raw.removeprefix(b"\xef\xbb\xbf")
            if not raw.strip():
                continue
            try:
                yield number, parse_json_line(raw)
            except InputError as error:
                yield number, InputError(f"{path}:{number}: {error}")


def read_jsonl(path: os.PathLike | str) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yields (line number from 1, object) of a JSON-lines file; blank lines are skipped.

    Raises:
        InputError: the first thing that is wrong, as `json_lines` has it.
    """
    for number, row in json_lines(path):
        if isinstance(row, InputError):
            raise row
        yield number, row


def check_writable(path: os.PathLike | str, name: str = "") -> None:
    """Refuses a path where no file can be written, before the work whose result goes there.

    Args:
        path: of a file that need not exist, nor its folder.
        name: what the path is called in a message, e.g. `--output`.

    Raises:
        InputError: it is a folder, or lies in one that cannot be written to.
    """
    path, name = local_path(path, name or "output"), f"{name} {path}" if name else f"{path}"
    path = path.absolute()
    if path.is_dir():
        raise InputError(f"{name}: is a folder, a file to write is wanted")
    nearest = next(parent for parent in path.parents if os.path.lexists(parent))
    if not nearest.is_dir():
        raise InputError(f"{name}: cannot be written ({nearest} is no folder)")
    if not os.access(nearest, os.W_OK):
        raise InputError(f"{name}: cannot be written (no permission in {nearest})")


def open_locked(path: pathlib.Path) -> IO[bytes]:
    """Opens `path` to append; no other process can until it is closed.

    Raises:
        InputError: another one has it open.
        OSError: it cannot be written.
    """
    while True:
        file = open(path, "ab")  # noqa: SIM115
        try:
            _lock(file)
            # a run that ended in between has renamed or removed what we opened
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.stat(path), os.fstat(file.fileno())):
                    return file
        except BaseException:
            file.close()
            raise
        file.close()


def _lock(file: IO[bytes]) -> None:
    try:
        import fcntl
    except ImportError:  # no POSIX system
        return
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise InputError(
            f"{file.name}: another run is writing it; wait for that one, or give another output"
        ) from None
    except OSError:  # some network file systems have no locks
        return


def sha256(path: os.PathLike | str) -> str:
    """Hex digest of a file's bytes."""
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def sampled_digest(folder: pathlib.Path) -> str:
    """Hex digest of the names and sizes of all files below a folder, and of pieces spread over each.

    Reads at most 4 MiB of a file: it tells two trainings of a model apart without reading either.
    What does not count: a README.md, and what lies hidden (downloads leave their dates there).
    """
    found = []
    for path in sorted(p for p in folder.rglob("*") if p.is_file() and p.name != "README.md"):
        name = path.relative_to(folder)
        if any(part.startswith(".") for part in name.parts):
            continue
        size = path.stat().st_size
        with open(path, "rb") as f:
            pieces = hashlib.sha256()
            for start in range(0, size, max(4096, -(-size // 1024))):
                f.seek(start)
                pieces.update(f.read(4096))
        found.append([name.as_posix(), size, pieces.hexdigest()])
    return digest(found)


def digest(value: Any) -> str:
    """Hex digest of a JSON-like value; the order of keys does not matter."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()
