"""Trains and evaluates a run for each combination of arm, fraction, seed and grid values."""

import dataclasses
import datetime
import functools
import json
import os
import pathlib
import re
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax

from stepdistill_jax.data.objectives import gives_rationale, resolve
from stepdistill_jax.data.prepare import ensure_prepared
from stepdistill_jax.data.prepared import EMBEDDED, data_folder, prepared_fingerprint
from stepdistill_jax.errors import InputError, printable
from stepdistill_jax.formats.tensors import read_object
from stepdistill_jax.inference import evaluate
from stepdistill_jax.inference.evaluate import check_result
from stepdistill_jax.inference.prompting import RATIONALE
from stepdistill_jax.runtime.checkpoints.manager import saved_steps
from stepdistill_jax.runtime.files import read_json, write_json
from stepdistill_jax.runtime.progress import log, translated
from stepdistill_jax.runtime.signals import StopSignals, leave
from stepdistill_jax.runtime.stores import as_path, is_remote
from stepdistill_jax.tasks.load import has_split
from stepdistill_jax.training.config import TrainConfig
from stepdistill_jax.training.loop import train
from stepdistill_jax.training.provenance import differences
from stepdistill_jax.training.workdir import RUN, locked_workdir, read_run

SWEEP = "sweep.json"
EVALUATION = "evaluation"  # folder of WORKDIR/evaluation/SPLIT.json
TRAIN_STEPS = "train_steps"  # key in that file: `train_steps` of the evaluated run
WAITING, RUNNING, DONE, FAILED, STOPPED = "waiting", "running", "done", "failed", "stopped"


@dataclasses.dataclass(frozen=True)
class Cell:
    """One run of a sweep.

    Attributes:
        fraction: share of the train split that the run is trained on.
        grid: {setting: value as typed} of further settings that differ between cells.
        text: gin text to save as `config.gin`.
    """

    arm: str
    fraction: float
    seed: int
    grid: Mapping[str, str]
    config: TrainConfig
    text: str | None = None

    @property
    def path(self) -> str:
        """Workdir of the cell, relative to the sweep's folder.

        Examples: `step_by_step/0.25/3`, or `step_by_step/LEARNING_RATE=0.001/0.25/3` with a grid.
        """
        return cell_path(self.arm, self.fraction, self.seed, self.grid)

    @property
    def name(self) -> str:
        """Name in messages, such as `step_by_step 0.25 seed 3 LEARNING_RATE=0.001`."""
        return cell_name(self.arm, self.fraction, self.seed, self.grid)


def cell_path(arm: str, fraction: float, seed: int, grid: Mapping[str, str]) -> str:
    """Returns `Cell.path`, with `-` for characters that are unsafe in a folder's name."""
    values = ",".join(f"{k}={re.sub(r'[^A-Za-z0-9._+-]+', '-', v)}" for k, v in grid.items())
    return "/".join([arm, *([values] if values else []), repr(float(fraction)), str(seed)])


def cell_name(arm: str, fraction: float, seed: int, grid: Mapping[str, str]) -> str:
    """Returns `Cell.name`."""
    return " ".join([arm, f"{fraction:g}", f"seed {seed}", *(f"{k}={v}" for k, v in grid.items())])


