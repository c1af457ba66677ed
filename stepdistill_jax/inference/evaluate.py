"""Accuracy on a split of a prepared dataset; no TensorFlow, since it reads SPLIT.jsonl.

`evaluate_task.evaluate` takes the tasks that only SeqIO can read, too.
"""

import dataclasses
import os
import pathlib
import tempfile
import time
from collections.abc import Sequence
from typing import Any

from stepdistill_jax.data.example import Example
from stepdistill_jax.data.prepared import PreparedDataset, open_prepared
from stepdistill_jax.decoding.beam import search
from stepdistill_jax.errors import InputError
from stepdistill_jax.inference.allowed import ROW, allow, check_choices, choose
from stepdistill_jax.inference.counts import Tally
from stepdistill_jax.inference.engines import open_engine
from stepdistill_jax.inference.predict import predict
from stepdistill_jax.inference.prompting import RATIONALE, cut_ids, how_to_ask, read_answer
from stepdistill_jax.inference.rationale_quality import RationaleTally
from stepdistill_jax.models.sharding import Layout
from stepdistill_jax.runtime.checkpoints.manager import is_workdir, resolve_step
from stepdistill_jax.runtime.files import (
    as_path,
    is_remote,
    local_path,
    read_jsonl,
    upload,
    write_json,
)
from stepdistill_jax.runtime.on_processes import everywhere, on_first, require_same, until_stopped
from stepdistill_jax.runtime.overwriting import Made, check_outputs

PREDICTIONS = "predictions"
RESULT = Made("evaluate", b'{\n  "task": "', ("task", "split", "rows"))
WITH_RATIONALE = "-rationale"  # predictions/TASK-SPLIT-STEP-rationale.jsonl


def check_result(output: os.PathLike | str, choices: Any = None) -> None:
    """Refuses, before the work, a file for the result that must not be written (`check_outputs`)."""
    inputs = [choices] if isinstance(choices, os.PathLike | str) else []
    check_outputs({local_path(output, "--output"): RESULT}, inputs, "--output")


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
) -> dict[str, Any]:
    """Decodes the labels of a split and compares them.

    For a workdir the answers are kept in `predictions/TASK-SPLIT-STEP.jsonl`, those of beams in
    `predictions/TASK-SPLIT-STEP-beamsN.jsonl` (`-beamsN-penaltyX` where one is given), those of
    choices in `-choices.jsonl`, those of int8 weights in `-int8.jsonl`, those with rationales in
    `-rationale.jsonl`.

    Args:
        path: workdir or model directory.
        task: a prepared dataset; it also says how labels are compared.
        split: of the dataset.
        step: of a workdir: `best`, `last` or a number.
        output: JSON file for the result; None writes none.
        data_dir: where the dataset is prepared.
        batch_size, layout, num_beams, length_penalty, choices, choices_temperature, engine, quantization: as for
            `predict`.
        with_rationale: also decodes the rationales, and says what they are worth.

    Returns:
        What `predict` returns, and `task`, `split`, `step`, `num_beams`, `length_penalty`; with
        rationales also `rationale`, that is what `RationaleTally.summary` has and `unfinished` (those
        that reached their greatest length without an end).

    Raises:
        InputError: no such model, step, dataset or split, a bad option, or rationales of a model
            that was not trained to give them.
    """
    search(num_beams, length_penalty)  # a bad value is said before anything is read
    check_choices(choices, choices_temperature, num_beams)
    dataset = everywhere(lambda: open_prepared(task, data_dir))
    source = everywhere(lambda: dataset.file(split))
    if output is not None:
        on_first(lambda: check_result(output, choices))
    found = on_first(lambda: resolve_step(path, step) if is_workdir(path) else None)
    beams = "" if num_beams == 1 else f"-beams{num_beams}"
    penalty = "" if length_penalty is None else f"-penalty{length_penalty}"
    chosen = "" if choices is None else "-choices"
    rounded = "" if quantization is None else f"-{quantization}"
    explained = WITH_RATIONALE if with_rationale else ""
    with tempfile.TemporaryDirectory() as scratch:
        kept = None if found is None else as_path(path) / PREDICTIONS
        remote = kept is not None and is_remote(kept)
        folder = pathlib.Path(scratch) if kept is None or remote else kept
        answers = (
            folder / f"{task}-{split}-{found}{beams}{penalty}{chosen}{rounded}{explained}.jsonl"
        )
        result = predict(
            path,
            source,
            answers,
            task=task,
            step=step if found is None else found,
            batch_size=batch_size,
            layout=layout,
            num_beams=num_beams,
            length_penalty=length_penalty,
            choices=choices,
            choices_temperature=choices_temperature,
            with_rationale=with_rationale,
            engine=engine,
            quantization=quantization,
            data_dir=data_dir,
        )
        if with_rationale:
            unfinished = result.pop("unfinished_rationales", result["unfinished"])  # one answer
            figures = on_first(lambda: _rationale_figures(dataset, split, answers))
            result["rationale"] = figures | {"unfinished": unfinished}
        if kept is not None and remote:
            on_first(lambda: upload(folder, kept))
    told = {"num_beams": num_beams, "length_penalty": length_penalty}
    result = {"task": task, "split": split, "step": found, **told} | result
    if output is not None:
        on_first(lambda: write_json(output, result))
    return result


