"""Evaluates a model on a split of a prepared dataset or of a SeqIO task."""

import dataclasses
import math
import os
import pathlib
import tempfile
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from stepdistill_jax.data.example import Example
from stepdistill_jax.data.objectives import label_only
from stepdistill_jax.data.prepared import PreparedDataset, data_folder
from stepdistill_jax.data.vocabulary import truncate
from stepdistill_jax.errors import InputError
from stepdistill_jax.formats.ctranslate2 import read_ctranslate2
from stepdistill_jax.formats.directory import TaskInfo, is_ctranslate2, read_model_files
from stepdistill_jax.inference.accuracy import AccuracyCounts
from stepdistill_jax.inference.allowed_answers import ROW, allow
from stepdistill_jax.inference.answer_files import PREDICTIONS, answers_name, write_answers
from stepdistill_jax.inference.engines import open_engine
from stepdistill_jax.inference.labels import Labels, label_rows, score_targets
from stepdistill_jax.inference.options import DecodeOptions, decode_options
from stepdistill_jax.inference.predict import predict
from stepdistill_jax.inference.prompting import RATIONALE, prompting_for
from stepdistill_jax.inference.rationale_quality import RationaleCounts
from stepdistill_jax.runtime.checkpoints.manager import is_workdir, resolve_step
from stepdistill_jax.runtime.files import read_jsonl, write_json
from stepdistill_jax.runtime.on_processes import (
    on_all_processes,
    on_process_0,
    require_same,
    until_stopped,
)
from stepdistill_jax.runtime.overwriting import Made, check_outputs
from stepdistill_jax.runtime.progress import log
from stepdistill_jax.runtime.stores import as_path, is_remote, local_path, upload
from stepdistill_jax.tasks.load import load_task
from stepdistill_jax.tasks.lookup import find_task
from stepdistill_jax.tasks.metrics import TaskMetrics
from stepdistill_jax.tasks.mixtures import TaskObjectives, is_mixture, label_tasks
from stepdistill_jax.tasks.registry import TaskSpec
from stepdistill_jax.tasks.task_data import Part

RESULT = Made("evaluate", b'{\n  "task": "', ("task", "split", "rows"))


def check_result(output: os.PathLike | str, choices: Any = None) -> None:
    """Refuses an output file that must not be overwritten; see `check_outputs`."""
    inputs = [choices] if isinstance(choices, os.PathLike | str) else []
    check_outputs({local_path(output, "`output`"): RESULT}, inputs, "`output`")


