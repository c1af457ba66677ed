"""The label decoder as a `jax.export` artefact: StableHLO that a process with jax alone runs again."""

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
from stepdistill_jax.formats.vocabulary_files import model_name
from stepdistill_jax.models.config import ModelConfig
from stepdistill_jax.runtime.files import atomic_write

DECODER, PARAMS = "label_decoder.jax_export", "params"
PLATFORMS = ("cpu", "cuda", "rocm", "tpu")


def export_decoder(params: Any, config: ModelConfig, *, max_decode_len: int) -> jax.export.Exported:
    """`greedy_decode` of a model, with its loop, for any batch, length and platform.

    The parameters are arguments, not constants: a serialized program holds 2 GB at most.

    Args:
        params: of the model, unboxed; only shapes and types are read.
        config: its configuration.
        max_decode_len: most tokens of an answer, the end of sequence included.

    Returns:
        A function of (a dict of parameters by path, `encoder/encoder_norm/scale` written with dots;
        ids [batch, length] int32) -> ids, scores, finished of `greedy_decode`.
    """

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
    """Writes `label_decoder.jax_export` and, next to it, a file of `params/` per parameter.

    The files are numpy's, so they can be mapped into memory; each is read back and compared.

    Returns:
        What was exported, and the number of parameters.

    Raises:
        InputError: `flatbuffers` is not installed.
        OSError: what was read back differs from what was written.
    """
    if not importlib.util.find_spec("flatbuffers"):  # jax.export does not declare it
        raise InputError("`format=jax`: jax.export needs one more package: pip install flatbuffers")
    directory = pathlib.Path(directory)
    exported = export_decoder(params, config, max_decode_len=max_decode_len)
    with atomic_write(directory / DECODER, "wb") as f:
        f.write(exported.serialize())
    flat: dict[str, Any] = flax.traverse_util.flatten_dict(params, sep=".")
    for name, x in flat.items():
        path = directory / PARAMS / f"{name}.npy"
        array = np.ascontiguousarray(x)  # on a CPU a view, no copy
        with atomic_write(path, "wb") as f:
            np.save(f, array)
        again = np.load(path, mmap_mode="r")
        if not np.array_equal(again.view(np.uint8), array.view(np.uint8)):
            raise OSError(f"{path}: reads back differently from what was written")
    return exported, sum(x.size for x in flat.values())


_README = """\
# The label decoder of {task} as StableHLO

`{decoder}` is a program of `jax.export`: encoder, cache and the loop over tokens of a model of {parameters}
parameters, greedy. `{params}/` has its parameters, one numpy file each. It runs where jax is installed, with the small package
by which `jax.export` reads files (`pip install jax flatbuffers`); the package that wrote it (`stepdistill-jax` {version}) is not
needed.

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
```

- `ids` [rows, {max_decode_len}] int32: the answer, its end of sequence (1), then 0.
- `scores` [rows] float32: natural log of the probability of those ids, the end of sequence included.
- `finished` [rows] bool: false where {max_decode_len} ids came without an end.

Any number of rows and any length will do; each new shape compiles once, so pad to few lengths ({length}).
A row of zeros is a filler and costs no further step.

## Text to ids and back

{vocabulary}

## Where it runs

Lowered for {platforms}. Written by jax {jax} (calling convention {convention}). `jax.export` promises that a program runs on a
jax and jaxlib that are up to 6 months newer than those that wrote it, and up to 3 weeks older; what counts is when they were built. Later,
write it again from the checkpoint or from a model directory: `stepdistill export ... --format jax`.
"""

_SPIECE = """\
`{file}` is a SentencePiece model. With `pip install sentencepiece`, here or in another process:

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
    """How to run what `write_decoder` wrote; the Python lines there work as they stand.

    Args:
        exported: the program.
        vocabulary: that the model was trained with.
        task: name of the dataset.
        prompt: an input with its prefix, as an example.
        num_parameters: of all arrays.
        input_length: most ids of an input that the model saw in training.
        max_decode_len: most ids of an answer.
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
        decoder=DECODER,
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
