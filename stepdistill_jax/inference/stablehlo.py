"""Exports the label decoder with `jax.export`, as a StableHLO program that needs only jax to run."""

import importlib.util
import os
import pathlib
from typing import Any

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np

import stepdistill_jax
from stepdistill_jax.data.vocabulary import BYTES, Vocabulary, truncate
from stepdistill_jax.decoding.greedy import greedy_decode
from stepdistill_jax.errors import InputError
from stepdistill_jax.formats.directory import STABLEHLO_DECODER
from stepdistill_jax.formats.vocabulary_files import model_name
from stepdistill_jax.models.config import ModelConfig
from stepdistill_jax.runtime.files import atomic_write

PARAMS = "params"
PLATFORMS = ("cpu", "cuda", "rocm", "tpu")


def export_decoder(params: Any, config: ModelConfig, *, max_decode_len: int) -> jax.export.Exported:
    """Exports the greedy decoder for any batch size and input length, and for all `PLATFORMS`.

    Args:
        params: unboxed; only shapes and types are read.
        max_decode_len: largest number of tokens in an answer, the end of sequence included.

    Returns:
        A program with the results of `greedy_decode`. Its arguments are:
        the parameters, {path with dots, such as `encoder.encoder_norm.scale`: array};
        the input ids, [batch, length] int32.
    """
    # the parameters are arguments, since a serialized program is limited to 2 GB

    def decode_labels(flat, encoder_input_tokens):
        nested = flax.traverse_util.unflatten_dict(flat, sep=".")
        return greedy_decode(nested, config, encoder_input_tokens, max_decode_len=max_decode_len)

    flat: dict[str, Any] = flax.traverse_util.flatten_dict(params, sep=".")
    shapes = {name: jax.ShapeDtypeStruct(x.shape, x.dtype) for name, x in flat.items()}
    tokens = jax.ShapeDtypeStruct(jax.export.symbolic_shape("batch, length"), jnp.int32)
    return jax.export.export(jax.jit(decode_labels), platforms=PLATFORMS)(shapes, tokens)


def write_decoder(
    directory: os.PathLike | str, params: Any, config: ModelConfig, *, max_decode_len: int
) -> tuple[jax.export.Exported, int]:
    """Writes `label_decoder.jax_export` and one .npy file in `params/` for each parameter array.

    Returns:
        The exported program.
        The total count of parameters.

    Raises:
        InputError: `flatbuffers` is not installed.
        OSError: a file reads back differently from what was written.
    """
    if not importlib.util.find_spec("flatbuffers"):  # jax.export does not declare it
        raise InputError(
            "`format=jax`: jax.export needs the package flatbuffers, which is not installed; run"
            " pip install flatbuffers"
        )
    directory = pathlib.Path(directory)
    exported = export_decoder(params, config, max_decode_len=max_decode_len)
    with atomic_write(directory / STABLEHLO_DECODER, "wb") as f:
        f.write(exported.serialize())
    flat: dict[str, Any] = flax.traverse_util.flatten_dict(params, sep=".")
    for name, x in flat.items():
        path = directory / PARAMS / f"{name}.npy"
        array = np.ascontiguousarray(x)  # on a CPU, a view instead of a copy
        with atomic_write(path, "wb") as f:
            np.save(f, array)
        again = np.load(path, mmap_mode="r")
        if not np.array_equal(again.view(np.uint8), array.view(np.uint8)):
            raise OSError(f"{path}: the file reads back differently from what was written")
    return exported, sum(x.size for x in flat.values())


_README = """\
# The label decoder of {task} as StableHLO

`{decoder}` is a program of `jax.export`: the greedy decoder of a model of {parameters} parameters, with encoder, cache and
the loop over tokens. The folder `{params}/` contains the parameters, with a numpy file for each array. To run the program, you
need jax and the small package flatbuffers, with which `jax.export` reads files (`pip install jax flatbuffers`). You do not need
the package that wrote it (`stepdistill-jax` {version}).

```python
import pathlib

import jax
import numpy as np

folder = pathlib.Path("THIS_FOLDER")
program = jax.export.deserialize(bytearray((folder / "{decoder}").read_bytes()))
decode = jax.jit(program.call)
files = (folder / "{params}").glob("*.npy")
params = {{f.stem: jax.device_put(np.load(f, mmap_mode="r")) for f in files}}

rows = [{example}]  # {framed}
batch = np.zeros((len(rows), 64), np.int32)  # 0 is padding
for row, ids in zip(batch, rows):
    row[: len(ids)] = ids
ids, scores, finished = map(np.asarray, decode(params, batch))
print(ids, scores, finished)
```

- `ids` [rows, {max_decode_len}] int32: the ids of the answer, the end of sequence (1), and zeros as padding.
- `scores` [rows] float32: natural log of the probability of these ids, the end of sequence included.
- `finished` [rows] bool: false if the answer has {max_decode_len} ids without an end of sequence.

The batch may have any number of rows and any length. The program is compiled once for each new shape, so pad the rows to a few
fixed lengths ({length}). A row of zeros is padding and adds no decoding step.

## Converting text to ids and back

{vocabulary}

## Where it runs

The program runs on {platforms}. It was written by jax {jax} (calling convention {convention}). `jax.export` guarantees that a
program runs on versions of jax and jaxlib that were built up to 6 months after the versions that wrote it, and up to 3 weeks
before. For later versions, export the model again from the checkpoint or a model directory: `stepdistill export ... --format jax`.
"""

_SPIECE = """\
`{file}` is a SentencePiece model. After `pip install sentencepiece`, in this or another process:

    vocabulary = sentencepiece.SentencePieceProcessor(model_file="THIS_FOLDER/{file}")
    row = [{bos}*vocabulary.encode(text){eos}]
    label = vocabulary.decode([i for i in ids[0].tolist() if 1 < i < vocabulary.get_piece_size()])"""

_BYTES = """\
Ids are bytes of UTF-8 plus 3:

    row = [*(byte + 3 for byte in text.encode()), 1]
    label = bytes(i - 3 for i in ids[0].tolist() if 3 <= i < 259).decode(errors="ignore")"""


def decoder_readme(
    exported: jax.export.Exported,
    vocabulary: Vocabulary,
    *,
    task: str,
    prompt: str,
    num_parameters: int,
    input_length: int,
    max_decode_len: int,
) -> str:
    """Returns the text of an exported decoder's `README.md`. Its Python code runs unchanged.

    Args:
        input_length: largest count of ids in an input during training.
        max_decode_len: largest count of ids in an answer.
    """
    framing = vocabulary.framing
    bos, eos = [framing.bos_id] * framing.add_bos_token, [1] * framing.add_eos_token
    how = _SPIECE.format(
        file=model_name(vocabulary),
        bos="".join(f"{i}, " for i in bos),
        eos="".join(f", {i}" for i in eos),
    )
    return _README.format(
        task=task,
        decoder=STABLEHLO_DECODER,
        params=PARAMS,
        parameters=f"{num_parameters:,}",
        version=stepdistill_jax.__version__,
        example=truncate(framing.input_ids(vocabulary.encode(prompt)), input_length),
        framed=" and ".join(map(str, [*bos, f"ids of {prompt!r}", *eos])),
        length=f"inputs had at most {input_length} ids in training",
        max_decode_len=max_decode_len,
        vocabulary=_BYTES if vocabulary.source == BYTES else how,
        platforms=", ".join(exported.platforms),
        jax=jax.__version__,
        convention=exported.calling_convention_version,
    )
