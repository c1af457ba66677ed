"""Checks who owns a workdir: nobody, this run, or another program."""

import contextlib
import datetime
import io
import json
import os
import pathlib
import socket
import tokenize
import uuid
from collections.abc import Iterator
from typing import Any

from stepdistill_jax.errors import InputError
from stepdistill_jax.formats.directory import CONFIG, GENERATION_CONFIG, TASK_INFO
from stepdistill_jax.formats.vocabulary_files import SPIECE, TOKENIZER_MODEL
from stepdistill_jax.runtime.checkpoints.manager import FOLDER
from stepdistill_jax.runtime.files import check_writable, read_json
from stepdistill_jax.runtime.locks import InUse, locked
from stepdistill_jax.runtime.metrics import FLAGGED, METRICS
from stepdistill_jax.runtime.on_processes import on_process_0
from stepdistill_jax.runtime.overwriting import Made, check_outputs
from stepdistill_jax.runtime.stores import StoreError, is_remote

RUN, LOCK = "run.json", "run.lock"
GIN = "config.gin"  # the run's complete config; a run can be started or resumed from it
# a run writes these after run.json, so without a run.json another program wrote them
_NAMES = (
    *(FOLDER, CONFIG, TASK_INFO, GENERATION_CONFIG, "model.safetensors", SPIECE, TOKENIZER_MODEL),
    *(GIN, METRICS, FLAGGED),
)
# fields that readers of a run.json need; older versions did not write the last group
_FIELDS = {"config": dict, "examples": int, "parameters": int}
_CONFIG_FIELDS = {
    **{"task": str, "objectives": list, "data_fraction": (int, float), "seed": int},
    **{"batch_size": int, "train_steps": int},
}
_LATER_FIELDS = {"model": dict, "fingerprint": dict, "lives": list, "row_lengths": list}


@contextlib.contextmanager
def locked_workdir(workdir: pathlib.Path) -> Iterator[None]:
    """A context in which process 0 holds the lock of a workdir, if its storage has locks.

    Raises:
        InputError: another run holds the lock, or the lock file cannot be written. Raised on every process.
    """
    with contextlib.ExitStack() as held:
        on_process_0(lambda: None if is_remote(workdir) else _hold(workdir, held))
        yield


def _hold(workdir: pathlib.Path, held: contextlib.ExitStack) -> None:
    path = workdir / LOCK
    since = datetime.datetime.now().astimezone().isoformat(timespec="seconds")
    note = json.dumps([os.getpid(), socket.gethostname(), since])
    check_outputs({path: Made("train", b"[")})
    try:
        held.enter_context(locked(path, note=note.encode()))
    except InUse:
        raise InputError(
            f"`workdir` {workdir}: {_holder(path)} is training in it; wait until it ends, stop it, or"
            " choose another folder"
        ) from None


def _holder(path: pathlib.Path) -> str:
    try:
        pid, host, since = json.loads(path.read_text())
    except (OSError, ValueError):  # the other run has only just taken it
        return "another run"
    return f"process {pid} on {host} (since {since})"


def check_workdir(workdir: pathlib.Path) -> None:
    """Checks that a run may use a folder, before anything is read or written.

    Raises:
        InputError: the folder cannot be written, its `run.json` is damaged, or it has files of a run but no
            `run.json`.
    """
    if is_remote(workdir):
        _check_store(workdir)
    else:
        check_writable(workdir, "`workdir`", folder=True)
    if (workdir / RUN).is_file():
        read_run(workdir)
        return
    for name in _NAMES:
        if (workdir / name).exists():
            raise InputError(
                f"`workdir` {workdir}: has {name} but no {RUN}, so there is no run to resume in it;"
                " choose another folder, or move that file away"
            )


def check_config(path: pathlib.Path, new: str) -> None:
    """Checks that `train` wrote the config at `path`, so that it may be replaced by the text `new`.

    Raises:
        InputError: `train` did not write the file: it has comments or includes, is a link, or cannot be parsed.
    """
    if not path.exists() or path.read_bytes() == new.encode():
        return
    try:
        text = path.read_text(encoding="utf-8")
        tokens = list(tokenize.generate_tokens(io.StringIO(text).readline))
    except (ValueError, SyntaxError, tokenize.TokenError):
        ours = False
    else:
        ours = not any(t.type == tokenize.COMMENT or t.string == "include" for t in tokens)
    if not ours or (not is_remote(path) and path.is_symlink()):
        raise InputError(
            f"{path}: was not written by `train` (it has comments or includes, or is a link), but"
            " `train` writes a config with that name; move yours out of the workdir, and pass its new path"
        )


def _check_store(workdir: pathlib.Path) -> None:
    """Checks that a store may be written, by writing and removing a small object."""
    probe = workdir / f".{uuid.uuid4().hex}"
    try:
        probe.write_bytes(b"")
        probe.unlink()
    except (StoreError, FileNotFoundError) as error:  # FileNotFoundError: no such bucket
        reason = error.reason if isinstance(error, StoreError) else f"no such bucket: {error}"
        raise InputError(
            f"`workdir` {workdir}: cannot be written ({reason}); check that the bucket exists and that"
            " the credentials are set"
        ) from None


def read_run(workdir: pathlib.Path) -> dict[str, Any]:
    """Returns the `run.json` of a workdir.

    Raises:
        InputError: the file is missing, damaged, or from another program.
    """
    path = workdir / RUN
    found = read_json(path)
    later = {n: kind for n, kind in _LATER_FIELDS.items() if isinstance(found, dict) and n in found}
    problem = _misfit(found, _FIELDS | later) or _misfit(found["config"], _CONFIG_FIELDS, "config.")
    if problem is None:
        lists = {
            "config.objectives": found["config"]["objectives"],
            "lives": found.get("lives", []),
        }
        problem = next(
            (f"{n} has items that are not objects" for n, x in lists.items() if not _objects(x)),
            None,
        )
    if problem is None and not _are_lengths(found.get("row_lengths", [1, 1])):
        problem = "row_lengths is not a pair of lengths"
    if problem:
        raise InputError(
            f"{path}: is not the {RUN} of a run ({problem}); put back a copy, or choose another folder"
        )
    return found


def _misfit(found: Any, kinds: dict[str, Any], prefix: str = "") -> str | None:
    """Returns which field is missing or has the wrong type, or None if all are right."""
    if not isinstance(found, dict):
        return f"expected an object, got {_kind(found)}"
    for name, kind in kinds.items():
        if not isinstance(value := found.get(name), kind) or isinstance(value, bool):
            return f"{prefix}{name} is {_kind(value) if name in found else 'missing'}"
    return None


def _kind(value: Any) -> str:
    return "null" if value is None else f"a {type(value).__name__}"


def _are_lengths(values: list[Any]) -> bool:
    return len(values) == 2 and all(type(x) is int and x > 0 for x in values)


def _objects(values: list[Any]) -> bool:
    return all(isinstance(value, dict) for value in values)
