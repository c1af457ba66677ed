"""Writes and reads directories for CTranslate2, an inference engine for CPUs.

CTranslate2's own converter is not used: with transformers 5, it scales the logits of every T5 down, which is
wrong for a T5 v1.1.
"""

import dataclasses
import importlib
import os
import pathlib
from collections.abc import Callable
from typing import Any

import numpy as np

import stepdistill_jax
from stepdistill_jax.data.vocabulary import EOS_ID, PAD_ID, TOKENIZER_CONFIG, Vocabulary
from stepdistill_jax.errors import InputError, how_to_install
from stepdistill_jax.formats.directory import (
    CONFIG,
    CTRANSLATE2_MODEL,
    CTRANSLATE2_TOKENS,
    GENERATION_CONFIG,
    TASK_INFO,
    TaskInfo,
    read_task_info,
    write_model_files,
)
from stepdistill_jax.formats.hf import to_hf
from stepdistill_jax.formats.parameter_names import EMBEDDING, HEAD
from stepdistill_jax.formats.tensors import read_object
from stepdistill_jax.formats.vocabulary_files import SPIECE, read_vocabulary
from stepdistill_jax.models.config import ModelConfig
from stepdistill_jax.models.t5 import T5Config
from stepdistill_jax.runtime.checks import one_of
from stepdistill_jax.runtime.files import fsync, read_json, write_json
from stepdistill_jax.runtime.fingerprints import sha256
from stepdistill_jax.runtime.stores import local_path

QUANTIZATIONS = ("float32", "int8")
LARGEST = 127  # largest int8 weight
OURS = "stepdistill"  # our key in config.json; CTranslate2 ignores keys that it does not know


@dataclasses.dataclass(frozen=True)
class CTranslate2Files:
    """The contents of a CTranslate2 directory, except the model.

    Attributes:
        tokens: names of the tokens, in the order of the embedding's rows.
        sha256: digest that `model.bin` had when it was written.
    """

    vocabulary: Vocabulary
    task_info: TaskInfo | None
    tokens: list[str]
    sha256: str

    @property
    def vocab_size(self) -> int:
        """Count of rows of the embedding."""
        return len(self.tokens)


