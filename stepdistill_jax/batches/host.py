"""A process's part of the batches: the shards whose rows lie on its devices, packed ahead of the steps.

A batch's row count depends on its fullest shard, and its totals on all. So the processes tell each
other what their shards need, for `AGREED_STEPS` steps at once: these are packed by then, and become
arrays when their turn comes.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from stepdistill_jax.batches.batch import Batch, Batches, Shard
from stepdistill_jax.runtime.channel import Channel

AGREED_STEPS = 8
# of a shard: its rows, input tokens, target tokens, then the tokens of each objective
Counts = list[int]


@dataclasses.dataclass(frozen=True)
class HostBatch:
    """The rows of a batch that a process has made, and what the batch holds in all.

    Attributes:
        groups: the rows of its shards, block after block.
        shards: numbers of these shards, ascending.
        num_shards: of the batch.
        shapes: (rows, input length, target length) of each group of the batch.
        input_tokens, target_tokens: cells of the batch that hold a token, those of decoder prefixes
            included.
        objective_tokens: target tokens of each objective in the batch, without prefixes.
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
    """Batches of the steps from `start` to before `stop`, made ahead in a thread by Grain.

    Args:
        batches: the same in all processes.
        start, stop: steps.
        shards: that this process makes, ascending; None is all.
        channel: to the processes that make others; it is closed at the end. None: there are none.
        prefetch: batches that wait to be taken.
    """
    import grain

    if stop <= start:
        return iter(())
    numbers = tuple(range(batches.num_shards) if shards is None else shards)
    made = _Maker(batches, stop, numbers, channel)
    # one thread: it takes the steps in their order
    options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=prefetch)
    source = iter(grain.MapDataset.range(start, stop).map(made).to_iter_dataset(options))
    return _closing(source, channel)


def _closing(source: Any, channel: Channel | None) -> Iterator[HostBatch]:
    try:
        yield from source
    finally:  # also where the reader stops early
        source.close()
        if channel is not None:
            channel.close()


class _Maker:
    """Makes the batch of a step, the next one at each call."""

    def __init__(
        self, batches: Batches, stop: int, numbers: tuple[int, ...], channel: Channel | None
    ):
        self._batches, self._stop, self._numbers = batches, stop, numbers
        # a single shard is every process's
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
        if self._channel is not None:  # of the next block one for each of this: the work is even
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
        """The counts of each step's whole batch: the rows of its fullest shard, all shards' tokens."""
        own = {
            number: [_counts(self._batches, self._packed[step][place]) for step in steps]
            for place, number in enumerate(self._numbers)
        }
        if self._channel is None:
            return _of_batches([own])
        return self._channel.combined(own, _of_batches)


def _of_batches(of_processes: Sequence[dict]) -> list[Counts]:
    """What shards count in all, by step; a shard that two processes make counts once."""
    by_shard = {int(number): x for of_one in of_processes for number, x in of_one.items()}
    counts = np.array(list(by_shard.values()), np.int64)  # [shards, steps, counts]
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
