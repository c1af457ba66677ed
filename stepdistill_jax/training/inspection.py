"""Shows the data that a task gives to training: rows, their lengths and truncation, and how full batches are."""

import dataclasses
import itertools
import math
import os
from collections.abc import Iterator
from typing import Any

import numpy as np

from stepdistill_jax.batches.batch import Batches
from stepdistill_jax.batches.packing import DECODER_ENCODER_SEGMENTS, Group
from stepdistill_jax.batches.row_lengths import RowLengths, cheapest
from stepdistill_jax.data import schedules
from stepdistill_jax.data.objectives import Objective
from stepdistill_jax.data.vocabulary import EOS_ID
from stepdistill_jax.formats.directory import read_config
from stepdistill_jax.formats.hub import local_model
from stepdistill_jax.models.config import ModelConfig
from stepdistill_jax.runtime.checks import whole
from stepdistill_jax.tasks.load import has_split
from stepdistill_jax.tasks.task_data import TaskData
from stepdistill_jax.tasks.token_store import verify_store
from stepdistill_jax.training.config import TrainConfig
from stepdistill_jax.training.data import (
    TRAIN,
    batches_of,
    load_split,
    tried_row_lengths,
    vocabulary_of,
    with_row_lengths,
)
from stepdistill_jax.training.run import model_settings, new_model

MEASURED_STEPS = 12
HISTOGRAM_BINS = 10


def inspect(
    config: TrainConfig | str,
    *,
    split: str = "train",
    rows: int = 2,
    data_dir: os.PathLike | str | None = None,
    task_module: str | None = None,
    verify: bool = False,
) -> dict[str, Any]:
    """Measures a split as training with `config` would read it, without training.

    Args:
        config: a run's config, or the name of a task, which is then measured with the default lengths.
        rows: number of rows of the batch of step 0 to show. Without packing, this number is shown for each
            objective.
        data_dir: folder of prepared datasets; None means the default folder.
        task_module: replaces the config's `task_module`.
        verify: whether to compare the split's token files with their manifests, byte for byte.

    Returns:
        `task`, `split`, `examples`, `batch_size`, `pack`, `input_length`, `target_length`, `vocabulary_size`.
        `objectives`: {name: {"weight", "rows", "absent", "inputs", "targets"}}.
            "weight": a number, or a schedule in words.
            "rows", "absent": number of targets, and number of examples without a target.
            "inputs", "targets": lengths in tokens before truncation: "min", "mean", "median", "p99", "max"
                and "histogram" (list of {"from", "to", "rows"}, where "rows" counts targets). Target lengths
                include the decoder prefix.
        `shares`: only for a mixture, the result of `TaskData.shares`.
        `cut`: {name: {"inputs", "targets"}}, the number of truncated inputs and targets.
        `fill`: {"inputs", "targets", "all"}, the share of the batches' positions that contain a token.
        `rows_per_step`: mean number of rows in a step's batch.
        `row_counts`: the numbers of rows that a packed batch can have.
        `shown`: list of rows of step 0, each a list of targets: {"objective", "input", "target", "input_tokens",
            "target_tokens", "weight" (of the last target token)}. The "input" is "" if it is shared with the
            previous target.
        `row_lengths`: [input length, target length] of a packed row; empty if rows are not packed.
        `candidates`: possible lengths of packed rows, each with `flops_per_step` (matmuls only).
        `chosen`: the shortest candidate with at most 1% more FLOPs than the minimum.
        `verified`: only with `verify`, a list of {"store" (folder), "files" (their number), "bytes"}.

    Raises:
        InputError: the task or split is unknown, `rows` is negative, or a store is damaged.
    """
    whole("rows", rows, 0)
    if isinstance(config, str):
        config = TrainConfig(task=config)
    if task_module is not None:
        config = dataclasses.replace(config, task_module=task_module)
    data = load_split(config, split, vocabulary=vocabulary_of(config), data_dir=data_dir)
    verified = {}
    if verify:
        folders = [folder for store in data.stores for folder in store.directories]
        verified["verified"] = [verify_store(folder) for folder in folders]
    batches, candidates, chosen = batches_of(config, data), [], None
    if config.pack:
        train = _train_batches(config, data, batches, data_dir)
        tried = tried_row_lengths(config, train, _model_of(config, data))
        candidates = [_candidate(train, one) for one in tried]
        best = cheapest(tried)
        chosen = candidates[tried.index(best)]
        batches = with_row_lengths(batches, best.lengths)
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
            objective.name: _objective_statistics(data, number, objective)
            for number, objective in enumerate(data.objectives)
        },
        "cut": batches.cut_counts(),
        **({"shares": data.shares()} if data.is_mixed else {}),
        **_measure(batches),
        "row_counts": list(batches.row_counts) if config.pack else [],
        "shown": list(_shown(batches, rows)),
        "row_lengths": list(batches.row_lengths) if config.pack else [],
        "candidates": candidates,
        "chosen": chosen,
        **verified,
    }