def _rationale_figures(
    dataset: PreparedDataset, split: str, answers: pathlib.Path
) -> dict[str, Any]:
    tally = RationaleTally(dataset.metric, dataset.labels)
    rows = (row for _, row in read_jsonl(answers))
    for example, row in zip(dataset.examples(split), rows, strict=True):
        tally.add(example, row["label"], row.get(RATIONALE, ""))
    return tally.summary()


def evaluate_tokens(
    path: os.PathLike | str,
    inputs: Sequence[Sequence[int]],
    labels: Sequence[str],
    *,
    metric: str,
    allowed: Sequence[str] = (),
    step: str | int = "best",
    batch_size: int | None = None,
    layout: str | Layout = "data",
    num_beams: int = 1,
    length_penalty: float | None = None,
    choices: os.PathLike | str | Sequence[str] | None = None,
    choices_temperature: float = 1.0,
    engine: str | None = None,
    quantization: str | None = None,
) -> dict[str, Any]:
    """Decodes inputs that are ids already (a user's own SeqIO task), and compares.

    Args:
        path: workdir or model directory.
        inputs: ids of each row with its end of sequence; longer ones than in training are cut.
        labels: the gold answer of each.
        metric: how they are compared.
        allowed: the possible labels, where they are few.
        step: of a workdir: `best`, `last` or a number.
        batch_size, layout, num_beams, length_penalty, choices, choices_temperature, engine, quantization: as for
            `predict`; `labels` are `allowed`, and rows have no choices of their own.

    Returns:
        What `predict` returns, and `step`, `num_beams`, `length_penalty`.

    Raises:
        InputError: no such model or step, or a bad option.
    """
    check_choices(choices, choices_temperature, num_beams)
    if choices == ROW:
        raise InputError(
            "--choices row: rows of a SeqIO task have no field `choices`; give a file of labels"
        )
    model = open_engine(
        path,
        engine,
        step=step,
        batch_size=batch_size,
        layout=layout,
        num_beams=num_beams,
        length_penalty=length_penalty,
        quantization=quantization,
    )
    asking = dataclasses.replace(how_to_ask(model), labels=tuple(allowed))
    chooser = None
    if choices is not None:
        chooser = everywhere(lambda: allow(choices, asking, model, choices_temperature))
    tally, cut = (
        Tally(metric, allowed, choices_temperature),
        [cut_ids(ids, asking.input_length) for ids in inputs],
    )
    require_same([asking.input_length, cut], "data")
    start = time.perf_counter()
    rows = [Example(str(i), "", label) for i, label in enumerate(labels, 1)]
    unfinished = 0
    told: dict[str, Any] = {"reads": list(asking.reads)} if asking.reads else {}
    answers: list[dict[str, Any]]
    with until_stopped(len(inputs), "evaluate") as update:
        if chooser:
            answers = choose(model, cut, rows, chooser, update)
        else:
            decoded = model.decode(cut, asking.decode_lengths[0], update)
            read = [
                read_answer(asking.objectives[0], model.vocabulary.decode(ids))
                for ids in decoded.ids
            ]
            answers = [answer for answer, _ in read]
            if asking.objectives[0].writes_more:
                told["unparsed"] = sum(not parsed for _, parsed in read)
            unfinished = int((~decoded.finished).sum())
    seconds = time.perf_counter() - start
    for row, answer in zip(rows, answers, strict=True):
        tally.add(row, answer["label"], answer.get("choices"))
    return {
        "step": model.step,
        "num_beams": num_beams,
        "length_penalty": length_penalty,
        **tally.summary(),
        **told,
        "unfinished": unfinished,
        "cut_inputs": sum(len(ids) > asking.input_length for ids in inputs),
        "skipped": 0,
        "rows_per_second": round(len(inputs) / seconds, 3) if len(inputs) else 0.0,
    }
