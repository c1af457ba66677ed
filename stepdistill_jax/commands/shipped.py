"""Finds the shipped folders `gin/` and `configs/`, in a checkout or in an installed wheel."""

import os
import pathlib

import stepdistill_jax
from stepdistill_jax.errors import InputError, nearest

# every command still accepts a config's old name
OLD_NAMES = {"cqa_base_step_by_step": "paper_cqa", "svamp_base_step_by_step": "paper_svamp"}


def shipped_folder(name: str) -> pathlib.Path:
    """Returns the folder of the shipped parts (`gin`) or experiments (`configs`).

    In a wheel, the folders are `_gin` and `_configs` in the package, since `gin/` in site-packages would
    overwrite gin-config.

    Raises:
        InputError: the installation is incomplete.
    """
    package = pathlib.Path(stepdistill_jax.__file__).resolve().parent
    for folder in (package / f"_{name}", package.parent / name):
        if folder.is_dir() and any(folder.glob("*.gin")):
            return folder
    raise InputError(
        f"{package}: the folder {name}/ is missing from this installation; reinstall stepdistill-jax"
    )


def shipped_configs() -> dict[str, pathlib.Path]:
    """Returns {file name without `.gin`: path} of the shipped experiments."""
    return {path.stem: path for path in sorted(shipped_folder("configs").glob("*.gin"))}


def find_shipped(name: str) -> pathlib.Path | None:
    """Returns the path of a shipped experiment or part; None if the name is unknown.

    Names of experiments: `demo_step_by_step`, `demo_step_by_step.gin`, `configs/demo_step_by_step.gin`.
    Names of parts: `layouts/fsdp.gin`, `gin/layouts/fsdp.gin`.
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
    """Returns the path of a config: the file `name` or else the shipped experiment or part called `name`.

    Raises:
        InputError: there is no such file, experiment or part.
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
    """Returns the names of all shipped parts in the same folder as `path`, for example in `optimizers/`."""
    folder = shipped_folder("gin") / path.parent.as_posix().removeprefix("gin/")
    # os.path.isdir is False for an impossible name, where pathlib would raise an error
    return sorted(part.name for part in folder.glob("*.gin")) if os.path.isdir(folder) else []
