"""The manifest of a saved step: its files' sizes and digests, and its metrics; written last.

A step without one was not saved to its end. A step whose files or whose folder's number differ from its
manifest is damaged.
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
COMMITTED = "commit_success.txt"  # what Orbax writes last in a store, which knows no rename
DELETED = ".deleted"  # where Orbax moves steps that are no longer kept; nobody restores from there
UNSEALED = f"no {MANIFEST}, so it was not saved to its end"
DAMAGED, UNFINISHED = "damaged", "unfinished"
# in a store, which has checksums of its own, only files up to this size are read for a digest
READ_IN_STORE = 64 * 1024
_STEP = re.compile(r"0|[1-9][0-9]*")  # what Orbax takes for a step
_QUARANTINED = re.compile(rf"([0-9]+)\.({DAMAGED}|{UNFINISHED})-([0-9]+)")


class CheckpointError(Exception):
    """A step that cannot be saved, or no step that can be trusted: its one line says all."""


class SavedStep(NamedTuple):
    """A folder that Orbax takes for a step.

    Attributes:
        number: updates done.
        folder: where it is.
        metrics: None where the manifest cannot be read.
        size: of all its files, in bytes.
        problem: None, or the first thing that is wrong with it (`UNSEALED`, or FILE: WHAT).
    """

    number: int
    folder: pathlib.Path
    metrics: dict[str, Any] | None
    size: int
    problem: str | None


def seal(step_folder: pathlib.Path, metrics: dict[str, Any], channel: Channel = MAIN) -> None:
    """Writes the manifest of a step that Orbax has finished; a crc32 of each file, read once.

    All processes call it: each reads a part of the files, process 0 writes. None returns before the
    step is sealed.

    Args:
        step_folder: of the step.
        metrics: of the step.
        channel: of the calling thread.
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
    """Gives a sealed step other metrics, in one rename; its arrays are not touched."""
    _write(step_folder, _read(step_folder) | {"metrics": metrics})


def defect(step_folder: pathlib.Path, *, below: str = "") -> str | None:
    """Reads and compares a step's files.

    Args:
        step_folder: of a step.
        below: compare only the files of this item (`params`); all by default.

    Returns:
        None where every byte is as it was saved, else FILE: WHAT of the first that is not.
    """
    try:
        wanted = _wanted(step_folder, below)
    except ValueError as error:
        return str(error)
    return _difference(step_folder, wanted, {})


def defect_by_all(step_folder: pathlib.Path) -> str | None:
    """Returns what `defect` does, on all processes, which call it together and read a part each."""

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
    """Size and digest of each file of an item by the manifest; ValueError where a size is another."""
    files = _read(step_folder)["files"]
    wanted = {n: w for n, w in files.items() if n.startswith(f"{below}/" if below else "")}
    if problem := _other_size(wanted, _files(step_folder)):
        raise ValueError(problem)
    return wanted


def _difference(
    step_folder: pathlib.Path, wanted: dict[str, list[Any]], found: dict[str, str]
) -> str | None:
    """The first file whose bytes are others than were saved.

    Files that are not `found`, or not as they were saved, are read here: one host's bad read must not
    condemn a good step.
    """
    names = [n for n, (_, crc) in wanted.items() if crc is not None]
    try:
        again = [n for n in names if found.get(n) != wanted[n][1]]
        found = found | digests(step_folder, again)
    except OSError as error:
        return f"{error.filename or step_folder}: cannot be read ({error.strerror or error})"
    for name in names:
        if found[name] != wanted[name][1]:
            return (
                f"{name}: other bytes than were saved (crc32 {found[name]}, not {wanted[name][1]})"
            )
    return None


def files_digest(step_folder: pathlib.Path, below: str) -> str | None:
    """Digest of an item's files as they were saved, by the manifest; None where there is none to read."""
    try:
        files = _read(step_folder)["files"]
    except ValueError:
        return None
    return digest({name: of for name, of in files.items() if name.startswith(f"{below}/")})


def saved(folder: pathlib.Path) -> list[SavedStep]:
    """The steps in a `checkpoints` folder, oldest first. Names and sizes are compared, no arrays read."""
    numbers = [int(p.name) for p in _folders(folder) if _STEP.fullmatch(p.name)]
    steps = [_look(folder / str(number)) for number in sorted(numbers)]
    # a live run may have let one go since
    return [s for s in steps if s.problem is None or s.folder.exists()]


def quarantined(folder: pathlib.Path) -> list[pathlib.Path]:
    """Folders that `quarantine_damaged` has renamed, by name."""
    return sorted(p for p in _folders(folder) if _QUARANTINED.fullmatch(p.name))


