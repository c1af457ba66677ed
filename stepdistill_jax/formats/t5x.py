"""Reads the parameters of T5X checkpoints, and renames them as in Hugging Face's torch files.

The optimizer state is not read. Source of the formats: t5x/checkpoints.py and t5x/examples/{t5,scalable_t5}. The older
format is a msgpack file `checkpoint`. Each of its entries is an array or the name of a zarr folder. The newer format
is Orbax's. The parameters of a layer are in `encoder/layers_0/...` or, if layers are stacked along axis 1, in
`encoder/encoder/...`.
"""

import functools
import math
import os
import pathlib
import re
from collections.abc import Iterator, Mapping
from typing import Any

import ml_dtypes
import numpy as np

from stepdistill_jax.errors import InputError
from stepdistill_jax.formats.flax_msgpack import read_tree
from stepdistill_jax.formats.parameter_names import HEAD, hf_names, is_transposed
from stepdistill_jax.formats.tensors import (
    Index,
    Tensor,
    Transposed,
    Weights,
    is_file_name,
    read_object,
)
from stepdistill_jax.models.config import MAX_LAYERS
from stepdistill_jax.models.t5 import T5Config

CHECKPOINT, METADATA, OCDBT = "checkpoint", "_METADATA", "manifest.ocdbt"
_PLACEHOLDER = "PLACEHOLDER://"
_SMALL, _UNPACKED = (
    64 << 20,  # bytes
    2000,  # unpacked bytes per stored byte; gzip, which T5X uses, reaches about 1000
)
_LAYER_AXIS = 1  # param_scan_axis of t5x's minimal models
# our path -> Hugging Face name, for every kind of T5
_NAMES = {
    path: name
    for shared in (True, False)
    for activations in (("relu",), ("gelu", "linear"))
    for path, name in hf_names(
        T5Config(shared_relative_position_bias=shared, mlp_activations=activations)
    ).items()
}


def find_t5x(directory: os.PathLike | str) -> pathlib.Path | None:
    """Returns the folder of a T5X checkpoint, or None.

    Searches `directory`, then its folders `checkpoint_STEP` from newest to oldest. In each of these folders, the
    checkpoint may also be in the subfolder `state`.
    """
    directory = pathlib.Path(directory)
    steps = {
        int(match[1]): path
        for path in directory.glob("checkpoint_*")
        if (match := re.fullmatch(r"checkpoint_(\d+)", path.name))
    }
    places = [directory] + [steps[step] for step in sorted(steps, reverse=True)]
    for place in places:
        for folder in (place, place / "state"):
            if (folder / METADATA).is_file() or (folder / CHECKPOINT).is_file():
                return folder
    return None


def open_t5x(directory: pathlib.Path) -> Weights:
    """Opens the parameters (`target`) of a T5X checkpoint.

    Raises:
        InputError: a file is missing or truncated, or the checkpoint has a version below 2 or no parameters.
    """
    if (folder := find_t5x(directory)) is None:
        raise InputError(f"{directory}: no T5X checkpoint (neither {CHECKPOINT} nor {METADATA})")
    stored = _open_orbax(folder) if (folder / METADATA).is_file() else _open_first_form(folder)
    tensors: dict[str, Tensor] = {}
    stacks: dict[str, Tensor] = {}
    for path, array in stored.items():
        ours, layer = _our_path(path)
        name = _NAMES.get(ours)
        if name is None:  # an unknown parameter keeps its name, so that `load_params` lists it
            tensors[path] = _Stored(array, path, stacked=False, folder=folder)
            continue
        tensor: Any = _Stored(array, ours, stacked=layer == "", folder=folder)
        tensor = Transposed(tensor) if is_transposed(ours) and len(tensor.shape) > 1 else tensor
        if layer == "":
            if tensor.shape[0] > MAX_LAYERS:  # checked before a name is made for each layer
                raise InputError(
                    f"{folder}: {path} claims {tensor.shape[0]} layers, which is too many"
                )
            stacks[name] = tensor
            tensors |= {name.format(i): _Layer(tensor, i) for i in range(tensor.shape[0])}
        else:
            tensors[name.format(layer)] = tensor
    return Weights(tensors, stacks)


