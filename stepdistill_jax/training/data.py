"""Loads the splits of a run's task and makes their batches, for training, `inspect` and `plan`."""

import dataclasses
import os
from collections.abc import Iterator, Sequence

import jax
from jax.sharding import Mesh

from stepdistill_jax.batches import row_lengths
from stepdistill_jax.batches.batch import Batch, Batches
from stepdistill_jax.batches.host import HostBatch, iterate
from stepdistill_jax.batches.packing import round_up
from stepdistill_jax.data.objectives import Objective, held_out_objectives, resolve
from stepdistill_jax.data.vocabulary import BYTES
from stepdistill_jax.formats.directory import read_model_files
from stepdistill_jax.formats.hub import local_model
from stepdistill_jax.models.config import ModelConfig
from stepdistill_jax.models.flops import train_flops
from stepdistill_jax.models.sharding import blocks_on, place_rows
from stepdistill_jax.runtime.channel import Channel
from stepdistill_jax.tasks.load import load_task
from stepdistill_jax.tasks.task_data import TaskData
from stepdistill_jax.tasks.token_weights import with_token_weights
from stepdistill_jax.training.config import AUTO, TrainConfig

TRAIN, VALIDATION = "train", "validation"


def vocabulary_of(config: TrainConfig) -> str | None:
    """Returns the vocabulary of `init_from` or of the model family; None means the task's own vocabulary."""
    if config.init_from is not None:
        return read_model_files(local_model(config.init_from)).vocabulary.source
    return BYTES if config.model_family == "byt5" else None


def load_split(
    config: TrainConfig,
    split: str,
    *,
    vocabulary: str | None,
    data_dir: os.PathLike | str | None,
    objectives: Sequence[Objective] | None = None,
) -> TaskData:
    """Returns the tokens of a split as a run of `config` reads them.

    The config's supervision and token weights apply only to the train split. The validation split uses
    `Supervision.held_out()`. Other splits are read without supervision.

    Args:
        vocabulary: path of a `spiece.model`, or `bytes`; None means the task's.
        data_dir: folder of prepared datasets; None means the default.
        objectives: objectives for training; None means the config's.

    Raises:
        InputError: as for `load_task` and `with_token_weights`.
    """
    objectives = objectives or resolve(config.objectives)
    supervision = config.supervision if split == TRAIN else None
    if split == VALIDATION:
        supervision = config.supervision.for_objectives(objectives).held_out()
        objectives = held_out_objectives(objectives)
    where = {"data_dir": data_dir, "task_module": config.task_module}
    data = load_task(
        config.task,
        split=split,
        objectives=objectives,
        vocabulary=vocabulary,
        supervision=supervision,
        task_objectives=config.task_objectives,
        share=(config.data_fraction, config.seed),
        **where,
    )
    if config.token_weights is None or split != TRAIN:
        return data
    weights = config.token_weights
    return with_token_weights(data, weights, supervision=config.supervision, **where)


def tried_row_lengths(
    config: TrainConfig, batches: Batches, model: ModelConfig
) -> list[row_lengths.RowLengths]:
    """Returns candidate lengths of packed rows, each with the FLOPs of a step.

    `batches` must be of the train split. If `row_input_length` or `row_target_length` is a number, all candidates
    have this input or target length.
    """

    def cost(input_length: int, target_length: int) -> float:
        return train_flops(model, rows=1, input_length=input_length, target_length=target_length)

    given = (config.row_input_length, config.row_target_length)
    free = (None if length == AUTO else int(length) for length in given)
    return row_lengths.candidates(batches, cost, *free)


def in_cheapest_rows(config: TrainConfig, batches: Batches, model: ModelConfig) -> Batches:
    """Returns the batches with the packed-row lengths that a new run of `config` chooses."""
    if not config.pack:
        return batches
    best = row_lengths.cheapest(tried_row_lengths(config, batches, model))
    return dataclasses.replace(batches, row_lengths=best.lengths)


def with_row_lengths(batches: Batches, lengths: tuple[int, int]) -> Batches:
    """Returns the batches with packed rows of these lengths, or longer ones if an example needs them."""
    pairs = zip(lengths, batches.longest(), strict=True)
    fitting = [length if longest <= length else round_up(longest, 8) for length, longest in pairs]
    return dataclasses.replace(batches, row_lengths=tuple(fitting))


def batches_of(
    config: TrainConfig, data: TaskData, *, row_multiple: int = 1, shuffle: bool = True
) -> Batches:
    """Returns the batches of a split, drawn as in a run with `config`.

    `data_fraction` and `config.pairs` apply only to the train split. Packed rows have the lengths
    `input_length` and `target_length` until `with_row_lengths` changes them.
    """
    return Batches(
        data,
        batch_size=config.batch_size,
        input_length=config.input_length,
        target_length=config.target_length,
        seed=config.seed,
        pack=config.pack,
        row_multiple=row_multiple,
        data_fraction=1.0 if data.split != TRAIN or data.share_is_drawn else config.data_fraction,
        shuffle=shuffle,
        loss_mean=config.loss_mean,
        pairs=data.split == TRAIN and config.pairs,
    )


def on_this_host(batches: Batches, start: int, stop: int, mesh: Mesh) -> Iterator[HostBatch]:
    """Yields this process's rows of the batches of steps `start` to `stop - 1`.

    A thread makes the batches in advance. All processes must iterate over the same steps, in the same order.
    """
    channel = Channel("batches") if jax.process_count() > 1 else None
    shards = blocks_on(mesh, batches.num_shards)
    return iterate(batches, start, stop, shards=shards, channel=channel)


def placed(batch: HostBatch, mesh: Mesh) -> Batch:
    """Returns a batch as global arrays, to which each process adds its own rows."""
    return place_rows(batch.groups, mesh, blocks=batch.shards, num_blocks=batch.num_shards)
