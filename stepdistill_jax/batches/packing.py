"""Packs many short rows, each with an input and a target, into few long packed rows.

1. `Encodings.of` groups the rows that share an encoded input.
2. `first_fit` chooses a packed row, and a place in it, for each encoding. If targets are paired, it does so for
   each example, and `Packing.of_encodings` computes where the example's encodings start.
3. `scatter` writes the tokens into the arrays of a batch.
"""

import bisect
import dataclasses
import math
from collections.abc import Sequence

import numpy as np

from stepdistill_jax.batches.sampler import ranges

Group = dict[str, np.ndarray]

# for each target token, the encoder segment that it reads; without this feature, it reads the encoder segment
# that has the same number as its own decoder segment
DECODER_ENCODER_SEGMENTS = "decoder_encoder_segment_ids"
TASK_IDS = "decoder_task_ids"
EXAMPLE_IDS = "decoder_example_ids"

PROBES = 128
PROBED_ROWS = 1024  # per probe: keeps probing below about two seconds for any batch size
NEARLY_FULL = 2.2  # when fewer mean rows than this still fit, the last two rows are chosen together
CANDIDATES = 24  # candidates from each list for these two; more take time and pack no better


@dataclasses.dataclass(frozen=True)
class Encodings:
    """How rows share encoded inputs. The targets of all rows that read the same encoding are concatenated.

    Attributes:
        of_row: index of each row's encoding, [rows] int64.
        offset: start of each row's target in its encoding's concatenated targets, [rows] int64.
        row_sizes: input length and decoder length of each row, [rows, 2] int64.
        is_first: whether a row is the first row that reads its encoding, [rows] bool.
        places: index of each encoding's example in the shard, [encodings] int64.
        sizes: input length and total decoder length of each encoding, [encodings, 2] int64.
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
        """Returns one encoding for each row or, if `shared`, one for all rows of an example.

        If an example's targets do not fit into `target_length` together, its shared input is encoded several times.

        Example: three rows share an input. Their sizes are (3, 2), (3, 3) and (3, 4), and `target_length` is 6.
        The result has `of_row` [0, 0, 1], `offset` [0, 2, 0], and `sizes` [[3, 5], [3, 4]].

        Args:
            sizes: input length and decoder length of each row, [rows, 2] int64.
            places: index of each row's example in the shard, [rows] int64.
            target_length: decoder length of a packed row.
        """
        rows, lengths = np.arange(len(sizes)), sizes[:, 1]
        keys, offset = rows.copy(), np.zeros_like(rows)
        if shared:
            count = int(places.max()) + 1
            # per place: how often its example is encoded again, and the decoder tokens in its latest encoding
            again, used = np.zeros(count, np.int64), np.zeros(count, np.int64)
            # the first rows of all examples at once, then all second rows, and so on
            turn = _numbers_within(places, rows)
            for mine in (np.flatnonzero(turn == k) for k in range(1, int(turn.max()) + 1)):
                at = places[mine]  # each place once; NumPy's `again[at] += ...` ignores repetitions
                full = used[at] + lengths[mine] > target_length
                again[at] += full
                offset[mine] = np.where(full, 0, used[at])
                used[at] = offset[mine] + lengths[mine]
                keys[mine] = again[at] * count + at  # a different number for each encoding
        _, first, of_row = np.unique(keys, return_index=True, return_inverse=True)
        is_first = np.zeros(len(rows), bool)
        is_first[first] = True
        sums = np.bincount(of_row, lengths, minlength=len(first)).astype(np.int64)
        of_first = np.stack([sizes[first, 0], sums], 1)
        return cls(of_row, offset, sizes, is_first, places[first], of_first)

    def of_examples(self) -> tuple[np.ndarray, np.ndarray]:
        """Returns each example's index and the total size of its encodings.

        Returns:
            The index of each example (see `places`), in ascending order, [examples].
            The total input length and total decoder length of each example, [examples, 2].
        """
        places, of = np.unique(self.places, return_inverse=True)
        sums = [np.bincount(of, lengths, minlength=len(places)) for lengths in self.sizes.T]
        return places, np.stack(sums, 1).astype(np.int64)


@dataclasses.dataclass(frozen=True)
class Packing:
    """The place of each encoding (an input and its targets, see `Encodings`) in the packed rows.

    All arrays are [encodings] int64.

    Attributes:
        row: index of the packed row, from 0.
        input_start, target_start: columns where the encoding's inputs and targets start.
        segment: index of the encoding's segment within the packed row, from 1.
        num_rows: number of packed rows.
    """

    row: np.ndarray
    input_start: np.ndarray
    target_start: np.ndarray
    segment: np.ndarray
    num_rows: int

    @classmethod
    def padded(cls, places: np.ndarray) -> "Packing":
        """Returns the positions of items that are not packed: row `places[i]` contains only item i."""
        start = np.zeros_like(places)
        return cls(places, start, start, start + 1, len(places))

    def of_encodings(self, encodings: Encodings) -> "Packing":
        """Returns the positions of `encodings`.

        `self` must have the positions of their examples, in the order of `Encodings.of_examples`.

        Example: if an example starts at the columns (input 5, target 2) and its encodings have the sizes (3, 1)
        and (3, 4), the encodings start at (5, 2) and (8, 3).
        """
        _, of = np.unique(encodings.places, return_inverse=True)
        order = np.argsort(of, kind="stable")
        before = np.cumsum(encodings.sizes[order], 0) - encodings.sizes[order]
        offset = np.empty_like(before)
        # tokens before an encoding, minus tokens before the first encoding of its example
        offset[order] = before - before[np.searchsorted(of[order], of[order])]
        row, starts = self.row[of], np.stack([self.input_start, self.target_start], 1)[of] + offset
        segment = _numbers_within(row, starts[:, 1])
        return Packing(row, starts[:, 0], starts[:, 1], segment, self.num_rows)


def first_fit(sizes: np.ndarray, capacity: tuple[int, int]) -> Packing:
    """Packs rows by first-fit decreasing on two lengths.

    Example: with the capacity (4, 4), the sizes (3, 1), (1, 1), (1, 3) are put into the packed rows 0, 1, 0.

    Args:
        sizes: input length and target length of each row, [rows, 2] int, at least 1.
        capacity: input length and target length of a packed row.

    Returns:
        For each row, in the order of `sizes`, its packed row and its place there.

    Raises:
        ValueError: a row is longer than the capacity.
    """
    columns = np.empty((4, len(sizes)), np.int64)
    if not len(sizes):
        return Packing(*columns, num_rows=0)
    shares = sizes / capacity
    # two lists, longest row first: most rationales are sorted by target length, most labels by input length. So
    # inputs and targets fill up together: on CQA, 15% fewer packed rows than with one list
    is_target_heavy = shares[:, 1] > shares[:, 0]
    lists = [_Decreasing(sizes, np.flatnonzero(is_target_heavy == side), side) for side in (0, 1)]
    nearly_full = (NEARLY_FULL * sizes.mean(0)).tolist()
    # value of an input token and of a target token. If all inputs together fill 3 packed rows and all targets
    # fill 6, a target token counts twice as much as an input token, relative to the capacities.
    worth = shares.sum(0) / capacity
    placed: list[tuple[int, int, int, int, int]] = []  # index, row, input, target, segment
    num_rows = 0
    while len(placed) < len(sizes):
        room, segment, paired = list(capacity), 0, False
        while True:
            found = []
            # when about two more rows fit, choose both together, once for each packed row: 3% fewer packed rows
            if not paired and (room[0] < nearly_full[0] or room[1] < nearly_full[1]):
                found, paired = _last_two(lists, room, worth), True
            if not found:
                # room[0] / capacity[0] < room[1] / capacity[1]: the targets have more room
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
        if not segment:  # an empty packed row takes any row that is not too long
            raise ValueError(f"a row is longer than the (input, target) capacity {capacity}")
        num_rows += 1
    index, *values = np.array(placed, np.int64).T
    columns[:, index] = values
    return Packing(*columns, num_rows=num_rows)


class _Decreasing:
    """A list of the rows that `first_fit` has not packed yet, the longest first.

    The list is sorted by input length if `side` is 0, and by target length if `side` is 1.
    """

    def __init__(self, sizes: np.ndarray, members: np.ndarray, side: int):
        order = members[np.argsort(-sizes[members, side], kind="stable")]
        self._side = side
        self._keys = (-sizes[order, side]).tolist()  # ascending, as bisect requires
        self._index = order.tolist()
        self._lengths = [sizes[order, either].tolist() for either in (0, 1)]
        self._least_other = min(self._lengths[1 - side], default=0)

    def _from(self, room: list[int]) -> int:
        """Returns the position of the first row that may fit into `room`.

        From this position on, the length by which the list is sorted fits. The other length may not fit.
        """
        # lengths 7 5 5 2 and room 5: keys -7 -5 -5 -2, so position 1. If even the smallest other length (the
        # target length in the input list) does not fit, no row fits, and the result is the end of the list.
        if room[1 - self._side] < self._least_other:
            return len(self._keys)
        return bisect.bisect_left(self._keys, -room[self._side])

    def first(self, room: list[int]) -> list[tuple["_Decreasing", int]]:
        """Finds the first row whose input and target fit into `room`.

        Returns:
            [(self, position of the row)], or [] if no row fits.
        """
        other, other_room = self._lengths[1 - self._side], room[1 - self._side]
        for k in range(self._from(room), len(other)):
            if other[k] <= other_room:
                return [(self, k)]
        return []

    def some(self, room: list[int]) -> tuple[range, list[int], list[int]]:
        """Returns the positions, input lengths and target lengths of about 24 candidate rows for `room`.

        The candidates are spread evenly over the rows that fit by the length that sorts this list. Their other
        length may be too long.
        """
        start = self._from(room)
        step = max(1, (len(self._keys) - start) // CANDIDATES)
        inputs, targets = self._lengths
        return range(start, len(self._keys), step), inputs[start::step], targets[start::step]

    def take(self, k: int) -> tuple[int, int, int]:
        """Removes the row at position k of the list, and returns (index in `sizes`, input length, target length)."""
        self._keys.pop(k)
        inputs, targets = self._lengths
        return self._index.pop(k), inputs.pop(k), targets.pop(k)


def _last_two(
    lists: Sequence[_Decreasing], room: list[int], worth: np.ndarray
) -> list[tuple[_Decreasing, int]]:
    """Returns (list, position) of the one or two rows that fill the packed row best, or [] if none fits.

    Considers only the rows that `_Decreasing.some` returns. If both rows are in one list, the one with the higher
    position comes first: removing it does not change the position of the other.
    """
    (places, inputs, targets), (more_places, more_inputs, more_targets) = (
        waiting.some(room) for waiting in lists
    )
    count = len(places) + len(more_places)
    if not count:
        return []
    both_inputs = _each_two(inputs + more_inputs)
    both_targets = _each_two(targets + more_targets)
    value = both_inputs * worth[0] + both_targets * worth[1]
    value *= (both_inputs <= room[0]) & (both_targets <= room[1])  # 0 for pairs that do not fit
    best = int(value.argmax())
    if not value.item(best):
        return []
    first = len(places)
    # the flat index `best` means the pair divmod(best, count); on the diagonal, both indices are the same row
    return [
        (lists[0], places[i]) if i < first else (lists[1], more_places[i - first])
        for i in sorted({*divmod(best, count)}, reverse=True)
    ]


def _each_two(lengths: list[int]) -> np.ndarray:
    """Returns the sum of each pair of n lengths, [n, n] float64. The diagonal holds the single lengths.

    Example: `_each_two([1, 5])` is [[1, 6], [6, 5]].
    """
    single = np.array(lengths, np.float64)
    sums = np.add.outer(single, single)
    sums.reshape(-1)[:: len(single) + 1] = single
    return sums


def choose_row_counts(
    probes: Sequence[int], bound: int, row_multiple: int, *, num_shards: int = 1
) -> tuple[int, ...]:
    """Returns the row counts that a shard's block may have: at most four, ascending.

    A block gets the smallest count into which all blocks of its batch fit.

    Example: `choose_row_counts([4, 4, 4, 7], bound=20, row_multiple=2)` is (4, 8, 10, 20).

    Args:
        probes: for each of several random shards, the number of packed rows that it needed.
        bound: number of packed rows that no shard can exceed.
        row_multiple: every returned count is a multiple of it.
        num_shards: number of shards in a batch.
    """
    # few counts, since each is another shape to compile. The third lies one or two standard deviations above the
    # largest probe; the last, `bound`, is far larger and hardly ever needed
    used = np.sort(np.asarray(probes, np.int64))
    # The fullest of several shards lies further above the mean. With this factor, only one batch in some
    # thousands needs the fourth count.
    spread = used.std() * (1 + math.log10(num_shards) / 2)
    third = round_up(used[-1] + max(1, int(np.ceil(spread))), row_multiple)
    if num_shards > 1:
        # random batches of `num_shards` probes: the fullest of each
        used = np.random.default_rng(0).choice(used, (PROBES, num_shards)).max(1)
    rounded = np.array([round_up(count, row_multiple) for count in used.tolist()])
    values = np.unique(rounded)
    # mean row count for each choice of the first two counts, a <= b, if each probe gets the smallest of a, b
    # and `third` into which it fits
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
    """Returns the smallest multiple of `multiple` that is at least `value`."""
    return math.ceil(value / multiple) * multiple


def most_rows(loads: np.ndarray, rows_each: np.ndarray, batch_size: int) -> int:
    """Returns an upper bound on the packed rows that `first_fit` needs for any `batch_size` of the examples.

    The load of an encoding is its input length as a fraction of a packed row's input length, plus the same
    fraction for its targets.

    Args:
        loads: sum of the loads of each example's encodings, [examples]. An example that a batch may contain twice
            is listed twice.
        rows_each: number of encodings of each example, [examples].
        batch_size: number of examples in a batch.
    """
    # the worst batch has the heaviest examples
    heaviest = np.partition(loads, -batch_size)[-batch_size:] if len(loads) > batch_size else loads
    # `first_fit` opens a packed row only when nothing fits into the current one, so two consecutive packed rows
    # have a load above 1, and m packed rows above (m - 1) / 2. m < 2 load + 1 is m <= ceil(2 load); the small
    # summand covers rounding errors of the sum
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
    """Returns a group of `count` rows of padding.

    Each option adds an array with a value for each target token. `shared` adds the token's encoder segment,
    `several_tasks` its task index, and `pairs` the index of its example within the packed row.
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
    """Writes each token of the rows into its cell of a group.

    Args:
        group: arrays of `empty_group`, filled in place.
        inputs: input ids of all rows, one row after the other, [input tokens].
        targets: decoder ids in the same order, with decoder prefixes, [decoder tokens].
        tasks, objectives, weights: task index, objective index and loss weight of each decoder token,
            [decoder tokens].
    """
    # Segments are numbered from left to right. So if each target has its own encoding, its encoder segment and
    # its decoder segment have the same number.
    # An array [rows, width] is filled through its flat view: cell = row * width + column.
    # encoder: only the first row of each encoding, since the other rows read the same encoding
    of = encodings.of_row[encodings.is_first]
    lengths, width = encodings.sizes[of, 0], group["encoder_segment_ids"].shape[1]
    inputs = inputs[np.repeat(encodings.is_first, encodings.row_sizes[:, 0])]
    cells = ranges(packing.row[of] * width + packing.input_start[of], lengths)
    np.put(group["encoder_input_tokens"], cells, inputs)
    np.put(group["encoder_segment_ids"], cells, np.repeat(packing.segment[of], lengths))

    # decoder: the targets of all rows, each `offset` columns to the right of its encoding's start
    of, lengths = encodings.of_row, encodings.row_sizes[:, 1]
    row, start = packing.row[of], packing.target_start[of] + encodings.offset
    cells = ranges(row * group["decoder_segment_ids"].shape[1] + start, lengths)
    # teacher forcing: each decoder input is the previous target; targets 7 1 | 8 9 1 of two segments have
    # inputs 0 7 | 0 8 9
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
    """Numbers the examples of each packed row from 1, and returns the number of each row's example, [rows].

    Examples with several targets come first. Their numbers are at most half the target length of a packed row,
    since each of these examples has at least two targets.
    """
    _, first, of, count = np.unique(
        places, return_index=True, return_inverse=True, return_counts=True
    )
    # sort by column, with the examples that have a single target after all others
    key = start[first] + (count == 1) * (start.max(initial=0) + 1)
    return _numbers_within(row[first], key)[of]


def _numbers_within(group: np.ndarray, key: np.ndarray) -> np.ndarray:
    """Returns each element's 1-based rank by ascending `key` among the elements with the same `group`, [elements].

    Example: `_numbers_within([0, 1, 0], [9, 5, 2])` is [2, 1, 1].
    """
    # sorted by group, a row's rank is 1 + its index - the index of the first row of its group
    order = np.lexsort((key, group))
    number = np.empty_like(group)
    number[order] = np.arange(1, len(group) + 1) - np.searchsorted(group[order], group[order])
    return number
