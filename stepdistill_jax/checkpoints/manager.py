"""Orbax checkpoints of a workdir: the newest two and the best step are kept."""

import os
import pathlib
from typing import Any

import jax
import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import AnyPreservationPolicy, BestN, LatestN
from orbax.checkpoint.options import AtomicityMode, AtomicityOptions

from stepdistill_jax.checkpoints import s3
from stepdistill_jax.errors import InputError
from stepdistill_jax.files import as_path, is_remote, read_json

FOLDER = "checkpoints"
ITEMS = ("params", "state", "metadata")
KEPT_LATEST = 2
COMMITTED = "commit_success.txt"


def rank(metrics: dict[str, Any]) -> Any:
    """Higher is better: label accuracy, then a lower label loss, then the earlier step.

    A step that was saved without a validation ranks below every validated one.
    """
    if not metrics.get("validated"):
        return (-1.0, 0.0, -float(metrics["step"]))
    return (metrics["label_accuracy"], -metrics["label_loss"], -float(metrics["step"]))


class Checkpoints:
    """Saves and restores the train state; one object per run."""

    def __init__(self, workdir: os.PathLike | str):
        """Opens (or makes) the folder; what a kill in the middle of a save left behind is removed."""
        folder = _folder(workdir)
        # renaming a folder in a store copies its files one by one
        mode = AtomicityMode.COMMIT_FILE if is_remote(folder) else AtomicityMode.AUTO
        self._manager = ocp.CheckpointManager(
            folder,
            item_names=ITEMS,
            options=ocp.CheckpointManagerOptions(
                preservation_policy=AnyPreservationPolicy(
                    [LatestN(n=KEPT_LATEST), BestN(get_metric_fn=rank, n=1)]
                ),
                best_fn=rank,
                atomicity_options=AtomicityOptions(mode),
                cleanup_tmp_directories=True,
            ),
        )

    def latest_step(self) -> int | None:
        """The newest finished step."""
        return self._manager.latest_step()

    def save(self, step: int, params: Any, rest: Any, metrics: dict[str, Any]) -> None:
        """Writes a step in the background; waits for an earlier save, and raises what that hit.

        Args:
            step: updates done.
            params: parameter tree.
            rest: the state without its parameters.
            metrics: `step`, `validated` and, where it is true, `label_accuracy`, `label_loss` and
                whatever else is worth keeping of the validation.
        """
        self.wait()
        self._manager.save(
            step,
            args=ocp.args.Composite(
                params=ocp.args.StandardSave(params),
                state=ocp.args.StandardSave(rest),
                metadata=ocp.args.JsonSave({"step": step, **metrics}),
            ),
            metrics=metrics,
            force=True,
        )

    def delete(self, step: int) -> None:
        """Removes a step that will be saved again."""
        self.wait()
        self._manager.delete(step)

    def restore(self, step: int, params: Any, rest: Any) -> tuple[Any, Any]:
        """(params, rest) of a step, placed as the abstract trees say."""
        got = self._manager.restore(
            step,
            args=ocp.args.Composite(
                params=ocp.args.StandardRestore(params), state=ocp.args.StandardRestore(rest)
            ),
        )
        return got["params"], got["state"]

    def wait(self) -> None:
        """Returns when the save in the background is whole; raises what it hit."""
        self._manager.wait_until_finished()
        self._manager.check_for_errors()

    def close(self) -> None:
        """Waits and releases the folder; raises what a save in the background hit."""
        try:
            self.wait()
        finally:
            self._manager.close()


def _folder(workdir: os.PathLike | str) -> pathlib.Path:
    path = as_path(workdir) / FOLDER
    if not is_remote(path):
        return path.absolute()
    if os.fspath(path).startswith(s3.S3):
        s3.enable()
    return path


def is_workdir(path: os.PathLike | str) -> bool:
    """Whether `path` is a training run's folder rather than an exported model."""
    return _folder(path).is_dir()


def saved_steps(workdir: os.PathLike | str) -> dict[int, dict[str, Any]]:
    """Metrics of each finished step, oldest first; no manager is opened, so a live run is not disturbed."""
    steps, remote = {}, is_remote(workdir)
    if remote and not is_workdir(workdir):
        return {}  # a store has no empty folders
    for folder in _folder(workdir).iterdir():
        metadata = folder / "metadata" / "metadata"
        # a store has no rename that ends a save: there, Orbax writes this file last
        last = folder / COMMITTED if remote else metadata
        if folder.name.isdigit() and last.is_file():
            steps[int(folder.name)] = read_json(metadata)
    return dict(sorted(steps.items()))


def resolve_step(workdir: os.PathLike | str, step: str | int) -> int:
    """The step that `best`, `last` or a number means.

    Raises:
        InputError: no such step; lists those that are there.
    """
    steps = saved_steps(workdir) if is_workdir(workdir) else {}
    if not steps:
        raise InputError(f"{workdir}: no checkpoint in it; run `stepdistill train` first")
    if step == "last":
        return max(steps)
    if step == "best":
        return max(steps, key=lambda s: rank(steps[s]))
    if str(step).isdigit() and int(step) in steps:
        return int(step)
    raise InputError(
        f"{workdir}: no step {step!r}; `best`, `last` or one of {', '.join(map(str, steps))}"
    )


def restore_params(workdir: os.PathLike | str, step: int, abstract: Any) -> Any:
    """Parameters of a step alone, placed as `abstract` (shapes with shardings) says.

    Raises:
        InputError: the checkpoint holds other shapes than the model.
    """
    path = _folder(workdir) / str(step) / "params"
    restore_args = jax.tree.map(
        lambda x: ocp.ArrayRestoreArgs(sharding=x.sharding, global_shape=x.shape, dtype=x.dtype),
        abstract,
    )
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        try:
            return checkpointer.restore(
                path, args=ocp.args.PyTreeRestore(item=abstract, restore_args=restore_args)
            )
        except ValueError as error:
            reason = " ".join(str(error).split())[:200]
            raise InputError(f"{path}: does not fit the model's config.json ({reason})") from error
