"""Computes the batch of a step, as a pure function of (data, seed, step).

`sampler.py` draws the rows of a step, and `packing.py` writes their tokens into arrays.
"""

import collections
import copy
import dataclasses
import functools
import itertools
import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from stepdistill_jax.batches.packing import (
    PROBED_ROWS,
    PROBES,
    Encodings,
    Group,
    Packing,
    choose_row_counts,
    empty_group,
    first_fit,
    most_rows,
    round_up,
    scatter,
)
from stepdistill_jax.batches.sampler import (
    ExampleIds,
    Rows,
    Sampler,
    TokenTable,
    nested_pools,
    rows_of,
    token_tables,
)
from stepdistill_jax.errors import InputError
from stepdistill_jax.runtime.checks import keep, number, whole
from stepdistill_jax.tasks.task_data import TaskData

Batch = tuple[Group, ...]

SHARD_EXAMPLES = 512  # larger shards pack no better


class Packed(NamedTuple):
    """The rows of a shard that go into one group (one set of arrays), packed or padded.

    Attributes:
        rows: the rows, listed by table; may be empty.
        encodings: the encoded inputs of these rows; None without rows.
        packing: positions of the encodings in the shard's block of the arrays; None without rows.
    """

    rows: Rows
    encodings: Encodings | None = None
    packing: Packing | None = None

    @property
    def num_rows(self) -> int:
        """Number of packed rows of this group, without rows that are only padding."""
        return 0 if self.packing is None else self.packing.num_rows


Shard = tuple[Packed, ...]  # by group


