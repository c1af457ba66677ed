"""Writes and checks the manifest of a saved step: its metrics, and the sizes and digests of its files.

A step without a manifest is incomplete. A step is damaged if its files do not match the manifest, or if its folder
is named after another step.
"""

import json
import os
import pathlib
import re
import stat
import zlib
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from stepdistill_jax.runtime.channel import Channel
from stepdistill_jax.runtime.checkpoints.reading import digests, digests_by_all
from stepdistill_jax.runtime.files import atomic_write
from stepdistill_jax.runtime.fingerprints import digest
from stepdistill_jax.runtime.on_processes import MAIN, on_process_0
from stepdistill_jax.runtime.progress import log
from stepdistill_jax.runtime.stores import is_remote, store_errors

MANIFEST = "manifest.json"
COMMITTED = "commit_success.txt"  # Orbax writes it last in a store, where folders cannot be renamed
DELETED = ".deleted"  # folder to which Orbax moves steps before it removes them
UNSEALED = f"no {MANIFEST}, so its save did not finish"
DAMAGED, UNFINISHED = "damaged", "unfinished"
# A store has checksums of its own, so only files of at most this many bytes are read for a digest
READ_IN_STORE = 64 * 1024
_STEP = re.compile(r"0|[1-9][0-9]*")  # folder names that Orbax reads as steps
_QUARANTINED = re.compile(rf"([0-9]+)\.({DAMAGED}|{UNFINISHED})-([0-9]+)")


class CheckpointError(Exception):
    """A step cannot be saved or restored, or all saved steps are damaged."""


class SavedStep(NamedTuple):
    """A folder that Orbax reads as a step.

    Attributes:
        number: count of updates.
        metrics: None if the manifest cannot be read.
        size: bytes of all files.
        problem: the first defect, such as `UNSEALED` or "FILE: missing", or None.
    """

    number: int
    folder: pathlib.Path
    metrics: dict[str, Any] | None
    size: int
    problem: str | None


def seal(step_folder: pathlib.Path, metrics: dict[str, Any], channel: Channel = MAIN) -> None:
    """Writes the manifest of a step that Orbax has finished.

    All processes must call this function, and none returns before the manifest is written. No other thread may
    use `channel` at the same time.
    """
    sizes = on_process_0(lambda: _files(step_folder), channel)
    to_read = {name: sizes[name] for name in _to_read(step_folder, sizes)}
    found = digests_by_all(step_folder, to_read, channel)

    def write() -> None:
        read = found | digests(step_folder, to_read.keys() - found.keys())
        files = {name: [size, read.get(name)] for name, size in sizes.items()}
        _write(step_folder, {"metrics": metrics, "files": files})

    on_process_0(write, channel)


def reseal(step_folder: pathlib.Path, metrics: dict[str, Any]) -> None:
    """Atomically replaces the metrics of a sealed step."""
    _write(step_folder, _read(step_folder) | {"metrics": metrics})


def defect(step_folder: pathlib.Path, *, below: str = "") -> str | None:
    """Returns the first difference between a step's files and the manifest, such as "FILE: missing", or None.

    Reads only the files in the step's subfolder `below`, such as `params`. If `below` is "", reads all files.
    """
    try:
        wanted = _wanted(step_folder, below)
    except ValueError as error:
        return str(error)
    return _difference(step_folder, wanted, {})


def defect_by_all(step_folder: pathlib.Path) -> str | None:
    """Returns what `defect` returns, but each process reads only a share of the files.

    All processes must call this function, and all get the same result.
    """

    def look() -> tuple[dict[str, list[Any]], str | None]:
        try:
            return _wanted(step_folder, ""), None
        except ValueError as error:
            return {}, str(error)

    wanted, problem = on_process_0(look)
    if problem is not None:
        return problem
    sizes = {name: size for name, (size, crc) in wanted.items() if crc is not None}
    found = digests_by_all(step_folder, sizes, MAIN)
    return on_process_0(lambda: _difference(step_folder, wanted, found))


def _wanted(step_folder: pathlib.Path, below: str) -> dict[str, list[Any]]:
    """Returns an item's manifest entries as {name: [size, crc32]}, after comparing names and sizes with the files."""
    files = _read(step_folder)["files"]
    wanted = {n: w for n, w in files.items() if n.startswith(f"{below}/" if below else "")}
    if problem := _other_size(wanted, _files(step_folder)):
        raise ValueError(problem)
    return wanted


def _difference(
    step_folder: pathlib.Path, wanted: dict[str, list[Any]], found: dict[str, str]
) -> str | None:
    """Returns a message for the first file with changed bytes, or None.

    A file whose digest in `found` is missing or wrong is read again, since another host may have misread it.
    """
    names = [n for n, (_, crc) in wanted.items() if crc is not None]
    try:
        again = [n for n in names if found.get(n) != wanted[n][1]]
        found = found | digests(step_folder, again)
    except OSError as error:
        return f"{error.filename or step_folder}: cannot be read ({error.strerror or error})"
    for name in names:
        if found[name] != wanted[name][1]:
            return f"{name}: its bytes have changed (expected crc32 {wanted[name][1]}, got {found[name]})"
    return None


