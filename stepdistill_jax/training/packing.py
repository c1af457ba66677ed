"""Many short rows in few long ones: where each goes, and its tokens put there."""

import bisect
import dataclasses
import math
from collections.abc import Sequence

import numpy as np

from stepdistill_jax.tasks.token_store import TokenRows
from stepdistill_jax.text.vocabulary import EOS_ID

PROBES = 128
PROBED_ROWS = 200_000  # at most: probing must stay below about two seconds for any batch size


@dataclasses.dataclass(frozen=True)
class TokenTable:
    """One objective of one store, with each row's length after cutting.

    Attributes:
        inputs, targets: uncut ids.
        input_lengths, target_lengths: [examples] int64 tokens that are used; target 0 is an absent
            row.
        inputs_cut, targets_cut: [examples] bool, longer than the configured length.
        weights: [examples] float32 factor of the loss.
        store, objective: number of the store from 0, of the objective from 1.
        variant: which of an example's rationales, from 0.
    """

    inputs: TokenRows
    targets: TokenRows
    input_lengths: np.ndarray
    target_lengths: np.ndarray
    inputs_cut: np.ndarray
    targets_cut: np.ndarray
    weights: np.ndarray
    store: int
    objective: int
    variant: int = 0

    @classmethod
    def of(cls, rows, weights, input_length: int, target_length: int, *place: int):
        """The table of a `TokenStore.rows` entry at the configured lengths.

        `place` is store, objective and variant.
        """
        inputs, targets = rows["inputs"], rows["targets"]
        return cls(
            inputs,
            targets,
            np.minimum(inputs.lengths, input_length),
            np.minimum(targets.lengths, target_length),
            inputs.lengths > input_length,
            targets.lengths > target_length,
            weights,
            *place,
        )

    def load(self, capacity: tuple[int, int]) -> np.ndarray:
        """[examples] float64 input / capacity + target / capacity of each row, absent ones 0."""
        inputs = np.where(self.target_lengths > 0, self.input_lengths / capacity[0], 0.0)
        return inputs + self.target_lengths / capacity[1]


Rows = Sequence[tuple[TokenTable, np.ndarray, np.ndarray]]


@dataclasses.dataclass(frozen=True)
class Packing:
    """Where rows lie. All arrays are [rows] int64.

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
    ordered by the larger share, which puts the rationales together.

    With capacity (4, 4) the sizes (3, 1), (1, 1), (1, 3) give the packed rows 0, 1, 0: (3, 1) comes
    first, (1, 3) fills what it leaves.

    Args:
        sizes: [rows, 2] int input and target length, each from 1 to the capacity.
        capacity: input and target length of a packed row.
    """
    shares = sizes / capacity
    is_target_heavy = shares[:, 1] > shares[:, 0]
    lists = [_Decreasing(sizes, np.flatnonzero(is_target_heavy == side), side) for side in (0, 1)]
    placed: list[tuple[int, int, int, int, int]] = []  # index, row, input, target, segment
    num_rows = 0
    while len(placed) < len(sizes):
        room, segment = list(capacity), 0
        while True:
            fuller = room[0] * capacity[1] < room[1] * capacity[0]
            found = lists[fuller].take(room) or lists[not fuller].take(room)
            if found is None:
                break
            index, n_in, n_out = found
            segment += 1
            placed.append((index, num_rows, capacity[0] - room[0], capacity[1] - room[1], segment))
            room[0] -= n_in
            room[1] -= n_out
        if not segment:
            raise ValueError(f"a row longer than the capacity {capacity}")
        num_rows += 1
    columns = np.empty((4, len(sizes)), np.int64)
    if placed:
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

    def take(self, room: list[int]) -> tuple[int, int, int] | None:
        """(index, input, target length) of the first that fits, which then no longer waits."""
        other_room = room[1 - self._side]
        if other_room < self._least_other:
            return None
        for k in range(bisect.bisect_left(self._keys, -room[self._side]), len(self._keys)):
            if self._other[k] <= other_room:
                own, other = -self._keys.pop(k), self._other.pop(k)
                pair = (other, own) if self._side else (own, other)
                return self._index.pop(k), *pair
        return None


