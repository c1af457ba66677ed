"""Orbax checkpoints of a workdir, each sealed by a manifest: the newest two and the best are kept."""

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
from stepdistill_jax.runtime.stores import StoreError, as_path, is_remote

FOLDER = "checkpoints"
PARAMS, STATE = ITEMS = ("params", "state")
KEPT_LATEST = 2


def rank(metrics: dict[str, Any]) -> Any:
    """Higher is better: the numbers in `rank`, then the earlier step.

    A step that was saved without a validation ranks below every validated one, and among its like by
    the later step: the best step of a run without validation is its last. Older versions wrote no
    `rank`: it was label accuracy, then a lower label loss.
    """
    step = float(metrics["step"])
    if not metrics.get("validated"):
        return (False, 0.0, 0.0, step)
    first, second = metrics.get("rank") or (metrics["label_accuracy"], -metrics["label_loss"])
    return (True, first, second, -step)


class _Kept:
    """Orbax's preservation policy: the newest steps, and the best by what is known of each."""

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
    """Saves and restores the train state; one object per run."""

    def __init__(self, workdir: os.PathLike | str):
        """Opens (or makes) the folder; what a kill in the middle of a save left behind is removed.

        A step that is damaged or was not saved to its end is set aside before Orbax sees it
        (`manifest.quarantine_damaged`), so that `latest_step` is good, read as a whole.

        Raises:
            CheckpointError: there are steps, and none of them is good.
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
                # renaming a folder in a store copies its files one by one
                atomicity_options=AtomicityOptions(
                    AtomicityMode.COMMIT_FILE if remote else AtomicityMode.AUTO
                ),
                cleanup_tmp_directories=True,
                # one rename: a kill in the middle of a removal leaves nothing that looks damaged
                todelete_subdir=None if remote else DELETED,
            ),
        )
        self._background = concurrent.futures.ThreadPoolExecutor(1, "seal")
        self._sealing: concurrent.futures.Future | None = None
        self._saving, self._channel = 0, Channel("seal")

    def latest_step(self) -> int | None:
        """The newest finished step."""
        return self._manager.latest_step()

    def save(self, step: int, params: Any, rest: Any, metrics: dict[str, Any]) -> None:
        """Writes and seals a step in the background; waits for an earlier one, and raises what that hit.

        Args:
            step: updates done.
            params: parameter tree.
            rest: the state without its parameters.
            metrics: `step`, `validated` and, where it is true, `label_accuracy`, `label_loss`,
                `rank` (two numbers, of which larger ones are better) and whatever else is worth
                keeping of the validation.

        Raises:
            CheckpointError: this or the earlier step could not be written; names it and the newest
                good one, which is still there.
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
        """Gives a saved step other metrics: those of a validation that came after it."""
        self.wait()
        self._metrics[step] = metrics
        on_process_0(lambda: reseal(self._folder / str(step), metrics))
        steps = self._manager.all_steps()
        for old in set(steps) - self._kept.of(steps):
            self._manager.delete(old)

    def restore(self, step: int, params: Any, rest: Any) -> tuple[Any, Any]:
        """(params, rest) of a step, placed as the abstract trees say.

        Raises:
            InputError: it holds another tree, shape or dtype; names the leaf.
            CheckpointError: it is damaged, or cannot be read by this process; names the file.
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
                raise  # of the devices: no room, or a lost peer
            # say a host that does not see what process 0 has verified
            raise CheckpointError(
                f"{self._folder / str(step)}: process {jax.process_index()} cannot restore it"
                f" ({_reason(error)})"
            ) from error
        return got["params"], got["state"]

    def _require_undamaged(self, step: int) -> None:
        if problem := defect_by_all(self._folder / str(step)):
            raise CheckpointError(f"{self._folder / str(step)}: damaged ({problem})")

    def wait(self) -> None:
        """Returns when the save in the background is whole and sealed; raises what it hit."""
        if (sealing := self._sealing) is not None:
            self._sealing = None
            with self._reported():
                sealing.result()

    def close(self) -> None:
        """Waits and releases the folder; raises what a save in the background hit."""
        try:
            self.wait()
        finally:
            self._background.shutdown()
            self._manager.close()

    def _seal(self, step: int, metrics: dict[str, Any]) -> None:
        """In the background, after Orbax has finished a step in all processes."""
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
            # Orbax keeps it for this thread, too
            for again in (self._manager.wait_until_finished, self._manager.check_for_errors):
                with contextlib.suppress(Exception):
                    again()
            del self._metrics[self._saving]
            reason = _reason(error)
            try:
                last = max(saved_steps(self._folder.parent), default=None)
                kept = "no step is saved yet" if last is None else f"step {last} is saved"
            except StoreError:  # gone as a whole
                kept = "what was saved before cannot be seen either"
            raise CheckpointError(
                f"{self._folder / str(self._saving)}: not saved ({reason}); {kept}; start again when"
                " it can be written"
            ) from error


def _is_not_raised(record: logging.LogRecord) -> bool:
    """False for the log of a traceback of what Orbax also raises: `_reported` says it in one line."""
    if not record.exc_info:
        return True
    from_orbax = f"{os.sep}orbax{os.sep}" in record.pathname
    return not from_orbax and not isinstance(record.exc_info[1], StoreError)


def _reason(error: Exception) -> str:
    """One line; of TensorStore's long ones the end, where the system's own words are."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 300 else f"...{text[-300:]}"


