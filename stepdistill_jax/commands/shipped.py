"""Finds the shipped folders `gin/` and `configs/`, in a checkout or in an installed wheel."""

import os
import pathlib

import stepdistill_jax
from stepdistill_jax.errors import InputError, nearest

# every command still accepts a config's old name
OLD_NAMES = {"cqa_base_step_by_step": "paper_cqa", "svamp_base_step_by_step": "paper_svamp"}


def shipped_folder(name: str) -> pathlib.Path:
    """Returns the folder of the shipped parts (`gin`) or of the shipped experiments (`configs`).

    In a wheel, the folders are inside the package, and their names start with an underscore. A folder `gin/`
    at the top of site-packages would overwrite gin-config.

    Raises:
        InputError: the folder is missing, so the installation is incomplete.
    """
    package = pathlib.Path(stepdistill_jax.__file__).resolve().parent
    for folder in (package / f"_{name}", package.parent / name):
        if folder.is_dir() and any(folder.glob("*.gin")):
            return folder
    raise InputError(
        f"{package}: the folder {name}/ is missing from this installation; reinstall stepdistill-jax"
    )


def shipped_configs() -> dict[str, pathlib.Path]:
    """Returns {name: path} of the shipped experiments. The names are those of the files, without `.gin`."""
    return {path.stem: path for path in sorted(shipped_folder("configs").glob("*.gin"))}


def find_shipped(name: str) -> pathlib.Path | None:
    """Returns the path of a shipped experiment or part; None if the name is unknown.

    An experiment may be named `demo_step_by_step`, `demo_step_by_step.gin` or
    `configs/demo_step_by_step.gin`, for example. A part may be named `layouts/fsdp.gin` or
    `gin/layouts/fsdp.gin`.
    """
    path = pathlib.PurePath(name)
    name_of_config = path.suffix in ("", ".gin") and str(path.parent) in (".", "configs")
    found = shipped_configs().get(OLD_NAMES.get(path.stem, path.stem))
    if found is not None and name_of_config:
        return found
    part = shipped_folder("gin") / name.removeprefix("gin/")
    # os.path: pathlib raises an error for a name of 5,000 letters
    return part if os.path.isfile(part) else None


def find_config(name: str) -> pathlib.Path:
    """Returns the path of a config: the file `name`, or a shipped experiment or part of that name.

    Raises:
        InputError: there is no such file, experiment or part. The message suggests a similar name,
            or lists the names of shipped configs or parts.
    """
    path = pathlib.Path(name).expanduser()
    if os.path.isfile(path):
        return path
    if found := find_shipped(name):
        return found
    if os.path.isdir(path):
        raise InputError(f"{name}: expected a config file, got a folder")
    if len(path.parts) > 1 and (parts := _sibling_parts(path)):
        raise InputError(
            f"{name}: no such config file or shipped part; {path.parent.name} has"
            f" {', '.join(parts)}{nearest(path.name, parts)}"
        )
    known = shipped_configs()
    raise InputError(
        f"{name}: no such config file, and no shipped config of that name"
        f"{nearest(path.stem, known) or ' (shipped: ' + ', '.join(known) + ')'}"
    )


def _sibling_parts(path: pathlib.Path) -> list[str]:
    """Returns the names of all shipped parts in the folder of a path.

    Example: for `optimizers/adam.gin`, these are the names of all parts in `optimizers/`.
    """
    folder = shipped_folder("gin") / path.parent.as_posix().removeprefix("gin/")
    # os.path.isdir is False for an impossible name, where pathlib would raise an error
    return sorted(part.name for part in folder.glob("*.gin")) if os.path.isdir(folder) else []
