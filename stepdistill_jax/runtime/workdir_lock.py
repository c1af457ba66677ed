"""One run at a time in a workdir."""

import contextlib
import datetime
import json
import os
import pathlib
import socket
from collections.abc import Iterator
from typing import IO

from stepdistill_jax.errors import InputError
from stepdistill_jax.runtime.files import InUse, is_remote, open_locked
from stepdistill_jax.runtime.on_processes import on_first
from stepdistill_jax.runtime.overwriting import Made, check_outputs

LOCK = "run.lock"
_HOLDER = Made("train", b"[")


@contextlib.contextmanager
def locked(workdir: pathlib.Path) -> Iterator[None]:
    """Holds the lock of a workdir in process 0; the kernel drops it with the process, however that ends.

    So a `run.lock` that a killed run left is no obstacle. An object store, and a network disk
    without locks, have none.

    Raises:
        InputError: another run holds it, or it cannot be written; in every process.
    """
    with contextlib.ExitStack() as held:
        on_first(lambda: _take(workdir, held))
        yield


def _take(workdir: pathlib.Path, held: contextlib.ExitStack) -> None:
    if is_remote(workdir):
        return
    path = workdir / LOCK
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        check_outputs({path: _HOLDER})
        file = open_locked(path)
        held.callback(_close, file)
        held.callback(path.unlink, missing_ok=True)  # before the close: while it is ours
        file.truncate(0)
        since = datetime.datetime.now().astimezone().isoformat(timespec="seconds")
        file.write(json.dumps([os.getpid(), socket.gethostname(), since]).encode())
        file.flush()
    except InUse:
        raise InputError(
            f"--workdir {workdir}: {_holder(path)} is training in it; wait for its end, stop it, or"
            " choose another folder"
        ) from None
    except OSError as error:
        raise InputError(f"--workdir {workdir}: {error.strerror or error} ({path})") from None


def _close(file: IO[bytes]) -> None:
    with contextlib.suppress(OSError):  # of a full disk, which was told
        file.close()


def _holder(path: pathlib.Path) -> str:
    try:
        pid, host, since = json.loads(path.read_text())
    except (OSError, ValueError):  # it has only just taken it
        return "another run"
    return f"process {pid} on {host} (since {since})"
