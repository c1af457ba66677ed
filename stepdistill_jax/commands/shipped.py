"""Finds `gin/` and `configs/`, in a checkout or in an installed wheel."""

import os
import pathlib

import stepdistill_jax
from stepdistill_jax.errors import InputError, nearest

# every command still takes the old name of a config
OLD_NAMES = {"cqa_base_step_by_step": "paper_cqa", "svamp_base_step_by_step": "paper_svamp"}


def shipped_folder(name: str) -> pathlib.Path:
    """Folder of the gin parts (`gin`) or of the experiments (`configs`).

    A wheel carries them inside the package with a leading underscore: a `gin/` at the top of
    site-packages would overwrite gin-config.

    Raises:
        InputError: neither is there, so the installation is not whole.
    """
    package = pathlib.Path(stepdistill_jax.__file__).resolve().parent
    for folder in (package / f"_{name}", package.parent / name):
        if folder.is_dir() and any(folder.glob("*.gin")):
            return folder
    raise InputError(
        f"{package}: no {name}/ is installed with the package; reinstall stepdistill-jax"
    )


def shipped_configs() -> dict[str, pathlib.Path]:
    """Path of each shipped experiment by its name, the file's stem."""
    return {path.stem: path for path in sorted(shipped_folder("configs").glob("*.gin"))}


def find_shipped(name: str) -> pathlib.Path | None:
    """The shipped experiment or part of a name; None where there is none.

    `demo_step_by_step`, `demo_step_by_step.gin` and `configs/demo_step_by_step.gin` name an
    experiment; `layouts/fsdp.gin` and `gin/layouts/fsdp.gin` a part.
    """
    path = pathlib.PurePath(name)
    name_of_config = path.suffix in ("", ".gin") and str(path.parent) in (".", "configs")
    found = shipped_configs().get(OLD_NAMES.get(path.stem, path.stem))
    if found is not None and name_of_config:
        return found
    part = shipped_folder("gin") / name.removeprefix("gin/")
    # pathlib raises at a name of 5,000 letters
    return part if os.path.isfile(part) else None


def find_config(name: str) -> pathlib.Path:
    """The file at a path, or else the shipped experiment or part of that name.

    Raises:
        InputError: neither; names the nearest shipped one.
    """
    path = pathlib.Path(name).expanduser()
    if os.path.isfile(path):
        return path
    if found := find_shipped(name):
        return found
    if os.path.isdir(path):
        raise InputError(f"{name}: is a folder, a config file is wanted")
    if len(path.parts) > 1 and (parts := _parts_beside(path)):
        raise InputError(
            f"{name}: no such config file or shipped part; {path.parent.name} has"
            f" {', '.join(parts)}{nearest(path.name, parts)}"
        )
    known = shipped_configs()
    raise InputError(
        f"{name}: no such config file, and no shipped config of that name"
        f"{nearest(path.stem, known) or ' (shipped: ' + ', '.join(known) + ')'}"
    )


def _parts_beside(path: pathlib.Path) -> list[str]:
    """Returns the file names of the shipped parts in the folder of a name such as `optimizers/adam.gin`."""
    folder = shipped_folder("gin") / path.parent.as_posix().removeprefix("gin/")
    # os.path's answer for a name that no folder can have is no
    return sorted(part.name for part in folder.glob("*.gin")) if os.path.isdir(folder) else []
