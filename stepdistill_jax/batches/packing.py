"""Many short rows in few long ones, in three steps: lengths -> packed rows -> cells and arrays.

1. `Encodings.of`: which rows of a step read one encoding of an input, and how long it and they are.
2. `first_fit`: the packed row of each encoding, and its first column there. `choose_row_counts` and
   `most_rows` bound how many packed rows there may be. Where targets are paired, whole examples are
   packed instead (`Encodings.of_examples`), and `Packing.of_encodings` places what is in them.
3. `scatter`: the cell of each token in the arrays of a batch.
"""

import bisect
import dataclasses
import math
from collections.abc import Sequence

import numpy as np

from stepdistill_jax.batches.sampler import ranges

Group = dict[str, np.ndarray]

# the encoder segment that a target token reads; without this feature, the segment of its own number
DECODER_ENCODER_SEGMENTS = "decoder_encoder_segment_ids"
TASK_IDS = "decoder_task_ids"
EXAMPLE_IDS = "decoder_example_ids"

PROBES = 128
PROBED_ROWS = 1024  # for each: probing must stay below about two seconds for any batch size
NEARLY_FULL = 2.2  # mean rows still fit: then the last two are chosen together
CANDIDATES = 24  # of each list, for these two; more cost time and pack no better


@dataclasses.dataclass(frozen=True)
class Encodings:
    """The rows that share one encoding of an input, and where their targets start in the decoder.

    Attributes:
        of_row: [rows] int64 number of the encoding that a row reads, from 0.
        offset: [rows] int64 decoder tokens of the same encoding to the left of the row's own.
        row_sizes: [rows, 2] int64 input and decoder length of a row.
        is_first: [rows] bool, true for the row whose inputs an encoding has.
        places: [encodings] int64 its example's place in the step.
        sizes: [encodings, 2] int64 input length, and decoder lengths of all its rows together.
    """

    of_row: np.ndarray
    offset: np.ndarray
    row_sizes: np.ndarray
    is_first: np.ndarray
    places: np.ndarray
    sizes: np.ndarray

    @classmethod
    def of(
        cls, sizes: np.ndarray, places: np.ndarray, target_length: int, *, shared: bool
    ) -> "Encodings":
        """One encoding for each row or, if `shared`, one for all rows of an example.

        An example whose targets need more than `target_length` together is encoded again for the
        targets that no longer fit, so that none is cut for the others' sake.

        Args:
            sizes: [rows, 2] int64 input and decoder length.
            places: [rows] int64 each example's place in the step.
            target_length: of a packed row.
            shared: whether all rows of an example have one input.
        """
        rows, lengths = np.arange(len(sizes)), sizes[:, 1]
        keys, offset = rows.copy(), np.zeros_like(rows)
        if shared:
            count = int(places.max()) + 1
            again, used = np.zeros(count, np.int64), np.zeros(count, np.int64)
            turn = _numbers_within(places, rows)
            for mine in (np.flatnonzero(turn == k) for k in range(1, int(turn.max()) + 1)):
                at = places[mine]  # each place once
                full = used[at] + lengths[mine] > target_length
                again[at] += full
                offset[mine] = np.where(full, 0, used[at])
                used[at] = offset[mine] + lengths[mine]
                keys[mine] = again[at] * count + at
        _, first, of_row = np.unique(keys, return_index=True, return_inverse=True)
        is_first = np.zeros(len(rows), bool)
        is_first[first] = True
        sums = np.bincount(of_row, lengths, minlength=len(first)).astype(np.int64)
        of_first = np.stack([sizes[first, 0], sums], 1)
        return cls(of_row, offset, sizes, is_first, places[first], of_first)

    def of_examples(self) -> tuple[np.ndarray, np.ndarray]:
        """Returns the place of each example, ascending, and the sizes [examples, 2] of all it has."""
        places, of = np.unique(self.places, return_inverse=True)
        sums = [np.bincount(of, lengths, minlength=len(places)) for lengths in self.sizes.T]
        return places, np.stack(sums, 1).astype(np.int64)


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

    @classmethod
    def padded(cls, places: np.ndarray) -> "Packing":
        """Each encoding by itself, in the row of its place."""
        start = np.zeros_like(places)
        return cls(places, start, start, start + 1, len(places))

    def of_encodings(self, encodings: Encodings) -> "Packing":
        """Returns where encodings lie whose examples, as `of_examples` orders them, lie here.

        They lie side by side. An example of two encodings of sizes (3, 1) and (3, 4) that begins at
        the columns (5, 2) has its first at (5, 2) and its second at (8, 3).
        """
        _, of = np.unique(encodings.places, return_inverse=True)
        order = np.argsort(of, kind="stable")
        before = np.cumsum(encodings.sizes[order], 0) - encodings.sizes[order]
        offset = np.empty_like(before)
        # what lies before an encoding, less what lies before the first of its example
        offset[order] = before - before[np.searchsorted(of[order], of[order])]
        row, starts = self.row[of], np.stack([self.input_start, self.target_start], 1)[of] + offset
        segment = _numbers_within(row, starts[:, 1])
        return Packing(row, starts[:, 0], starts[:, 1], segment, self.num_rows)


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
        order = members[np.argsort(-sizes[members, side], kind="stable")]
        self._side = side
        self._keys = (-sizes[order, side]).tolist()  # ascending, for bisect
        self._index = order.tolist()
        self._lengths = [sizes[order, either].tolist() for either in (0, 1)]
        self._least_other = min(self._lengths[1 - side], default=0)

    def _from(self, room: list[int]) -> int:
        """The first whose own side fits; those after it do, too."""
        if room[1 - self._side] < self._least_other:
            return len(self._keys)
        return bisect.bisect_left(self._keys, -room[self._side])

    def first(self, room: list[int]) -> list[tuple["_Decreasing", int]]:
        """The place of the first that fits, if one does."""
        other, other_room = self._lengths[1 - self._side], room[1 - self._side]
        for k in range(self._from(room), len(other)):
            if other[k] <= other_room:
                return [(self, k)]
        return []

    def some(self, room: list[int]) -> tuple[range, list[int], list[int]]:
        """Places of about `CANDIDATES` of all lengths whose own side fits, their inputs, targets."""
        start = self._from(room)
        step = max(1, (len(self._keys) - start) // CANDIDATES)
        inputs, targets = self._lengths
        return range(start, len(self._keys), step), inputs[start::step], targets[start::step]

    def take(self, k: int) -> tuple[int, int, int]:
        """(index, input, target length) of one, which then no longer waits."""
        self._keys.pop(k)
        inputs, targets = self._lengths
        return self._index.pop(k), inputs.pop(k), targets.pop(k)


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


def choose_row_counts(
    probes: Sequence[int], bound: int, row_multiple: int, *, num_shards: int = 1
) -> tuple[int, ...]:
    """At most four packed row counts of a shard that cost few empty rows, the last for any at all.

    The first two are those that give the fullest of `num_shards` probes the smallest mean; the third
    stands a standard deviation or two above the largest probe, so that the fourth, which is far
    larger, is hardly ever compiled.

    Args:
        probes: packed rows that random shards needed.
        bound: packed rows that no shard can exceed.
        row_multiple: counts are multiples of it.
        num_shards: of a batch, which all get as many rows as the fullest of them needs.
    """
    used = np.sort(np.asarray(probes, np.int64))
    # the fullest of several shards lies further above the mean: so far that the fourth is for one
    # batch in some thousands
    spread = used.std() * (1 + math.log10(num_shards) / 2)
    third = round_up(used[-1] + max(1, int(np.ceil(spread))), row_multiple)
    if num_shards > 1:
        used = np.random.default_rng(0).choice(used, (PROBES, num_shards)).max(1)
    rounded = np.array([round_up(count, row_multiple) for count in used.tolist()])
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


def empty_group(
    count: int,
    input_length: int,
    target_length: int,
    *,
    shared: bool = False,
    several_tasks: bool = False,
    pairs: bool = False,
) -> Group:
    """A group of `count` rows of padding, with all features.

    Where encodings are `shared`, a decoder segment says which encoder segment it reads; of several
    tasks each target token says which it is of, and with `pairs` which example of its row.
    """
    group: Group = {}
    for name in ("encoder_input_tokens", "encoder_segment_ids"):
        group[name] = np.zeros((count, input_length), np.int32)
    names = [
        *(
            f"decoder_{n}"
            for n in ("input_tokens", "target_tokens", "segment_ids", "objective_ids")
        ),
        *([DECODER_ENCODER_SEGMENTS] if shared else []),
        *([TASK_IDS] if several_tasks else []),
        *([EXAMPLE_IDS] if pairs else []),
    ]
    for name in names:
        group[name] = np.zeros((count, target_length), np.int32)
    group["decoder_loss_weights"] = np.zeros((count, target_length), np.float32)
    return group


def scatter(
    group: Group,
    encodings: Encodings,
    packing: Packing,
    inputs: np.ndarray,
    targets: np.ndarray,
    tasks: np.ndarray,
    objectives: np.ndarray,
    weights: np.ndarray,
) -> None:
    """Writes tokens into a group of padding, each into its cell.

    The segments of the decoder are numbered from the left of each packed row; where every target
    has an encoding of its own these are the encoder's numbers, too.

    `inputs` and, with their decoder prefixes, `targets`, `tasks`, `objectives` and `weights` are
    [tokens] of all rows, one row after the other.
    """
    of = encodings.of_row[encodings.is_first]
    lengths, width = encodings.sizes[of, 0], group["encoder_segment_ids"].shape[1]
    inputs = inputs[np.repeat(encodings.is_first, encodings.row_sizes[:, 0])]
    cells = ranges(packing.row[of] * width + packing.input_start[of], lengths)
    np.put(group["encoder_input_tokens"], cells, inputs)
    np.put(group["encoder_segment_ids"], cells, np.repeat(packing.segment[of], lengths))

    of, lengths = encodings.of_row, encodings.row_sizes[:, 1]
    row, start = packing.row[of], packing.target_start[of] + encodings.offset
    cells = ranges(row * group["decoder_segment_ids"].shape[1] + start, lengths)
    previous = np.concatenate([[0], targets[:-1]])
    previous[np.cumsum(lengths) - lengths] = 0  # each segment starts with 0
    np.put(group["decoder_target_tokens"], cells, targets)
    np.put(group["decoder_input_tokens"], cells, previous)
    np.put(group["decoder_segment_ids"], cells, np.repeat(_numbers_within(row, start), lengths))
    np.put(group["decoder_objective_ids"], cells, objectives)
    np.put(group["decoder_loss_weights"], cells, weights)
    if TASK_IDS in group:
        np.put(group[TASK_IDS], cells, tasks)
    if DECODER_ENCODER_SEGMENTS in group:
        np.put(group[DECODER_ENCODER_SEGMENTS], cells, np.repeat(packing.segment[of], lengths))
    if EXAMPLE_IDS in group:
        numbers = _numbers_of_examples(encodings.places[of], row, start)
        np.put(group[EXAMPLE_IDS], cells, np.repeat(numbers, lengths))


def _numbers_of_examples(places: np.ndarray, row: np.ndarray, start: np.ndarray) -> np.ndarray:
    """[rows] the number of each row's example in its packed row, from 1.

    Examples with several targets come first, from left to right, then the others: so the numbers of
    pairs are at most half of the row's target tokens, whatever the others are.
    """
    _, first, of, count = np.unique(
        places, return_index=True, return_inverse=True, return_counts=True
    )
    key = start[first] + (count == 1) * (start.max(initial=0) + 1)
    return _numbers_within(row[first], key)[of]


def _numbers_within(group: np.ndarray, key: np.ndarray) -> np.ndarray:
    """[rows] the number of each in its group by its key, from 1."""
    order = np.lexsort((key, group))
    number = np.empty_like(group)
    number[order] = np.arange(1, len(group) + 1) - np.searchsorted(group[order], group[order])
    return number
