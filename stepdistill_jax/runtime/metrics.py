"""Writes and reads a run's `metrics.jsonl`, `flagged_batches.jsonl` and TensorBoard events."""

import importlib
import json
import math
import os
import pathlib
import socket
import sys
import tempfile
import time
from typing import Any

import numpy as np

from stepdistill_jax.errors import InputError
from stepdistill_jax.runtime.files import atomic_write, check_file, naming, opener, parse_json_line
from stepdistill_jax.runtime.progress import log
from stepdistill_jax.runtime.stores import as_path, is_remote, upload

METRICS = "metrics.jsonl"
FLAGGED = "flagged_batches.jsonl"  # steps that were skipped, or whose loss is a spike
FLUSH_SECS = 30.0  # time between two flushes of TensorBoard's events
UPLOAD_SECS = 60.0  # least time between two uploads, since each upload sends the complete file (stores cannot append)


class MetricsWriter:
    """Appends the metrics of each step to a run's files.

    For a workdir in an object store, the files grow in a temporary folder. They are uploaded about every
    `UPLOAD_SECS` seconds, before each checkpoint, and at the end.
    """

    def __init__(
        self,
        workdir: os.PathLike | str,
        *,
        start_step: int,
        validated: bool = True,
        active: bool = True,
    ):
        """Opens the files, and removes lines of steps that the resumed run will repeat.

        Args:
            start_step: step from which the run continues.
            validated: whether the checkpoint has its validation results. If not, the line with the
                validation results of `start_step` is removed, too.
            active: False on all processes but process 0.
        """
        self._active = active
        if not active:
            return
        self._workdir, folder = as_path(workdir), pathlib.Path(workdir)
        self._scratch = None
        if is_remote(workdir):
            self._scratch = tempfile.TemporaryDirectory(prefix="stepdistill-")
            self._uploaded, folder = time.monotonic(), pathlib.Path(self._scratch.name)
            for name in (METRICS, FLAGGED):
                if (self._workdir / name).exists():
                    (folder / name).write_bytes((self._workdir / name).read_bytes())
        self._folder = folder
        _cut_back(folder / METRICS, start_step, validated)
        _cut_back(folder / FLAGGED, start_step)
        path = folder / METRICS
        self._file = open(path, "a", encoding="utf-8", opener=opener)  # noqa: SIM115  (for the whole run)
        self._board = _Board(folder, start_step)

    def write(self, step: int, metrics: dict[str, Any]) -> None:
        """Writes a line `{"step": step, ...}`. On a local disk, the line survives a kill of the process.

        Raises:
            OSError: the disk is full or broken.
        """
        if not self._active:
            return
        with naming(self._folder / METRICS):
            self._file.write(_line(step, metrics))
            self._file.flush()
        self._board.write(step, metrics)
        if self._scratch is not None and time.monotonic() - self._uploaded > UPLOAD_SECS:
            self.sync()

    def flag(self, step: int, entry: dict[str, Any]) -> None:
        """Writes a line to `flagged_batches.jsonl`. Raises the same errors as `write`."""
        if not self._active:
            return
        path = self._folder / FLAGGED
        with naming(path), open(path, "a", encoding="utf-8", opener=opener) as f:
            f.write(_line(step, entry))

    def sync(self) -> None:
        """Uploads the files if the workdir is in a store. Call this method before a checkpoint is saved.

        A run that resumes from a checkpoint needs the lines of all steps up to that checkpoint.
        """
        if self._active and self._scratch is not None:
            self._board.flush()
            upload(pathlib.Path(self._scratch.name), self._workdir)
            self._uploaded = time.monotonic()

    def close(self) -> None:
        """Flushes and closes the files."""
        if self._active:
            with naming(self._folder / METRICS):
                self._file.close()
            self._board.close()
            if self._scratch is not None:
                with self._scratch as folder:
                    upload(pathlib.Path(folder), self._workdir)


class _Board:
    """Writes TensorBoard events. tensorboardX's SummaryWriter would hang the run when the disk is full."""

    def __init__(self, folder: pathlib.Path, start_step: int):
        _import_tensorboardx()
        from tensorboardX.proto.event_pb2 import Event, SessionLog  # type: ignore[attr-defined]  # protobuf makes them at import
        from tensorboardX.record_writer import RecordWriter

        name = f"events.out.tfevents.{int(time.time()):010d}.{socket.gethostname()}.{start_step}"
        self._path = folder / name
        self._records = RecordWriter(os.fspath(self._path))
        self._add(Event(file_version="brain.Event:2"))
        # makes TensorBoard hide later steps that a killed process wrote
        self._add(Event(step=start_step + 1, session_log=SessionLog(status=SessionLog.START)))
        self._flushed = time.monotonic()

    def write(self, step: int, metrics: dict[str, Any]) -> None:
        from tensorboardX.proto.event_pb2 import Event  # type: ignore[attr-defined]  # protobuf makes it at import
        from tensorboardX.proto.summary_pb2 import Summary  # type: ignore[attr-defined]  # protobuf makes it at import

        values = [Summary.Value(tag=n, simple_value=v) for n, v in metrics.items()]
        self._add(Event(step=step, summary=Summary(value=values)))
        if time.monotonic() - self._flushed > FLUSH_SECS:
            self.flush()

    def _add(self, event: Any) -> None:
        event.wall_time = time.time()
        with naming(self._path):
            self._records.write(event.SerializeToString())

    def flush(self) -> None:
        with naming(self._path):
            self._records.flush()
        self._flushed = time.monotonic()

    def close(self) -> None:
        with naming(self._path):
            self._records.close()


