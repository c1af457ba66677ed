"""Chooses how long packed rows are, by what a step costs with them."""

import dataclasses
from collections.abc import Callable, Iterator

import numpy as np

from stepdistill_jax.batches.batch import Batches
from stepdistill_jax.batches.packing import round_up
from stepdistill_jax.models.config import MAX_LENGTH

FOLDS = (1, 1.5, 2, 3, 4, 6, 8)  # so many of the longest inputs fit into a row
SLACKS = (1.0, 1.1, 1.25)  # the targets' length, by what the data has of them for an input
TILE = 64  # accelerators cut longer rows into tiles
PROBES = 8  # batches packed for each try: at most about a second in all
LITTLE_MORE = 1.01  # cost that shorter rows, whose attention takes less memory, may have

Cost = Callable[[int, int], float]  # of a packed row by its input and target length


@dataclasses.dataclass(frozen=True)
class RowLengths:
    """Lengths of packed rows that are worth a try, and their cost.

    Attributes:
        input_length, target_length: tokens of a row.
        rows: rows of a step, rounded up to the row multiple, on average.
        cost: of a step.
    """

    input_length: int
    target_length: int
    rows: float
    cost: float

    @property
    def lengths(self) -> tuple[int, int]:
        """Returns both."""
        return self.input_length, self.target_length


def candidates(
    batches: Batches, cost: Cost, input_length: int | None, target_length: int | None
) -> list[RowLengths]:
    """Returns row lengths with their cost, shortest first.

    They hold the longest example of the data, and depend neither on the seed nor on `data_fraction`
    (but for `TaskData.share_is_drawn`, whose data is the share itself).

    Args:
        batches: of the train split; `row_multiple` counts, `row_lengths` does not.
        cost: of one row, for instance its FLOPs.
        input_length, target_length: None where it is free.
    """
    found = []
    # one for all seeds and fractions
    free = {"seed": 0, "data_fraction": 1.0, "loss_mean": "token", "row_lengths": (0, 0)}
    batches = dataclasses.replace(batches, **free)
    for lengths in _lengths(batches, input_length, target_length):
        packed = batches.with_row_lengths(lengths)
        probes = packed.probe(PROBES)
        rows = float(np.mean([packed.rounded(count) for count in probes]))
        found.append(RowLengths(*lengths, rows, rows * cost(*lengths)))
    return found


def cheapest(tried: list[RowLengths]) -> RowLengths:
    """Returns the candidate of least cost; within 1% of it, the shortest."""
    least = min(c.cost for c in tried)
    return next(c for c in tried if c.cost <= LITTLE_MORE * least)


def _lengths(
    batches: Batches, input_length: int | None, target_length: int | None
) -> Iterator[tuple[int, int]]:
    longest = batches.longest()
    inputs, targets = batches.sizes().sum(0)
    found = set()
    for fold in FOLDS:
        one = input_length or round_up(
            longest[0] * fold, TILE if longest[0] * fold > 2 * TILE else 8
        )
        for slack in SLACKS:
            other = target_length or round_up(max(longest[1], one * targets / inputs * slack), 8)
            found.add((min(one, MAX_LENGTH), min(other, MAX_LENGTH)))
    yield from sorted(found)