def import_ctranslate2(wanted_by: str, module: str = "ctranslate2") -> Any:
    """Imports CTranslate2, or one of its modules.

    Args:
        wanted_by: option or directory that needs CTranslate2, for the message.

    Raises:
        InputError: CTranslate2 is not installed.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise InputError(
            f"{wanted_by}: CTranslate2 cannot be imported ({error}); {how_to_install('ctranslate2')}"
        ) from None


def check_quantization(quantization: str | None) -> None:
    """Checks that the value is one of `QUANTIZATIONS`, or None for float32.

    Raises:
        InputError: the value is unknown, or is float16. The message gives the reason.
    """
    if quantization == "float16":
        raise InputError(
            "`quantization`: float16 gives NaN, since T5's feed-forward layers overflow in it"
            " (OpenNMT/CTranslate2#1074); int8 is smaller and faster"
        )
    if quantization is not None:
        one_of("quantization", quantization, QUANTIZATIONS)


def write_ctranslate2(
    directory: os.PathLike | str,
    params: Any,
    config: ModelConfig,
    vocabulary: Vocabulary,
    task_info: TaskInfo | None,
    quantization: str | None = None,
) -> int:
    """Writes a CTranslate2 directory, and returns the number of parameters.

    The call needs memory for two copies of the parameters.

    Args:
        directory: a new or empty folder.
        params: unboxed parameters without adapters.
        quantization: one of `QUANTIZATIONS`; None means float32.

    Raises:
        InputError: the quantization is unknown, the model is not a T5, or CTranslate2 is not installed.
    """
    check_quantization(quantization)
    if not isinstance(config, T5Config):
        raise InputError(
            "`format`: ctranslate2 supports only T5 models, and this is not one; use hf or jax"
        )
    specs = import_ctranslate2("`format=ctranslate2`", "ctranslate2.specs")
    folder = pathlib.Path(directory)
    write_model_files(folder, config, vocabulary, task_info)
    (folder / GENERATION_CONFIG).unlink()  # for `transformers`, which finds no weights here
    # a ByT5 keeps the next file, which says that its vocabulary is bytes
    if (folder / SPIECE).is_file():
        (folder / TOKENIZER_CONFIG).unlink()
    tensors = to_hf(params, config)
    num_parameters = sum(x.size for x in tensors.values())
    spec = _spec(specs, tensors, config)
    if quantization == "int8":
        specs.model_spec.visit_spec(spec, _quantize)
    tokens = token_names(vocabulary, config.vocab_size)
    spec.register_source_vocabulary(tokens)
    spec.register_target_vocabulary(tokens)
    spec.config.bos_token = spec.config.decoder_start_token = tokens[PAD_ID]
    spec.config.eos_token = tokens[EOS_ID]
    spec.config.unk_token = tokens[vocabulary.unk_id]
    spec.config.layer_norm_epsilon = config.layer_norm_epsilon
    spec.validate()
    spec.optimize()  # stores equal matrices once
    spec.save(os.fspath(folder))
    for name in (CTRANSLATE2_MODEL, CTRANSLATE2_TOKENS):
        fsync(folder / name)
    ours = {
        "version": stepdistill_jax.__version__,
        "quantization": quantization or "float32",
        "vocab_size": config.vocab_size,
        "sha256": sha256(folder / CTRANSLATE2_MODEL),
    }
    write_json(folder / CONFIG, read_json(folder / CONFIG) | {OURS: ours})
    return num_parameters


def read_ctranslate2(directory: os.PathLike | str) -> CTranslate2Files:
    """Reads what `write_ctranslate2` wrote, except the model.

    Raises:
        InputError: a file is missing, damaged or from another model.
    """
    folder = local_path(directory, "model directory")
    for name in (CTRANSLATE2_MODEL, CTRANSLATE2_TOKENS, CONFIG):
        if not (folder / name).is_file():
            raise InputError(
                f"{folder}: {name} is missing; a CTranslate2 directory is incomplete without it"
            )
    ours = read_object(folder / CONFIG).get(OURS)
    size = ours.get("vocab_size") if isinstance(ours, dict) else None
    if not isinstance(ours, dict) or type(size) is not int or "sha256" not in ours:
        raise InputError(
            f"{folder / CONFIG}: this file was not written by `stepdistill export --format ctranslate2`; other"
            " converters may scale the logits of a T5, so export the model from its original directory"
        )
    vocabulary, tokens = read_vocabulary(folder), read_json(folder / CTRANSLATE2_TOKENS)
    # CTranslate2 itself does not check that the embedding has one row per token
    whole = isinstance(tokens, list) and len(tokens) == size
    if not whole or tokens != token_names(vocabulary, size):
        raise InputError(
            f"{folder / CTRANSLATE2_TOKENS}: does not match the vocabulary of {SPIECE if (folder / SPIECE).is_file() else 'ByT5'}"
            " in this directory; copy or export the directory again"
        )
    info = read_task_info(folder) if (folder / TASK_INFO).is_file() else None
    return CTranslate2Files(vocabulary, info, tokens, str(ours["sha256"]))


def check_model(directory: os.PathLike | str, files: CTranslate2Files) -> None:
    """Checks the digest of `model.bin`, since CTranslate2 would run on damaged weights.

    Raises:
        InputError: the digest differs.
    """
    path = pathlib.Path(directory) / CTRANSLATE2_MODEL
    if sha256(path) != files.sha256:
        raise InputError(
            f"{path}: damaged, or from another model (its digest differs from the one in {CONFIG});"
            " copy or export the directory again"
        )


def token_names(vocabulary: Vocabulary, size: int) -> list[str]:
    """Returns the vocabulary's pieces, and a name such as `<row 32100>` for each further row of the embedding."""
    # CTranslate2 looks up ids by name, so all names must differ; no piece contains a space
    pieces = vocabulary.pieces()
    return [*pieces, *(f"<row {i}>" for i in range(len(pieces), size))]


