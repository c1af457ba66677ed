"""Reads `pytorch_model.bin` with torch, without running code that a pickle may contain."""

import pathlib
import re
import warnings
import zipfile

import ml_dtypes
import numpy as np

from stepdistill_jax.errors import InputError, how_to_install
from stepdistill_jax.formats.tensors import Tensor


def open_torch(path: pathlib.Path) -> dict[str, Tensor]:
    """Returns the tensors of a file or shard as {name: tensor}.

    A file of torch 1.6 or later is memory-mapped. An older one is read into memory.

    Raises:
        InputError: torch is not installed, the file is truncated or compressed, or it contains anything but
            tensors.
    """
    try:
        import torch
    except ImportError:
        raise InputError(
            f"{path}: torch is needed to read it; {how_to_install('torch')}, or use a directory with"
            " model.safetensors"
        ) from None
    try:
        zipped = zipfile.is_zipfile(path)
        if zipped:
            _require_plain(path)
        with warnings.catch_warnings():  # torch warns about old pickles; our own error says more
            warnings.simplefilter("ignore")
            state = torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    except InputError:
        raise
    except Exception as error:  # on broken bytes the unpickler raises errors of any class
        if found := re.search(r"GLOBAL (\S+)|Trying to (?:call|build)", str(error)):
            raise InputError(
                f"{path}: its pickle calls {found[1] or 'code'}, which would run when the file is read;"
                " the file is refused, since weights need only tensors"
            ) from None
        reason = str(error).split("\n")[0] or type(error).__name__
        raise InputError(f"{path}: not a complete torch file ({reason})") from None
    tensors: dict[str, Tensor] = {}
    for name, tensor in state.items() if isinstance(state, dict) else [("", None)]:
        if not isinstance(name, str) or not isinstance(tensor, torch.Tensor):
            raise InputError(f"{path}: expected a dictionary of tensors, as save_pretrained writes")
        tensor = tensor.detach()
        try:
            size = tensor.numel() * tensor.element_size()
            if size > tensor.untyped_storage().nbytes():  # a view of one number may claim any shape
                raise TypeError(f"its shape needs {size} bytes, but fewer are stored")
            tensors[name] = _view(tensor, torch)
        except (TypeError, RuntimeError, NotImplementedError) as error:  # sparse, quantized, ...
            reason = str(error).split("\n")[0]
            raise InputError(f"{path}: {name} cannot be read ({reason})") from None
    return tensors


def _require_plain(path: pathlib.Path) -> None:
    # a map would show compressed bytes as weights, and a pickle of 2 MB could unpack to 2 GB
    with zipfile.ZipFile(path) as archive:
        for member in archive.infolist():
            if member.compress_type != zipfile.ZIP_STORED:
                raise InputError(
                    f"{path}: {member.filename} in this archive is compressed, which torch never does"
                )


def _view(tensor, torch) -> np.ndarray:
    if tensor.dtype == torch.bfloat16:  # numpy itself has no bfloat16
        return tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return tensor.numpy()