def files_digest(step_folder: pathlib.Path, below: str) -> str | None:
    """Returns a digest of the manifest's entries for the subfolder `below`; None if the manifest is unreadable."""
    try:
        files = _read(step_folder)["files"]
    except ValueError:
        return None
    return digest({name: of for name, of in files.items() if name.startswith(f"{below}/")})


def saved(folder: pathlib.Path) -> list[SavedStep]:
    """Returns the steps in a `checkpoints` folder, oldest first. Checks only names and sizes of files."""
    numbers = [int(p.name) for p in _folders(folder) if _STEP.fullmatch(p.name)]
    steps = [_look(folder / str(number)) for number in sorted(numbers)]
    # a live run may have removed a step in the meantime
    return [s for s in steps if s.problem is None or s.folder.exists()]


def quarantined(folder: pathlib.Path) -> list[pathlib.Path]:
    """Returns the folders that `quarantine_damaged` has renamed, sorted by name."""
    return sorted(p for p in _folders(folder) if _QUARANTINED.fullmatch(p.name))


def quarantine_damaged(folder: pathlib.Path) -> int | None:
    """Renames damaged and unfinished steps, so that no run resumes from them, and logs each one.

    All processes must call this function. For steps older than the newest good one, only the names and sizes of
    the files are checked. A step without a manifest is unfinished if it is the newest, and otherwise damaged.

    Returns:
        The newest good step, or None if no save has ever finished.

    Raises:
        CheckpointError: there are damaged steps, and no good one.
        OSError: a step cannot be renamed.
    """
    # Reads the steps whose names and sizes are right, newest first, until one is good. Example: `problems` is
    # {1: None, 2: None, 3: None}, and step 3 turns out to be damaged. Then step 2 is read. If it is good,
    # step 1 is not read.
    good, problems = None, dict(on_process_0(lambda: _looked_at(folder)))
    for number in reversed(list(problems)):
        if problems[number] is None and good is None:
            problems[number] = defect_by_all(folder / str(number))
            good = number if problems[number] is None else None
    on_process_0(lambda: _quarantine(folder, problems, good))
    return good


def _looked_at(folder: pathlib.Path) -> list[tuple[int, str | None]]:
    """Returns (number, problem or None) for each saved step, oldest first.

    In a store, steps that Orbax has not committed are left out, since Orbax removes them itself.
    """
    steps = [
        s
        for s in saved(folder)
        if not is_remote(folder) or (s.folder / COMMITTED).exists()  # else Orbax removes it
    ]
    return [(s.number, s.problem) for s in steps]


def _quarantine(folder: pathlib.Path, problems: Mapping[int, str | None], good: int | None) -> None:
    newest = max((s.number for s in saved(folder)), default=None)
    for number, problem in reversed(list(problems.items())):
        if problem is not None:
            # a save starts only after the previous step is sealed
            cut_off = problem == UNSEALED and number == newest
            target = _move(folder / str(number), UNFINISHED if cut_off else DAMAGED)
            log(f"warning: checkpoint {folder / str(number)}: {problem}; renamed to {target.name}")
    damaged = [p.name for p in quarantined(folder) if DAMAGED in p.name]
    if good is None and damaged:
        raise CheckpointError(
            f"{folder}: has no good checkpoint to resume from: all are damaged ({', '.join(damaged)});"
            " copy a good one from a backup to this folder, named by its step number, or use another `workdir`"
        )


def purge(folder: pathlib.Path) -> None:
    """Removes the steps that Orbax has moved to `DELETED`."""
    if is_remote(folder):
        return
    import shutil

    shutil.rmtree(folder / DELETED, ignore_errors=True)


def _look(step_folder: pathlib.Path) -> SavedStep:
    metrics, sizes = None, _files(step_folder)
    try:
        manifest = _read(step_folder)
        metrics, problem = manifest["metrics"], _other_size(manifest["files"], sizes)
    except ValueError as error:
        problem = str(error)
    return SavedStep(int(step_folder.name), step_folder, metrics, sum(sizes.values()), problem)


def _other_size(wanted: dict[str, list[Any]], sizes: dict[str, int]) -> str | None:
    for name, (size, _) in wanted.items():
        if name not in sizes:
            return f"{name}: missing"
        if sizes[name] != size:
            return f"{name}: expected {size} bytes, got {sizes[name]}"
    return None


def _text(body: dict[str, Any]) -> str:
    """Returns the manifest's text: `body` as JSON with its crc32 as an additional key."""
    crc = f"{zlib.crc32(json.dumps(body, sort_keys=True).encode()):08x}"
    return json.dumps({**body, "crc32": crc}, sort_keys=True, indent=1) + "\n"