def _import_tensorboardx() -> None:
    """Imports tensorboardX, but not torch, whose import would take seconds."""
    hidden = "torch" not in sys.modules
    if hidden:
        sys.modules["torch"] = None  # type: ignore[assignment]  # makes `import torch` fail
    try:
        importlib.import_module("tensorboardX")
    finally:
        if hidden:
            del sys.modules["torch"]


def _line(step: int, entry: dict[str, Any]) -> str:
    # strict JSON has no NaN
    finite = {
        n: None if isinstance(v, float) and not math.isfinite(v) else v for n, v in entry.items()
    }
    return json.dumps({"step": step, **finite}, ensure_ascii=False) + "\n"


def _cut_back(path: pathlib.Path, start_step: int, validated: bool = True) -> None:
    """Removes the lines of steps after `start_step`, and an incomplete last line. Keeps other unreadable lines."""
    if not path.exists():
        return
    kept = []
    for raw, entry in _lines(path):
        if entry is not None and entry["step"] == start_step:
            # the step's training line (with `loss`) stays; the line of a validation that will run again does not
            counts = validated or "loss" in entry
        else:
            counts = entry is None or entry["step"] < start_step
        if counts:
            kept.append(raw + b"\n")
    with atomic_write(path, "wb") as f:
        f.writelines(kept)


def last_step_metrics(workdir: os.PathLike | str) -> dict[str, Any]:
    """Returns the last training metrics in a run's `metrics.jsonl`, or an empty dict."""
    if not (as_path(workdir) / METRICS).exists():
        return {}
    return next((x for x in reversed(read_metrics(workdir)) if "loss" in x), {})


def read_metrics(workdir: os.PathLike | str) -> list[dict[str, Any]]:
    """Returns the lines of a run's `metrics.jsonl`, oldest first.

    Unreadable lines are left out with a warning. An incomplete last line is left out without a warning.

    Raises:
        InputError: there is no such file, or it is not a regular file.
    """
    path = as_path(workdir) / METRICS
    if not path.exists():
        raise InputError(f"{path}: no such file; {workdir} is not the workdir of a training run")
    return [entry for _, entry in _lines(path) if entry is not None]


def curves(workdir: os.PathLike | str) -> dict[str, np.ndarray]:
    """Returns a run's metrics as columns for `pandas.DataFrame`, with one entry per logged step.

    Returns:
        `step`: int64, ascending.
        Other columns, such as `eval/validation/label_accuracy`: float64, NaN where a step lacks the metric.

    Raises:
        InputError: as for `read_metrics`.
    """
    by_step: dict[int, dict[str, Any]] = {}
    for line in read_metrics(workdir):  # a step's training and validation are separate lines
        by_step.setdefault(line["step"], {}).update(line)
    steps = sorted(by_step)
    columns: dict[str, np.ndarray] = {"step": np.array(steps, np.int64)}
    for name in dict.fromkeys(name for step in steps for name in by_step[step]):
        if name != "step":
            values = [by_step[step].get(name) for step in steps]
            columns[name] = np.array([_number(value) for value in values], np.float64)
    return columns


def _number(value: Any) -> float:
    return float(value) if isinstance(value, int | float) else math.nan


def read_flagged(workdir: os.PathLike | str) -> list[dict[str, Any]]:
    """Returns the lines of a run's `flagged_batches.jsonl`, oldest first, or [] without such a file."""
    path = as_path(workdir) / FLAGGED
    return [e for _, e in _lines(path) if e is not None] if path.exists() else []


def _lines(path: pathlib.Path) -> list[tuple[bytes, dict[str, Any] | None]]:
    """Returns (line, parsed object or None) for each non-blank line. Warns about unreadable lines.

    A kill may truncate the last line, so an unreadable last line is left out silently.
    """
    if not is_remote(path):
        check_file(path, "a JSON-lines file")
    whole, problems = [], []
    *ended, last = path.read_bytes().split(b"\n")
    for number, raw in enumerate([*ended, last], 1):
        if not raw.strip():
            continue
        try:
            entry = parse_json_line(raw)
            if type(entry.get("step")) is not int:
                raise InputError("it has no `step`")
        except InputError as error:
            if number > len(ended):
                continue
            entry = None
            problems.append(f"{path}:{number}: {error}")
        whole.append((raw, entry))
    if problems:
        more = len(problems) - 1
        also = f" (and {more} more line{'s' if more > 1 else ''})" if more else ""
        log(
            f"warning: {problems[0]}{also}; such lines stay in the file, but are left out of all results"
        )
    return whole
