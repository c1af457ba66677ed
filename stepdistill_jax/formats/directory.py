"""Reads and writes a model directory's configuration, vocabulary and task.

A workdir is a model directory, too. Its weights are in `checkpoints/STEP/`.
"""

import dataclasses
import os
import pathlib
from typing import Any

from stepdistill_jax.data.objectives import Objective, check_first
from stepdistill_jax.data.schedules import Schedule
from stepdistill_jax.data.text_metrics import METRICS
from stepdistill_jax.data.vocabulary import EOS_ID, PAD_ID, Vocabulary
from stepdistill_jax.errors import InputError
from stepdistill_jax.formats.config_json import config_json, config_of
from stepdistill_jax.formats.fields import size
from stepdistill_jax.formats.t5x import config_from_shapes, find_t5x
from stepdistill_jax.formats.tensors import read_object
from stepdistill_jax.formats.vocabulary_files import read_vocabulary, write_vocabulary
from stepdistill_jax.formats.weights import has_weights, open_weights
from stepdistill_jax.models.config import MAX_LENGTH, LoraConfig, ModelConfig
from stepdistill_jax.runtime.files import write_json
from stepdistill_jax.runtime.stores import as_path, existing_folder, is_remote

CONFIG, TASK_INFO = "config.json", "stepdistill.json"
GENERATION_CONFIG = "generation_config.json"
CTRANSLATE2_MODEL, CTRANSLATE2_TOKENS = "model.bin", "shared_vocabulary.json"
STABLEHLO_DECODER = "label_decoder.jax_export"
FORMAT_VERSION = 1
LORA = "stepdistill_lora"  # key in the config.json of a workdir whose checkpoints hold adapters


@dataclasses.dataclass(frozen=True)
class TaskInfo:
    """Contents of `stepdistill.json`: how the model was prompted in training, and how it was made.

    Attributes:
        task: name of the dataset, task or mixture.
        objectives: training objectives. The label is read from the model's answer to the first one.
        input_length: largest number of ids in an input, the end of sequence included.
        target_length: largest number of ids in any objective's target.
        max_decode_len: largest number of ids to decode for the label, the end of sequence included. By
            default, every target of the first objective in the train split fits.
        metric: `text_match` or `value_match`.
        labels: all possible labels if they are few; else empty.
        provenance: facts about the training, such as versions, data and metrics.
        input_pair: whether examples have a second input text (`Example.input_pair`).
    """

    task: str
    objectives: tuple[Objective, ...]
    input_length: int
    target_length: int
    max_decode_len: int
    metric: str = "text_match"
    labels: tuple[str, ...] = ()
    provenance: dict[str, Any] = dataclasses.field(default_factory=dict)
    input_pair: bool = False


@dataclasses.dataclass(frozen=True)
class ModelFiles:
    """A model directory without its weights. `task_info` is None without a `stepdistill.json`."""

    config: ModelConfig
    vocabulary: Vocabulary
    task_info: TaskInfo | None

    @property
    def vocab_size(self) -> int:
        """Count of rows of the embedding."""
        return self.config.vocab_size


def write_model_files(
    directory: os.PathLike | str,
    config: ModelConfig,
    vocabulary: Vocabulary,
    task_info: TaskInfo | None,
) -> None:
    """Writes configuration, vocabulary and task."""
    directory = as_path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    raw = config_json(config) | ({LORA: dataclasses.asdict(config.lora)} if config.lora else {})
    write_json(directory / CONFIG, raw)
    generation = {
        "decoder_start_token_id": config.start_id,
        "eos_token_id": EOS_ID,
        "pad_token_id": PAD_ID,
        # transformers 5 makes a cache as deep as the encoder, and fails if the decoder is deeper
        "use_cache": config.decoder.num_layers <= config.encoder.num_layers,
    }
    if task_info:
        generation["max_new_tokens"] = task_info.max_decode_len
        write_json(
            directory / TASK_INFO, {"format": FORMAT_VERSION} | dataclasses.asdict(task_info)
        )
    write_vocabulary(directory, vocabulary, task_info.input_length if task_info else None)
    write_json(directory / GENERATION_CONFIG, generation)


def is_ctranslate2(directory: os.PathLike | str) -> bool:
    """Returns whether a local folder is a CTranslate2 directory, even an incomplete one."""
    folder = as_path(directory)
    names = (CTRANSLATE2_MODEL, CTRANSLATE2_TOKENS)
    if is_remote(folder) or not any((folder / name).is_file() for name in names):
        return False
    return not has_weights(folder)  # a `model.bin` of another tool may lie next to the weights


def read_model_files(directory: os.PathLike | str) -> ModelFiles:
    """Reads configuration, vocabulary and task of a model directory or workdir.

    Stored weights, if there are any, decide whether the output layer is tied to the embedding.

    Raises:
        InputError: a file or field is missing, wrong, or not supported.
    """
    # transformers 5 always writes true as `tie_word_embeddings`, so the field alone does not tell
    directory = existing_folder(directory)
    if not (directory / CONFIG).is_file() and find_t5x(directory) is None:
        raise InputError(f"{directory}: not a model directory or workdir (it has no {CONFIG})")
    config = read_config(directory)
    vocabulary = read_vocabulary(directory)
    if vocabulary.size > config.vocab_size:
        raise InputError(
            f"{directory / CONFIG}: vocab_size {config.vocab_size} is below the"
            f" {vocabulary.size} pieces of the vocabulary"
        )
    bos = vocabulary.framing.bos_id
    # without bos a T5 starts with the padding, and a T5Gemma with the end of sequence
    if config.start_id not in ([bos] if bos else [PAD_ID, EOS_ID]):
        raise InputError(
            f"{directory}: the vocabulary belongs to another model: in {CONFIG} the decoder starts"
            f" with id {config.start_id}, but {vocabulary.source} has {f'bos {bos}' if bos else 'no bos'}, like"
            f" {'Gemma' if bos else 'T5'}; copy the vocabulary from the directory of the weights"
        )
    task_info = read_task_info(directory) if (directory / TASK_INFO).is_file() else None
    return ModelFiles(config, vocabulary, task_info)