def sweep(
    cells: Sequence[Cell],
    *,
    workdir: os.PathLike | str,
    data_dir: os.PathLike | str | None = None,
    split: str | None = "test",
    with_rationale: bool = False,
    retries: int = 1,
    asked: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Trains and evaluates the cells that are not done yet, in order.

    After an interruption, the same call continues the sweep.

    Args:
        cells: cells to train, which may have different tasks.
        workdir: folder for `sweep.json` and the cells' workdirs.
        split: split on which the best step of each run is evaluated; None evaluates nothing. The cell's workdir
            gets `evaluation/SPLIT.json` and `predictions/`.
        with_rationale: also measures the rationales of arms that write them, as `rationale` in
            `evaluation/SPLIT.json`.
        retries: maximum number of retries for each failed cell.
        asked: the command's arguments, which are saved in `sweep.json`.

    Returns:
        `workdir`: folder of the sweep.
        `cells`: number of all cells.
        `done`: number of cells that are done after this call.
        `skipped`: number of cells that were already done before this call.
        `failed_cells`: a dict with `cell`, `workdir` and `error` for each failed cell.
        `seconds`: duration of this call.

    Raises:
        InputError: before any training, if there are several processes, a cell's workdir contains another run,
            two cells have the same workdir, or a task lacks the split.
        SystemExit: a signal arrived. The exit status is 75, and finished work is saved.
    """
    if jax.process_count() > 1:
        raise InputError(
            "sweep runs in a single process; for many hosts, print the cells' commands with"
            " `stepdistill sweep ... --print slurm` (or xpk)"
        )
    folder, data_dir = as_path(workdir), data_folder(data_dir)
    began = time.monotonic()
    datasets = _check_cells(cells, folder, data_dir, split)
    # within a run, `train` catches the signals and exits after it has saved
    with (
        StopSignals(lambda name: leave(name, "the sweep was stopped while no cell was training")),
        locked_workdir(folder),
    ):
        _check_workdirs(cells, folder, datasets)
        record = _Record(folder, cells, {"split": split, **(asked or {})})
        done = [c for c in cells if _is_done(c, folder, split, with_rationale)]
        for cell in done:
            record.note(cell, state=DONE, error=None)
        record.write()
        if done:
            log(f"{len(done)} of {len(cells)} cells are already done")

        def work(cell: Cell) -> None:
            workdir = folder / cell.path
            if not _is_trained(cell, workdir):
                train(cell.config, workdir=workdir, data_dir=data_dir, config_text=cell.text)
            if split is not None:
                _evaluate(cell, workdir, data_dir, split, with_rationale, datasets)

        _run(cells, [c for c in cells if c not in done], work, retries, record)
    failed = [
        {"cell": c.name, "workdir": str(folder / c.path), "error": record.of(c)["error"]}
        for c in cells
        if record.of(c)["state"] == FAILED
    ]
    for entry in failed:
        log(f"failed: {entry['cell']}: {entry['error']}")
    return {
        "workdir": str(folder),
        "cells": len(cells),
        "done": len(cells) - len(failed),
        "skipped": len(done),
        "failed_cells": failed,
        "seconds": round(time.monotonic() - began, 1),
    }


def _run(
    cells: Sequence[Cell],
    left: Sequence[Cell],
    work: Callable[[Cell], None],
    retries: int,
    record: "_Record",
) -> None:
    """Calls `work` for each cell in `left`, and retries failed cells after all others."""
    waiting, ended, spent = [(cell, 1) for cell in left], 0, 0.0
    while waiting:
        cell, attempt = waiting.pop(0)
        # mean time of the cells that have ended, times the number of cells that are left
        left_secs = spent / ended * (len(waiting) + 1) if ended else None
        eta = "" if left_secs is None else f"  ETA {datetime.timedelta(seconds=int(left_secs))}"
        again = f"  (attempt {attempt})" if attempt > 1 else ""
        log(f"=== cell {cells.index(cell) + 1}/{len(cells)} {cell.name}{again}{eta}")
        start = time.monotonic()
        record.note(cell, state=RUNNING, error=None, started=_now())
        record.write()
        outcome: dict[str, Any] = {"state": STOPPED}  # if a signal or `SystemExit` ends `work`
        try:
            work(cell)
            outcome = {"state": DONE}
        except Exception as error:
            kind = "" if isinstance(error, InputError) else f"{type(error).__name__}: "
            outcome = {"state": FAILED, "error": printable(translated(f"{kind}{error}"), 500)}
            log(f"cell {cell.name} failed: {outcome['error']}")
            if attempt <= retries:
                waiting.append((cell, attempt + 1))
        finally:
            record.note(cell, **outcome, seconds=time.monotonic() - start)
            record.write()
        ended, spent = ended + 1, spent + time.monotonic() - start


def _evaluate(
    cell: Cell,
    workdir: pathlib.Path,
    data_dir: pathlib.Path,
    split: str,
    with_rationale: bool,
    datasets: Mapping[str, str | None],
) -> None:
    """Evaluates the best step of a run. `evaluation/SPLIT.json` is written last: it marks the run as evaluated."""
    config, path = cell.config, workdir / EVALUATION / f"{split}.json"
    if not is_remote(path):
        check_result(path)
    answer = functools.partial(
        evaluate,
        workdir,
        task=config.task,
        split=split,
        data_dir=data_dir,
        task_module=config.task_module,
    )
    result = answer()
    dataset = datasets[config.task]
    kept = result | {"dataset": dataset, "with_rationale": with_rationale}
    kept[TRAIN_STEPS] = config.train_steps
    if with_rationale:
        kept[RATIONALE] = None
        if dataset and gives_rationale(resolve(config.objectives)):
            kept[RATIONALE] = answer(step=result["step"], with_rationale=True)[RATIONALE]
    write_json(path, kept)


def _is_trained(cell: Cell, workdir: pathlib.Path) -> bool:
    if not (workdir / RUN).is_file():
        return False
    metrics = saved_steps(workdir).get(cell.config.train_steps)
    return metrics is not None and bool(metrics.get("validated", True))


def _is_done(cell: Cell, folder: pathlib.Path, split: str | None, with_rationale: bool) -> bool:
    workdir = folder / cell.path
    if not _is_trained(cell, workdir):
        return False
    if split is None:
        return True
    path = workdir / EVALUATION / f"{split}.json"
    if not path.is_file():
        return False
    kept = read_object(path)
    # a cell that was trained for more steps since may have a different best step
    if TRAIN_STEPS in kept:
        current = kept[TRAIN_STEPS] == cell.config.train_steps
    else:  # from an older version, which could not add steps and did not record TRAIN_STEPS
        current = not any(TRAIN_STEPS in life for life in read_run(workdir).get("lives", []))
    return current and (not with_rationale or RATIONALE in kept)


def _check_cells(
    cells: Sequence[Cell], folder: pathlib.Path, data_dir: pathlib.Path, split: str | None
) -> dict[str, str | None]:
    """Checks the cells, and returns {task: fingerprint of its dataset, or None for a SeqIO task}."""
    if (folder / RUN).is_file():
        raise InputError(
            f"`workdir` {folder}: expected a folder of runs, but this is the folder of a single run"
        )
    if not cells:
        raise InputError("sweep: no cells; expected at least one arm, fraction and seed")
    paths: dict[str, Cell] = {}
    for cell in cells:
        if (other := paths.setdefault(cell.path, cell)) is not cell:
            raise InputError(
                f"sweep: {other.name} and {cell.name} would share the folder {folder / cell.path}; list"
                " each arm, fraction, seed and value only once"
            )
    datasets = {}
    for task, module in {(c.config.task, c.config.task_module): None for c in cells}:
        if task == EMBEDDED:
            ensure_prepared(task, data_dir)
        if split and not has_split(task, split, data_dir=data_dir, task_module=module):
            raise InputError(
                f"`split` {split}: {task} has no such split; choose another, or `none` to skip the evaluation"
            )
        datasets[task] = prepared_fingerprint(task, data_dir)
    return datasets


def _check_workdirs(
    cells: Sequence[Cell], folder: pathlib.Path, datasets: Mapping[str, str | None]
) -> None:
    """Refuses a cell whose workdir contains a run with another config or other data."""
    for cell in cells:
        workdir = folder / cell.path
        if not (workdir / RUN).is_file():
            continue
        before = read_run(workdir)
        now = {k: before.get(k, {}) for k in ("fingerprint", "model")}
        # through JSON, which turns tuples into lists, as in `run.json`
        now["config"] = json.loads(json.dumps(cell.config.to_json(), default=str))
        if found := differences(before, now):
            raise InputError(
                f"{workdir}: the folder contains a run with other settings ({'; '.join(found)}); use the"
                " same settings to continue this sweep, or choose another `workdir`"
            )
        for file in sorted((workdir / EVALUATION).glob("*.json")):
            old, new = read_object(file).get("dataset"), datasets[cell.config.task]
            if old and new and old != new:
                raise InputError(
                    f"{file}: this evaluation was made before {cell.config.task} was prepared again; choose"
                    " another `workdir`"
                )


class _Record:
    """The file `sweep.json`: the arguments of each call of `sweep`, and the state of each cell (one run)."""

    def __init__(self, folder: pathlib.Path, cells: Sequence[Cell], asked: Mapping[str, Any]):
        self._path = folder / SWEEP
        kept = read_json(self._path) if self._path.is_file() else {"asked": [], "cells": {}}
        try:
            self._asked, self._cells = list(kept["asked"]), dict(kept["cells"])
        except (KeyError, TypeError, ValueError):
            raise InputError(
                f"{self._path}: the file was not written by `sweep`; move it away"
            ) from None
        if not any({**earlier, "at": None} == {"at": None, **asked} for earlier in self._asked):
            self._asked.append({"at": _now(), **asked})
        for cell in cells:
            new = {"state": WAITING, "error": None}
            names = {"arm": cell.arm, "fraction": cell.fraction, "seed": cell.seed}
            known = self._cells.get(cell.path, {})
            self._cells[cell.path] = {**new, **known, **names, "grid": dict(cell.grid)}

    def of(self, cell: Cell) -> dict[str, Any]:
        """Returns the entry of a cell in `sweep.json`."""
        return self._cells[cell.path]

    def note(self, cell: Cell, **values: Any) -> None:
        """Updates the entry of a cell, and adds `seconds` to the time of earlier attempts."""
        entry = self._cells[cell.path]
        if "seconds" in values:
            values["seconds"] = round(entry.get("seconds", 0.0) + values["seconds"], 1)
            values["ended"] = _now()
        entry |= values

    def write(self) -> None:
        """Writes the file atomically."""
        write_json(self._path, {"asked": self._asked, "cells": self._cells})


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
