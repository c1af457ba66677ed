"""Reads and writes the vocabulary files of a model directory or workdir."""

import dataclasses
import pathlib
import shutil
from typing import Any

from stepdistill_jax.data.vocabulary import (
    BYTES,
    EOS_ID,
    PAD_ID,
    TOKENIZER_CONFIG,
    SentencePieceVocabulary,
    Vocabulary,
    load_vocabulary,
)
from stepdistill_jax.errors import InputError
from stepdistill_jax.formats.t5x import find_t5x
from stepdistill_jax.formats.tensors import read_object
from stepdistill_jax.runtime.files import atomic_write, write_json
from stepdistill_jax.runtime.stores import is_remote, local_copy

SPIECE, TOKENIZER_MODEL = (
    "spiece.model",  # SentencePiece model of a T5
    "tokenizer.model",  # SentencePiece model of a T5Gemma
)
FAST_TOKENIZER = "tokenizer.json"


def model_name(vocabulary: Vocabulary) -> str:
    """Returns the name of a vocabulary's SentencePiece file in a model directory."""
    return TOKENIZER_MODEL if vocabulary.framing.bos_id else SPIECE


def write_vocabulary(
    directory: pathlib.Path, vocabulary: Vocabulary, model_max_length: int | None = None
) -> None:
    """Writes the SentencePiece model and `tokenizer_config.json` for `read_vocabulary`.

    Args:
        directory: an existing folder, which may be in a store such as `gs://`.
        vocabulary: vocabulary to write. For ByT5's bytes, only `tokenizer_config.json` is written.
        model_max_length: largest number of ids in an input; None leaves the field out.
    """
    # Without sentinels (`extra_ids` 0): they would change the ids of texts that contain strings such as
    # `<extra_id_0>`, and a small embedding has no rows for them.
    tokenizer: dict[str, Any] = {
        "tokenizer_class": "ByT5Tokenizer",
        "extra_ids": 0,
        "pad_token": "<pad>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
    }
    if isinstance(vocabulary, SentencePieceVocabulary):
        tokenizer["tokenizer_class"] = "T5Tokenizer"
        target = directory / model_name(vocabulary)
        in_place = not is_remote(target) and target.exists() and target.samefile(vocabulary.path)
        if not in_place:
            with open(vocabulary.path, "rb") as source, atomic_write(target, "wb") as f:
                shutil.copyfileobj(source, f)
    if vocabulary.framing.bos_id:
        tokenizer = _gemma_config(vocabulary)
    if model_max_length is not None:
        tokenizer["model_max_length"] = model_max_length
    write_json(directory / TOKENIZER_CONFIG, tokenizer)


def _gemma_config(vocabulary: Vocabulary) -> dict[str, Any]:
    """Returns the fields of Gemma's `tokenizer_config.json`: whether inputs get bos and eos, and the special tokens."""
    framing, pieces = dataclasses.asdict(vocabulary.framing), vocabulary.pieces()
    ids = {"bos": framing.pop("bos_id"), "eos": EOS_ID, "pad": PAD_ID, "unk": vocabulary.unk_id}
    named = {f"{name}_token": pieces[i] for name, i in ids.items()}
    return {"tokenizer_class": "GemmaTokenizer", **framing, **named}


def read_vocabulary(directory: pathlib.Path) -> Vocabulary:
    """Returns the vocabulary of a model directory or workdir.

    Raises:
        InputError: there is no vocabulary, or it cannot be read.
    """
    for name in (SPIECE, TOKENIZER_MODEL):
        if (directory / name).is_file():
            return load_vocabulary(local_copy(directory / name, TOKENIZER_CONFIG))
    tokenizer = directory / TOKENIZER_CONFIG
    kind = read_object(tokenizer).get("tokenizer_class") if tokenizer.is_file() else None
    if kind == "ByT5Tokenizer":
        return load_vocabulary(BYTES)
    name = TOKENIZER_MODEL if str(kind).startswith("Gemma") else SPIECE
    raise InputError(
        f"{directory}: there is no vocabulary in it (neither {SPIECE} nor {TOKENIZER_MODEL} nor a"
        f" {TOKENIZER_CONFIG} of ByT5){_where_to_find_it(directory, name)}"
    )


def _where_to_find_it(directory: pathlib.Path, name: str) -> str:
    if (directory / FAST_TOKENIZER).is_file():
        return (
            f"; transformers 5 saves only {FAST_TOKENIZER}, which does not contain {name}:"
            f" copy {name} from the directory of the model that this one was made from"
        )
    if find_t5x(directory):
        return (
            f"; a T5X checkpoint contains none: copy the sentencepiece.model of its gin file into this folder"
            f' as {SPIECE}; for ByT5, write {TOKENIZER_CONFIG} with {{"tokenizer_class": "ByT5Tokenizer"}}'
        )
    return ""
