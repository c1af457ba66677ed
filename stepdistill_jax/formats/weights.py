"""Opens the weights of a model directory, in any format."""

import os
import pathlib
from collections.abc import Callable

import numpy as np

from stepdistill_jax.errors import InputError
from stepdistill_jax.formats.flax_msgpack import open_flax
from stepdistill_jax.formats.parameter_names import Names
from stepdistill_jax.formats.safetensors_file import open_safetensors
from stepdistill_jax.formats.t5x import find_t5x, open_t5x
from stepdistill_jax.formats.tensors import Tensor, Weights, shard_files
from stepdistill_jax.formats.torch_bin import open_torch

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
INDEX_SUFFIX = ".index.json"
# the first one found is read; msgpack comes before torch's format, since it needs no torch
_READERS: dict[str, Callable[[pathlib.Path], dict[str, Tensor]]] = {
    WEIGHTS: open_safetensors,
    "flax_model.msgpack": open_flax,
    "pytorch_model.bin": open_torch,
}
WEIGHT_FILES = tuple(_READERS)
_TENSORFLOW = "tf_model.h5"
_BLOCK = 1024  # rows that are compared at once


def open_weights(directory: os.PathLike | str) -> Weights:
    """Opens the tensors of a directory, in the first format found.

    The order is `model.safetensors`, `flax_model.msgpack`, `pytorch_model.bin`, T5X checkpoint. The first three
    may be split into shards with an index.

    Raises:
        InputError: there are no weights, or they cannot be read.
    """
    directory = pathlib.Path(directory)
    for name, reader in _READERS.items():
        if (directory / name).is_file():
            return Weights(reader(directory / name))
        if (index := directory / (name + INDEX_SUFFIX)).is_file():
            tensors: dict[str, Tensor] = {}
            for file in shard_files(index):
                tensors |= reader(file)
            return Weights(tensors)
    if find_t5x(directory):
        return open_t5x(directory)
    raise InputError(f"{directory}: no {WEIGHTS}{_how_to_convert(directory)}")


def has_weights(directory: os.PathLike | str) -> bool:
    """Returns whether the directory contains weights, even in a format that `open_weights` refuses."""
    directory = pathlib.Path(directory)
    names = [n + suffix for n in (*_READERS, _TENSORFLOW) for suffix in ("", INDEX_SUFFIX)]
    return any((directory / n).is_file() for n in names) or find_t5x(directory) is not None


def has_own_head(weights: Weights, names: Names) -> bool:
    """Returns whether the weights have an output layer that is more than a copy of the embedding.

    Older tools wrote v1.0's tied table a second time, as `lm_head.weight`.
    """
    shapes = weights.shapes()
    if names.head not in shapes:
        return False
    if shapes[names.head] != shapes.get(names.embedding) or len(shapes[names.head]) != 2:
        return True
    # if the tables differ, the first block almost always shows it
    for start in range(0, shapes[names.head][0], _BLOCK):
        index = (slice(start, start + _BLOCK), slice(None))
        if not np.array_equal(
            weights.read(names.head, index), weights.read(names.embedding, index)
        ):
            return True
    return False


def _how_to_convert(directory: pathlib.Path) -> str:
    """Returns how to convert the directory's TensorFlow weights to safetensors, or "" if it has no such weights."""
    names = (_TENSORFLOW, _TENSORFLOW + INDEX_SUFFIX)
    there = [name for name in names if (directory / name).is_file()]
    if not there:
        return ""
    folder = repr(os.fspath(directory))
    return (
        f", but only {', '.join(there)}; convert the weights once with transformers below 5, which still"
        ' reads them: python -c "from transformers import T5ForConditionalGeneration as T;'
        f" T.from_pretrained({folder}, from_tf=True)"
        f'.save_pretrained({folder}, safe_serialization=True)"'
    )
