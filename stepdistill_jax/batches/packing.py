"""Many short rows in few long ones: which goes where, and how many there may be."""

import bisect
import dataclasses
import math
from collections.abc import Sequence

import numpy as np

PROBES = 128
PROBED_ROWS = 200_000  # at most: probing must stay below about two seconds for any batch size
NEARLY_FULL = 2.2  # mean rows still fit: then the last two are chosen together
CANDIDATES = 24  # of each list, for these two; more cost time and pack no better


@dataclasses.dataclass(frozen=True)
class Packing:
    """Where encodings lie. All arrays are [encodings] int64.

    Attributes:
        row: the packed row.
        input_start, target_start: first column in it.
        segment: number of the segment in its packed row, from 1.
        num_rows: packed rows used.
    """

    row: np.ndarray
    input_start: np.ndarray
    target_start: np.ndarray
    segment: np.ndarray
    num_rows: int


def first_fit(sizes: np.ndarray, capacity: tuple[int, int]) -> Packing:
    """First-fit decreasing on two lengths: one packed row after the other is filled.

    Rows are kept in two lists, each longest first: those that take the larger share of a packed
    row's inputs (most labels) and those that take the larger share of its targets (rationales).
    The next row is the first that fits of the list whose side has more room, so that inputs and
    targets run out together. On rows like CQA's that needs 15% fewer packed rows than one list
    ordered by the larger share, which puts the rationales together. Where two more rows fill a
    packed row, they are chosen together, for what they leave: 3% fewer.

    With capacity (4, 4) the sizes (3, 1), (1, 1), (1, 3) give the packed rows 0, 1, 0: (3, 1) comes
    first, (1, 3) fills what it leaves.

    Args:
        sizes: [rows, 2] int input and target length, each from 1 to the capacity.
        capacity: input and target length of a packed row.
    """
    columns = np.empty((4, len(sizes)), np.int64)
    if not len(sizes):
        return Packing(*columns, num_rows=0)
    shares = sizes / capacity
    is_target_heavy = shares[:, 1] > shares[:, 0]
    lists = [_Decreasing(sizes, np.flatnonzero(is_target_heavy == side), side) for side in (0, 1)]
    nearly_full = (NEARLY_FULL * sizes.mean(0)).tolist()
    worth = shares.sum(0) / capacity  # of a token: the scarcer side counts more
    placed: list[tuple[int, int, int, int, int]] = []  # index, row, input, target, segment
    num_rows = 0
    while len(placed) < len(sizes):
        room, segment, paired = list(capacity), 0, False
        while True:
            found = []
            if not paired and (room[0] < nearly_full[0] or room[1] < nearly_full[1]):
                found, paired = _last_two(lists, room, worth), True
            if not found:
                fuller = room[0] * capacity[1] < room[1] * capacity[0]
                found = lists[fuller].first(room) or lists[not fuller].first(room)
            if not found:
                break
            for waiting, k in found:
                index, n_in, n_out = waiting.take(k)
                segment += 1
                start = (capacity[0] - room[0], capacity[1] - room[1])
                placed.append((index, num_rows, *start, segment))
                room[0] -= n_in
                room[1] -= n_out
        if not segment:
            raise ValueError(f"a row longer than the capacity {capacity}")
        num_rows += 1
    index, *values = np.array(placed, np.int64).T
    columns[:, index] = values
    return Packing(*columns, num_rows=num_rows)


