"""Finds the model that a config would train, and the number and lengths of the rows in a step.

If the dataset is not prepared, unknown sizes are assumed. `Workload.assumptions` lists the assumptions.
"""

import dataclasses
import functools
import os
from collections.abc import Callable

from stepdistill_jax.batches.batch import filled_rows
from stepdistill_jax.batches.packing import round_up
from stepdistill_jax.data.objectives import resolve, share_encoding
from stepdistill_jax.data.prepared import data_folder, prepared_names
from stepdistill_jax.errors import InputError, nearest
from stepdistill_jax.formats.directory import read_config
from stepdistill_jax.models.config import ModelConfig
from stepdistill_jax.models.families import PUBLISHED, published_model
from stepdistill_jax.models.flops import train_flops
from stepdistill_jax.tasks.task_data import TaskData
from stepdistill_jax.training.config import AUTO, TrainConfig
from stepdistill_jax.training.data import (
    TRAIN,
    batches_of,
    in_cheapest_rows,
    load_split,
    vocabulary_of,
)
from stepdistill_jax.training.run import model_settings, new_model

STEPS_LOOKED_AT = 32
Groups = tuple[tuple[int, int, int], ...]  # (rows, input length, target length) of each group


@dataclasses.dataclass(frozen=True)
class StepRows:
    """The number and lengths of the rows of a step.

    Attributes:
        groups: (row count, input length, target length) of each group of the batch (see `Batches.pack`). Row counts
            are rounded up to a multiple of `Batches.row_multiple`.
        filled: number of rows that contain tokens. The other rows are padding.
    """

    groups: Groups
    filled: int

    @property
    def rows(self) -> int:
        """Number of rows of all groups, including rows of padding."""
        return sum(rows for rows, *_ in self.groups)


@dataclasses.dataclass(frozen=True)
class Workload:
    """The model that a config would train, and the rows that a step would process.

    Attributes:
        rows_of: function that takes `Batches.row_multiple` and returns the rows of a step.
        assumptions: sentences about sizes that were assumed, for instance because the dataset is not prepared.
        counted: how the rows were counted, and with which vocabulary; "" if their number was given or assumed.
    """

    model: ModelConfig
    rows_of: Callable[[int], StepRows]
    assumptions: tuple[str, ...]
    counted: str = ""

    def step_flops(self, multiple: int) -> float:
        """Returns the FLOPs of a step. Rows of padding count, too.

        Row counts are rounded up to multiples of `multiple`, so a larger `multiple` can add rows of padding.
        """
        return sum(
            train_flops(self.model, rows=rows, input_length=inputs, target_length=targets)
            for rows, inputs, targets in self.rows_of(multiple).groups
        )


def workload(
    config: TrainConfig,
    *,
    rows: int | None = None,
    data_dir: os.PathLike | str | None = None,
) -> Workload:
    """Returns the model that a config would train, and the rows that a step would process.

    Args:
        rows: number of packed rows of a step, as shown by `stepdistill inspect`. None means the
            largest number in the first 32 steps or, if the dataset is not prepared, one row for each example.
        data_dir: folder of prepared datasets; None means the default folder.

    Raises:
        InputError: `init_from` exists but cannot be read, or the family or size of the model is unknown.
    """
    assumptions: list[str] = []
    data = prepared(config, data_dir)
    model = model_of(config, data, assumptions)
    if data is not None and rows is None:
        counted = (
            f"the most in the first {STEPS_LOOKED_AT} steps of {config.task!r}, tokenised with"
            f" {data.vocabulary.source}"
        )
        if config.init_from is not None and not os.path.isdir(config.init_from):
            counted += ", since the vocabulary of `init_from` is not here"
        rows_of = functools.cache(_reader(config, data, model))
        return Workload(model, rows_of, tuple(assumptions), counted)
    given = (config.row_input_length, config.row_target_length)
    cuts = (config.input_length, config.target_length)
    if config.pairs:  # all inputs and targets of an example are in one row
        objectives = resolve(config.objectives)
        inputs_each = 1 if config.pack and share_encoding(objectives) else len(objectives)
        cuts = (inputs_each * cuts[0], len(objectives) * cuts[1])
    if not config.pack:
        given = (AUTO, AUTO)
    inputs, targets = (c if g == AUTO else int(g) for g, c in zip(given, cuts, strict=True))
    if rows is not None:
        if data is not None and config.pack:  # `inspect` counts rows of these lengths
            inputs, targets = in_cheapest_rows(config, batches_of(config, data), model).row_lengths
        groups = ((rows, inputs, targets),)
    else:
        count = 1 if config.pack or config.pairs else len(config.objectives)
        groups = ((config.batch_size, inputs, targets),) * count
        assumptions.append(
            f"dataset {config.task!r} is not prepared here, so a step has "
            + (
                "one packed row for each example; a real step has fewer packed rows, so set `rows` to their number"
                if config.pack
                else "rows of the complete `input_length` and `target_length`"
                + (", summed over all objectives" if config.pairs else "")
            )
        )

    def rounded(multiple: int) -> StepRows:
        padded = tuple((round_up(rows, multiple), i, t) for rows, i, t in groups)
        return StepRows(padded, sum(rows for rows, *_ in groups))

    return Workload(model, rounded, tuple(assumptions))


