"""`flax_model.msgpack` of transformers 4's Flax T5, presented under torch's names."""

import pathlib
from collections.abc import Iterator
from typing import Any

from stepdistill_jax.errors import InputError
from stepdistill_jax.formats.mapped_msgpack import read_tree
from stepdistill_jax.formats.tensors import Tensor, transpose


def open_flax(path: pathlib.Path) -> dict[str, Tensor]:
    """Tensors of one file (or one of its shards) by Hugging Face's torch name; nothing is read.

    Flax keeps matrices as `kernel` [in, out], tables as `embedding` and norms as `weight`.

    Raises:
        InputError: a file that is cut, or is not what Flax writes.
    """
    tree = read_tree(path)
    if set(tree) == {"params"} and isinstance(tree["params"], dict):
        tree = tree["params"]
    tensors: dict[str, Tensor] = {}
    for parts, leaf in _leaves(tree):
        *where, last = parts
        if not hasattr(leaf, "shape") or last not in ("kernel", "embedding", "weight"):
            raise InputError(f"{path}: {'/'.join(parts)} is no tensor of a T5")
        if last == "kernel" and len(leaf.shape) == 2:
            leaf = transpose(leaf)
        tensors[".".join([*where, "weight"])] = leaf
    return tensors


def _leaves(tree: dict[str, Any], above: tuple[str, ...] = ()) -> Iterator[tuple[list[str], Any]]:
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from _leaves(value, (*above, key))
        else:
            yield [*above, key], value
