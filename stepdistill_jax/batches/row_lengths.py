"""Chooses the input and target lengths of packed rows, so that a step is cheap."""

import dataclasses
from collections.abc import Callable, Iterator

import numpy as np

from stepdistill_jax.batches.batch import Batches
from stepdistill_jax.batches.packing import round_up
from stepdistill_jax.models.config import MAX_LENGTH

FOLDS = (1, 1.5, 2, 3, 4, 6, 8)  # input length of a row / length of the longest input
# target length of a row / (its input length x the data's target tokens per input token)
SLACKS = (1.0, 1.1, 1.25)
TILE = 64  # accelerators split longer rows into tiles
PROBES = 8  # shards to pack for each candidate; all candidates together take at most about a second
# shorter rows may cost 1% more than the cheapest candidate, since their attention takes less memory
LITTLE_MORE = 1.01

Cost = Callable[[int, int], float]  # (input length, target length) of a packed row -> cost


@dataclasses.dataclass(frozen=True)
class RowLengths:
    """Possible lengths of packed rows, and their cost.

    Attributes:
        input_length, target_length: lengths of a packed row, in tokens.
        rows: mean number of packed rows of a step.
        cost: mean cost of a step: `rows` times the cost of one packed row.
    """

    input_length: int
    target_length: int
    rows: float
    cost: float

    @property
    def lengths(self) -> tuple[int, int]:
        """The pair (input length, target length)."""
        return self.input_length, self.target_length


def candidates(
    batches: Batches, cost: Cost, input_length: int | None, target_length: int | None
) -> list[RowLengths]:
    """Returns row lengths to choose from, with their cost, shortest first.

    Args:
        batches: batches of the train split. Their `row_lengths`, `seed` and `data_fraction` are ignored.
        cost: function from (input length, target length) of a packed row to its cost, for instance in FLOPs.
        input_length, target_length: a fixed length, or None to try several.

    Raises:
        InputError: an example is longer than a fixed length.
    """
    found = []
    # runs that differ in these settings get the same row lengths, and so share compiled steps
    free = {"seed": 0, "data_fraction": 1.0, "loss_mean": "token", "row_lengths": (0, 0)}
    batches = dataclasses.replace(batches, **free)
    for lengths in _lengths(batches, input_length, target_length):
        packed = batches.with_row_lengths(lengths)
        probes = packed.probe(PROBES)
        rows = float(np.mean([packed.rounded(count) for count in probes]))
        found.append(RowLengths(*lengths, rows, rows * cost(*lengths)))
    return found


def cheapest(tried: list[RowLengths]) -> RowLengths:
    """Returns the shortest candidate that costs at most 1% more than the cheapest one."""
    least = min(c.cost for c in tried)
    return next(c for c in tried if c.cost <= LITTLE_MORE * least)


def _lengths(
    batches: Batches, input_length: int | None, target_length: int | None
) -> Iterator[tuple[int, int]]:
    longest = batches.longest()
    inputs, targets = batches.sizes().sum(0)
    found = set()
    for fold in FOLDS:
        # rounded up to multiples of 8 up to 128 tokens, and of 64 above: 45 -> 48, 150 -> 192
        one = input_length or round_up(
            longest[0] * fold, TILE if longest[0] * fold > 2 * TILE else 8
        )
        for slack in SLACKS:
            other = target_length or round_up(max(longest[1], one * targets / inputs * slack), 8)
            found.add((min(one, MAX_LENGTH), min(other, MAX_LENGTH)))
    yield from sorted(found)