def quarantine_damaged(folder: pathlib.Path) -> int | None:
    """Renames the steps that must not be resumed from, says each in a line, and removes none.

    The newest step is read as a whole, and if it is damaged the one before it, and so on; of the
    others, names and sizes are compared. A step without a manifest is the save that a kill cut off
    if it is the newest one: the next save only starts when the one before has its manifest.

    All processes call it: each reads a part of the steps' bytes, process 0 judges and renames.

    Returns:
        The newest good step; None in a folder where no save has ever come to its end.

    Raises:
        CheckpointError: none is good, and there were some; lists them.
        OSError: one cannot be renamed.
    """
    good, problems = None, dict(on_process_0(lambda: _looked_at(folder)))
    for number in reversed(list(problems)):
        if problems[number] is None and good is None:
            problems[number] = defect_by_all(folder / str(number))
            good = number if problems[number] is None else None
    on_process_0(lambda: _quarantine(folder, problems, good))
    return good


def _looked_at(folder: pathlib.Path) -> list[tuple[int, str | None]]:
    """(step, problem) by names and sizes, oldest first; not of what Orbax itself will remove."""
    steps = [
        s
        for s in saved(folder)
        if not is_remote(folder) or (s.folder / COMMITTED).exists()  # Orbax: unfinished
    ]
    return [(s.number, s.problem) for s in steps]


def _quarantine(folder: pathlib.Path, problems: Mapping[int, str | None], good: int | None) -> None:
    newest = max((s.number for s in saved(folder)), default=None)
    for number, problem in reversed(list(problems.items())):
        if problem is not None:
            cut_off = problem == UNSEALED and number == newest
            target = _move(folder / str(number), UNFINISHED if cut_off else DAMAGED)
            log(
                f"warning: checkpoint {folder / str(number)}: {problem}; set aside as {target.name}"
            )
    damaged = [p.name for p in quarantined(folder) if DAMAGED in p.name]
    if good is None and damaged:
        raise CheckpointError(
            f"{folder}: no good checkpoint to go on from, all are damaged: {', '.join(damaged)};"
            " put back a copy of one under its number, or start in another `workdir`"
        )


def purge(folder: pathlib.Path) -> None:
    """Removes the steps that Orbax has moved out of the way since they are no longer kept."""
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
            return f"{name}: {sizes[name]} bytes, {size} were saved"
    return None


def _text(body: dict[str, Any]) -> str:
    """Of a manifest: JSON with a crc32 of the rest of it."""
    crc = f"{zlib.crc32(json.dumps(body, sort_keys=True).encode()):08x}"
    return json.dumps({**body, "crc32": crc}, sort_keys=True, indent=1) + "\n"


def _write(step_folder: pathlib.Path, body: dict[str, Any]) -> None:
    with atomic_write(step_folder / MANIFEST) as f:
        f.write(_text(body))


def _read(step_folder: pathlib.Path) -> dict[str, Any]:
    """`metrics` and `files` of a manifest.

    Raises:
        ValueError: there is none, it is not what was written, or it is of another step; says which.
    """
    path = step_folder / MANIFEST
    try:
        if (
            not is_remote(path) and path.exists() and not path.is_file()
        ):  # a pipe would be waited for
            raise ValueError(f"{MANIFEST}: is a pipe or device")
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ValueError(UNSEALED) from None
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{MANIFEST}: cannot be read ({error})") from None
    try:
        body = json.loads(text)
        del body["crc32"]
        same = _text(body) == text  # any other byte, white space included
    except (ValueError, KeyError, TypeError, RecursionError):
        same = False
    if not same:
        raise ValueError(f"{MANIFEST}: other bytes than were saved")
    if not _is_manifest(body):
        raise ValueError(f"{MANIFEST}: not one of ours")
    if (number := str(body["metrics"]["step"])) != step_folder.name:
        raise ValueError(f"{MANIFEST}: of step {number}; rename the folder to {number}")
    return body


def _is_manifest(body: Any) -> bool:
    """Whether it has what `seal` writes: its crc32 can be computed by anyone who makes up the rest."""
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
    """Size of each regular file below a step's folder by its name in it; not of the manifest."""
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
                except FileNotFoundError:  # a live run deletes what it no longer keeps
                    continue
                if stat.S_ISREG(found.st_mode):  # a pipe would be waited for
                    sizes[path.relative_to(step_folder).as_posix()] = found.st_size
    return {n: sizes[n] for n in sorted(sizes) if not n.startswith(MANIFEST)}


def _to_read(step_folder: pathlib.Path, sizes: dict[str, int]) -> Iterable[str]:
    remote = is_remote(step_folder)
    return [name for name, size in sizes.items() if not remote or size <= READ_IN_STORE]


def _move(step_folder: pathlib.Path, kind: str) -> pathlib.Path:
    """Renames a step to a name that Orbax does not read, and that was never used."""
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
    """Inside the store: nothing is downloaded. A kill in the middle leaves both folders."""
    import fsspec

    with store_errors(step_folder):
        store, root = fsspec.core.url_to_fs(os.fspath(step_folder))
        _, goal = fsspec.core.url_to_fs(os.fspath(target))
        names = store.find(root)
        for name in names:
            store.cp_file(name, goal.rstrip("/") + name.removeprefix(root.rstrip("/")))
        store.rm(names)
