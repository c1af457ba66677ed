"""Prepares a process's shards of the coming batches.

A batch's row count and token totals depend on all shards. So the processes pack 8 steps ahead and exchange their
counts, before they make the arrays.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from stepdistill_jax.batches.batch import Batch, Batches, Shard
from stepdistill_jax.runtime.channel import Channel

AGREED_STEPS = 8
# a shard's number of rows, of input tokens and of target tokens, then its target tokens for each objective
Counts = list[int]


@dataclasses.dataclass(frozen=True)
class HostBatch:
    """A process's rows of a batch, and the totals of the global batch.

    Attributes:
        groups: arrays with the rows of the process's shards, one shard after the other.
        shards: indices of these shards, from 0, ascending.
        num_shards: number of shards of the global batch. The attributes below also describe the global batch.
        shapes: (rows, input length, target length) of each group.
        target_tokens: number of target tokens, with decoder prefixes.
        objective_tokens: number of target tokens of each objective, without prefixes.
    """

    groups: Batch
    shards: tuple[int, ...]
    num_shards: int
    shapes: tuple[tuple[int, int, int], ...]
    input_tokens: int
    target_tokens: int
    objective_tokens: tuple[int, ...]


def iterate(
    batches: Batches,
    start: int,
    stop: int,
    *,
    shards: Sequence[int] | None = None,
    channel: Channel | None = None,
    prefetch: int = 4,
) -> Iterator[HostBatch]:
    """Returns an iterator over the batches of steps `start` to `stop - 1`, made in advance by a thread.

    Args:
        batches: the run's batches, the same in all processes.
        shards: indices of this process's shards, ascending; None means all.
        channel: connection to the processes with the other shards, closed at the end; None if there are none.
        prefetch: number of batches to keep ready.
    """
    import grain

    if stop <= start:
        return iter(())
    numbers = tuple(range(batches.num_shards) if shards is None else shards)
    made = _Maker(batches, stop, numbers, channel)
    # a single thread: `_Maker` needs the steps in order
    options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=prefetch)
    source = iter(grain.MapDataset.range(start, stop).map(made).to_iter_dataset(options))
    return _closing(source, channel)


def _closing(source: Any, channel: Channel | None) -> Iterator[HostBatch]:
    try:
        yield from source
    finally:  # also if the reader stops early
        source.close()
        if channel is not None:
            channel.close()


class _Maker:
    """Makes the batch of a step. It must be called for consecutive steps, in order."""

    def __init__(
        self, batches: Batches, stop: int, numbers: tuple[int, ...], channel: Channel | None
    ):
        self._batches, self._stop, self._numbers = batches, stop, numbers
        # a batch with a single shard needs no exchange: every process makes that shard
        self._channel = channel if batches.num_shards > 1 else None
        self._ahead = 1 if self._channel is None else AGREED_STEPS
        self._packed: dict[int, list[Shard]] = {}
        self._totals: dict[int, Counts] = {}

    def __call__(self, step: int) -> HostBatch:
        if step not in self._totals:
            block = range(step, min(step + self._ahead, self._stop))
            for other in block:
                self._pack(other)
            self._totals.update(zip(block, self._agreed(block), strict=True))
        # each call also packs one step of the next block, so that no call has to pack 8
        if self._channel is not None:
            self._pack(step + self._ahead)
        fullest, inputs, targets, *objectives = self._totals.pop(step)
        rows = self._batches.batch_rows(fullest)
        return HostBatch(
            self._batches.arrays(self._packed.pop(step), fullest),
            self._numbers,
            self._batches.num_shards,
            tuple((rows, *lengths) for lengths in self._batches.lengths),
            inputs,
            targets,
            tuple(objectives),
        )

    def _pack(self, step: int) -> None:
        if step < self._stop and step not in self._packed:
            self._packed[step] = [self._batches.shard(step, n) for n in self._numbers]

    def _agreed(self, steps: range) -> list[Counts]:
        """Returns, for each step, the row count of the fullest shard and the total tokens of all shards."""
        # shard -> its counts for each step: {2: [[9, 140, 61, 20, 41], ...], 3: ...}
        own = {
            number: [_counts(self._batches, self._packed[step][place]) for step in steps]
            for place, number in enumerate(self._numbers)
        }
        if self._channel is None:
            return _of_batches([own])
        return self._channel.combined(own, _of_batches)


def _of_batches(of_processes: Sequence[dict]) -> list[Counts]:
    """Returns the largest row count and the summed token counts of all shards, for each step.

    A shard that several processes make is counted only once.
    """
    by_shard = {int(number): x for of_one in of_processes for number, x in of_one.items()}
    counts = np.array(list(by_shard.values()), np.int64)  # [shards, steps, counts]
    # column 0, rows, becomes the maximum over shards; token counts are added up
    return np.concatenate([counts[..., :1].max(0), counts[..., 1:].sum(0)], 1).tolist()


def _counts(batches: Batches, shard: Shard) -> Counts:
    inputs, targets = 0, 0
    objectives = np.zeros(len(batches.data.objectives), np.int64)
    for packed in shard:
        if packed.encodings is not None:
            inputs += int(packed.encodings.sizes[:, 0].sum())
            targets += int(packed.encodings.sizes[:, 1].sum())
        for table, examples, _ in packed.rows:
            objectives[table.objective - 1] += table.targets.lengths[examples].sum()
    return [shard[0].num_rows, inputs, targets, *objectives.tolist()]
