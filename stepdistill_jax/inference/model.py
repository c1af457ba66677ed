"""A trained model, from a workdir or a model directory."""

import dataclasses
import os
import pathlib
import zlib
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from jax.sharding import Mesh, SingleDeviceSharding

from stepdistill_jax.checkpoints.manager import is_workdir, resolve_step, restore_params
from stepdistill_jax.errors import InputError
from stepdistill_jax.files import digest
from stepdistill_jax.formats.directory import TaskInfo, read_model_files
from stepdistill_jax.formats.hf import load_params
from stepdistill_jax.models.config import T5Config
from stepdistill_jax.models.lora import merge
from stepdistill_jax.models.t5 import abstract_params
from stepdistill_jax.sharding import param_shardings
from stepdistill_jax.text.vocabulary import Vocabulary


@dataclasses.dataclass(frozen=True)
class LoadedModel:
    """What is needed to ask a model.

    Attributes:
        path: the directory that it came from.
        config, params: of the `T5`; activations are float32 whatever it was trained with, and
            adapters are merged.
        vocabulary: text to ids and back.
        task_info: how it was asked during training; None for a bare Hugging Face directory.
        step: of the checkpoint; None where the directory holds one model only.
    """

    path: pathlib.Path
    config: T5Config
    params: Any
    vocabulary: Vocabulary
    task_info: TaskInfo | None
    step: int | None


def load_model(
    path: os.PathLike | str, step: str | int = "best", *, mesh: Mesh | None = None
) -> LoadedModel:
    """Opens a workdir at a step, or a model directory.

    Args:
        path: a folder with `checkpoints/`, or one in the Hugging Face layout.
        step: `best` by validation, `last`, or a number; a model directory has only one.
        mesh: where the parameters are placed; None is the default device.

    Raises:
        InputError: not a model, no such step, or weights that do not fit the configuration.
    """
    path = pathlib.Path(path)
    files = read_model_files(path)
    if not is_workdir(path) and step not in ("best", "last"):
        raise InputError(
            f"--step {step}: {path} is a model directory, which holds one model; leave --step out,"
            " or give the workdir"
        )
    boxed = abstract_params(files.config)
    if mesh:
        shardings = param_shardings(mesh, boxed)
    else:
        one = SingleDeviceSharding(jax.devices()[0])
        shardings = jax.tree.map(lambda _: one, nn.meta.unbox(boxed))
    if not is_workdir(path):
        params, found = load_params(path, files.config, shardings), None
    else:
        found = resolve_step(path, step)
        abstract = jax.tree.map(
            lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
            nn.meta.unbox(boxed),
            shardings,
        )
        params = restore_params(path, found, abstract)
    params, config = merge(params, files.config)
    return LoadedModel(path, config, params, files.vocabulary, files.task_info, found)


def params_fingerprint(params: Any) -> str:
    """A checksum of all parameters: the same for a checkpoint and for its export."""
    return digest([zlib.crc32(np.ascontiguousarray(x).data) for x in jax.tree.leaves(params)])
