"""Whose folder a workdir is: nobody's yet, this run's, or something else's."""

import os
import pathlib
import uuid

from stepdistill_jax.checkpoints.manager import FOLDER
from stepdistill_jax.errors import InputError
from stepdistill_jax.files import StoreError, is_remote
from stepdistill_jax.formats.directory import CONFIG, TASK_INFO

RUN = "run.json"


def check_workdir(workdir: pathlib.Path) -> None:
    """Refuses, before anything is read or written, a folder that a run must not be in.

    Raises:
        InputError: it cannot be written, or holds a model or checkpoints without a `run.json`.
    """
    if is_remote(workdir):
        _check_store(workdir)
    else:
        _check_local(workdir)
    if (workdir / RUN).is_file():
        return
    for name in (FOLDER, CONFIG, TASK_INFO, "model.safetensors"):
        if (workdir / name).exists():
            raise InputError(
                f"--workdir {workdir}: has {name} and no {RUN}, so it is not a run to resume;"
                " choose another folder"
            )


def _check_local(workdir: pathlib.Path) -> None:
    nearest = next(p for p in (workdir.absolute(), *workdir.absolute().parents) if p.exists())
    if not nearest.is_dir():
        raise InputError(f"--workdir {workdir}: {nearest} is a file, a folder is wanted")
    if not os.access(nearest, os.W_OK | os.X_OK):
        read_only = os.statvfs(nearest).f_flag & os.ST_RDONLY  # and so even for root
        reason = "is on a read-only file system" if read_only else "gives no right to write"
        raise InputError(f"--workdir {workdir}: {nearest} {reason}")


def _check_store(workdir: pathlib.Path) -> None:
    """Writes and removes a small object: rights in a store show only when they are used."""
    probe = workdir / f".{uuid.uuid4().hex}"
    try:
        probe.write_bytes(b"")
        probe.unlink()
    except (StoreError, FileNotFoundError) as error:  # the latter: no such bucket
        reason = error.reason if isinstance(error, StoreError) else f"no such bucket: {error}"
        raise InputError(
            f"--workdir {workdir}: cannot be written ({reason}); is the bucket there, and are the"
            " credentials set?"
        ) from None
