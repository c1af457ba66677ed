"""Reads Flax's msgpack files: transformers 4's `flax_model.msgpack`, and T5X's `checkpoint`."""

import os
import pathlib
from typing import Any

import flax
import numpy as np

from stepdistill_jax.errors import InputError, printable
from stepdistill_jax.formats.tensors import Tensor, map_file


def open_flax(path: pathlib.Path) -> dict[str, Tensor]:
    """Returns the tensors of a file or shard as {Hugging Face's torch name: tensor}.

    Raises:
        InputError: a tensor has an unknown name, or the file cannot be read (see `read_tree`).
    """
    # a name ends in `kernel` for an [in, out] matrix, in `embedding` for a table, and in `weight` for a norm's
    # scale; in torch, all three end in `weight`, and a matrix is [out, in]
    tree = read_tree(path)
    if set(tree) == {"params"} and isinstance(tree["params"], dict):
        tree = tree["params"]
    tensors: dict[str, Tensor] = {}
    for parts, leaf in flax.traverse_util.flatten_dict(tree).items():
        *where, last = parts
        if not isinstance(leaf, np.ndarray) or last not in ("kernel", "embedding", "weight"):
            raise InputError(f"{path}: {'/'.join(parts)} is not a tensor of a T5")
        tensors[".".join([*where, "weight"])] = leaf.T if last == "kernel" else leaf
    return tensors


def read_tree(path: os.PathLike | str) -> dict[str, Any]:
    """Returns the nested dicts of numpy arrays in a file.

    The arrays need about as much memory as the file has bytes.

    Raises:
        InputError: the file is truncated, not written by Flax, or larger than this machine's memory.
    """
    data = map_file(path)
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if len(data) > memory:
        raise InputError(
            f"{path}: its {len(data)} bytes must fit into memory, but this machine has only {memory} bytes;"
            " save the model as model.safetensors, which is read by slices"
        )
    try:
        tree = flax.serialization.msgpack_restore(data)  # type: ignore[arg-type]  # reads any buffer
        flax.traverse_util.flatten_dict(tree, sep="/")  # raises unless all keys are strings
        assert isinstance(tree, dict)  # which `flatten_dict` has checked
    except Exception as error:  # raised by msgpack, Flax or numpy, whichever finds it first
        reason = printable(f"{type(error).__name__} {error}", 200)
        raise InputError(f"{path}: not a complete msgpack file of Flax ({reason})") from None
    return tree
