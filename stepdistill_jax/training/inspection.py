"""What a model will see of a task: rows, lengths, fill, what is cut, and lengths that fit better."""

import dataclasses
import math
import os
from collections.abc import Iterator
from typing import Any

import numpy as np

from stepdistill_jax.objectives import Objective
from stepdistill_jax.tasks.load import TaskData, load_task
from stepdistill_jax.training.batches import Batches, Group
from stepdistill_jax.training.config import TrainConfig
from stepdistill_jax.training.packing import round_up

MEASURED_STEPS = 12
HISTOGRAM_BINS = 10
FEW_ROWS = 4  # a step of fewer packed rows can not be shared out over devices
GOOD_ENOUGH = 0.02  # of fill, that shorter rows may cost


def inspect(
    config: TrainConfig | str,
    *,
    split: str = "train",
    rows: int = 2,
    data_dir: os.PathLike | str | None = None,
    task_module: str | None = None,
) -> dict[str, Any]:
    """Looks at a split as training with `config` would; nothing is trained.

    Args:
        config: a run's config, or the name of a task (with the default lengths).
        split: which split.
        rows: packed rows of step 0 to show (unpacked: rows of each objective).
        data_dir: None is the default one.
        task_module: goes before the config's.

    Returns:
        `task`, `split`, `examples`, `batch_size`, `pack`, `input_length`, `target_length`,
        `vocabulary_size`;
        `objectives`: {name: {"weight", "rows", "absent", "inputs", "targets"}}, the last two with
            "min", "mean", "median", "p99", "max" (tokens, uncut) and "histogram" (list of
            {"from", "to", "rows"});
        `cut`: {name: {"inputs", "targets"}} rows that are longer than the lengths;
        `fill`: {"inputs", "targets", "all"} share of cells that hold a token;
        `rows_per_step`, `row_counts`: packed rows;
        `shown`: list of rows, each a list of {"objective", "input", "target", "input_tokens",
            "target_tokens", "weight"};
        `candidates`: packed lengths with what they would give, and `proposed`, one of them.

    Raises:
        InputError: unknown task or split.
    """
    if isinstance(config, str):
        config = TrainConfig(task=config, task_module=task_module)
    data = load_task(
        config.task,
        split=split,
        objectives=config.objectives,
        vocabulary=_vocabulary_of(config),
        data_dir=data_dir,
        task_module=task_module or config.task_module,
        supervision=config.supervision if split == "train" else None,
    )
    batches = Batches(
        data,
        config.batch_size,
        config.input_length,
        config.target_length,
        seed=config.seed,
        pack=config.pack,
        data_fraction=config.data_fraction if split == "train" else 1.0,
    )
    measured = _measure(batches)
    candidates = [_candidate(batches, *pair) for pair in _candidate_lengths(data)]
    return {
        "task": data.name,
        "split": split,
        "examples": batches.num_examples,
        "batch_size": config.batch_size,
        "pack": config.pack,
        "input_length": config.input_length,
        "target_length": config.target_length,
        "vocabulary_size": data.vocab_size,
        "objectives": {
            objective.name: _objective_figures(data, number, objective)
            for number, objective in enumerate(data.objectives)
        },
        "cut": batches.cut_counts(),
        **measured,
        "row_counts": list(batches.row_counts) if config.pack else [],
        "shown": list(_shown(batches, rows)),
        "candidates": candidates,
        "proposed": _choose(candidates),
    }


def _vocabulary_of(config: TrainConfig) -> str | None:
    """The vocabulary that INIT_FROM brings; None is the task's own."""
    if config.init_from is None:
        return None
    from stepdistill_jax.formats.directory import read_model_files

    return read_model_files(config.init_from).vocabulary.source


def _lengths(data: TaskData, objective: int, feature: str) -> np.ndarray:
    """[rows] uncut tokens of the rows that have a target; `objective` counts from 0."""
    return np.concatenate(
        [
            rows[feature].lengths[rows["targets"].lengths > 0]
            for store in data.stores
            for column, rows in zip(data.columns, store.rows, strict=True)
            if column.objective == objective + 1
        ]
    )


def _objective_figures(data: TaskData, number: int, objective: Objective) -> dict[str, Any]:
    inputs, targets = (_lengths(data, number, feature) for feature in ("inputs", "targets"))
    first = next(i for i, c in enumerate(data.columns) if c.objective == number + 1)
    return {
        "weight": objective.weight,
        "rows": len(inputs),
        "absent": sum(int((s.rows[first]["targets"].lengths == 0).sum()) for s in data.stores),
        "inputs": _length_figures(inputs),
        "targets": _length_figures(targets),
    }