def to_int8(matrix: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Quantizes each row of a matrix, so that its matmuls have the same result on every processor.

    Args:
        matrix: [rows, inputs], float32.

    Returns:
        The quantized matrix, int8 [rows, inputs].
        The scale by which each row was multiplied, float32 [rows].
    """
    # Processors without VNNI add two adjacent products of a weight and an unsigned 8-bit activation in 16 bits,
    # which saturate silently. So two adjacent weights, too, sum to at most 127: 255 * (127 + 1) < 2 ** 15, where
    # the 1 is for rounding.
    adjacent = matrix[:, : matrix.shape[1] // 2 * 2].reshape(len(matrix), -1, 2).sum(2)
    largest = np.full(len(matrix), 1e-30, np.float32)  # a row of zeros has a finite scale, too
    for x in (matrix, adjacent):
        largest = np.maximum(largest, np.maximum(x.max(1, initial=0), -x.min(1, initial=0)))
    scale = (LARGEST / largest).astype(np.float32)
    scaled = matrix * scale[:, None]
    return np.rint(scaled, out=scaled).astype(np.int8), scale


def _quantize(part: Any, path: str, value: Any) -> None:
    """Quantizes the matrix at `path` if the specification has a field for its scale."""
    name = path.rpartition("/")[2]
    if isinstance(value, np.ndarray) and hasattr(part, f"{name}_scale"):
        weight, scale = to_int8(value)
        setattr(part, name, weight)
        setattr(part, f"{name}_scale", scale)


def _spec(specs: Any, tensors: dict[str, np.ndarray], config: T5Config) -> Any:
    gated = len(config.mlp_activations) == 2
    kinds = specs.common_spec.Activation
    activations = {"relu": kinds.RELU, "gelu": kinds.GELUTanh, "silu": kinds.SWISH}
    spec = specs.TransformerSpec.from_config(
        (config.num_encoder_layers, config.num_decoder_layers),
        config.num_heads,
        activation=activations[config.mlp_activations[0]],
        ffn_glu=gated,
        relative_attention_bias=True,
        rms_norm=True,
    )

    def take(*names: str) -> np.ndarray:
        parts = [tensors.pop(name) for name in names]
        return np.concatenate(parts) if len(parts) > 1 else parts[0]

    embedding = take(EMBEDDING)
    spec.encoder.embeddings[0].weight = spec.decoder.embeddings.weight = embedding
    spec.decoder.projection.weight = embedding if config.logits_via_embedding else take(HEAD)
    if config.scale_decoder_outputs:
        spec.decoder.scale_outputs = config.emb_dim**-0.5
    for side, stack in (("encoder", spec.encoder), ("decoder", spec.decoder)):
        stack.scale_embeddings = False
        stack.layer_norm.gamma = take(f"{side}.final_layer_norm.weight")
        for i, layer in enumerate(stack.layer):
            _set_layer(layer, f"{side}.block.{i}.layer.", take, config, gated)
            if i and config.shared_relative_position_bias:
                first = stack.layer[0].self_attention.relative_attention_bias
                layer.self_attention.relative_attention_bias = first
    assert not tensors, f"unused tensors: {', '.join(tensors)}"
    return spec


def _set_layer(
    layer: Any, block: str, take: Callable[..., np.ndarray], config: T5Config, gated: bool
) -> None:
    """Fills one layer of the specification with the tensors whose names begin with `block`."""
    own = f"{block}0.SelfAttention."
    attention = layer.self_attention
    attention.queries_scale = 1.0  # T5 does not divide by sqrt(head_dim)
    attention.layer_norm.gamma = take(f"{block}0.layer_norm.weight")
    attention.linear[0].weight = take(*(f"{own}{x}.weight" for x in "qkv"))
    attention.linear[1].weight = take(f"{own}o.weight")
    attention.relative_attention_max_distance = np.int32(config.max_distance)
    if not config.shared_relative_position_bias or ".block.0." in block:
        attention.relative_attention_bias = take(f"{own}relative_attention_bias.weight")
    last = f"{block}1."
    if hasattr(layer, "attention"):
        cross, last = f"{block}1.EncDecAttention.", f"{block}2."
        layer.attention.queries_scale = 1.0
        layer.attention.layer_norm.gamma = take(f"{block}1.layer_norm.weight")
        layer.attention.linear[0].weight = take(f"{cross}q.weight")
        layer.attention.linear[1].weight = take(*(f"{cross}{x}.weight" for x in "kv"))
        layer.attention.linear[2].weight = take(f"{cross}o.weight")
    dense = f"{last}DenseReluDense."
    layer.ffn.layer_norm.gamma = take(f"{last}layer_norm.weight")
    layer.ffn.linear_0.weight = take(f"{dense}wi{'_0' if gated else ''}.weight")
    if gated:
        layer.ffn.linear_0_noact.weight = take(f"{dense}wi_1.weight")
    layer.ffn.linear_1.weight = take(f"{dense}wo.weight")