class _Decreasing:
    """Rows that wait for a place, the longest on their heavy side first."""

    def __init__(self, sizes: np.ndarray, members: np.ndarray, side: int):
        own = sizes[members, side]
        order = np.argsort(-own, kind="stable")
        self._side = side
        self._keys = (-own[order]).tolist()  # ascending, for bisect
        self._index = members[order].tolist()
        self._other = sizes[members[order], 1 - side].tolist()
        self._least_other = min(self._other, default=0)

    def _from(self, room: list[int]) -> int:
        """The first whose own side fits; those behind it do, too."""
        if room[1 - self._side] < self._least_other:
            return len(self._keys)
        return bisect.bisect_left(self._keys, -room[self._side])

    def first(self, room: list[int]) -> list[tuple["_Decreasing", int]]:
        """The place of the first that fits, if one does."""
        other_room = room[1 - self._side]
        for k in range(self._from(room), len(self._keys)):
            if self._other[k] <= other_room:
                return [(self, k)]
        return []

    def some(self, room: list[int]) -> tuple[range, list[int], list[int]]:
        """Places of about `CANDIDATES` of all lengths whose own side fits, their inputs, targets."""
        start = self._from(room)
        places = range(start, len(self._keys), max(1, (len(self._keys) - start) // CANDIDATES))
        own = [-key for key in self._keys[start :: places.step]]
        other = self._other[start :: places.step]
        return (places, other, own) if self._side else (places, own, other)

    def take(self, k: int) -> tuple[int, int, int]:
        """(index, input, target length) of one, which then no longer waits."""
        index, own, other = self._index.pop(k), -self._keys.pop(k), self._other.pop(k)
        return (index, other, own) if self._side else (index, own, other)


def _last_two(
    lists: Sequence[_Decreasing], room: list[int], worth: np.ndarray
) -> list[tuple[_Decreasing, int]]:
    """Places of the one or two that fit and fill the most, the later one of a list first."""
    (places, inputs, targets), (more_places, more_inputs, more_targets) = (
        waiting.some(room) for waiting in lists
    )
    count = len(places) + len(more_places)
    if not count:
        return []
    both_inputs = _each_two(inputs + more_inputs)
    both_targets = _each_two(targets + more_targets)
    value = both_inputs * worth[0] + both_targets * worth[1]
    value *= (both_inputs <= room[0]) & (both_targets <= room[1])
    best = int(value.argmax())
    if not value.item(best):
        return []
    first = len(places)
    return [
        (lists[0], places[i]) if i < first else (lists[1], more_places[i - first])
        for i in sorted({*divmod(best, count)}, reverse=True)
    ]


def _each_two(lengths: list[int]) -> np.ndarray:
    """[n, n] float64 sums of each two of n lengths; on the diagonal one by itself."""
    single = np.array(lengths, np.float64)
    sums = np.add.outer(single, single)
    sums.reshape(-1)[:: len(single) + 1] = single
    return sums


def choose_row_counts(probes: Sequence[int], bound: int, row_multiple: int) -> tuple[int, ...]:
    """At most four packed row counts that cost few empty rows, the last for any batch at all.

    The first two are those that give the probes the smallest mean; the third stands a standard
    deviation above the largest probe, so that the fourth, which is far larger, is hardly ever
    compiled.

    Args:
        probes: packed rows that random batches needed.
        bound: packed rows that no batch can exceed.
        row_multiple: counts are multiples of it.
    """
    used = np.sort(np.asarray(probes, np.int64))
    rounded = np.array([round_up(count, row_multiple) for count in used.tolist()])
    third = round_up(used[-1] + max(1, int(np.ceil(used.std()))), row_multiple)
    values = np.unique(rounded)
    means = {
        (a, b): np.where(rounded <= a, a, np.where(rounded <= b, b, third)).mean()
        for a in values.tolist()
        for b in values.tolist()
        if a <= b
    }
    a, b = min(means, key=lambda pair: (means[pair], pair))
    last = round_up(bound, row_multiple)
    return tuple(sorted({c for c in (a, b, third) if c < last} | {last}))


def round_up(value: float, multiple: int) -> int:
    """The least multiple that is not below `value`."""
    return math.ceil(value / multiple) * multiple


def most_rows(loads: np.ndarray, rows_each: np.ndarray, batch_size: int) -> int:
    """Packed rows that first-fit never exceeds for `batch_size` of these examples.

    First-fit opens a packed row only when nothing that waits fits into the one before it, in inputs
    or in targets, so two neighbours' loads add up to more than 1: m packed rows mean a total load
    above (m - 1) / 2.

    Args:
        loads: [examples] the sum over an example's encodings of input / capacity + target / capacity.
            An example that a batch may take twice is listed twice.
        rows_each: [examples] its encodings: none needs more than a packed row of its own.
        batch_size: examples in a batch.
    """
    heaviest = np.partition(loads, -batch_size)[-batch_size:] if len(loads) > batch_size else loads
    by_load = int(np.ceil(2 * heaviest.sum() + 1e-6))
    return max(1, min(by_load, int(np.sort(rows_each)[-batch_size:].sum())))