def checkpoints_folder(workdir: os.PathLike | str) -> pathlib.Path:
    """Where a workdir's steps are; a local one absolute."""
    path = as_path(workdir) / FOLDER
    return path if is_remote(path) else path.absolute()


def is_workdir(path: os.PathLike | str) -> bool:
    """Whether `path` is a training run's folder rather than an exported model."""
    return checkpoints_folder(path).is_dir()


def saved_steps(workdir: os.PathLike | str) -> dict[int, dict[str, Any]]:
    """Metrics of each sealed step whose files are there, oldest first.

    No manager is opened, so a live run is not disturbed.
    """
    steps = saved(checkpoints_folder(workdir))
    return {s.number: s.metrics for s in steps if s.problem is None and s.metrics is not None}


def resolve_step(workdir: os.PathLike | str, step: str | int, *, read: str | None = None) -> int:
    """The step that `best`, `last` or a number means.

    Args:
        workdir: a run's folder; nothing in it is changed.
        step: which.
        read: also read all files of this item (`params`) and compare them with the manifest; else
            names and sizes are.

    Raises:
        InputError: no such step; lists those that are there. Or it is damaged; names the file and
            another step that is good.
    """
    # a step without a manifest is being saved, or never was
    steps = {s.number: s for s in saved(checkpoints_folder(workdir)) if s.problem != UNSEALED}
    if not steps:
        raise InputError(f"{workdir}: no checkpoint in it; run `stepdistill train` first")
    if step == "last":
        found = max(steps)
    elif step == "best":
        known = {n: s.metrics for n, s in steps.items() if s.metrics is not None}
        # one whose metrics are lost might have been the best
        lost = min(steps.keys() - known.keys(), default=None)
        found = max(known, key=lambda n: rank(known[n])) if lost is None else lost
    elif str(step).isdecimal() and int(step) in steps:
        found = int(step)
    else:
        raise InputError(
            f"{workdir}: no step {step!r}; `best`, `last` or one of {', '.join(map(str, steps))}"
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
    """Digest of a step and of its parameters' files as they were saved; None where the step is gone."""
    found = files_digest(checkpoints_folder(workdir) / str(step), PARAMS)
    return None if found is None else digest([step, found])


def restore_params(workdir: os.PathLike | str, step: int, abstract: Any) -> Any:
    """Parameters of a step alone, placed as `abstract` (shapes with shardings) says.

    Raises:
        InputError: the checkpoint holds another tree, shape or dtype than the model.
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