def _write(step_folder: pathlib.Path, body: dict[str, Any]) -> None:
    with atomic_write(step_folder / MANIFEST) as f:
        f.write(_text(body))


def _read(step_folder: pathlib.Path) -> dict[str, Any]:
    """Returns the manifest of a step. Raises a ValueError that names the defect."""
    path = step_folder / MANIFEST
    try:
        if (
            not is_remote(path) and path.exists() and not path.is_file()
        ):  # reading a pipe would block
            raise ValueError(f"{MANIFEST}: is a pipe or device")
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ValueError(UNSEALED) from None
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{MANIFEST}: cannot be read ({error})") from None
    try:
        body = json.loads(text)
        del body["crc32"]
        same = _text(body) == text  # every byte counts, white space included
    except (ValueError, KeyError, TypeError, RecursionError):
        same = False
    if not same:
        raise ValueError(f"{MANIFEST}: its bytes have changed")
    if not _is_manifest(body):
        raise ValueError(f"{MANIFEST}: was not written by stepdistill")
    if (number := str(body["metrics"]["step"])) != step_folder.name:
        raise ValueError(f"{MANIFEST}: belongs to step {number}; rename the folder to {number}")
    return body


def _is_manifest(body: Any) -> bool:
    """Returns whether `body` has the keys and types that `seal` writes.

    A file from another program could have a correct crc32 but other keys or types.
    """
    metrics, files = body.get("metrics"), body.get("files")
    if body.keys() != {"metrics", "files"} or not all(
        isinstance(x, dict) for x in (metrics, files)
    ):
        return False
    if type(metrics.get("step")) is not int:
        return False
    ranked = ("label_accuracy", "label_loss") if metrics.get("validated") else ()
    order = metrics.get("rank", [0, 0])
    if not isinstance(order, list) or len(order) != 2:
        return False
    if not all(type(x) in (int, float) for x in [*map(metrics.get, ranked), *order]):
        return False
    return all(
        isinstance(entry, list)
        and len(entry) == 2
        and type(entry[0]) is int
        and isinstance(entry[1], str | None)
        for entry in files.values()
    )


def _folders(folder: pathlib.Path) -> list[pathlib.Path]:
    if not folder.is_dir():
        return []
    return [p for p in folder.iterdir() if p.is_dir()]


def _files(step_folder: pathlib.Path) -> dict[str, int]:
    """Returns {relative path: size in bytes} of a step's regular files, without the manifest."""
    if is_remote(step_folder):
        import fsspec

        with store_errors(step_folder):
            store, root = fsspec.core.url_to_fs(os.fspath(step_folder))
            listed = store.find(root, detail=True)
        sizes = {n.removeprefix(root).lstrip("/"): info["size"] for n, info in listed.items()}
    else:
        sizes = {}
        for folder, _, names in os.walk(step_folder):
            for path in (pathlib.Path(folder, name) for name in names):
                try:
                    found = path.stat()
                except FileNotFoundError:  # a live run has just removed the step
                    continue
                if stat.S_ISREG(found.st_mode):  # reading a pipe would block
                    sizes[path.relative_to(step_folder).as_posix()] = found.st_size
    return {n: sizes[n] for n in sorted(sizes) if not n.startswith(MANIFEST)}


def _to_read(step_folder: pathlib.Path, sizes: dict[str, int]) -> Iterable[str]:
    remote = is_remote(step_folder)
    return [name for name, size in sizes.items() if not remote or size <= READ_IN_STORE]


def _move(step_folder: pathlib.Path, kind: str) -> pathlib.Path:
    """Renames a step's folder so that Orbax does not read it as a step: `300` becomes `300.damaged-1`."""
    # one more than the highest number in use: after 300.damaged-1 and 300.damaged-2 comes 300.damaged-3
    prefix = f"{step_folder.name}.{kind}-"
    before = [p.name for p in quarantined(step_folder.parent) if p.name.startswith(prefix)]
    number = max((int(name.removeprefix(prefix)) for name in before), default=0) + 1
    target = step_folder.with_name(f"{prefix}{number}")
    if is_remote(step_folder):
        _move_in_store(step_folder, target)
    else:
        os.rename(step_folder, target)
    return target


def _move_in_store(step_folder: pathlib.Path, target: pathlib.Path) -> None:
    """Moves a step within the store without downloading it.

    If the process is killed during the move, both folders may contain files.
    """
    import fsspec

    with store_errors(step_folder):
        store, root = fsspec.core.url_to_fs(os.fspath(step_folder))
        _, goal = fsspec.core.url_to_fs(os.fspath(target))
        names = store.find(root)
        for name in names:
            store.cp_file(name, goal.rstrip("/") + name.removeprefix(root.rstrip("/")))
        store.rm(names)