def evaluate(
    path: os.PathLike | str,
    *,
    task: str,
    split: str = "test",
    output: os.PathLike | str | None = None,
    with_rationale: bool = False,
    data_dir: os.PathLike | str | None = None,
    task_module: str | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Decodes the labels of a split and compares them with the gold labels.

    For a workdir, the answers are saved in its `predictions/TASK-SPLIT-STEP.jsonl`. Options that are set are
    appended to STEP, in this order: `-beamsN`, `-penaltyX`, `-choices`, `-int8`, `-rationale`.

    Args:
        path: workdir or model directory.
        task: name of a prepared dataset, a task registered by `add_task`, or a SeqIO task or mixture.
        output: JSON file for the result; None writes no file.
        with_rationale: also decodes rationales and measures their quality; only for a prepared dataset.
        data_dir: folder of prepared datasets and tokens; None means the default folder.
        task_module: module that registers the task. None means the run's `task_module`, if the model was trained
            on this task.
        **options: fields of `DecodeOptions` except `max_decode_len` and `prefix`.

    Returns:
        The keys that `predict` returns, and `task`, `split`, `step`, `num_beams` and `length_penalty`.
        `rationale`: the keys of `RationaleCounts.summary`, and `unfinished`; present only if requested.
        `metrics`: {name: value}; present only if a SeqIO task has its own metrics.
        For a mixture with several label tasks, only `task`, `split`, `rows` and `tasks` ({task: result}).

    Raises:
        InputError: the model or an argument is bad, or the requested rationales do not exist.
    """
    chosen = decode_options(evaluate, options, without=("max_decode_len", "prefix"))
    if output is not None:
        on_process_0(lambda: check_result(output, chosen.choices))
    read = read_ctranslate2 if is_ctranslate2(path) else read_model_files
    # a file that only one process cannot read ends all processes, instead of leaving the others waiting
    files = on_all_processes(lambda: read(path))
    info, folder = files.task_info, data_folder(data_dir)
    module = _own_module(info, task) if task_module is None else task_module
    found = on_all_processes(lambda: find_task(task, data_dir=folder, task_module=module))
    if isinstance(found, PreparedDataset):
        _check_held_out(info, found, split)
        trained_on = info.provenance.get("dataset") if info and info.task == found.name else None
        if trained_on not in (None, found.fingerprint):
            text = (
                f"warning: {found.name} was prepared again from other rows after this model was trained, so it"
                f" may have been trained on rows that are in {split} now; train again to be sure"
            )
            on_process_0(lambda: log(text))
        result = _evaluate_dataset(path, found, split, chosen, with_rationale)
    elif not isinstance(found, TaskSpec) and is_mixture(found):
        names = label_tasks(found, *_objectives_of(info))
        rows_of_files = with_rationale or chosen.choices == ROW
        on_all_processes(
            lambda: _check_each(found.name, names, split, rows_of_files, folder, module)
        )
        where = {"data_dir": data_dir, "task_module": module, "with_rationale": with_rationale}
        each = {name: evaluate(path, task=name, split=split, **where, **options) for name in names}
        rows = sum(of_task["rows"] for of_task in each.values())
        result = each[names[0]] if len(names) == 1 else {"rows": rows, "tasks": each}
    elif with_rationale:
        raise InputError(
            f"`with_rationale`: {task} is a SeqIO task, whose rationales cannot be evaluated; leave this"
            " option out, or prepare the rows as a dataset (stepdistill prepare jsonl)"
        )
    else:
        data = on_all_processes(
            lambda: load_task(
                task,
                split=split,
                objectives=info.objectives[:1] if info else label_only(),
                vocabulary=files.vocabulary.source,
                data_dir=folder,
                task_module=module,
            )
        )
        data.check_ids(files.vocab_size)
        (part,) = data.parts
        result = _evaluate_part(path, part, split, chosen)
    # `task` and `split` come first; a mixture of one task keeps the name that the caller gave
    result = {"task": task, "split": split} | result | {"task": task}
    if output is not None:
        on_process_0(lambda: write_json(output, result))
    return result


def _check_held_out(info: TaskInfo | None, dataset: PreparedDataset, split: str) -> None:
    """Raises InputError if `split` is a validation split with rows on which the model was trained."""
    # with `paper_exact`, a run with a `data_fraction` below 1 draws another validation split
    config = info.provenance.get("config") if info and info.task == dataset.name else None
    share = config.get("data_fraction") if isinstance(config, dict) else None
    if split in dataset.drawn[1:] and share not in (None, 1.0):
        raise InputError(
            f"`split`: the model was trained on {share} of {dataset.name} with a different validation"
            " split, so it has seen some of these validation rows; evaluate the test split"
        )


def _check_each(
    mixture: str,
    names: Sequence[str],
    split: str,
    rows_of_files: bool,
    data_dir: pathlib.Path,
    task_module: str | None,
) -> None:
    """Checks, before any decoding, that each task of a mixture can be evaluated."""
    for name in names:
        found = find_task(name, data_dir=data_dir, task_module=task_module)
        splits = found.source.splits if isinstance(found, TaskSpec) else found.splits
        if split not in splits:
            raise InputError(
                f"mixture {mixture!r}: {name} has no split {split!r} (it has {', '.join(splits)});"
                " evaluate the other tasks one by one"
            )
        if rows_of_files and not isinstance(found, PreparedDataset):
            raise InputError(
                f"mixture {mixture!r}: `with_rationale` and `choices=row` read the rows of prepared"
                f" datasets, but {name} is a SeqIO task; evaluate the other tasks one by one"
            )


def _objectives_of(info: TaskInfo | None) -> tuple[list[str], TaskObjectives]:
    """Returns the names of the model's objectives, and the run's `task_objectives` (None if unknown)."""
    if info is None:
        return ["label"], None
    config = info.provenance.get("config")
    given = config.get("task_objectives") if isinstance(config, dict) else None
    return [o.name for o in info.objectives], given


def _own_module(info: TaskInfo | None, task: str) -> str | None:
    """Returns the module that registered `task` when the model was trained on it.

    Returns None if the model was trained on a different task, or if the module is unknown.
    """
    if info is None or info.task != task:
        return None
    config = info.provenance.get("config")
    module = config.get("task_module") if isinstance(config, dict) else None
    return module if isinstance(module, str) else None


def _evaluate_dataset(
    path: os.PathLike | str,
    dataset: PreparedDataset,
    split: str,
    options: DecodeOptions,
    with_rationale: bool,
) -> dict[str, Any]:
    """Returns the result for a prepared dataset. If `path` is a workdir, saves the answers there."""
    source = on_all_processes(lambda: dataset.file(split))
    found = on_process_0(lambda: resolve_step(path, options.step) if is_workdir(path) else None)
    name = answers_name(dataset.name, split, found, options, with_rationale)
    with tempfile.TemporaryDirectory() as scratch:
        kept = None if found is None else as_path(path) / PREDICTIONS
        remote = kept is not None and is_remote(kept)
        folder = pathlib.Path(scratch) if kept is None or remote else kept
        answers = folder / f"{name}.jsonl"
        chosen = options if found is None else dataclasses.replace(options, step=found)
        try:
            result = predict(
                path,
                source,
                answers,
                task=dataset.name,
                with_rationale=with_rationale,
                # not `data_dir`: a module may have registered the dataset from another folder
                data_dir=dataset.directory.parent,
                **vars(chosen),
            )
        except KeyboardInterrupt:
            if folder != kept:  # the scratch folder goes, with the rows that it kept
                raise KeyboardInterrupt from None
            raise
        if with_rationale:
            # a model that writes both in one answer has no separate count
            unfinished = result.pop("unfinished_rationales", result["unfinished"])
            figures = on_process_0(lambda: _rationale_figures(dataset, split, answers))
            result["rationale"] = figures | {"unfinished": unfinished}
        if kept is not None and remote:
            on_process_0(lambda: upload(folder, kept))
    return _told(found, options) | result


def _evaluate_part(
    path: os.PathLike | str, part: Part, split: str, options: DecodeOptions
) -> dict[str, Any]:
    """Returns the result for a SeqIO task. If `path` is a workdir, saves the answers there."""
    found = on_process_0(lambda: resolve_step(path, options.step) if is_workdir(path) else None)
    if found is not None:
        options = dataclasses.replace(options, step=found)
    metrics = on_all_processes(lambda: TaskMetrics.of(part, split))
    inputs, labels = part.labelled_inputs()
    name = answers_name(part.name, split, found, options)

    def keep(answers: list[dict[str, Any]]) -> None:
        if found is not None:
            on_process_0(lambda: write_answers(path, name, answers))

    allowed = part.labels
    return evaluate_tokens(path, inputs, labels, part.metric, allowed, options, metrics, keep)


def _told(step: int | None, options: DecodeOptions) -> dict[str, Any]:
    """Returns the part of a result that names the step and the search options."""
    return {
        "step": step,
        "num_beams": options.num_beams,
        "length_penalty": options.length_penalty,
    }


def _rationale_figures(
    dataset: PreparedDataset, split: str, answers: pathlib.Path
) -> dict[str, Any]:
    counts = RationaleCounts(dataset.metric, dataset.labels)
    rows = (row for _, row in read_jsonl(answers))
    for example, row in zip(dataset.examples(split), rows, strict=True):
        counts.add(example, row["label"], row.get(RATIONALE, ""))
    return counts.summary()


def evaluate_tokens(
    path: os.PathLike | str,
    inputs: Sequence[Sequence[int]],
    labels: Sequence[str],
    metric: str,
    allowed: Sequence[str] = (),
    options: DecodeOptions | None = None,
    task_metrics: TaskMetrics | None = None,
    keep: Callable[[list[dict[str, Any]]], None] = lambda _: None,
) -> dict[str, Any]:
    """Decodes the labels of the tokenised inputs of a SeqIO task, and compares them with the gold labels.

    Args:
        path: workdir or model directory.
        inputs: ids of each input, with its end of sequence.
        labels: the gold labels.
        allowed: the task's labels if they are a closed set; else empty.
        keep: called with one dict for each input, before the task's metrics are computed. A dict has the fields
            that `predict` writes (`id` is the 1-based index), and the gold label as `target`. If a metric reads
            target scores, `target_score` is the natural log of the target's probability.

    Returns:
        The keys that `predict` returns, and `step`, `num_beams` and `length_penalty`.
        `metrics`: {name: value}, with None for NaN or infinity; present only if the task has its own metrics.

    Raises:
        InputError: the model or step does not exist, an option is bad, `choices` is `row`, or a metric fails.
    """
    options = options or DecodeOptions()
    if options.choices == ROW:
        raise InputError(
            "`choices=row`: rows of a SeqIO task have no field 'choices'; pass a file of labels instead"
        )
    model = open_engine(path, options)
    prompting = dataclasses.replace(prompting_for(model, options), labels=tuple(allowed))
    chooser = on_all_processes(lambda: allow(options, prompting, model))
    cut = [truncate(ids, prompting.input_length) for ids in inputs]
    require_same([prompting.input_length, cut], "data")
    start = time.perf_counter()
    rows = [Example(str(i), "", label) for i, label in enumerate(labels, 1)]
    targets = None
    if task_metrics is not None and task_metrics.reads_target_scores:
        targets = task_metrics.targets
    with until_stopped(len(inputs) + len(targets or ()), "evaluate") as update:
        found = label_rows(model, prompting, chooser, rows, cut, update)
        target_scores = None
        if targets is not None:
            target_scores = score_targets(model.score, cut, targets, update)
    seconds = time.perf_counter() - start
    accuracy = AccuracyCounts(metric, allowed, options.choices_temperature)
    for label, answer in zip(labels, found.answers, strict=True):
        accuracy.add(answer["label"], label, (), answer.get("choices"))
    keep(_kept(rows, found, target_scores))
    own = {}
    if task_metrics is not None:
        own = task_metrics.compute(found.ids, found.scores, target_scores)
        own = {"metrics": {n: v if math.isfinite(v) else None for n, v in own.items()}}
    return {
        **_told(model.step, options),
        **accuracy.summary(),
        **own,
        **({"reads": list(prompting.reads)} if prompting.reads else {}),
        **({"unparsed": found.unparsed} if prompting.objectives[0].writes_more else {}),
        "unfinished": found.unfinished,
        "cut_inputs": sum(len(ids) > prompting.input_length for ids in inputs),
        "skipped": 0,
        "rows_per_second": round(len(inputs) / seconds, 3) if len(inputs) else 0.0,
    }


def _kept(
    rows: Sequence[Example], found: Labels, target_scores: np.ndarray | None
) -> list[dict[str, Any]]:
    kept = [
        {"id": row.id, **answer, "target": row.label}
        for row, answer in zip(rows, found.answers, strict=True)
    ]
    if target_scores is not None:
        for row, score in zip(kept, target_scores, strict=True):
            row["target_score"] = round(float(score), 6) + 0.0
    return kept