def _train_batches(
    config: TrainConfig, data: TaskData, batches: Batches, data_dir: os.PathLike | str | None
) -> Batches:
    """Returns the train split's batches for a single device, from which the row lengths are chosen."""
    where = {"data_dir": data_dir, "task_module": config.task_module}
    if data.split != TRAIN and has_split(config.task, TRAIN, **where):
        vocabulary = data.vocabulary.source
        data = load_split(config, TRAIN, vocabulary=vocabulary, data_dir=data_dir)
        batches = batches_of(config, data)
    return dataclasses.replace(batches, row_multiple=config.num_microbatches)


def _model_of(config: TrainConfig, data: TaskData) -> ModelConfig:
    """Returns the model's configuration, from which the FLOPs of each row length are computed."""
    if config.init_from is None:
        return new_model(config, data)
    found = read_config(local_model(config.init_from))
    return dataclasses.replace(found, **model_settings(config))


def _lengths(data: TaskData, objective: int, feature: str) -> np.ndarray:
    """Returns the length of each row's `inputs` or `targets` (`feature`) before truncation, [rows]."""
    prefix = len(data.decoder_prefixes[objective]) if feature == "targets" else 0
    return np.concatenate(
        [np.zeros(0, np.int64)]
        + [
            rows[feature].lengths[rows["targets"].lengths > 0] + prefix
            for part in data.parts
            for column, rows in zip(part.columns, part.store.rows, strict=True)
            if column.objective == objective + 1
        ]
    )


def _objective_statistics(data: TaskData, number: int, objective: Objective) -> dict[str, Any]:
    inputs, targets = (_lengths(data, number, feature) for feature in ("inputs", "targets"))
    firsts = [
        rows["targets"]
        for part in data.parts
        for column, rows in zip(part.columns, part.store.rows, strict=True)
        if (column.objective, column.variant) == (number + 1, 0)
    ]
    return {
        "weight": schedules.described(objective.weight),
        "rows": len(inputs),
        "absent": sum(int((targets.lengths == 0).sum()) for targets in firsts),
        "inputs": _length_statistics(inputs),
        "targets": _length_statistics(targets),
    }


def _length_statistics(lengths: np.ndarray) -> dict[str, Any]:
    if not len(lengths):
        return {"min": 0, "mean": 0.0, "median": 0, "p99": 0, "max": 0, "histogram": []}
    low, high = int(lengths.min()), int(lengths.max())
    # lengths 12 to 45: 34 values in bins of ceil(34 / 10) = 4, so 9 bins: 12-15, 16-19, ..., 44-45
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
    """Returns `fill` and `rows_per_step` (see `inspect`), measured over the first steps."""
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
    """Yields a dict for each target of one row. `inspect` lists the keys under `shown`."""
    own = group["decoder_segment_ids"][row]
    read = group.get(DECODER_ENCODER_SEGMENTS, group["decoder_segment_ids"])[row]
    before = 0
    for segment in range(1, int(own.max()) + 1):
        target = own == segment
        source = group["encoder_segment_ids"][row] == read[target][0]
        if read[target][0] == before:
            source = np.zeros_like(source)
        before = read[target][0]
        inputs = group["encoder_input_tokens"][row][source].tolist()
        targets = group["decoder_target_tokens"][row][target].tolist()
        # the last token, since the first may belong to a decoder prefix, which has no objective
        objective = int(group["decoder_objective_ids"][row][target][-1])
        yield {
            "objective": data.objectives[objective - 1].name,
            "input": _text(data, inputs),
            "target": data.vocabulary.decode(targets),
            "input_tokens": len(inputs),
            "target_tokens": len(targets),
            "weight": float(group["decoder_loss_weights"][row][target][-1]),
        }


def _text(data: TaskData, ids: list[int]) -> str:
    """Returns an input as text. If it has two texts, the end-of-sequence piece separates them."""
    texts = (list(own) for is_end, own in itertools.groupby(ids, EOS_ID.__eq__) if not is_end)
    decoded = list(map(data.vocabulary.decode, texts))
    return data.vocabulary.pieces()[EOS_ID].join(decoded) if len(decoded) > 1 else "".join(decoded)


def _candidate(batches: Batches, tried: RowLengths) -> dict[str, Any]:
    """Returns a candidate's row lengths and, for a step with these lengths, `fill` (see `inspect`), rows and FLOPs."""
    return {
        "row_input_length": tried.input_length,
        "row_target_length": tried.target_length,
        **_measure(dataclasses.replace(batches, row_lengths=tried.lengths)),
        "flops_per_step": tried.cost,
    }
