"""What a step of a config works on: the model and the shapes of its rows, read or assumed."""

import dataclasses
import functools
import os
from collections.abc import Callable

from stepdistill_jax.batches.batch import filled_rows
from stepdistill_jax.batches.packing import round_up
from stepdistill_jax.data.objectives import resolve, share_encoding
from stepdistill_jax.data.prepared import data_folder, prepared_names
from stepdistill_jax.formats.directory import read_config
from stepdistill_jax.models.config import ModelConfig
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


Groups = tuple[tuple[int, int, int], ...]  # (rows, input length, target length) of each


@dataclasses.dataclass(frozen=True)
class StepRows:
    """Rows of a step for one row multiple (batch shards x microbatches).

    Attributes:
        groups: (rows, input length, target length) of each group, rows rounded up to the multiple.
        filled: rows of all groups that hold tokens; the others are computed all the same.
    """

    groups: Groups
    filled: int

    @property
    def rows(self) -> int:
        """Of all groups, empty ones included."""
        return sum(rows for rows, *_ in self.groups)


@dataclasses.dataclass(frozen=True)
class Workload:
    """Shapes of a step.

    Attributes:
        model: the configuration that `train` would build.
        rows_of: row multiple -> rows, as a run with that multiple packs them.
        assumptions: sentences; empty where everything was read.
    """

    model: ModelConfig
    rows_of: Callable[[int], StepRows]
    assumptions: tuple[str, ...]

    def step_flops(self, multiple: int) -> float:
        """FLOPs of a step, empty rows included; with a multiple of 1 what the tokens need."""
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
    """Model and rows of a config; a prepared dataset is looked at, none is needed.

    Args:
        config: of the run.
        rows: packed rows of a step, as `stepdistill inspect` shows them; None is the most of the
            first 32 steps on the prepared dataset or, without one, a row for each example.
        data_dir: of prepared datasets; None is the default one.

    Raises:
        InputError: an `init_from` that is there and cannot be read, an unknown family or size.
    """
    assumptions: list[str] = []
    data = prepared(config, data_dir)
    model = model_of(config, data, assumptions)
    if data is not None and rows is None:
        return Workload(model, functools.cache(_reader(config, data, model)), tuple(assumptions))
    given = (config.row_input_length, config.row_target_length)
    cuts = (config.input_length, config.target_length)
    if config.pairs:  # a row holds all that an example reads and writes
        objectives = resolve(config.objectives)
        inputs_each = 1 if config.pack and share_encoding(objectives) else len(objectives)
        cuts = (inputs_each * cuts[0], len(objectives) * cuts[1])
    if not config.pack:
        given = (AUTO, AUTO)
    inputs, targets = (c if g == AUTO else int(g) for g, c in zip(given, cuts, strict=True))
    if rows is not None:
        if data is not None and config.pack:  # rows are counted by `inspect`, of these lengths
            inputs, targets = in_cheapest_rows(config, batches_of(config, data), model).row_lengths
        groups = ((rows, inputs, targets),)
    else:
        count = 1 if config.pack or config.pairs else len(config.objectives)
        groups = ((config.batch_size, inputs, targets),) * count
        assumptions.append(
            f"dataset {config.task!r} is not prepared here: "
            + (
                "one packed row for each example of a step (short rows pack into fewer: `rows`)"
                if config.pack
                else "rows as long as `input_length` and `target_length`"
                + (", of all objectives together" if config.pairs else "")
            )
        )

    def rounded(multiple: int) -> StepRows:
        padded = tuple((round_up(rows, multiple), i, t) for rows, i, t in groups)
        return StepRows(padded, sum(rows for rows, *_ in groups))

    return Workload(model, rounded, tuple(assumptions))


def _reader(config: TrainConfig, data: TaskData, model: ModelConfig) -> Callable[[int], StepRows]:
    """Returns the rows of a run on the data, as it would choose and round them."""

    def rows_of(multiple: int) -> StepRows:
        batches = batches_of(config, data, row_multiple=multiple)
        batches = in_cheapest_rows(config, batches, model)
        # the largest of the shapes that `train` compiles is for a batch that all but never comes
        taken = [batches(step) for step in range(STEPS_LOOKED_AT)]
        groups = tuple(
            (max(len(batch[i]["encoder_segment_ids"]) for batch in taken), *pair)
            for i, pair in enumerate(batches.lengths)
        )
        return StepRows(groups, max(filled_rows(batch) for batch in taken))

    return rows_of


def prepared(config: TrainConfig, data_dir: os.PathLike | str | None) -> TaskData | None:
    """The train tokens of a prepared dataset, with its own vocabulary where `init_from` is not at hand."""
    data_dir = data_folder(data_dir)
    if config.task not in prepared_names(data_dir):
        return None
    if config.init_from is not None and not os.path.isdir(config.init_from):
        config = dataclasses.replace(config, init_from=None, init_rules=None)
    config = dataclasses.replace(config, task_module=None)  # where the job runs, and maybe not here
    return load_split(config, TRAIN, vocabulary=vocabulary_of(config), data_dir=data_dir)


def model_of(config: TrainConfig, data: TaskData | None, assumptions: list[str]) -> ModelConfig:
    """Returns the configuration that `train` would build, and adds what it assumes to `assumptions`."""
    if config.init_from is not None and os.path.isdir(config.init_from):
        return dataclasses.replace(read_config(config.init_from), **model_settings(config))
    if config.init_from is None and data is not None:
        return new_model(config, data)
    model = new_model(config, None)
    missing = (
        f"dataset {config.task!r} is not prepared here"
        if config.init_from is None
        else f"`init_from` {config.init_from} is not here: {config.model_family} {config.model_size}"
    )
    assumptions.append(f"{missing}, with the published vocabulary of {model.vocab_size}")
    return model
