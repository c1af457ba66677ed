"""Reads `model.safetensors` as views of the mapped file, and writes it tensor by tensor."""

import json
import math
import pathlib
from collections.abc import Callable, Mapping

import ml_dtypes
import numpy as np
import safetensors

from stepdistill_jax.errors import InputError
from stepdistill_jax.formats.tensors import Tensor, map_file
from stepdistill_jax.runtime.files import atomic_write

_DTYPES = {
    "F16": np.float16,
    "BF16": ml_dtypes.bfloat16,
    "F32": np.float32,
    "F64": np.float64,
}


def open_safetensors(path: pathlib.Path) -> dict[str, Tensor]:
    """Returns the tensors of one file as {name: tensor}. Reads only the header.

    Raises:
        InputError: the file is truncated or not safetensors, or a tensor does not contain floats.
    """
    try:  # we use the library only to check that header and file match: its slices would be copies
        with safetensors.safe_open(path, "numpy"):
            pass
    except (safetensors.SafetensorError, OSError) as error:
        raise InputError(f"{path}: not a complete safetensors file ({error})") from None
    data = map_file(path)
    start = 8 + int.from_bytes(data[:8], "little")
    tensors: dict[str, Tensor] = {}
    for name, entry in json.loads(data[8:start], object_pairs_hook=list):
        if name == "__metadata__":
            continue
        entry = dict(entry)
        if name in tensors:  # libraries differ in which of the two they read
            raise InputError(f"{path}: {name} is stored twice")
        if (dtype := _DTYPES.get(entry["dtype"])) is None:
            raise InputError(
                f"{path}: {name} is stored as {entry['dtype']}, expected one of {', '.join(_DTYPES)}"
            )
        begin, end = entry["data_offsets"]
        view = memoryview(data)[start + begin : start + end]
        try:
            tensors[name] = np.frombuffer(view, dtype).reshape(entry["shape"])
        except ValueError as error:  # such as a shape with 100 axes, or [2**63, 0]
            raise InputError(
                f"{path}: {name} has a shape that no array can have ({error})"
            ) from None
    return tensors


def write_safetensors(
    path: pathlib.Path,
    shapes: Mapping[str, tuple[int, ...]],
    tensor: Callable[[str], np.ndarray],
) -> None:
    """Writes float32 tensors, reads them back and compares.

    Args:
        path: file to write, which appears complete or not at all.
        tensor: function that returns a named tensor as contiguous float32. It is called twice for each name.

    Raises:
        OSError: the file reads back differently from what was written.
    """
    # writes the bytes of `safetensors.numpy.save_file(..., metadata={"format": "pt"})`, tensor by tensor
    names = sorted(shapes)  # the library's order when all tensors have one type
    header: dict[str, dict] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name in names:
        size = 4 * math.prod(shapes[name])
        header[name] = {"dtype": "F32", "shape": shapes[name], "data_offsets": [at, at + size]}
        at += size
    head = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    head += b" " * (-len(head) % 8)  # the data begin at a multiple of 8
    with atomic_write(path, "wb") as f:
        f.write(len(head).to_bytes(8, "little") + head)
        for name in names:
            f.write(tensor(name).data)
        f.flush()
        again = open_safetensors(pathlib.Path(f.name))
        for name in names:
            if not _same(again[name], tensor(name)):
                raise OSError(f"{f.name}: {name} reads back differently from what was written")


def _same(a: Tensor, b: np.ndarray) -> bool:
    # compares bits, so that a NaN equals itself
    a = np.asarray(a)
    return a.dtype == b.dtype and np.array_equal(a.view(np.uint32), b.view(np.uint32))
