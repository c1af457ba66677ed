"""Saves the steps of a run with Orbax, and keeps the two newest steps and the best one.

A step is sealed when its manifest is written. Without a manifest, it is incomplete.
"""

import concurrent.futures
import contextlib
import logging
import os
import pathlib
from collections.abc import Iterable, Iterator
from typing import Any

import jax
import orbax.checkpoint as ocp
from orbax.checkpoint.options import AtomicityMode, AtomicityOptions

from stepdistill_jax.errors import InputError
from stepdistill_jax.runtime.channel import Channel
from stepdistill_jax.runtime.checkpoints.fit import require_fit
from stepdistill_jax.runtime.checkpoints.manifest import (
    DELETED,
    UNSEALED,
    CheckpointError,
    SavedStep,
    defect,
    defect_by_all,
    files_digest,
    purge,
    quarantine_damaged,
    reseal,
    saved,
    seal,
)
from stepdistill_jax.runtime.fingerprints import digest
from stepdistill_jax.runtime.on_processes import on_all_processes, on_process_0
from stepdistill_jax.runtime.stores import StoreError, as_path, existing_folder, is_remote

FOLDER = "checkpoints"
PARAMS, STATE = ITEMS = ("params", "state")
KEPT_LATEST = 2


def rank(metrics: dict[str, Any]) -> Any:
    """Returns the sort key of a step from its metrics. A better step has a larger key.

    - Validated steps are compared by their metric `rank`. Without it, the higher label accuracy wins, then the lower
      label loss. The earlier step wins a tie.
    - Steps without validation rank below all validated steps, and the later step wins.

    A validated step 300 with rank [0.9, -0.2] has the key (True, 0.9, -0.2, -300). A step 400 without validation
    has the key (False, 0.0, 0.0, 400).
    """
    step = float(metrics["step"])
    if not metrics.get("validated"):
        return (False, 0.0, 0.0, step)
    # older versions wrote no `rank`
    first, second = metrics.get("rank") or (metrics["label_accuracy"], -metrics["label_loss"])
    return (True, first, second, -step)


class _Kept:
    """Orbax preservation policy: keeps the newest steps and the best one."""

    def __init__(self, metrics: dict[int, dict[str, Any]]):
        self._metrics = metrics

    def of(self, steps: Iterable[int]) -> set[int]:
        steps = sorted(steps)
        return {*steps[-KEPT_LATEST:], max(steps, key=lambda s: rank(self._metrics[s]))}

    def should_preserve(self, checkpoints, *, context) -> list[bool]:
        del context
        kept = self.of(c.step for c in checkpoints)
        return [c.step in kept for c in checkpoints]


