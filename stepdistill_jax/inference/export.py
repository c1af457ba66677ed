"""Exports a trained model for other programs: in Hugging Face's layout, as StableHLO, or for CTranslate2."""

import dataclasses
import functools
import os
import pathlib
from collections.abc import Callable
from typing import Any

import stepdistill_jax
from stepdistill_jax.data.vocabulary import T5_FRAMING, TOKENIZER_CONFIG
from stepdistill_jax.errors import InputError
from stepdistill_jax.formats.card import model_card
from stepdistill_jax.formats.ctranslate2 import check_quantization, write_ctranslate2
from stepdistill_jax.formats.ctranslate2_readme import ctranslate2_readme
from stepdistill_jax.formats.directory import (
    GENERATION_CONFIG,
    TaskInfo,
    read_config,
    write_model_files,
)
from stepdistill_jax.formats.hf import save_params
from stepdistill_jax.formats.tokenizer import write_tokenizer
from stepdistill_jax.inference.model import LoadedModel, load_model
from stepdistill_jax.inference.prompting import prompting_for
from stepdistill_jax.inference.stablehlo import decoder_readme, write_decoder
from stepdistill_jax.runtime.checkpoints.manager import require_workdir, saved_steps
from stepdistill_jax.runtime.checks import one_of
from stepdistill_jax.runtime.files import atomic_write, check_writable, fsync
from stepdistill_jax.runtime.folders import sole_writer, staged_folder
from stepdistill_jax.runtime.stores import local_path

FORMATS = ("hf", "jax", "ctranslate2")
CARD = "README.md"


def export(
    workdir: os.PathLike | str,
    model_dir: os.PathLike | str,
    *,
    step: str | int = "best",
    format: str = "hf",
    quantization: str | None = None,
) -> dict[str, Any]:
    """Writes the model of one step for other programs.

    Args:
        workdir: folder of a training run; for `jax` and `ctranslate2`, also a model directory.
        model_dir: folder to write, which must be absent or empty. A failed export leaves no folder.
        step: checkpoint of the workdir: `best`, `last` or a step number.
        format: `hf` (Hugging Face's layout), `jax` (the label decoder as a `jax.export` program, which needs
            only jax) or `ctranslate2` (faster on CPUs). `predict` can read `hf` and `ctranslate2`. Its
            output with `hf` is identical to its output with the workdir.
        quantization: type of the weights for `ctranslate2`: `int8` or `float32`; None means `float32`.

    Returns:
        `model_dir`, `step` and `format`.
        `parameters`: number of parameters.
        `files`: sorted names of the files and folders in `model_dir`.

    Raises:
        InputError: an argument is bad, `model_dir` is not empty, or `transformers` could not tokenise texts as in
            training.
    """
    one_of("format", format, FORMATS)
    if quantization is not None and format != "ctranslate2":
        raise InputError(
            f"`quantization`: only `format=ctranslate2` accepts it; the weights of {format} are float32"
        )
    check_quantization(quantization)
    target = local_path(model_dir, "MODEL_DIR")
    target = target if target.name else target.absolute()  # `.`
    _check_target(target)
    if format == "hf":
        require_workdir(workdir)
    model = load_model(workdir, step)
    write = {
        "hf": _write_hf,
        "jax": _write_jax,
        "ctranslate2": functools.partial(_write_ctranslate2, quantization=quantization),
    }[format]
    with sole_writer(target):
        _check_target(target)  # another export may have written it since
        with staged_folder(target) as new:
            parameters = write(new, model)
            os.replace(new, target)
    fsync(target.parent)
    return {
        "model_dir": str(model_dir),
        "step": model.step,
        "format": format,
        "parameters": parameters,
        "files": sorted(p.name for p in target.iterdir()),
    }


def _check_target(target: pathlib.Path) -> None:
    if target.is_symlink() or (target.exists() and not target.is_dir()):
        raise InputError(f"{target}: this is a file or link; choose a new folder")
    if target.is_dir() and any(target.iterdir()):
        raise InputError(
            f"{target}: the folder is not empty, and nothing is overwritten; choose a new folder"
        )
    check_writable(target, folder=True)


def _write_hf(folder: pathlib.Path, model: LoadedModel) -> int:
    info, metrics = _task_info(model), _metrics(model)
    write_model_files(folder, model.config, model.vocabulary, info)
    write_tokenizer(folder, model.vocabulary)  # before the weights: it may refuse
    parameters = save_params(folder, model.params, model.config)
    if info is not None:
        card = model_card(
            info,
            model.config,
            model.vocabulary,
            num_parameters=parameters,
            version=stepdistill_jax.__version__,
            step=int(model.step or 0),
            metrics=metrics,
            lora=read_config(model.path).lora,
        )
        with atomic_write(folder / CARD) as f:
            f.write(card)
    return parameters


def _write_jax(folder: pathlib.Path, model: LoadedModel) -> int:
    write_model_files(folder, model.config, model.vocabulary, _task_info(model))
    (folder / GENERATION_CONFIG).unlink()  # for `transformers`, which finds no weights here
    if model.vocabulary.framing == T5_FRAMING:
        (folder / TOKENIZER_CONFIG).unlink()
    length = prompting_for(model).decode_lengths[0]
    exported, parameters = write_decoder(folder, model.params, model.config, max_decode_len=length)
    _write_readme(folder, model, parameters, functools.partial(decoder_readme, exported))
    return parameters


def _write_ctranslate2(folder: pathlib.Path, model: LoadedModel, quantization: str | None) -> int:
    info = _task_info(model)
    parameters = write_ctranslate2(
        folder, model.params, model.config, model.vocabulary, info, quantization
    )
    readme = functools.partial(ctranslate2_readme, quantization=quantization)
    _write_readme(folder, model, parameters, readme)
    return parameters


def _write_readme(
    folder: pathlib.Path, model: LoadedModel, parameters: int, readme: Callable[..., str]
) -> None:
    prompting = prompting_for(model)
    text = readme(
        model.vocabulary,
        task=model.task_info.task if model.task_info else model.path.resolve().name,
        prompt=prompting.objectives[0].input_template.replace("{input}", "..."),
        num_parameters=parameters,
        input_length=prompting.input_length,
        max_decode_len=prompting.decode_lengths[0],
    )
    with atomic_write(folder / CARD) as f:
        f.write(text)


def _metrics(model: LoadedModel) -> dict[str, Any]:
    return {} if model.step is None else saved_steps(model.path)[model.step]


def _task_info(model: LoadedModel) -> TaskInfo | None:
    """Returns the model's task information, with the exported step added."""
    info = model.task_info
    if info is None or model.step is None:
        return info
    origin = {
        "step": model.step,
        "metrics": _metrics(model),
        "exported_by": stepdistill_jax.__version__,
    }
    return dataclasses.replace(info, provenance=info.provenance | origin)