def config_from_shapes(directory: pathlib.Path, shapes: Mapping[str, tuple[int, ...]]) -> T5Config:
    """Derives a T5X checkpoint's configuration from its tensors' names and shapes.

    Raises:
        InputError: tensors that determine a T5's sizes are missing, or a size is not supported.
    """
    # `wi` means v1.0's ReLU; `wi_0` and `wi_1` mean v1.1's gated GELU
    attention = "encoder.block.0.layer.0.SelfAttention"
    bias, gated = f"{attention}.relative_attention_bias.weight", "wi_0"
    if f"encoder.block.0.layer.1.DenseReluDense.{gated}.weight" not in shapes:
        gated = "wi"
    mlp = f"encoder.block.0.layer.1.DenseReluDense.{gated}.weight"
    needed = ("shared.weight", bias, f"{attention}.q.weight", mlp)
    if lacking := [name for name in needed if len(shapes.get(name, ())) != 2]:
        raise InputError(
            f"{directory}: this T5X checkpoint contains no T5 ({', '.join(lacking)} missing)"
        )
    vocab_size, emb_dim = shapes["shared.weight"]
    num_buckets, num_heads = shapes[bias]
    tied = HEAD not in shapes

    def depth(side: str) -> int:
        blocks = [re.match(rf"{side}\.block\.(\d+)\.", name) for name in shapes]
        return 1 + max((int(match[1]) for match in blocks if match), default=0)

    try:
        return T5Config(
            vocab_size=vocab_size,
            emb_dim=emb_dim,
            num_heads=num_heads,
            head_dim=max(1, shapes[f"{attention}.q.weight"][0] // max(1, num_heads)),
            mlp_dim=shapes[mlp][0],
            num_encoder_layers=depth("encoder"),
            num_decoder_layers=depth("decoder"),
            mlp_activations=("relu",) if gated == "wi" else ("gelu", "linear"),
            num_buckets=num_buckets,
            shared_relative_position_bias=bias.replace("block.0", "block.1") not in shapes,
            logits_via_embedding=tied,
            scale_decoder_outputs=tied,
        )
    except InputError as error:
        raise InputError(f"{directory}: {error}") from None


def _our_path(path: str) -> tuple[str, str | None]:
    """Returns (our path, layer) of the parameter that T5X calls `path`.

    The layer is an index such as "3". For a stack of all layers it is "", and outside the layers it is None.
    """
    if path == "token_embedder/embedding":
        return "token_embedder", None
    if path == "decoder/logits_dense/kernel":
        return "logits_dense/kernel", None
    if match := re.fullmatch(r"(encoder|decoder)/layers_(\d{1,9})/(.+)", path):
        return f"{match[1]}/layers/{match[3]}", match[2]
    if match := re.fullmatch(r"(encoder|decoder)/\1/(.+)", path):
        return f"{match[1]}/layers/{match[2]}", ""
    return path, None


class _Stored:
    """A stored parameter, read as [in, out] or, for a stack of layers, as [layers, in, out].

    Separate axes for heads and head width are joined into one.
    """

    def __init__(self, array: Tensor, path: str, *, stacked: bool, folder: pathlib.Path):
        self._array, self._path, self._folder = array, path, folder
        sizes = list(array.shape)
        self._stacked = stacked and len(sizes) > _LAYER_AXIS
        layers = [sizes.pop(_LAYER_AXIS)] if self._stacked else []
        # scalable_t5 keeps [embed, heads, kv], and [heads, kv, embed] for the output projection
        self._joined = None
        if len(sizes) == 3 and path.endswith("/kernel"):
            self._joined = 0 if path.endswith("/out/kernel") else 1
            self._width = sizes.pop(self._joined + 1)
            sizes[self._joined] *= self._width
        self.shape = (*layers, *sizes)
        # version 2 wrote the 16 bits of bfloat16 as integers
        self._bits = np.dtype(_numpy_dtype(array)) == np.uint16
        self.dtype = np.dtype(ml_dtypes.bfloat16) if self._bits else np.dtype(_numpy_dtype(array))

    def __getitem__(self, index: Index) -> np.ndarray:
        wanted = [slice(*i.indices(n)) for i, n in zip(index, self.shape, strict=True)]
        layers = [wanted.pop(0)] if self._stacked else []
        cut = None
        if self._joined is not None:  # read complete heads, then slice them
            j, width = self._joined, self._width
            low, high = wanted[j].start // width, -(-wanted[j].stop // width)
            cut = slice(wanted[j].start - low * width, wanted[j].stop - low * width)
            wanted[j : j + 1] = [slice(low, high), slice(0, width)]
        wanted[_LAYER_AXIS:_LAYER_AXIS] = layers
        try:
            part = np.asarray(self._array[tuple(wanted)])
        except (ValueError, OSError) as error:  # a missing or truncated chunk
            reason = str(error).split(" [")[0]
            raise InputError(f"{self._folder}: {self._path} cannot be read ({reason})") from None
        if self._bits:
            part = part.view(ml_dtypes.bfloat16)
        if self._stacked:
            part = np.moveaxis(part, _LAYER_AXIS, 0)
        if self._joined is None:
            return part
        j = self._joined + self._stacked
        sizes = (*part.shape[:j], math.prod(part.shape[j : j + 2]), *part.shape[j + 2 :])
        return part.reshape(sizes)[(slice(None),) * j + (cut,)]


class _Layer:
    def __init__(self, stack: Tensor, layer: int):
        self._stack, self._layer = stack, layer
        self.shape, self.dtype = stack.shape[1:], stack.dtype

    def __getitem__(self, index: Index) -> np.ndarray:
        return self._stack[(slice(self._layer, self._layer + 1), *index)][0]


def _numpy_dtype(array: Any) -> Any:
    return array.dtype if isinstance(array.dtype, np.dtype) else array.dtype.numpy_dtype


def _open_first_form(folder: pathlib.Path) -> dict[str, Tensor]:
    file = folder / CHECKPOINT
    with open(file, "rb") as f:
        start = f.read(21)
    if start == b"model_checkpoint_path":
        raise InputError(
            f"{file}: this file is from TensorFlow's T5, not from T5X; convert it with"
            " t5x's convert_tf_checkpoint"
        )
    tree = read_tree(file)
    version = tree.get("version", 0)
    state = tree.get("optimizer", tree)
    if "optimizer" in tree and (not isinstance(version, int) or version < 2):
        raise InputError(
            f"{file}: only T5X checkpoints of version 2 or later can be read, got version {version!r}"
        )
    target = state.get("target") if isinstance(state, dict) else None
    if not isinstance(target, dict) or not target:
        raise InputError(f"{file}: has no `target`, where T5X keeps the parameters")
    ocdbt = (folder / OCDBT).is_file()  # Orbax's first format also keeps its tree in `checkpoint`
    tensors, folders = {}, {}
    for path, leaf in _leaves(target):
        if isinstance(leaf, dict):
            if not isinstance(store := leaf["kvstore"], dict):
                store = {}
            # before TensorStore 0.1.14 the path was next to `kvstore`
            folders[path] = _inside(folder, store.get("path", leaf.get("path")))
        elif isinstance(leaf, str) and leaf.startswith(_PLACEHOLDER):
            folders[path] = _inside(folder, leaf.removeprefix(_PLACEHOLDER))
        elif hasattr(leaf, "shape"):
            tensors[path] = leaf
        else:
            raise InputError(f"{file}: {path} is not an array")
    return tensors | _open_arrays(folder, folders, ocdbt=ocdbt, driver="zarr")


def _leaves(tree: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, dict) and not value.keys() >= {"driver", "kvstore", "metadata"}:
            yield from _leaves(value, f"{above}{key}/")
        else:
            yield above + key, value


def _open_orbax(folder: pathlib.Path) -> dict[str, Tensor]:
    file = folder / METADATA
    raw = read_object(file)
    try:
        keys = [
            [str(part["key"]) for part in entry["key_metadata"]]
            for entry in raw["tree_metadata"].values()
        ]
    except (KeyError, TypeError, AttributeError):
        raise InputError(
            f"{file}: this file was not written by Orbax (it has no `tree_metadata`)"
        ) from None
    names = {"/".join(key[1:]): ".".join(key) for key in keys if key[0] == "target"}
    if not names:
        raise InputError(f"{file}: has no `target`, where T5X keeps the parameters")
    folders = {path: _inside(folder, name) for path, name in names.items()}
    driver = "zarr3" if raw.get("use_zarr3") else "zarr"
    return _open_arrays(folder, folders, ocdbt=(folder / OCDBT).is_file(), driver=driver)


def _inside(folder: pathlib.Path, name: Any) -> str:
    # a checkpoint is not trusted, so it may refer only to arrays in its own folder
    name = name.rstrip("/") if isinstance(name, str) else ""
    if not is_file_name(name):
        raise InputError(
            f"{folder / CHECKPOINT}: it may refer only to arrays in its own folder, got {name!r}"
        )
    return name


def _open_arrays(
    folder: pathlib.Path, names: Mapping[str, str], *, ocdbt: bool, driver: str
) -> dict[str, Tensor]:
    """Opens zarr arrays in a folder or its OCDBT database. `names` is {our path: name of the array}."""
    import tensorstore

    base = {"driver": "file", "path": f"{folder.absolute()}/"}

    def spec(name: str) -> dict[str, Any]:
        if ocdbt:
            store = {"driver": "ocdbt", "base": base, "path": f"{name}/"}
        else:
            store = base | {"path": f"{base['path']}{name}/"}
        # a missing chunk would otherwise be read as zeros
        return {"driver": driver, "kvstore": store, "fill_missing_data_reads": False}

    futures = {path: tensorstore.open(spec(name), read=True) for path, name in names.items()}
    opened = {}
    stored = functools.cache(lambda: _bytes_in(folder))  # slow: it visits the files of all arrays
    for path, future in futures.items():
        try:
            opened[path] = future.result()
        except (ValueError, OSError) as error:
            reason = str(error).split(" [")[0].split("\n")[0]
            raise InputError(f"{folder}: {names[path]} cannot be read ({reason})") from None
        claimed = _claimed_bytes(opened[path])
        if claimed > _SMALL and claimed > _UNPACKED * stored():
            raise InputError(
                f"{folder}: {names[path]} claims {claimed} bytes, but the folder's files have only {stored()} bytes"
            )
    return opened


def _claimed_bytes(array: Any) -> int:
    """Returns the size in bytes of an array, or of one of its chunks if that is larger.

    A damaged checkpoint may claim a chunk of 2**60 bytes. If TensorStore tried to read such a chunk, the process
    would end.
    """
    chunk = array.chunk_layout.read_chunk.shape
    return _numpy_dtype(array).itemsize * max(math.prod(array.shape), math.prod(chunk))


def _bytes_in(folder: pathlib.Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