class Checkpoints:
    """Saves and restores the train state of one run."""

    def __init__(self, workdir: os.PathLike | str):
        """Opens or creates the folder of checkpoints, and removes Orbax's temporary folders.

        Renames damaged and incomplete steps (`manifest.quarantine_damaged`).

        Raises:
            CheckpointError: there are damaged steps, and no good one.
        """
        for name in ("absl", "asyncio"):
            logging.getLogger(name).addFilter(_is_not_raised)
        self._folder = folder = checkpoints_folder(workdir)
        on_process_0(lambda: purge(folder))
        quarantine_damaged(folder)
        self._metrics = saved_steps(workdir)
        self._verified = max(self._metrics, default=None)
        self._kept = _Kept(self._metrics)
        remote = is_remote(folder)
        self._manager = ocp.CheckpointManager(
            folder,
            item_names=ITEMS,
            options=ocp.CheckpointManagerOptions(
                preservation_policy=self._kept,
                # an object store can rename a folder only by copying its files one by one
                atomicity_options=AtomicityOptions(
                    AtomicityMode.COMMIT_FILE if remote else AtomicityMode.AUTO
                ),
                cleanup_tmp_directories=True,
                # a removal starts with a rename, so a kill leaves no step that looks damaged
                todelete_subdir=None if remote else DELETED,
            ),
        )
        # one thread, so that a step is sealed before the next one; its channel is separate from MAIN,
        # which the training loop uses at the same time
        self._background = concurrent.futures.ThreadPoolExecutor(1, "seal")
        self._sealing: concurrent.futures.Future | None = None
        self._saving, self._channel = 0, Channel("seal")

    def latest_step(self) -> int | None:
        """Returns the newest finished step, or None."""
        return self._manager.latest_step()

    def save(self, step: int, params: Any, rest: Any, metrics: dict[str, Any]) -> None:
        """Waits for the previous save, then starts to write and seal a step in the background.

        Args:
            step: count of updates.
            rest: the train state without its parameters.
            metrics: `step` and `validated`; if validated, also `label_accuracy`, `label_loss` and `rank` (two
                numbers, larger is better).

        Raises:
            CheckpointError: this save or the previous one failed. The message names the newest saved step.
        """
        self.wait()
        self._saving, self._metrics[step] = step, metrics
        with self._reported():
            self._manager.save(
                step,
                args=ocp.args.Composite(
                    params=ocp.args.StandardSave(params), state=ocp.args.StandardSave(rest)
                ),
                force=True,
            )
        self._sealing = self._background.submit(self._seal, step, metrics)

    def set_metrics(self, step: int, metrics: dict[str, Any]) -> None:
        """Replaces the metrics of a saved step, for example after a later validation."""
        self.wait()
        self._metrics[step] = metrics
        on_process_0(lambda: reseal(self._folder / str(step), metrics))
        steps = self._manager.all_steps()
        for old in set(steps) - self._kept.of(steps):
            self._manager.delete(old)

    def restore(self, step: int, params: Any, rest: Any) -> tuple[Any, Any]:
        """Returns a step's parameters and the rest of its train state, sharded like `params` and `rest`.

        Args:
            params: tree with the shape, dtype and sharding of each parameter.
            rest: such a tree for the rest of the train state.

        Raises:
            InputError: saved arrays have other names, shapes or dtypes.
            CheckpointError: the step is damaged, or this process cannot read it.
        """
        if step != self._verified:
            self._require_undamaged(step)
        for item, wanted in ((PARAMS, params), (STATE, rest)):
            folder = self._folder / str(step) / item
            require_fit(folder, wanted, "this run's model and optimizer")
        try:
            got = self._manager.restore(
                step,
                args=ocp.args.Composite(
                    params=ocp.args.StandardRestore(params), state=ocp.args.StandardRestore(rest)
                ),
            )
        except Exception as error:
            if isinstance(error, jax.errors.JaxRuntimeError):
                raise  # an error of the devices: out of memory, or a lost peer
            # for example, this host does not see the files that process 0 has verified
            raise CheckpointError(
                f"{self._folder / str(step)}: process {jax.process_index()} cannot restore it"
                f" ({_reason(error)})"
            ) from error
        return got["params"], got["state"]

    def _require_undamaged(self, step: int) -> None:
        if problem := defect_by_all(self._folder / str(step)):
            raise CheckpointError(f"{self._folder / str(step)}: damaged ({problem})")

    def wait(self) -> None:
        """Waits until the current save is sealed. Raises the save's error if it failed."""
        if (sealing := self._sealing) is not None:
            self._sealing = None
            with self._reported():
                sealing.result()

    def close(self) -> None:
        """Waits for the current save, and closes Orbax's manager. Raises the save's error if it failed."""
        try:
            self.wait()
        finally:
            self._background.shutdown()
            self._manager.close()

    def _seal(self, step: int, metrics: dict[str, Any]) -> None:
        """Seals a step after all processes have written it. Runs in the background thread."""
        on_all_processes(self._finish, self._channel)
        seal(self._folder / str(step), metrics, self._channel)
        on_process_0(lambda: purge(self._folder), self._channel)

    def _finish(self) -> None:
        self._manager.wait_until_finished()
        self._manager.check_for_errors()

    @contextlib.contextmanager
    def _reported(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            # Orbax also keeps the error for this thread. It is fetched here, or the next call would raise it
            for again in (self._manager.wait_until_finished, self._manager.check_for_errors):
                with contextlib.suppress(Exception):
                    again()
            del self._metrics[self._saving]
            reason = _reason(error)
            try:
                last = max(saved_steps(self._folder.parent), default=None)
                kept = "no step is saved yet" if last is None else f"step {last} is saved"
            except StoreError:  # the store cannot be reached at all
                kept = "earlier steps cannot be read either"
            raise CheckpointError(
                f"{self._folder / str(self._saving)}: was not saved ({reason}); {kept}; start again when"
                " the folder can be written"
            ) from error


def _is_not_raised(record: logging.LogRecord) -> bool:
    """Returns False for a log record of an error that `_reported` raises anyway."""
    if not record.exc_info:
        return True
    from_orbax = f"{os.sep}orbax{os.sep}" in record.pathname
    return not from_orbax and not isinstance(record.exc_info[1], StoreError)


def _reason(error: Exception) -> str:
    """Returns an error's message as one line.

    Keeps only the end of a long message, where TensorStore puts the cause.
    """
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 300 else f"...{text[-300:]}"


def checkpoints_folder(workdir: os.PathLike | str) -> pathlib.Path:
    """Returns the folder of a workdir's steps: an absolute path, or a path in a store."""
    path = as_path(workdir) / FOLDER
    return path if is_remote(path) else path.absolute()


def is_workdir(path: os.PathLike | str) -> bool:
    """Returns whether `path` is the workdir of a training run rather than an exported model."""
    return checkpoints_folder(path).is_dir()


def require_workdir(path: os.PathLike | str) -> None:
    """Raises InputError if `path` is not the workdir of a training run."""
    if not is_workdir(path):
        raise InputError(f"{existing_folder(path)}: not a workdir (it has no checkpoints)")


def saved_steps(workdir: os.PathLike | str) -> dict[int, dict[str, Any]]:
    """Returns {step: metrics} of the sealed steps whose files have the right sizes, oldest first. Changes nothing."""
    steps = saved(checkpoints_folder(workdir))
    return {s.number: s.metrics for s in steps if s.problem is None and s.metrics is not None}


def resolve_step(workdir: os.PathLike | str, step: str | int, *, read: str | None = None) -> int:
    """Returns the selected step of a run. Changes nothing.

    Args:
        step: `best`, `last` or a number.
        read: item whose bytes are verified, such as `params`. None means to check only names and sizes of
            files.

    Raises:
        InputError: there is no such step, or it is damaged. The message names other steps.
    """
    # a step without a manifest is being saved, or its save was interrupted
    steps = {s.number: s for s in saved(checkpoints_folder(workdir)) if s.problem != UNSEALED}
    if not steps:
        raise InputError(f"{workdir}: has no checkpoint; run `stepdistill train` first")
    if step == "last":
        found = max(steps)
    elif step == "best":
        known = {n: s.metrics for n, s in steps.items() if s.metrics is not None}
        # a step whose metrics are lost may have been the best: report its damage, do not skip it
        lost = min(steps.keys() - known.keys(), default=None)
        found = max(known, key=lambda n: rank(known[n])) if lost is None else lost
    elif str(step).isdecimal() and int(step) in steps:
        found = int(step)
    else:
        raise InputError(
            f"{workdir}: no step {step!r}; use `best`, `last` or one of {', '.join(map(str, steps))}"
        )
    if problem := _problem(steps[found], read):
        others = sorted((s for s in steps if s != found), reverse=True)
        good = next((s for s in others if not _problem(steps[s], read)), None)
        advice = "no other step is good" if good is None else f"`step={good}` is good"
        raise InputError(f"{steps[found].folder}: damaged ({problem}); {advice}")
    return found


def _problem(step: SavedStep, read: str | None) -> str | None:
    return step.problem or (defect(step.folder, below=read) if read else None)


def params_digest(workdir: os.PathLike | str, step: int) -> str | None:
    """Returns a digest of a step's number and its parameter files, or None if its manifest cannot be read."""
    found = files_digest(checkpoints_folder(workdir) / str(step), PARAMS)
    return None if found is None else digest([step, found])


def restore_params(workdir: os.PathLike | str, step: int, abstract: Any) -> Any:
    """Returns the parameters of a step. Reads nothing else of the step.

    Args:
        abstract: tree with the shape, dtype and sharding of each parameter.

    Raises:
        InputError: the saved arrays have other names, shapes or dtypes.
    """
    path = checkpoints_folder(workdir) / str(step) / PARAMS
    require_fit(path, abstract, "the model's config.json")
    restore_args = jax.tree.map(
        lambda x: ocp.ArrayRestoreArgs(sharding=x.sharding, global_shape=x.shape, dtype=x.dtype),
        abstract,
    )
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        return checkpointer.restore(
            path, args=ocp.args.PyTreeRestore(item=abstract, restore_args=restore_args)
        )