@dataclasses.dataclass(frozen=True)
class Batches:
    """The batches of a run: `batches(step)` is a step's global batch, the same in every process.

    A row is an input with one target. An example has a row for each objective. If the objective reads a rationale,
    the example has a row for each of its rationales. With `TaskData.sample_rationales`, it has a row for only one
    of them, which is drawn in each epoch.

    Many rows share a packed row, which is a row of the batch's arrays. The step's examples are split into shards,
    and each shard is packed into its own block of packed rows. All blocks of a batch have the same size.

    Two packed examples, where objective 1 is the label and objective 2 the rationale. The second example has weight
    0.5 and no rationale:

        encoder_input_tokens   20  5  1 21  5  1 20  6  1  0
        encoder_segment_ids     1  1  1  2  2  2  3  3  3  0
        decoder_target_tokens   7  1  8  9  1  7  1  0
        decoder_input_tokens    0  7  0  8  9  0  7  0
        decoder_segment_ids     1  1  2  2  2  3  3  0
        decoder_objective_ids   1  1  2  2  2  1  1  0
        decoder_loss_weights    1  1  1  1  1 .5 .5  0

    With `share_encoding`, an example's targets read the same encoder segment: `decoder_encoder_segment_ids`. Here,
    the target of objective 2 begins with the decoder prefix 9, a token without loss:

        encoder_input_tokens        20  5  1 20  6  1
        encoder_segment_ids          1  1  1  2  2  2
        decoder_target_tokens        7  1  9  8  9  1  7  1
        decoder_input_tokens         0  7  0  9  8  9  0  7
        decoder_segment_ids          1  1  2  2  2  2  3  3
        decoder_encoder_segment_ids  1  1  1  1  1  1  2  2
        decoder_objective_ids        1  1  0  2  2  2  1  1
        decoder_loss_weights         1  1  0  1  1  1 .5 .5

    If the data has several parts, `decoder_task_ids` has each target token's part, from 1.

    With `pairs`, `decoder_example_ids` has each target token's example within the packed row, from 1. Examples
    with several targets have the lowest ids:

        decoder_target_tokens        7  1  7  1  8  9  1  0
        decoder_segment_ids          1  1  2  2  3  3  3  0
        decoder_example_ids          2  2  1  1  1  1  1  0

    Attributes:
        data: token stores and objectives.
        batch_size: number of examples in a step.
        input_length: maximum number of tokens of an input. A truncated input keeps its end of sequence.
        target_length: the same for a target with its decoder prefix.
        seed: seed of the order, of the examples in use, and of the sampled rationales.
        pack: if False, rows are padded instead of packed. The arrays then form one group for each objective and
            variant (index of a rationale) or, with `pairs`, a single group. In each group, row i of a block belongs
            to the i-th example of the shard.
        row_multiple: the number of packed rows in a batch is a multiple of it.
        data_fraction: share of the examples to use. With the same seed, a smaller share is a subset of a larger one.
        row_lengths: input length and target length of a packed row. (0, 0) means `input_length` and
            `target_length` or, with `pairs`, lengths into which every example fits.
        pairs: whether all targets of an example are in the same packed row, so that a loss can compare them.
        loss_mean: `token` or `example`. With `example`, a target's total loss weight does not depend on its length.
        shuffle: if False, the batches take each example once and in order, in `num_steps` steps. The last step may
            have fewer examples.
    """

    data: TaskData
    batch_size: int
    input_length: int
    target_length: int
    seed: int
    pack: bool = True
    row_multiple: int = 1
    data_fraction: float = 1.0
    shuffle: bool = True
    loss_mean: str = "token"
    row_lengths: tuple[int, int] = (0, 0)
    pairs: bool = False

    def __post_init__(self):
        keep(self, whole, "batch_size", "input_length", "target_length", "row_multiple", least=1)
        keep(self, number, "data_fraction", above=0, most=1)
        for objective, prefix in zip(self.data.objectives, self.data.decoder_prefixes, strict=True):
            if len(prefix) >= self.target_length:
                raise InputError(
                    f"`target_length={self.target_length}`: it leaves no room for a target of"
                    f" {objective.name} after its decoder_prefix of {len(prefix)} tokens"
                )
        for store, pool in enumerate(self._sampler.pools):
            if not len(pool):
                raise InputError(
                    f"{self.data.name}: split {self.data.split} of {self.data.parts[store].name}"
                    " has no example with a target"
                )
        if self.pairs and not self._has_pairs():
            raise InputError(
                f"`extra_loss`: it compares {' and '.join(o.name for o in self.data.objectives[:2])},"
                f" but no example in {self.data.split} of {self.data.name} has targets for both"
            )
        if self.row_lengths == (0, 0):
            lengths = (self.input_length, self.target_length)
            if self.pairs:
                longest = self.longest()
                lengths = (max(lengths[0], longest[0]), max(lengths[1], longest[1]))
            object.__setattr__(self, "row_lengths", lengths)
        self._check_row_lengths()

    def _check_row_lengths(self) -> None:
        names = ("row_input_length", "row_target_length")
        for name, length, longest in zip(names, self.row_lengths, self.longest(), strict=True):
            if self.pack and length < longest:
                raise InputError(
                    f"`{name}={length}`: {self.data.split} of {self.data.name} has an example of"
                    f' {longest} tokens; set it to at least {longest}, or to "auto"'
                )

    def with_row_lengths(self, row_lengths: tuple[int, int]) -> "Batches":
        """Returns a copy of these batches whose packed rows have other lengths.

        Raises:
            InputError: an example is longer than the new lengths.
        """
        # a shallow copy keeps the cached tables and the sampler, which do not depend on the lengths
        other = copy.copy(self)
        for name in ("lengths", "row_counts"):  # cached properties that depend on the lengths
            other.__dict__.pop(name, None)
        object.__setattr__(other, "row_lengths", row_lengths)
        other._check_row_lengths()
        return other

    @property
    def shared(self) -> bool:
        """True if the input of an example is encoded once for all its targets."""
        return self.pack and self.data.shares_encoding

    @functools.cached_property
    def _tables(self) -> tuple[TokenTable, ...]:
        return token_tables(self.data, self.input_length, self.target_length, self.loss_mean)

    def _tables_of(self, store: int) -> list[TokenTable]:
        return [table for table in self._tables if table.store == store]

    @functools.cached_property
    def _usable(self) -> tuple[np.ndarray, ...]:
        """The examples of each store that have at least one target."""
        return tuple(
            np.flatnonzero(np.any([t.present for t in self._tables_of(s)], axis=0))
            for s in range(len(self.data.stores))
        )

    # draws only from the pools; `row_counts` uses all usable examples, so that fractions share shapes
    @functools.cached_property
    def _sampler(self) -> Sampler:
        pools = nested_pools(self._usable, self.data_fraction, self.seed)
        return Sampler(pools, self.data.rates, self.seed, self.shuffle)

    def _has_pairs(self) -> bool:
        """Returns whether any example in use has targets for both objective 1 and objective 2."""
        # two tables of one store, for objectives 1 and 2, and an example in use that has a row in each
        pairs = itertools.product(self._tables, self._tables)
        return any(
            (one.store, one.objective, other.objective) == (other.store, 1, 2)
            and bool((one.present & other.present)[self._sampler.pools[one.store]].any())
            for one, other in pairs
        )

    @property
    def num_examples(self) -> int:
        """Number of examples that the batches are drawn from, in all stores together."""
        return sum(len(pool) for pool in self._sampler.pools)

    @property
    def steps_per_epoch(self) -> float:
        """Number of steps in an epoch, which may be a fraction."""
        return self.num_examples / self.batch_size

    @property
    def num_shards(self) -> int:
        """Number of shards of a batch: one for each full 512 examples of `batch_size`, but at least 1."""
        return max(1, self.batch_size // SHARD_EXAMPLES)

    @property
    def _shard_size(self) -> int:
        """Number of examples in the largest shard."""
        return -(-self.batch_size // self.num_shards)

    @property
    def num_steps(self) -> int:
        """Number of steps in one pass over the examples, if `shuffle` is False."""
        return -(-self.num_examples // self.batch_size)

    @functools.cached_property
    def row_counts(self) -> tuple[int, ...]:
        """The row counts that a packed batch may have: at most four, ascending.

        Each batch gets the smallest count into which it fits. Any batch of this data fits into the last.
        """
        # independent of the seed and, unless it leaves few examples, of `data_fraction`, so that runs with other
        # seeds and fractions share their compiled steps
        loads, rows_each = [], []
        for store, usable in enumerate(self._usable):
            # A shard may hold an example once for each epoch that it touches. s consecutive draws from n
            # examples touch at most (s - 1) // n + 2 epochs: 5 draws from 3 examples at most 3, as 1 + 3 + 1.
            epochs = (self._shard_size - 1) // len(self._sampler.pools[store]) + 2
            places, sizes = self._units(self._all_encodings(store))
            load = np.bincount(places, (sizes / self.row_lengths).sum(1))
            loads.append(np.repeat(load[usable], epochs))
            rows_each.append(np.repeat(np.bincount(places)[usable], epochs))
        bound = most_rows(np.concatenate(loads), np.concatenate(rows_each), self._shard_size)
        counts = choose_row_counts(
            self.probe(PROBES), bound, self._block_multiple, num_shards=self.num_shards
        )
        return tuple(self.num_shards * count for count in counts)

    @property
    def _block_multiple(self) -> int:
        """Smallest block row count for which the batch's row count is a multiple of `row_multiple`.

        Example: 3 for 4 shards and a `row_multiple` of 6. Four blocks of 3 rows have 12 rows, a multiple of 6.
        """
        return self.row_multiple // math.gcd(self.row_multiple, self.num_shards)

    def rounded(self, num_rows: int) -> int:
        """Returns the row count of a batch whose fullest shard needs `num_rows` rows.

        All shards get the same number of rows. The row count of the batch is rounded up to a multiple of
        `row_multiple`.
        """
        return self.num_shards * round_up(num_rows, self._block_multiple)

    def longest(self) -> tuple[int, int]:
        """Returns the lengths of the longest input and of the longest target, after truncation.

        With `pairs`, an example counts as one row: its inputs are one long input, and its targets one long target.
        """
        return self._longest

    @functools.cached_property
    def _longest(self) -> tuple[int, int]:
        if self.pairs:
            inputs, targets = self.sizes().max(0, initial=1).tolist()
            return inputs, targets
        tables = self._tables
        inputs_of = [table.inputs.lengths[table.present] for table in tables]
        sides = (inputs_of, [table.decoder_lengths for table in tables])
        inputs, targets = (max(int(x.max(initial=0)) for x in side) for side in sides)
        return max(1, inputs), max(1, targets)

    def probe(self, count: int) -> list[int]:
        """Packs up to `count` random shards and returns the number of packed rows that each of them needs.

        The shards do not depend on `data_fraction`. They depend on `seed` only if rationales are sampled.
        """
        size = self._shard_size
        # fewer large shards, to save time
        # 128 shards of 256 examples with 3 tables: 98,304 rows <= 131,072, so all 128. Of 512 examples: 85
        most = count * PROBED_ROWS // (size * len(self._tables))
        count = min(count, max(1, count // 16, most))
        shares = np.asarray(self.data.rates, np.float64)
        if not self.shuffle:  # an evaluation takes each example once, whatever the rates are
            shares = np.array([len(usable) for usable in self._usable], np.float64)
        rng = np.random.default_rng(0)
        probes = []
        for _ in range(count):
            stores = rng.choice(len(shares), size, p=shares / shares.sum())
            indices = np.empty(size, np.int64)
            for store, usable in enumerate(self._usable):
                mine = stores == store
                indices[mine] = usable[rng.integers(len(usable), size=int(mine.sum()))]
            epochs = rng.integers(1 << 30, size=size)  # they decide only which rationale is sampled
            rows = self._rows(ExampleIds(stores, indices, epochs), self._tables)
            _, sizes = self._units(self._encodings(rows))
            probes.append(first_fit(sizes, self.lengths[0]).num_rows)
        return probes

    @functools.cached_property
    def lengths(self) -> tuple[tuple[int, int], ...]:
        """The input length and the target length of each group's rows."""
        if self.pack:
            return (self.row_lengths,)
        if self.pairs:
            return (self.longest(),)

        # of the complete data, so that all batches of a group have one shape
        def longest(lengths: Iterable[np.ndarray]) -> int:
            return max(1, *(int(of_table.max(initial=0)) for of_table in lengths))

        return tuple(
            (longest(t.inputs.lengths for t in tables), longest(t.decoder_lengths for t in tables))
            for tables in self._groups
        )

    @functools.cached_property
    def _groups(self) -> list[list[TokenTable]]:
        """The tables of each group.

        Packed batches and batches with `pairs` have a single group. All other batches have a group for each
        combination of objective and variant (index of a rationale).
        """
        if self.pack or self.pairs:
            return [list(self._tables)]
        # An example with two rationales has rows in the groups (label, 0), (rationale, 0), (rationale, 1). If
        # one rationale is sampled, a single group takes it, whichever variant it is.
        groups = collections.defaultdict(list)
        for table in self._tables:
            variant = 0 if self.data.sample_rationales else table.variant
            groups[table.objective, variant].append(table)
        return [groups[key] for key in sorted(groups)]

    def examples(self, step: int) -> ExampleIds:
        """Returns the examples of a step, in the order in which they are drawn."""
        first = step * self.batch_size
        return self._sampler(np.arange(first, first + self.batch_size))

    def __call__(self, step: int) -> Batch:
        """Returns the global batch of a step."""
        shards = [self.shard(step, number) for number in range(self.num_shards)]
        return self.arrays(shards, max(shard[0].num_rows for shard in shards))

    def shard(self, step: int, number: int) -> Shard:
        """Returns the packed rows of one shard of a step."""
        # shard k of n takes the examples from k/n to (k+1)/n of the step: 10 examples and 3 shards are
        # split at 0, 3, 6 and 10
        first, end = (
            step * self.batch_size + n * self.batch_size // self.num_shards
            for n in (number, number + 1)
        )
        drawn = self._sampler(np.arange(first, end))
        each = zip(self._groups, self.lengths, strict=True)
        return tuple(self._packed(drawn, tables, lengths) for tables, lengths in each)

    def batch_rows(self, fullest: int) -> int:
        """Returns the number of rows in each group of a batch, over all shards.

        Args:
            fullest: number of rows that the batch's fullest shard needs.
        """
        # padded: a row for each example. Packed: the smallest row count into which the fullest shard fits
        if not self.pack:
            return self.rounded(self._shard_size)
        return next(c for c in self.row_counts if c >= self.num_shards * fullest)

    def arrays(self, shards: Sequence[Shard], fullest: int) -> Batch:
        """Returns each group's arrays, with one block of rows for each given shard, in order.

        Args:
            shards: some or all shards of a step.
            fullest: number of rows that the step's fullest shard needs.
        """
        count, features = self.batch_rows(fullest) // self.num_shards, self._features
        batch = tuple(empty_group(count * len(shards), *of, **features) for of in self.lengths)
        for place, shard in enumerate(shards):
            block = slice(place * count, (place + 1) * count)
            # rows of a block that the shard does not fill stay padding: zeros
            for group, packed in zip(batch, shard, strict=True):
                if packed.encodings is None or packed.packing is None:
                    continue
                # views, which are written in place
                own = {name: array[block] for name, array in group.items()}
                # five lists of arrays by table: inputs, targets, tasks, objectives, weights
                tokens = zip(*(table.tokens(e) for table, e, _ in packed.rows), strict=True)
                scatter(own, packed.encodings, packed.packing, *map(np.concatenate, tokens))
        return batch

    @property
    def _features(self) -> dict[str, bool]:
        several_tasks = len(self.data.parts) > 1
        return {"shared": self.shared, "several_tasks": several_tasks, "pairs": self.pairs}

    def _packed(
        self, drawn: ExampleIds, tables: Sequence[TokenTable], lengths: tuple[int, int]
    ) -> Packed:
        """Packs the rows that the drawn examples have in `tables`, or pads them if `pack` is False."""
        rows = self._rows(drawn, tables)
        if not rows:
            return Packed(rows)
        encodings = self._encodings(rows)
        places, sizes = self._units(encodings)
        packing = first_fit(sizes, lengths) if self.pack else Packing.padded(places)
        return Packed(rows, encodings, packing.of_encodings(encodings) if self.pairs else packing)

    def _rows(self, drawn: ExampleIds, tables: Sequence[TokenTable]) -> Rows:
        return rows_of(drawn, tables, self.seed if self.data.sample_rationales else None)

    def _encodings(self, rows: Rows) -> Encodings:
        return self._encodings_of(
            (t.inputs.lengths[e], t.decoder_lengths[e], places) for t, e, places in rows
        )

    def _encodings_of(self, rows: Iterable[tuple[np.ndarray, np.ndarray, np.ndarray]]) -> Encodings:
        """Returns the encodings of the given rows.

        Args:
            rows: tuples of three arrays with one element for each row: (input lengths, decoder lengths, example
                indices).
        """
        inputs, targets, places = map(np.concatenate, zip(*rows, strict=True))
        sizes = np.stack([inputs, targets], 1)
        # with pairs, all targets of an example fit into a row (`longest`): no input is encoded twice
        room = int(targets.sum()) if self.pairs else self.row_lengths[1]
        return Encodings.of(sizes, places, room, shared=self.shared)

    def _units(self, encodings: Encodings) -> tuple[np.ndarray, np.ndarray]:
        """Returns the example indices and the sizes (input and decoder length) of the units to pack.

        A unit is an example if `pairs` is set, otherwise an encoding.
        """
        return encodings.of_examples() if self.pairs else (encodings.places, encodings.sizes)

    def _all_encodings(self, store: int) -> Encodings:
        """Returns the encodings of a store's examples. `places` are the examples' indices in the store.

        With `pairs` and sampled rationales, only an example's longest rationale is included.
        """
        groups = collections.defaultdict(list)
        for column, table in enumerate(self._tables_of(store)):
            one_of_them = self.pairs and self.data.sample_rationales
            groups[table.objective if one_of_them else column].append(table)
        rows = []
        for tables in groups.values():
            # usually one table; of sampled rationales the longest, since a step may draw any of them
            inputs = np.max([np.where(t.present, t.inputs.lengths, 0) for t in tables], axis=0)
            targets = np.max([t.decoder_lengths for t in tables], axis=0)
            examples = np.flatnonzero(targets)
            rows.append((inputs[examples], targets[examples], examples))
        return self._encodings_of(rows)

    def sizes(self) -> np.ndarray:
        """Returns the input and target lengths of all units to pack, [units, 2].

        With `pairs`, a unit is a complete example. Otherwise, a unit is an encoded input with its targets.
        """
        stores = range(len(self.data.stores))
        return np.concatenate([self._units(self._all_encodings(store))[1] for store in stores])

    def cut_counts(self) -> dict[str, dict[str, int]]:
        """Returns, for each objective, how many inputs and targets of the examples in use are truncated."""
        counts = {o.name: {"inputs": 0, "targets": 0} for o in self.data.objectives}
        for table in self._tables:
            pool = self._sampler.pools[table.store]
            pool = pool[table.present[pool]]
            name = self.data.objectives[table.objective - 1].name
            counts[name]["inputs"] += int(table.inputs.is_truncated[pool].sum())
            counts[name]["targets"] += int(table.targets.is_truncated[pool].sum())
        return counts


def filled_rows(batch: Batch) -> int:
    """Returns the number of rows of a batch, over all groups, that have at least one input token."""
    return sum(int((group["encoder_segment_ids"] > 0).any(1).sum()) for group in batch)
