"""Finds a task by its name, and imports the module that registers it."""

import importlib
import os
import pathlib
import sys
from typing import Any

from stepdistill_jax.data.builder import tensorflow
from stepdistill_jax.data.prepare import ensure_prepared
from stepdistill_jax.data.prepared import (
    EMBEDDED,
    PreparedDataset,
    data_folder,
    is_prepared,
    open_prepared,
    prepared_names,
)
from stepdistill_jax.errors import InputError, nearest
from stepdistill_jax.runtime.fingerprints import sha256
from stepdistill_jax.tasks import registry
from stepdistill_jax.tasks.prepared_tasks import importing_for, registered_dataset
from stepdistill_jax.tasks.registry import TaskSpec
from stepdistill_jax.tasks.sources import check_source, raised_at


def find_task(task: str, *, data_dir: pathlib.Path, task_module: str | None) -> Any:
    """Returns a `PreparedDataset`, a `TaskSpec`, or a plain `seqio.Task` or `seqio.Mixture`.

    A task of `add_task` takes precedence over a prepared dataset of the same name. A plain task takes precedence
    only if `task_module` is given.

    Raises:
        InputError: the task is unknown, or `check_source` refuses its source.
    """
    if task_module is not None:
        import_task_module(task_module, data_dir)
    if task in registry.SPECS:
        return registry.SPECS[task]
    registered = registry.registered_names()
    ours = registered_dataset(task)
    if (task == EMBEDDED or is_prepared(task, data_dir)) and not (
        task_module is not None and task in registered and ours is None
    ):
        return ensure_prepared(task, data_dir)
    if ours is not None:  # in another folder
        return open_prepared(task, ours.directory.parent)
    if task in registered:
        import seqio

        found = seqio.get_mixture_or_task(task)
        for one in seqio.get_subtasks(found):
            check_source(one.name, one.source)
        return found
    prepared = prepared_names(data_dir)
    raise InputError(
        f"unknown task {task!r}: prepared in {data_dir}: {', '.join(prepared) or 'none'};"
        f" registered with SeqIO: {', '.join(registered) or 'none'}"
        f"{nearest(task, [*prepared, *registered])}; prepare a dataset with `stepdistill"
        " prepare`, or set `task_module` to the module that registers your task"
    )


def import_task_module(name: str, data_dir: pathlib.Path | None = None) -> None:
    """Imports a user's module, which may be installed or in the current folder.

    `data_dir` is the default data folder of `register_prepared()` during the import.

    Raises:
        InputError: the module does not exist, or its import fails.
    """
    if name in sys.modules:
        return
    tensorflow()  # before the module imports it, since this hides accelerators from TensorFlow
    search_current_folder()
    try:
        if all(name.split(".")) and "\0" not in name:
            with importing_for(data_dir):
                importlib.import_module(name)
            return
    except InputError:
        raise
    except (Exception, SystemExit) as error:
        absent = error.name if isinstance(error, ModuleNotFoundError) else None
        # otherwise the module was found, and an import inside it failed
        if absent is None or not f"{name}.".startswith(f"{absent}."):
            raise _not_importable(name, error) from error
    hint = ""
    if name.endswith(".py") or "/" in name:
        hint = f"; write it as a module, {name.removesuffix('.py').strip('./').replace('/', '.')}"
    raise InputError(
        f"`task_module`: no module {name!r} on the Python path or in {os.getcwd()}{hint}"
    )


def _not_importable(name: str, error: BaseException) -> InputError:
    """Returns the error for a failed import."""
    return InputError(
        f"`task_module` {name!r} cannot be imported: {type(error).__name__}: {error}{raised_at(error)}"
    )


def search_current_folder() -> None:
    """Appends the current folder to `sys.path`, so that a console script can import from this folder.

    Installed modules take precedence over the folder's files.
    """
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())


def module_digest(name: str | None) -> str | None:
    """Returns a digest of a task module's file, or None if there is no such file.

    The digest is part of a token store's key, so a task is tokenised again after an edit of its module.
    """
    path = getattr(sys.modules.get(name or ""), "__file__", None)
    return sha256(path) if path else None


def has_split(
    task: str,
    split: str,
    *,
    data_dir: os.PathLike | str | None = None,
    task_module: str | None = None,
) -> bool:
    """Returns whether a task has a split.

    Raises:
        InputError: the task is unknown.
    """
    return split in splits_of(task, data_dir=data_dir, task_module=task_module)


def splits_of(
    task: str, *, data_dir: os.PathLike | str | None = None, task_module: str | None = None
) -> tuple[str, ...]:
    """Returns the names of a task's splits. A mixture has the splits of all its tasks."""
    folder = data_folder(data_dir)
    found = find_task(task, data_dir=folder, task_module=task_module)
    if isinstance(found, PreparedDataset):
        return tuple(found.splits)
    if isinstance(found, TaskSpec):
        return tuple(found.source.splits)
    import seqio

    return tuple(dict.fromkeys(s for t in seqio.get_subtasks(found) for s in t.splits))