def _length_figures(lengths: np.ndarray) -> dict[str, Any]:
    if not len(lengths):
        return {"min": 0, "mean": 0.0, "median": 0, "p99": 0, "max": 0, "histogram": []}
    low, high = int(lengths.min()), int(lengths.max())
    width = math.ceil((high - low + 1) / HISTOGRAM_BINS)
    starts = range(low, high + 1, width)
    counts = np.bincount((lengths - low) // width, minlength=len(starts))
    return {
        "min": low,
        "mean": round(float(lengths.mean()), 2),
        "median": int(np.median(lengths)),
        "p99": int(np.percentile(lengths, 99, method="higher")),
        "max": high,
        "histogram": [
            {"from": start, "to": min(start + width - 1, high), "rows": int(count)}
            for start, count in zip(starts, counts, strict=True)
        ],
    }


def _measure(batches: Batches) -> dict[str, Any]:
    """Fill and packed rows over the first steps."""
    tokens, cells, rows = np.zeros(2), np.zeros(2), 0
    for step in range(MEASURED_STEPS):
        for group in batches(step):
            for side, name in enumerate(("encoder_segment_ids", "decoder_segment_ids")):
                tokens[side] += np.count_nonzero(group[name])
                cells[side] += group[name].size
            rows += len(group["encoder_segment_ids"])
    inputs, targets = (tokens / cells).round(4).tolist()
    return {
        "fill": {
            "inputs": inputs,
            "targets": targets,
            "all": round(float(tokens.sum() / cells.sum()), 4),
        },
        "rows_per_step": round(rows / MEASURED_STEPS, 2),
    }


def _shown(batches: Batches, rows: int) -> Iterator[list[dict[str, Any]]]:
    for group in batches(0):
        for row in range(min(rows, len(group["encoder_segment_ids"]))):
            if group["encoder_segment_ids"][row].any():
                yield list(_segments(batches.data, group, row))


def _segments(data: TaskData, group: Group, row: int) -> Iterator[dict[str, Any]]:
    """The examples of one packed row, as text."""
    for segment in range(1, int(group["encoder_segment_ids"][row].max()) + 1):
        source = group["encoder_segment_ids"][row] == segment
        target = group["decoder_segment_ids"][row] == segment
        inputs = group["encoder_input_tokens"][row][source].tolist()
        targets = group["decoder_target_tokens"][row][target].tolist()
        objective = int(group["decoder_objective_ids"][row][target][0])
        yield {
            "objective": data.objectives[objective - 1].name,
            "input": data.vocabulary.decode(inputs),
            "target": data.vocabulary.decode(targets),
            "input_tokens": len(inputs),
            "target_tokens": len(targets),
            "weight": float(group["decoder_loss_weights"][row][target][0]),
        }


def _candidate_lengths(data: TaskData) -> list[tuple[int, int]]:
    """Packed lengths worth a try: room for 1 to 8 of the longest inputs, targets in proportion.

    The longest is the 99.9th percentile, so that one stray row does not set the length of all.
    """
    every = range(len(data.objectives))
    inputs, targets = (
        np.concatenate([_lengths(data, o, feature) for o in every])
        for feature in ("inputs", "targets")
    )
    longest_input, longest_target = (
        float(np.percentile(lengths, 99.9, method="higher")) for lengths in (inputs, targets)
    )
    proportion = targets.sum() / inputs.sum()
    found = []
    for fold in (1, 1.5, 2, 3, 4, 6, 8):
        input_length = round_up(longest_input * fold, 8)
        for slack in (1.0, 1.1, 1.25):
            target_length = max(longest_target, input_length * proportion * slack)
            found.append((input_length, round_up(target_length, 8)))
    return sorted(set(found))


def _candidate(batches: Batches, input_length: int, target_length: int) -> dict[str, Any]:
    """What packing to these lengths would give."""
    other = dataclasses.replace(
        batches, input_length=input_length, target_length=target_length, pack=True
    )
    cut = other.cut_counts().values()
    return {
        "input_length": input_length,
        "target_length": target_length,
        **_measure(other),
        "cut_inputs": sum(c["inputs"] for c in cut),
        "cut_targets": sum(c["targets"] for c in cut),
    }


def _choose(candidates: list[dict[str, Any]]) -> dict[str, Any]:
    """The shortest rows whose fill is within 0.02 of the best, of those with rows to share out."""
    several = [c for c in candidates if c["rows_per_step"] >= FEW_ROWS] or candidates[:1]
    best = max(c["fill"]["all"] for c in several)
    return next(c for c in several if c["fill"]["all"] >= best - GOOD_ENOUGH)
