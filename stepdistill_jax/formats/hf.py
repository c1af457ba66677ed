"""Converts between Hugging Face's weights and our parameters, slice by slice.

Hugging Face stores one tensor per layer. Our parameters stack all layers.
"""

import itertools
import math
import os
import pathlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import flax.linen as nn
import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import SingleDeviceSharding

from stepdistill_jax.errors import InputError
from stepdistill_jax.formats.parameter_names import NAMES, Names, hf_names, is_transposed
from stepdistill_jax.formats.safetensors_file import write_safetensors
from stepdistill_jax.formats.tensors import Weights
from stepdistill_jax.formats.weights import INDEX, WEIGHTS, has_own_head, open_weights
from stepdistill_jax.models.config import ModelConfig
from stepdistill_jax.models.encoder_decoder import abstract_params
from stepdistill_jax.runtime.files import write_json

MAX_SHARD_SIZE = 5 * 10**9  # bytes; Hugging Face's "5GB"


def load_params(
    directory: os.PathLike | str,
    config: ModelConfig,
    shardings: Any | None = None,
    *,
    sources: Mapping[str, str] | None = None,
) -> Any:
    """Returns the parameters of a model directory as float32, whatever their stored dtype.

    Each process reads only the slices of its own devices.

    Args:
        directory: folder with weights that `open_weights` reads.
        shardings: sharding of each parameter (`sharding.param_shardings`). None means the default device.
        sources: {name of a parameter in the result: its name in the directory}, as in `stored_shapes`. The shapes
            must be equal. None means that all parameters have the same names in both.

    Returns:
        The unboxed parameter tree of `EncoderDecoder`; with `sources`, only the parameters that it names.

    Raises:
        InputError: tensors are missing, unknown, or of a wrong shape or dtype. The message lists them.
    """
    weights, table = open_weights(directory), hf_names(config)
    abstract = jax.eval_shape(nn.meta.unbox, abstract_params(config))
    flat: dict[str, Any] = flax.traverse_util.flatten_dict(abstract, sep="/")
    if flat.keys() != table.keys():
        raise AssertionError(f"model and table disagree on {sorted(flat.keys() ^ table.keys())}")
    partly = sources is not None
    sources = {path: path for path in flat} if sources is None else sources
    flat = {path: flat[path] for path in sources}
    taken = {source: flat[path] for path, source in sources.items()}
    _check(directory, weights, _expected(taken, table), NAMES[type(config)], partly)
    placed: dict[str, Any] = dict.fromkeys(flat, SingleDeviceSharding(jax.devices()[0]))
    if shardings is not None:
        placed = flax.traverse_util.flatten_dict(shardings, sep="/")
    arrays = {}
    # the largest first, while little else is in memory
    for path, x in sorted(flat.items(), key=lambda item: -math.prod(item[1].shape)):
        read = _reader(weights, table[sources[path]], sources[path], x)
        array = jax.make_array_from_callback(x.shape, placed[path], read)
        # wait for the copy to the device, or host buffers would pile up
        arrays[path] = array.block_until_ready()
    return flax.traverse_util.unflatten_dict(arrays, sep="/")


def stored_shapes(directory: os.PathLike | str, config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Returns {our name: shape} of the parameters in a model directory.

    Parameters of layers are stacked along their first axis. The shapes need not fit `config`.

    Raises:
        InputError: there are no readable weights, or layers have different shapes.
    """
    found, shapes = open_weights(directory).shapes(), {}
    for path, name in hf_names(config).items():
        if "{}" in name:
            layers = list(_layers(found, name))
            if len(set(layers)) > 1:
                raise InputError(f"{directory}: the layers of {path} have different shapes")
            count = (len(layers),)
        else:
            layers, count = [found[name]] if name in found else [], ()
        if layers:
            shapes[path] = (*count, *(layers[0][::-1] if is_transposed(path) else layers[0]))
    return shapes


def _layers(found: Mapping[str, tuple[int, ...]], name: str) -> Iterator[tuple[int, ...]]:
    for layer in itertools.count():
        if (shape := found.get(name.format(layer))) is None:
            return
        yield shape


def _reader(
    weights: Weights, name: str, path: str, x: jax.ShapeDtypeStruct
) -> Callable[[Any], np.ndarray]:
    # reads the slice `index` of our array from one tensor, or from one tensor per layer
    def read(index):
        sizes = [len(range(*i.indices(n))) for i, n in zip(index, x.shape, strict=True)]
        out = np.empty(sizes, x.dtype)
        into = out  # the same memory, in torch's orientation
        if is_transposed(path):
            into = np.swapaxes(out, -1, -2)
            index = (*index[:-2], index[-1], index[-2])
        if "{}" in name:
            layers = range(*index[0].indices(x.shape[0]))
            weights.read_layers(name, layers, index[1:], into)
        else:
            into[...] = weights.read(name, index)
        return out

    return read


def _expected(
    flat: Mapping[str, jax.ShapeDtypeStruct], table: Mapping[str, str]
) -> dict[str, tuple[int, ...]]:
    expected = {}
    for path, x in flat.items():
        stacked = "{}" in table[path]
        shape = x.shape[1:] if stacked else x.shape
        shape = shape[::-1] if is_transposed(path) else shape
        names = [table[path].format(i) for i in range(x.shape[0])] if stacked else [table[path]]
        expected |= dict.fromkeys(names, tuple(shape))
    return expected


def _check(
    directory: os.PathLike | str,
    weights: Weights,
    expected: Mapping[str, tuple[int, ...]],
    names: Names,
    partly: bool,
) -> None:
    # partly: tensors other than the expected ones are ignored
    found = weights.shapes()
    ignored, head = set(names.ignored), names.head
    if head in found and head not in expected and not has_own_head(weights, names):
        ignored.add(head)
    both = [name for name in expected if name in found]
    wrong_shapes = [
        f"{name} is {list(found[name])}, expected {list(expected[name])}"
        for name in both
        if found[name] != expected[name]
    ]
    wrong_types = [
        f"{name} is {weights.dtype(name)}, expected floats"
        for name in both
        if not jnp.issubdtype(weights.dtype(name), jnp.floating)
    ]
    problems = [
        f"{len(names)} {kind}: {', '.join(sorted(names))}"
        for kind, names in (
            ("missing", expected.keys() - found.keys()),
            ("unknown", set() if partly else found.keys() - expected.keys() - ignored),
            ("of a wrong shape", wrong_shapes),
            ("of a wrong type", wrong_types),
        )
        if names
    ]
    if problems:
        whole = (pathlib.Path(directory) / "config.json").is_file()
        what = (
            "do not fit config.json" if whole else "do not fit any T5"
        )  # a T5X checkpoint has none
        raise InputError(f"{directory}: weights {what}; {'; '.join(problems)}")


def to_hf(params: Any, config: ModelConfig) -> dict[str, np.ndarray]:
    """Returns {Hugging Face's name: contiguous float32 array}, with one array per layer."""
    return {name: _tensor(*part) for name, part in _parts(params, config)}


def _parts(params: Any, config: ModelConfig) -> Iterator[tuple[str, tuple[Any, int | None, bool]]]:
    # name, (our array, its layer, whether torch stores it transposed)
    flat: dict[str, Any] = flax.traverse_util.flatten_dict(params, sep="/")
    table = hf_names(config)
    if flat.keys() != table.keys():  # e.g. unmerged adapters
        raise ValueError(f"params and config disagree on {sorted(flat.keys() ^ table.keys())}")
    for path, name in table.items():
        for layer in range(flat[path].shape[0]) if "{}" in name else [None]:
            yield name.format(layer), (flat[path], layer, is_transposed(path))


def _tensor(array: Any, layer: int | None, transposed: bool) -> np.ndarray:
    part = np.asarray(array if layer is None else array[layer], np.float32)
    # safetensors would write the buffer of a transposed view as it is, so values would be wrong, without an error
    return np.ascontiguousarray(part.T if transposed else part)


def save_params(
    directory: os.PathLike | str,
    params: Any,
    config: ModelConfig,
    *,
    max_shard_size: int = MAX_SHARD_SIZE,
) -> int:
    """Writes the parameters as float32 safetensors, verifies the files, and returns the number of parameters.

    Older safetensors files in the directory are replaced.

    Args:
        directory: an existing folder.
        params: unboxed parameters of an `EncoderDecoder`.
        max_shard_size: largest number of bytes of tensors in a file. If all tensors together have more, they are
            split into Hugging Face's shards with an index. A single tensor with more bytes gets its own file.

    Raises:
        OSError: a file reads back differently from what was written.
    """
    directory = pathlib.Path(directory)
    parts = dict(_parts(params, config))
    shapes = {name: _shape(*part) for name, part in parts.items()}
    sizes = {name: 4 * math.prod(shape) for name, shape in shapes.items()}
    shards = _cut(sizes, max_shard_size)
    files = [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    if len(shards) == 1:
        files = [WEIGHTS]
    # with an old index, a reader would mix old and new shards while they are written
    (directory / INDEX).unlink(missing_ok=True)
    for file, names in zip(files, shards, strict=True):
        of_file = {name: shapes[name] for name in names}
        write_safetensors(directory / file, of_file, lambda name: _tensor(*parts[name]))
    if len(shards) > 1:
        where = {name: file for file, names in zip(files, shards, strict=True) for name in names}
        total = {"total_size": sum(sizes.values())}
        write_json(directory / INDEX, {"metadata": total, "weight_map": where})
    old = {path.name for path in directory.glob("model-[0-9]*-of-[0-9]*.safetensors")} | {WEIGHTS}
    for name in old - set(files):
        (directory / name).unlink(missing_ok=True)
    return sum(sizes.values()) // 4


def _shape(array: Any, layer: int | None, transposed: bool) -> tuple[int, ...]:
    shape = tuple(array.shape if layer is None else array.shape[1:])
    return shape[::-1] if transposed else shape


def _cut(sizes: Mapping[str, int], most: int) -> list[list[str]]:
    """Splits names, in order, into shards of at most `most` bytes. A larger tensor gets a shard of its own."""
    shards: list[list[str]] = [[]]
    filled = 0
    for name, size in sizes.items():
        if shards[-1] and filled + size > most:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    return shards
