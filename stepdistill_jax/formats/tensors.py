"""Defines named tensors that are read slice by slice, whatever their file format."""

import json
import mmap
import os
import pathlib
from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np

from stepdistill_jax.errors import InputError
from stepdistill_jax.formats.parameter_names import EMBEDDING, EMBEDDING_COPIES
from stepdistill_jax.runtime.files import read_json

Index = tuple[slice, ...]
MAX_JSON = 64 << 20  # bytes; the index of the largest models has 1 MB


class Tensor(Protocol):
    """A NumPy view of a mapped file, or another object that loads only the requested slices."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def dtype(self) -> Any: ...

    def __getitem__(self, index: Any, /) -> Any: ...


class Weights:
    """Tensors under Hugging Face's torch names, in torch's orientation ([out, in] matrices)."""

    def __init__(self, tensors: Mapping[str, Tensor], stacks: Mapping[str, Tensor] | None = None):
        """Collects the tensors of a model.

        Args:
            tensors: {name: tensor}. A missing `shared.weight` is replaced by one of its `EMBEDDING_COPIES`.
            stacks: {name with `{}` in place of the layer: tensor of all layers, [layers, *shape]}. `tensors` must
                also contain the tensor of each layer.
        """
        self.tensors, self.stacks = dict(tensors), dict(stacks or {})
        copies = [name for name in EMBEDDING_COPIES if name in self.tensors]
        if copies and EMBEDDING not in self.tensors:
            self.tensors[EMBEDDING] = self.tensors[copies[0]]

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Returns {name: shape} of all tensors."""
        return {name: tuple(t.shape) for name, t in self.tensors.items()}

    def dtype(self, name: str) -> np.dtype:
        """Returns the stored dtype of a tensor."""
        return np.dtype(self.tensors[name].dtype)

    def read(self, name: str, index: Index) -> np.ndarray:
        """Returns a slice of a tensor in its stored dtype, as a view if the file is mapped."""
        return np.asarray(self.tensors[name][index])

    def read_layers(self, name: str, layers: range, index: Index, out: np.ndarray) -> None:
        """Fills `out` [layers, ...] with a slice of each layer's tensor. `{}` in `name` stands for the layer."""
        if name in self.stacks:  # all layers at once: each chunk is then decompressed only once
            out[...] = self.stacks[name][(slice(layers.start, layers.stop), *index)]
            return
        for i, layer in enumerate(layers):
            out[i] = self.read(name.format(layer), index)


class Transposed:
    """A tensor with its last two axes swapped, read by slices."""

    def __init__(self, tensor: Tensor):
        self._tensor = tensor
        *layers, rows, columns = tensor.shape
        self.shape, self.dtype = (*layers, columns, rows), tensor.dtype

    def __getitem__(self, index: Index) -> np.ndarray:
        *layers, rows, columns = index
        return np.swapaxes(np.asarray(self._tensor[(*layers, columns, rows)]), -1, -2)


def map_file(path: os.PathLike | str) -> mmap.mmap:
    """Maps a file into memory. Its bytes are read on access.

    Raises:
        InputError: the file does not exist, is empty, or cannot be read.
    """
    try:
        with open(path, "rb") as f:
            return mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ)
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except (OSError, ValueError) as error:  # ValueError: empty
        raise InputError(f"{path}: cannot be read ({error})") from None


def read_object(path: pathlib.Path) -> dict[str, Any]:
    """Returns the JSON object in a small file, such as `config.json`.

    Raises:
        InputError: the file is missing, too large, not JSON, not an object, or not valid Unicode.
    """
    if path.is_file() and path.stat().st_size > MAX_JSON:
        raise InputError(
            f"{path}: larger than {MAX_JSON >> 20} MiB, so it cannot be a valid file of this name"
        )
    raw = read_json(path)
    if not isinstance(raw, dict):
        raise InputError(f"{path}: expected a JSON object")
    try:
        json.dumps(raw, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise InputError(
            f"{path}: contains an unpaired surrogate, which is not valid Unicode"
        ) from None
    return raw


def shard_files(index: pathlib.Path) -> list[pathlib.Path]:
    """Returns the files that an index (`*.index.json`) names.

    Raises:
        InputError: a name is not a plain file name, or its file is not in the index's folder.
    """
    weight_map = read_object(index).get("weight_map")
    names = list(weight_map.values()) if isinstance(weight_map, dict) else []
    if not names or not all(map(is_file_name, names)):
        raise InputError(f"{index}: `weight_map` must name files in this folder")
    files = [index.parent / name for name in sorted(set(names))]
    for file in files:
        if not file.is_file():
            raise InputError(f"{file}: named in {index.name}, but missing")
    return files


def is_file_name(name: Any) -> bool:
    """Returns whether a value is a plain file name, which cannot point outside its folder."""
    if not isinstance(name, str) or "\0" in name or len(name.encode("utf-8", "replace")) > 255:
        return False
    return name not in ("", ".", "..") and pathlib.PurePath(name).name == name