def read_config(directory: os.PathLike | str) -> ModelConfig:
    """Reads a model's configuration from `config.json`, or from the shapes in a T5X checkpoint.

    Stored weights decide whether the output layer is tied.

    Raises:
        InputError: a field is missing or wrong, or the architecture is unknown.
    """
    directory = as_path(directory)
    path = directory / CONFIG
    if not path.is_file() and find_t5x(directory):
        return config_from_shapes(directory, open_weights(directory).shapes())
    if is_ctranslate2(directory):
        raise InputError(
            f"{directory}: this is a CTranslate2 directory, which only `predict`, `evaluate` and `serve`"
            " read; use the model directory that it was made from"
        )
    if (directory / STABLEHLO_DECODER).is_file() and not has_weights(directory):
        raise InputError(
            f"{directory}: this is a StableHLO directory (`stepdistill export --format jax`), and its"
            " README.md shows how to run it with jax alone; here, use the workdir or model directory that it was made from"
        )
    raw, weights = read_object(path), None
    if has_weights(directory):
        weights = open_weights(directory)
    elif LORA in raw:  # only checkpoints hold adapters; an export's weights are merged
        return dataclasses.replace(config_of(path, raw, None), lora=_read_lora(path, raw[LORA]))
    return config_of(path, raw, weights)


def _read_lora(path: pathlib.Path, given: Any) -> LoraConfig | None:
    if given is None:
        return None
    try:
        return LoraConfig(**given)
    except (InputError, TypeError) as error:
        raise InputError(f"{path}: {LORA}: {error}") from None


def read_task_info(directory: os.PathLike | str) -> TaskInfo:
    """Reads and checks `stepdistill.json`. Unknown fields are ignored.

    Raises:
        InputError: the file cannot be read, or a field is missing or has a wrong type.
    """
    path = as_path(directory) / TASK_INFO
    raw = read_object(path)
    if type(raw.get("format")) is not int or raw["format"] < 1:
        raise InputError(
            f"{path}: 'format' is missing or not a whole number above 0, so this is not a {TASK_INFO}"
            " of stepdistill-jax"
        )
    if raw["format"] > FORMAT_VERSION:
        raise InputError(
            f"{path}: format {raw['format']} is too new for this version, which reads format {FORMAT_VERSION};"
            " upgrade stepdistill-jax"
        )

    def field(name, kind, wanted):
        if not isinstance(raw.get(name), kind):
            found = f"got {raw[name]!r}" if name in raw else "but it is missing"
            raise InputError(f"{path}: {name} must be {wanted}, {found}")
        return raw[name]

    labels = field("labels", list, "a list of strings")
    if not all(isinstance(label, str) for label in labels):
        raise InputError(f"{path}: labels must be a list of strings, got {labels!r}")
    if (metric := field("metric", str, "a string")) not in METRICS:
        raise InputError(f"{path}: metric must be one of {', '.join(METRICS)}, got {metric!r}")
    if "input_pair" in raw:  # absent in files of versions without pairs
        field("input_pair", bool, "true or false")
    return TaskInfo(
        task=field("task", str, "a string"),
        objectives=_read_objectives(path, field("objectives", list, "a list")),
        input_length=size(path, raw, "input_length", most=MAX_LENGTH),
        target_length=size(path, raw, "target_length", most=MAX_LENGTH),
        max_decode_len=size(path, raw, "max_decode_len", most=MAX_LENGTH),
        metric=metric,
        labels=tuple(labels),
        provenance=field("provenance", dict, "an object"),
        input_pair=raw.get("input_pair", False),
    )


def _read_objectives(path: pathlib.Path, raw: list) -> tuple[Objective, ...]:
    names = [f.name for f in dataclasses.fields(Objective)]
    needed = [name for name in names if name != "decoder_prefix"]  # absent in older files
    if not raw:
        raise InputError(f"{path}: objectives must contain at least one objective")
    for o in raw:
        if not isinstance(o, dict) or not all(name in o for name in needed):
            raise InputError(
                f"{path}: each of the objectives must have {', '.join(needed)}, got {o!r}"
            )
    try:
        given = [{name: o[name] for name in names if name in o} for o in raw]
        for o in given:
            if isinstance(o["weight"], dict):
                o["weight"] = Schedule.from_json(o["weight"])
        objectives = tuple(Objective(**o) for o in given)
        check_first(objectives)
    except InputError as error:
        raise InputError(f"{path}: objectives: {error}") from None
    if len({o.name for o in objectives}) < len(objectives):
        raise InputError(f"{path}: objectives: each objective needs a different name")
    return objectives