def empty_group(count: int, input_length: int, target_length: int) -> dict[str, np.ndarray]:
    """A group of `count` rows of padding, with all features."""
    group: dict[str, np.ndarray] = {
        name: np.zeros((count, input_length), np.int32)
        for name in ("encoder_input_tokens", "encoder_segment_ids")
    }
    for name in (
        "decoder_input_tokens",
        "decoder_target_tokens",
        "decoder_segment_ids",
        "decoder_objective_ids",
    ):
        group[name] = np.zeros((count, target_length), np.int32)
    group["decoder_loss_weights"] = np.zeros((count, target_length), np.float32)
    return group


def place_tokens(group: dict[str, np.ndarray], rows: Rows, packing: Packing | None) -> None:
    """Writes rows into a group of padding; without a packing, each into the row of its place."""
    examples = [(table, e) for table, e, _ in rows]
    if packing is None:
        row = np.concatenate([places for _, _, places in rows])
        start = np.zeros(len(row), np.int64)
        packing = Packing(row, start, start, start + 1, len(row))
    lengths = np.concatenate([table.input_lengths[e] for table, e in examples])
    at = _cells(packing.row, packing.input_start, lengths, group["encoder_segment_ids"].shape[1])
    tokens = np.concatenate(
        [_tokens(t.inputs, e, t.input_lengths[e], t.inputs_cut[e]) for t, e in examples]
    )
    group["encoder_input_tokens"].reshape(-1)[at] = tokens
    group["encoder_segment_ids"].reshape(-1)[at] = np.repeat(packing.segment, lengths)

    lengths = np.concatenate([table.target_lengths[e] for table, e in examples])
    at = _cells(packing.row, packing.target_start, lengths, group["decoder_segment_ids"].shape[1])
    tokens = np.concatenate(
        [_tokens(t.targets, e, t.target_lengths[e], t.targets_cut[e]) for t, e in examples]
    )
    previous = np.concatenate([[0], tokens[:-1]])
    previous[np.cumsum(lengths) - lengths] = 0  # each segment starts with 0
    objectives = np.repeat([t.objective for t, _ in examples], [len(e) for _, e in examples])
    weights = np.concatenate([table.weights[e] for table, e in examples])
    group["decoder_target_tokens"].reshape(-1)[at] = tokens
    group["decoder_input_tokens"].reshape(-1)[at] = previous
    group["decoder_segment_ids"].reshape(-1)[at] = np.repeat(packing.segment, lengths)
    group["decoder_objective_ids"].reshape(-1)[at] = np.repeat(objectives, lengths)
    group["decoder_loss_weights"].reshape(-1)[at] = np.repeat(weights, lengths)


def _cells(row: np.ndarray, start: np.ndarray, lengths: np.ndarray, width: int) -> np.ndarray:
    """[tokens] flat index of each token of each row in a [rows, width] array."""
    ends = np.cumsum(lengths)
    return np.repeat(row * width + start - (ends - lengths), lengths) + np.arange(ends[-1])


def _tokens(
    rows: TokenRows, examples: np.ndarray, lengths: np.ndarray, cut: np.ndarray
) -> np.ndarray:
    """[tokens] the first `lengths` ids of each row; a cut row keeps its end of sequence."""
    ends = np.cumsum(lengths)
    first = rows.offsets[examples] - (ends - lengths)
    tokens = rows.ids[np.repeat(first, lengths) + np.arange(ends[-1])]
    if cut.any():
        last = rows.ids[rows.offsets[examples[cut] + 1] - 1]
        at = ends[cut] - 1
        tokens[at] = np.where(last == EOS_ID, EOS_ID, tokens[at])
    return tokens


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
        loads: [examples] the sum over an example's rows of input / capacity + target / capacity.
            An example that a batch may take twice is listed twice.
        rows_each: [examples] its rows: none needs more than a packed row of its own.
        batch_size: examples in a batch.
    """
    heaviest = np.partition(loads, -batch_size)[-batch_size:] if len(loads) > batch_size else loads
    by_load = int(np.ceil(2 * heaviest.sum() + 1e-6))
    return max(1, min(by_load, int(np.sort(rows_each)[-batch_size:].sum())))
