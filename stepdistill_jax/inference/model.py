"""Loads a trained model from a workdir or a model directory."""

import dataclasses
import os
import pathlib
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, SingleDeviceSharding

from stepdistill_jax.data.vocabulary import Vocabulary
from stepdistill_jax.errors import InputError
from stepdistill_jax.formats.directory import ModelFiles, TaskInfo, read_model_files
from stepdistill_jax.formats.hf import load_params
from stepdistill_jax.models.config import ModelConfig
from stepdistill_jax.models.encoder_decoder import abstract_params
from stepdistill_jax.models.lora import merge
from stepdistill_jax.models.sharding import Layout, make_mesh, param_shardings
from stepdistill_jax.runtime.checkpoints.manager import (
    FOLDER,
    is_workdir,
    resolve_step,
    restore_params,
)
from stepdistill_jax.runtime.fingerprints import digest, sampled_digest
from stepdistill_jax.runtime.on_processes import on_all_processes, on_process_0, require_same
from stepdistill_jax.runtime.stores import as_path, is_remote, local_path


@dataclasses.dataclass(frozen=True)
class LoadedModel:
    """A model with its vocabulary and task.

    Attributes:
        config: configuration, with float32 activations.
        params: parameters, with LoRA adapters merged in.
        task_info: contents of `stepdistill.json`; None if the directory lacks that file.
        step: step of the checkpoint; None if `path` is not a workdir.
    """

    path: pathlib.Path
    config: ModelConfig
    params: Any
    vocabulary: Vocabulary
    task_info: TaskInfo | None
    step: int | None


def load_model(
    path: os.PathLike | str, step: str | int = "best", *, mesh: Mesh | None = None
) -> LoadedModel:
    """Loads a checkpoint of a workdir, or the model of a model directory. All processes must call this.

    Args:
        path: workdir, or directory in Hugging Face's layout.
        step: checkpoint of a workdir: `best` on the validation split, `last`, or a step number.
        mesh: devices for the parameters; None means the default device.

    Raises:
        InputError: the model or step does not exist, or its files are damaged or do not fit together.
    """
    path = as_path(path)
    found = on_process_0(
        lambda: resolve_step(path, step, read="params") if is_workdir(path) else None
    )
    # every process reads these first: in Orbax, all would wait for one that cannot
    files = on_all_processes(lambda: _read_files(path, step, found))
    # with sharding, each process reads a part: parts of two different models would be mixed
    require_same(on_all_processes(lambda: _weights(path, found)), "model")
    boxed = abstract_params(files.config)
    if mesh:
        shardings = param_shardings(mesh, boxed, files.config)
    else:
        one = SingleDeviceSharding(jax.devices()[0])
        shardings = jax.tree.map(lambda _: one, nn.meta.unbox(boxed))
    if found is None:
        params = on_all_processes(lambda: load_params(path, files.config, shardings))
    else:
        abstract = jax.tree.map(
            lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
            nn.meta.unbox(boxed),
            shardings,
        )
        params = restore_params(path, found, abstract)
    params, config = merge(params, files.config)
    return LoadedModel(path, config, params, files.vocabulary, files.task_info, found)


def _read_files(path: pathlib.Path, step: str | int, found: int | None) -> ModelFiles:
    if found is None and (path / "run.json").is_file():
        raise InputError(f"{path}: this workdir has no folder checkpoints")
    files = read_model_files(path)
    if found is not None:
        resolve_step(path, found)
    elif step not in ("best", "last"):
        raise InputError(
            f"`step` {step}: {path} is a model directory, which contains only one model; leave this option"
            " out, or use the workdir"
        )
    else:
        local_path(path, "model directory")
    return files


def _weights(path: pathlib.Path, found: int | None) -> str:
    """Returns a digest of the weights, for a check that all processes read the same weights.

    Returns "" for a single process or a remote path.
    """
    if jax.process_count() == 1 or is_remote(path):
        return ""
    return sampled_digest(path if found is None else path / FOLDER / str(found) / "params")


def device_mesh(layout: str | Layout) -> Mesh | None:
    """Returns a layout's mesh over all devices of all processes; None if there is only one device.

    Raises:
        InputError: the layout is unknown, or does not fit the number of devices.
    """
    mesh = make_mesh(layout)
    return mesh if mesh.size > 1 else None


def params_fingerprint(params: Any) -> str:
    """Returns a checksum of all parameters, which is the same for a checkpoint and its export.

    The checksum does not depend on the sharding. All processes must call this function.
    """
    sums = [_checksum(x) for x in jax.tree.leaves(params)]
    return digest([np.asarray(x).tolist() for x in sums])


@jax.jit
def _checksum(x: jax.Array) -> jax.Array:
    """Returns a checksum of an array, [2] uint32, which does not depend on the array's sharding.

    Each element has a hash h of its bits and its position. The checksum is the sum of h and the sum of h^2,
    both modulo 2^32.
    """
    place = jnp.zeros(x.shape, jnp.uint32)
    for axis, size in enumerate(x.shape):
        place = place * jnp.uint32(size) + jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis)
    x = x.astype(jnp.int32) if x.dtype == jnp.int8 else x
    # multiplications and shifts of MurmurHash3
    h = jax.lax.bitcast_convert_type(x, jnp.uint32) ^ (place * jnp.uint32(0x9E3779B9))
    h = (h ^ (h >> 16)) * jnp.uint32(0x85EBCA6B)
    h = (h ^ (h >> 13)) * jnp.uint32(0xC2B2AE35)
    return jnp.stack([jnp.sum(h, dtype=jnp.uint32), jnp.sum(h * h, dtype=jnp.uint32)])