def _reader(config: TrainConfig, data: TaskData, model: ModelConfig) -> Callable[[int], StepRows]:
    """Returns the function `rows_of` of a `Workload` that trains on `data`."""

    def rows_of(multiple: int) -> StepRows:
        batches = batches_of(config, data, row_multiple=multiple)
        batches = in_cheapest_rows(config, batches, model)
        # Takes the largest row count of real steps, and not the largest shape that `train` may compile, since that
        # is for the worst batch, which hardly ever occurs.
        taken = [batches(step) for step in range(STEPS_LOOKED_AT)]
        groups = tuple(
            (max(len(batch[i]["encoder_segment_ids"]) for batch in taken), *pair)
            for i, pair in enumerate(batches.lengths)
        )
        return StepRows(groups, max(filled_rows(batch) for batch in taken))

    return rows_of


def prepared(config: TrainConfig, data_dir: os.PathLike | str | None) -> TaskData | None:
    """Returns the tokens of the train split, or None if the dataset is not prepared.

    The vocabulary is that of `init_from`, if this is a directory on this machine. Otherwise, ByT5 uses bytes, and
    other models use the dataset's vocabulary.
    """
    data_dir = data_folder(data_dir)
    if config.task not in prepared_names(data_dir):
        return None
    if config.init_from is not None and not os.path.isdir(config.init_from):
        config = dataclasses.replace(config, init_from=None, init_rules=None)
    config = dataclasses.replace(config, task_module=None)  # it may exist only where the job runs
    return load_split(config, TRAIN, vocabulary=vocabulary_of(config), data_dir=data_dir)


def model_of(config: TrainConfig, data: TaskData | None, assumptions: list[str]) -> ModelConfig:
    """Returns the configuration of the model that `train` would build. Appends each assumption to `assumptions`."""
    if config.init_from is not None and os.path.isdir(config.init_from):
        return dataclasses.replace(read_config(config.init_from), **model_settings(config))
    if config.init_from is None and data is not None:
        return new_model(config, data)
    published = published_model(config.init_from or "")
    if (
        config.init_from is not None
        and published is None
        and config.model_size == TrainConfig.model_size
    ):
        raise InputError(
            f"`init_from` {config.init_from}: no such folder here, and not the name of a published model"
            f"{nearest(config.init_from, PUBLISHED)}; to plan another model, set `model_size`"
        )
    if published is not None:
        family, size = published
        config = dataclasses.replace(config, model_family=family, model_size=size)
    model = new_model(config, None)
    missing = (
        f"dataset {config.task!r} is not prepared here, so the plan assumes a model"
        if config.init_from is None
        else f"`init_from` {config.init_from} does not exist here, so the model is assumed to be"
        f" {config.model_family} {config.model_size}" + (" by its name," if published else "")
    )
    assumptions.append(f"{missing} with the published vocabulary of {model.vocab_size} ids")
    return model
