"""`model.safetensors`, mapped: slices are views of the file's pages."""

import json
import pathlib

import ml_dtypes
import numpy as np
import safetensors

from stepdistill_jax.errors import InputError
from stepdistill_jax.formats.tensors import Tensor, map_file

_DTYPES = {
    "F16": np.float16,
    "BF16": ml_dtypes.bfloat16,
    "F32": np.float32,
    "F64": np.float64,
}


def open_safetensors(path: pathlib.Path) -> dict[str, Tensor]:
    """Tensors of one file by name; only the header is read.

    Raises:
        InputError: a file that is cut or no safetensors, or tensors that are no floats.
    """
    try:  # the library checks that header and file fit; its slices would be copies
        with safetensors.safe_open(path, "numpy"):
            pass
    except (safetensors.SafetensorError, OSError) as error:
        raise InputError(f"{path}: not a whole safetensors file ({error})") from None
    data = map_file(path)
    start = 8 + int.from_bytes(data[:8], "little")
    tensors: dict[str, Tensor] = {}
    for name, entry in json.loads(data[8:start]).items():
        if name == "__metadata__":
            continue
        if (dtype := _DTYPES.get(entry["dtype"])) is None:
            raise InputError(
                f"{path}: {name} is stored as {entry['dtype']}, one of {', '.join(_DTYPES)} is wanted"
            )
        begin, end = entry["data_offsets"]
        view = memoryview(data)[start + begin : start + end]
        tensors[name] = np.frombuffer(view, dtype).reshape(entry["shape"])
    return tensors
