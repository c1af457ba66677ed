"""Accuracy on a split of any task: a prepared dataset, or one that only SeqIO can read."""

import os
from collections.abc import Sequence
from typing import Any

from stepdistill_jax.data.objectives import label_only
from stepdistill_jax.data.prepared import PreparedDataset, data_folder
from stepdistill_jax.decoding.beam import search
from stepdistill_jax.errors import InputError
from stepdistill_jax.formats.ctranslate2 import read_ctranslate2
from stepdistill_jax.formats.directory import TaskInfo, is_ctranslate2, read_model_files
from stepdistill_jax.inference.allowed import check_choices
from stepdistill_jax.inference.evaluate import check_result, evaluate_tokens
from stepdistill_jax.inference.evaluate import evaluate as evaluate_prepared
from stepdistill_jax.models.sharding import Layout
from stepdistill_jax.runtime.files import write_json
from stepdistill_jax.runtime.on_processes import on_all_processes, on_process_0
from stepdistill_jax.tasks.load import load_task
from stepdistill_jax.tasks.lookup import find_task


def evaluate(
    path: os.PathLike | str,
    *,
    task: str,
    split: str = "test",
    step: str | int = "best",
    output: os.PathLike | str | None = None,
    data_dir: os.PathLike | str | None = None,
    batch_size: int | None = None,
    layout: str | Layout = "data",
    num_beams: int = 1,
    length_penalty: float | None = None,
    choices: os.PathLike | str | Sequence[str] | None = None,
    choices_temperature: float = 1.0,
    with_rationale: bool = False,
    engine: str | None = None,
    quantization: str | None = None,
    task_module: str | None = None,
) -> dict[str, Any]:
    """Decodes the labels of a split and compares them; what `stepdistill evaluate` calls.

    A prepared dataset goes to `evaluate.evaluate`, without TensorFlow. Any other task is tokenised
    through SeqIO, as for training.

    Args:
        path: workdir or model directory.
        task: a prepared dataset, a task of `add_task`, or a SeqIO task or mixture.
        split: of the task.
        step: of a workdir: `best`, `last` or a number.
        output: JSON file for the result; None writes none.
        data_dir: where datasets are prepared and tokens are kept; None is the default folder.
        batch_size, layout, num_beams, length_penalty, choices, choices_temperature, engine, quantization: as for
            `inference.predict`.
        with_rationale: of a prepared dataset: also decodes the rationales, and says what they are worth.
        task_module: module that registers the task; None is the one that the model was trained
            with, if it was trained on this task.

    Returns:
        What `predict` returns, and `task`, `split`, `step`, `num_beams`, `length_penalty`; with
        rationales also `rationale` (see `evaluate.evaluate`).

    Raises:
        InputError: no such model, step, task, split or module, or a bad option.
    """
    search(num_beams, length_penalty)  # a bad value is said before anything is read
    check_choices(choices, choices_temperature, num_beams)
    if output is not None:
        on_process_0(lambda: check_result(output, choices))
    read = read_ctranslate2 if is_ctranslate2(path) else read_model_files
    files = on_all_processes(lambda: read(path))
    info = files.task_info
    if task_module is None:
        task_module = _own_module(info, task)
    folder = data_folder(data_dir)
    found = on_all_processes(lambda: find_task(task, data_dir=folder, task_module=task_module))
    if isinstance(found, PreparedDataset):
        return evaluate_prepared(
            path,
            task=task,
            split=split,
            step=step,
            output=output,
            data_dir=folder,
            batch_size=batch_size,
            layout=layout,
            num_beams=num_beams,
            length_penalty=length_penalty,
            choices=choices,
            choices_temperature=choices_temperature,
            with_rationale=with_rationale,
            engine=engine,
            quantization=quantization,
        )
    if with_rationale:
        raise InputError(
            f"--with-rationale: {task} is a SeqIO task, of which only the labels are compared; leave it"
            " out, or prepare the rows as a dataset (`stepdistill prepare jsonl`)"
        )
    data = on_all_processes(
        lambda: load_task(
            task,
            split=split,
            objectives=info.objectives[:1] if info else label_only(),
            vocabulary=files.vocabulary.source,
            data_dir=folder,
            task_module=task_module,
        )
    )
    inputs, labels = [], []
    for store in data.stores:
        inputs += [store.rows[0]["inputs"][i].tolist() for i in range(store.num_examples)]
        labels += store.label_texts
    result = evaluate_tokens(
        path,
        inputs,
        labels,
        metric=data.metric,
        allowed=data.labels,
        step=step,
        batch_size=batch_size,
        layout=layout,
        num_beams=num_beams,
        length_penalty=length_penalty,
        choices=choices,
        choices_temperature=choices_temperature,
        engine=engine,
        quantization=quantization,
    )
    result = {"task": task, "split": split} | result
    if output is not None:
        on_process_0(lambda: write_json(output, result))
    return result


def _own_module(info: TaskInfo | None, task: str) -> str | None:
    """The module that registered the model's own task; None if `task` is another one."""
    if info is None or info.task != task:
        return None
    config = info.provenance.get("config")
    module = config.get("task_module") if isinstance(config, dict) else None
    return module if isinstance(module, str) else None
