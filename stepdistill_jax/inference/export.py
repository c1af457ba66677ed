"""From a workdir to a directory that Hugging Face tools open."""

import dataclasses
import os
import pathlib
import shutil
from typing import Any

import stepdistill_jax
from stepdistill_jax.checkpoints.manager import is_workdir, saved_steps
from stepdistill_jax.errors import InputError
from stepdistill_jax.files import atomic_write, fsync_folder
from stepdistill_jax.formats.card import model_card
from stepdistill_jax.formats.directory import SPIECE, write_model_files
from stepdistill_jax.formats.hf import save_params
from stepdistill_jax.inference.model import LoadedModel, load_model
from stepdistill_jax.text.vocabulary import EOS_ID, Vocabulary

FAST_TOKENIZER = "tokenizer.json"
# what a wrong normalizer, a dummy vocabulary or a lost space would show in
_PROBES = ("predict: a, b", "", "  two  spaces ", "line\nbreak", "É ½ ﬁ 日本語", "<extra_id_0>")


def export(
    workdir: os.PathLike | str, model_dir: os.PathLike | str, *, step: str | int = "best"
) -> dict[str, Any]:
    """Writes configuration, weights, tokenizer, task and model card of one step.

    `predict` gives the same bytes on `model_dir` as on the workdir at that step.

    Args:
        workdir: of a training run.
        model_dir: must be absent or empty; it appears whole or not at all.
        step: `best`, `last` or a number.

    Returns:
        `model_dir`, `step`, `parameters`, `files`.

    Raises:
        InputError: not a workdir, no such step, or a `model_dir` that holds something.
    """
    target = pathlib.Path(model_dir)
    _check_target(target)
    if not is_workdir(workdir):
        raise InputError(f"{workdir}: not a workdir (it has no checkpoints to export)")
    model = load_model(workdir, step)
    partial = target.with_name(f".{target.name}.partial-{os.getpid()}")
    try:
        partial.mkdir(parents=True)
        parameters = _write(partial, model)
        os.replace(partial, target)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    fsync_folder(target.parent)
    return {
        "model_dir": str(model_dir),
        "step": model.step,
        "parameters": parameters,
        "files": sorted(p.name for p in target.iterdir()),
    }


def _check_target(target: pathlib.Path) -> None:
    if target.is_symlink() or (target.exists() and not target.is_dir()):
        raise InputError(f"{target}: is a file or link, a new folder is wanted")
    if target.is_dir() and any(target.iterdir()):
        raise InputError(f"{target}: is not empty; give a new folder, nothing is overwritten")
    nearest = next(parent for parent in target.absolute().parents if parent.exists())
    if not nearest.is_dir() or not os.access(nearest, os.W_OK):
        raise InputError(f"{target}: cannot be written (no permission in {nearest})")


def _write(folder: pathlib.Path, model: LoadedModel) -> int:
    step = int(model.step or 0)
    metrics = saved_steps(model.path)[step]
    info = model.task_info
    if info is not None:
        origin = {
            "step": step,
            "metrics": metrics,
            "exported_by": stepdistill_jax.__version__,
        }
        info = dataclasses.replace(info, provenance=info.provenance | origin)
    write_model_files(folder, model.config, model.vocabulary, info)
    parameters = save_params(folder, model.params, model.config)
    if (folder / SPIECE).is_file():
        _write_fast_tokenizer(folder, model.vocabulary)
    if info is not None:
        card = model_card(
            info,
            model.config,
            num_parameters=parameters,
            version=stepdistill_jax.__version__,
            step=step,
            metrics=metrics,
        )
        with atomic_write(folder / "README.md") as f:
            f.write(card)
    return parameters


def _write_fast_tokenizer(folder: pathlib.Path, vocabulary: Vocabulary) -> None:
    """`tokenizer.json`, which tools other than `transformers` want, checked against our ids."""
    from transformers import T5Tokenizer  # 2 to 3 s

    tokenizer = T5Tokenizer.from_pretrained(folder)
    tokenizer.backend_tokenizer.save(str(folder / FAST_TOKENIZER))
    for text in _PROBES:
        got, wanted = tokenizer(text)["input_ids"], [*vocabulary.encode(text), EOS_ID]
        if got != wanted:
            raise RuntimeError(
                f"the exported tokenizer gives other ids for {text!r}: {got}, not {wanted}"
            )
