"""Where the numbers of a run go: `metrics.jsonl` and TensorBoard events."""

import json
import math
import os
import pathlib
import tempfile
import time
from typing import Any

from stepdistill_jax.errors import InputError
from stepdistill_jax.files import as_path, atomic_write, is_remote, upload

METRICS = "metrics.jsonl"
UPLOAD_SECS = 60.0  # an object cannot be appended to: each upload sends the whole file again


class MetricsWriter:
    """Appends a step's metrics; a resume cuts the file back to the step that it starts from.

    Of a workdir in an object store the files grow in a temporary folder, and are uploaded at most
    every `UPLOAD_SECS`, before each checkpoint, and at the end.
    """

    def __init__(self, workdir: os.PathLike | str, *, start_step: int, active: bool = True):
        """Opens both files.

        Args:
            workdir: the run's folder.
            start_step: the last step that counts; later lines are of a life that was lost.
            active: False on all but the first process.
        """
        self._active = active
        if not active:
            return
        self._workdir, folder = as_path(workdir), pathlib.Path(workdir)
        self._scratch = None
        if is_remote(workdir):
            self._scratch = tempfile.TemporaryDirectory(prefix="stepdistill-")
            self._uploaded, folder = time.monotonic(), pathlib.Path(self._scratch.name)
            if (self._workdir / METRICS).exists():
                (folder / METRICS).write_bytes((self._workdir / METRICS).read_bytes())
        _cut_back(folder / METRICS, start_step)
        self._file = open(folder / METRICS, "a", encoding="utf-8")  # noqa: SIM115  (for the whole run)
        from tensorboardX import SummaryWriter

        self._board = SummaryWriter(str(folder), purge_step=start_step + 1, flush_secs=30)

    def write(self, step: int, metrics: dict[str, Any]) -> None:
        """One line `{"step": step, ...}`, complete on a local disk when the process is killed."""
        if not self._active:
            return
        # strict JSON knows no NaN
        finite = {n: v if math.isfinite(v) else None for n, v in metrics.items()}
        self._file.write(json.dumps({"step": step, **finite}) + "\n")
        self._file.flush()
        for name, value in metrics.items():
            self._board.add_scalar(name, value, step)
        if self._scratch is not None and time.monotonic() - self._uploaded > UPLOAD_SECS:
            self.sync()

    def sync(self) -> None:
        """Uploads what is written, where the workdir is in a store: before a checkpoint is saved.

        A resume starts at a checkpoint and needs the lines before it.
        """
        if self._active and self._scratch is not None:
            self._board.flush()
            upload(pathlib.Path(self._scratch.name), self._workdir)
            self._uploaded = time.monotonic()

    def close(self) -> None:
        """Flushes both."""
        if self._active:
            self._file.close()
            self._board.close()
            if self._scratch is not None:
                with self._scratch as folder:
                    upload(pathlib.Path(folder), self._workdir)


def _cut_back(path: pathlib.Path, start_step: int) -> None:
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            step = json.loads(line)["step"]
        except (json.JSONDecodeError, KeyError, TypeError):
            break  # half a line, left by a kill
        if step <= start_step:
            kept.append(line + "\n")
    with atomic_write(path) as f:
        f.writelines(kept)


def last_step_metrics(workdir: os.PathLike | str) -> dict[str, Any]:
    """The newest training line of a run; empty where `metrics.jsonl` is gone."""
    if not (as_path(workdir) / METRICS).exists():
        return {}
    return next((x for x in reversed(read_metrics(workdir)) if "loss" in x), {})


def read_metrics(workdir: os.PathLike | str) -> list[dict[str, Any]]:
    """Lines of a run's `metrics.jsonl`, oldest first; half a line at the end is left out.

    Raises:
        InputError: the folder has no such file.
    """
    path = as_path(workdir) / METRICS
    if not path.exists():
        raise InputError(f"{path}: no such file; {workdir} is not a training run")
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows
