"""Hugging Face T5 weights <-> our scanned parameter tree, one slice at a time."""

import math
import os
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import flax.traverse_util
import jax
import numpy as np
import safetensors
import safetensors.numpy
from jax.sharding import SingleDeviceSharding

from stepdistill_jax.errors import InputError
from stepdistill_jax.files import PARTIAL, fsync_folder, read_json
from stepdistill_jax.models.config import T5Config
from stepdistill_jax.models.t5 import abstract_params

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
HEAD = "lm_head.weight"
_ATTENTION = {"query": "q", "key": "k", "value": "v", "out": "o"}
# copies of `shared.weight` that some writers keep, and a table that v1.0 files hold and T5 never reads
_IGNORED = (
    "encoder.embed_tokens.weight",
    "decoder.embed_tokens.weight",
    "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight",
)
# files that `transformers` reads and we do not -> what its `from_pretrained` has to be told
_OTHER_FORMATS = {
    "pytorch_model.bin": "",
    "pytorch_model.bin.index.json": "",
    "flax_model.msgpack": ", from_flax=True",
    "flax_model.msgpack.index.json": ", from_flax=True",
    "tf_model.h5": ", from_tf=True",
    "tf_model.h5.index.json": ", from_tf=True",
}


def hf_names(config: T5Config) -> dict[str, str]:
    """Our path -> Hugging Face tensor name, `{}` standing for the layer.

    Example: `decoder/layers/mlp/wo/kernel` -> `decoder.block.{}.layer.2.DenseReluDense.wo.weight`.
    """
    table = {
        "token_embedder": "shared.weight",
        "encoder/encoder_norm/scale": "encoder.final_layer_norm.weight",
        "decoder/decoder_norm/scale": "decoder.final_layer_norm.weight",
    }
    if not config.logits_via_embedding:
        table["logits_dense/kernel"] = HEAD
    gates = ("wi",) if len(config.mlp_activations) == 1 else ("wi_0", "wi_1")
    for side, attention, norm in (
        ("encoder", "attention", "pre_attention_layer_norm"),
        ("decoder", "self_attention", "pre_self_attention_layer_norm"),
    ):
        ours, block = f"{side}/layers/", f"{side}.block.{{}}.layer."
        bias = "0.SelfAttention.relative_attention_bias.weight"
        if config.shared_relative_position_bias:  # only block 0 has a table; all layers share it
            table[f"{side}/relpos_bias/rel_embedding"] = f"{side}.block.0.layer.{bias}"
        else:
            table[f"{ours}relpos_bias/rel_embedding"] = block + bias
        table[f"{ours}{norm}/scale"] = f"{block}0.layer_norm.weight"
        for name, letter in _ATTENTION.items():
            table[f"{ours}{attention}/{name}/kernel"] = f"{block}0.SelfAttention.{letter}.weight"
        if side == "decoder":
            table[f"{ours}pre_cross_attention_layer_norm/scale"] = f"{block}1.layer_norm.weight"
            for name, letter in _ATTENTION.items():
                path = f"{ours}encoder_decoder_attention/{name}/kernel"
                table[path] = f"{block}1.EncDecAttention.{letter}.weight"
        last = 2 if side == "decoder" else 1
        table[f"{ours}pre_mlp_layer_norm/scale"] = f"{block}{last}.layer_norm.weight"
        for name in (*gates, "wo"):
            table[f"{ours}mlp/{name}/kernel"] = f"{block}{last}.DenseReluDense.{name}.weight"
    return table


def is_transposed(path: str) -> bool:
    """Torch keeps matrices as [out, in], and the bias as [buckets, heads] where ours is [heads, buckets]."""
    return path.endswith(("/kernel", "/rel_embedding"))


class Weights:
    """Tensors of `model.safetensors`, or of its shards with an index; nothing is read until sliced."""

    def __init__(self, directory: os.PathLike | str):
        """Reads the headers.

        Raises:
            InputError: no safetensors in the directory, a shard that is missing, a broken file.
        """
        directory = pathlib.Path(directory)
        self.files = _weight_files(directory)
        self._slices = {}
        for file in self.files:
            try:
                opened = safetensors.safe_open(file, "numpy")
                self._slices |= {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118
            except FileNotFoundError:
                raise InputError(f"{file}: named in {INDEX}, and missing") from None
            except (safetensors.SafetensorError, OSError) as error:
                raise InputError(f"{file}: not a whole safetensors file ({error})") from None

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Tensor name -> shape."""
        return {name: tuple(s.get_shape()) for name, s in self._slices.items()}

    def read(self, name: str, index: tuple[slice, ...]) -> np.ndarray:
        """One slice of a tensor, as it is stored."""
        return self._slices[name][index]


def _weight_files(directory: pathlib.Path) -> list[pathlib.Path]:
    if (directory / WEIGHTS).is_file():
        return [directory / WEIGHTS]
    index = directory / INDEX
    if index.is_file():
        names = read_json(index).get("weight_map", {}).values()
        if not names or not all(isinstance(n, str) and pathlib.Path(n).name == n for n in names):
            raise InputError(f"{index}: `weight_map` must name files of this folder")
        return [directory / name for name in sorted(set(names))]
    raise InputError(f"{directory}: no {WEIGHTS}{_how_to_convert(directory)}")


def _how_to_convert(directory: pathlib.Path) -> str:
    """What else is there, and the command that makes safetensors of it; empty if nothing is."""
    there = [name for name in _OTHER_FORMATS if (directory / name).is_file()]
    if not there:
        return ""
    flags = _OTHER_FORMATS[there[0]]  # torch's comes first: any version of `transformers` reads it
    old = " by transformers below 5, which still reads them" if flags else ""
    folder = repr(os.fspath(directory))
    return (
        f", only {', '.join(there)}; convert them once{old}: python -c"
        f' "from transformers import T5ForConditionalGeneration as T;'
        f" T.from_pretrained({folder}{flags})"
        f'.save_pretrained({folder}, safe_serialization=True)"'
    )


def has_weights(directory: os.PathLike | str) -> bool:
    """Whether the directory holds weights, be it in a format that `Weights` refuses."""
    names = (WEIGHTS, INDEX, *_OTHER_FORMATS)
    return any((pathlib.Path(directory) / name).is_file() for name in names)


def load_params(
    directory: os.PathLike | str, config: T5Config, shardings: Any | None = None
) -> Any:
    """Parameters of a Hugging Face directory as float32, whatever they are stored as.

    Args:
        directory: with `model.safetensors`, or its shards and their index.
        config: of the model, from `formats.directory.read_model_files`.
        shardings: of each parameter (`sharding.param_shardings`): then each process reads only the
            slices of its own devices. None puts everything on the default device.

    Returns:
        The unboxed parameter tree of `models.t5.T5`.

    Raises:
        InputError: tensors that are missing, unknown, of a wrong shape or type: all of them in one
            line.
    """
    weights, table = Weights(directory), hf_names(config)
    abstract = jax.eval_shape(nn.meta.unbox, abstract_params(config))
    flat: dict[str, Any] = flax.traverse_util.flatten_dict(abstract, sep="/")
    if flat.keys() != table.keys():
        raise AssertionError(f"model and table disagree on {sorted(flat.keys() ^ table.keys())}")
    _check(directory, weights.shapes(), _expected(flat, table))
    placed: dict[str, Any] = dict.fromkeys(flat, SingleDeviceSharding(jax.devices()[0]))
    if shardings is not None:
        placed = flax.traverse_util.flatten_dict(shardings, sep="/")
    arrays = {
        path: jax.make_array_from_callback(
            x.shape, placed[path], _reader(weights, table[path], path, x)
        )
        for path, x in flat.items()
    }
    return flax.traverse_util.unflatten_dict(arrays, sep="/")


def _reader(
    weights: Weights, name: str, path: str, x: jax.ShapeDtypeStruct
) -> Callable[[Any], np.ndarray]:
    # reads the slice `index` of our array out of one tensor, or of one tensor per layer
    transposed = is_transposed(path)

    def one(name, index):
        part = weights.read(name, index[::-1] if transposed else index)
        return np.ascontiguousarray(part.T if transposed else part, x.dtype)

    def read(index):
        if "{}" not in name:
            return one(name, index)
        layers = range(*index[0].indices(x.shape[0]))
        return np.stack([one(name.format(i), index[1:]) for i in layers])

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
    found: Mapping[str, tuple[int, ...]],
    expected: Mapping[str, tuple[int, ...]],
) -> None:
    wrong = [
        f"{name} is {list(found[name])}, {list(shape)} is wanted"
        for name, shape in expected.items()
        if name in found and found[name] != shape
    ]
    problems = [
        f"{len(names)} {kind}: {', '.join(sorted(names))}"
        for kind, names in (
            ("missing", expected.keys() - found.keys()),
            ("unknown", found.keys() - expected.keys() - set(_IGNORED)),
            ("of a wrong shape", wrong),
        )
        if names
    ]
    if problems:
        raise InputError(f"{directory}: weights do not fit config.json; {'; '.join(problems)}")


def to_hf(params: Any, config: T5Config) -> dict[str, np.ndarray]:
    """Hugging Face name -> contiguous float32 tensor, the layers taken apart."""
    flat = flax.traverse_util.flatten_dict(params, sep="/")
    tensors = {}
    for path, name in hf_names(config).items():
        whole = np.asarray(flat[path], np.float32)
        for i in range(len(whole)) if "{}" in name else [None]:
            part = whole if i is None else whole[i]
            # safetensors writes the buffer of a transposed view as it lies: wrong values, no error
            tensors[name.format(i)] = np.ascontiguousarray(part.T if is_transposed(path) else part)
    return tensors


def save_params(directory: os.PathLike | str, params: Any, config: T5Config) -> int:
    """Writes `model.safetensors` (float32), reads it back and compares.

    Returns:
        The number of parameters.

    Raises:
        OSError: what was read back differs from what was written.
    """
    path = pathlib.Path(directory) / WEIGHTS
    partial = path.with_name(WEIGHTS + PARTIAL)
    tensors = to_hf(params, config)
    safetensors.numpy.save_file(tensors, partial, metadata={"format": "pt"})
    partial.chmod(0o644)  # the library writes 0600; a server is often another user
    with open(partial, "rb") as f:
        os.fsync(f.fileno())
    with safetensors.safe_open(partial, "numpy") as again:
        for name, tensor in tensors.items():
            if not np.array_equal(again.get_tensor(name), tensor, equal_nan=True):
                raise OSError(f"{partial}: {name} reads back differently from what was written")
    os.replace(partial, path)
    fsync_folder(path.parent)
    return sum(math.prod(t.shape) for t in tensors.values())
