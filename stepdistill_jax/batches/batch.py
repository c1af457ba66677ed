"""The batch as a pure function of (data, seed, step): which examples, and where their tokens go.

`sampler.py` draws the rows of a step, `packing.py` puts their tokens into arrays.
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

SHARD_EXAMPLES = 512  # more at once pack no better, and cost as much


class Packed(NamedTuple):
    """A group of a shard before its arrays are made.

    Attributes:
        rows: its examples by table; none in a group without tokens.
        encodings, packing: where their tokens go; None without tokens.
    """

    rows: Rows
    encodings: Encodings | None = None
    packing: Packing | None = None

    @property
    def num_rows(self) -> int:
        """Rows that hold tokens."""
        return 0 if self.packing is None else self.packing.num_rows


Shard = tuple[Packed, ...]  # by group


@dataclasses.dataclass(frozen=True)
class Batches:
    """`batches(step)` is the global batch of a step, the same in every process and in any order.

    Its examples are packed in `num_shards` shards, of about as many consecutive ones each, and the rows
    of a shard are a block of the batch's: shard i of n has the rows from i/n to (i+1)/n. All blocks
    have as many rows as the fullest shard needs, rounded up. So the batch does not depend on the number
    of processes, and each of them packs the shards whose rows its devices own (`batches/host.py`).

    A step takes `batch_size` examples, each with the rows of all its objectives; an absent target
    leaves its row out, and several rationales make several rows (or one that is drawn anew in each
    epoch, `TaskData.sample_rationales`). Examples come in a permutation per epoch, drawn from (seed, epoch).

    Two examples, the second of weight 0.5 and without a rationale (objective 2), packed:

        encoder_input_tokens   20  5  1 21  5  1 20  6  1  0
        encoder_segment_ids     1  1  1  2  2  2  3  3  3  0
        decoder_target_tokens   7  1  8  9  1  7  1  0
        decoder_input_tokens    0  7  0  8  9  0  7  0
        decoder_segment_ids     1  1  2  2  2  3  3  0
        decoder_objective_ids   1  1  2  2  2  1  1  0
        decoder_loss_weights    1  1  1  1  1 .5 .5  0

    Where all objectives have one input (`share_encoding`), an example's targets read one encoder
    segment; each is a decoder segment that says which. The same examples, objective 2 with the
    decoder prefix 9, whose tokens count nowhere:

        encoder_input_tokens        20  5  1 20  6  1
        encoder_segment_ids          1  1  1  2  2  2
        decoder_target_tokens        7  1  9  8  9  1  7  1
        decoder_input_tokens         0  7  0  9  8  9  0  7
        decoder_segment_ids          1  1  2  2  2  2  3  3
        decoder_encoder_segment_ids  1  1  1  1  1  1  2  2
        decoder_objective_ids        1  1  0  2  2  2  1  1
        decoder_loss_weights         1  1  0  1  1  1 .5 .5

    Of data with several parts each target token also has the number of its part, from 1, in
    `decoder_task_ids`.

    With `pairs` all rows of an example lie side by side in one packed row, or in one padded row, and
    each target token has the number of its example in that row. Examples with several targets are
    numbered first, here the first of the two:

        decoder_target_tokens        7  1  7  1  8  9  1  0
        decoder_segment_ids          1  1  2  2  3  3  3  0
        decoder_example_ids          2  2  1  1  1  1  1  0

    Attributes:
        data: token stores and objectives.
        batch_size: examples a step.
        input_length, target_length: tokens of an input and of a target (with its decoder prefix);
            longer ones are truncated, the end of sequence stays as their last id.
        seed: of the order, and of which examples a `data_fraction` keeps.
        pack: False gives one group for each objective (with `pairs` one for all), row i for the
            i-th example, as long as its longest row, and encodes an input anew for each of them.
        row_multiple: row counts are multiples of it (devices that share a batch x microbatches).
        data_fraction: share of the examples that is used; a smaller share is a subset of a larger.
        row_lengths: input and target tokens of a packed row (`batches/row_lengths.py` has
            what they cost); (0, 0) is `input_length` and `target_length`, with `pairs` no less than
            the longest example.
        pairs: a row has all targets of its examples, for a loss that compares them.
        loss_mean: `example` divides a row's weight by the number of its target tokens.
        shuffle: False takes the examples in order, once, for evaluation: `num_steps` steps, the
            last with fewer examples in the same shapes.
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
                    f"`target_length={self.target_length}`: nothing is left for a target of"
                    f" {objective.name} after its decoder_prefix of {len(prefix)} tokens"
                )
        for store, pool in enumerate(self._sampler.pools):
            if not len(pool):
                raise InputError(
                    f"{self.data.name}: store {store + 1} of split {self.data.split} has no"
                    " example with a target"
                )
        if self.pairs and not self._has_pairs():
            raise InputError(
                f"`extra_loss`: {self.data.split} of {self.data.name} has no example with targets of"
                f" both {' and '.join(o.name for o in self.data.objectives[:2])}, which it pairs"
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
                    f' {longest} tokens; give at least that, or "auto"'
                )

    def with_row_lengths(self, row_lengths: tuple[int, int]) -> "Batches":
        """Returns the same batches in rows of these lengths, without another look at the examples.

        Raises:
            InputError: an example is longer.
        """
        other = copy.copy(self)
        for name in ("lengths", "row_counts"):  # the cached properties that depend on them
            other.__dict__.pop(name, None)
        object.__setattr__(other, "row_lengths", row_lengths)
        other._check_row_lengths()
        return other

    @property
    def shared(self) -> bool:
        """Whether the targets of an example read one encoding of its input."""
        return self.pack and self.data.shares_encoding

    @functools.cached_property
    def _tables(self) -> tuple[TokenTable, ...]:
        return token_tables(self.data, self.input_length, self.target_length, self.loss_mean)

    def _tables_of(self, store: int) -> list[TokenTable]:
        return [table for table in self._tables if table.store == store]

    @functools.cached_property
    def _usable(self) -> tuple[np.ndarray, ...]:
        """For each store the examples with at least one target."""
        return tuple(
            np.flatnonzero(np.any([t.present for t in self._tables_of(s)], axis=0))
            for s in range(len(self.data.stores))
        )

    @functools.cached_property
    def _sampler(self) -> Sampler:
        pools = nested_pools(self._usable, self.data_fraction, self.seed)
        return Sampler(pools, self.data.rates, self.seed, self.shuffle)

    def _has_pairs(self) -> bool:
        """Whether an example in use has a target of each of the first two objectives."""
        pairs = itertools.product(self._tables, self._tables)
        return any(
            (one.store, one.objective, other.objective) == (other.store, 1, 2)
            and bool((one.present & other.present)[self._sampler.pools[one.store]].any())
            for one, other in pairs
        )

    @property
    def num_examples(self) -> int:
        """Examples in use, of all stores together."""
        return sum(len(pool) for pool in self._sampler.pools)

    @property
    def steps_per_epoch(self) -> float:
        """Steps in which as many examples are taken as there are."""
        return self.num_examples / self.batch_size

    @property
    def num_shards(self) -> int:
        """Shards of a batch, by its size alone; one of fewer than 1,024 examples."""
        return max(1, self.batch_size // SHARD_EXAMPLES)

    @property
    def _shard_size(self) -> int:
        """Examples of the largest shard."""
        return -(-self.batch_size // self.num_shards)

    @property
    def num_steps(self) -> int:
        """Steps that take each example once, with `shuffle` False."""
        return -(-self.num_examples // self.batch_size)

    @functools.cached_property
    def row_counts(self) -> tuple[int, ...]:
        """Packed row counts, ascending, at most four; the last holds any batch of this data.

        They do not depend on the seed, and on `data_fraction` only where it leaves fewer examples
        than a batch takes (the last count is larger then): runs that differ in these share their
        compiled steps.
        """
        loads, rows_each = [], []
        for store, usable in enumerate(self._usable):
            # a shard that crosses the end of an epoch may hold an example once for each
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
        """What a block's rows are a multiple of, so that the batch's are one of `row_multiple`."""
        return self.row_multiple // math.gcd(self.row_multiple, self.num_shards)

    def rounded(self, num_rows: int) -> int:
        """Returns the rows of a batch whose shards need `num_rows` each, rounded up."""
        return self.num_shards * round_up(num_rows, self._block_multiple)

    def longest(self) -> tuple[int, int]:
        """Returns the tokens of the longest input and of the longest target, truncated.

        With `pairs` these are the inputs and the targets of an example together; of rationales that
        are sampled, the longest counts.
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
        """Returns the packed rows that each of `count` random shards needs, or of fewer large ones.

        They are drawn in the same way for any `seed` and `data_fraction`, which of several
        rationales is sampled excepted. More than `count` x 1,024 rows before packing would take
        seconds: then there are fewer shards, a sixteenth at least.
        """
        size = self._shard_size
        most = count * PROBED_ROWS // (size * len(self._tables))
        count = min(count, max(1, count // 16, most))
        shares = np.asarray(self.data.rates, np.float64)
        if not self.shuffle:
            shares = np.array([len(usable) for usable in self._usable], np.float64)
        rng = np.random.default_rng(0)
        probes = []
        for _ in range(count):
            stores = rng.choice(len(shares), size, p=shares / shares.sum())
            indices = np.empty(size, np.int64)
            for store, usable in enumerate(self._usable):
                mine = stores == store
                indices[mine] = usable[rng.integers(len(usable), size=int(mine.sum()))]
            epochs = rng.integers(1 << 30, size=size)
            rows = self._rows(ExampleIds(stores, indices, epochs), self._tables)
            _, sizes = self._units(self._encodings(rows))
            probes.append(first_fit(sizes, self.lengths[0]).num_rows)
        return probes

    @functools.cached_property
    def lengths(self) -> tuple[tuple[int, int], ...]:
        """(input, target) length of each group."""
        if self.pack:
            return (self.row_lengths,)
        if self.pairs:
            return (self.longest(),)

        def longest(lengths: Iterable[np.ndarray]) -> int:
            return max(1, *(int(of_table.max(initial=0)) for of_table in lengths))

        return tuple(
            (longest(t.inputs.lengths for t in tables), longest(t.decoder_lengths for t in tables))
            for tables in self._groups
        )

    @functools.cached_property
    def _groups(self) -> list[list[TokenTable]]:
        """The tables of each group: all of them or, padded, the ones with one row per example."""
        if self.pack or self.pairs:
            return [list(self._tables)]
        groups = collections.defaultdict(list)
        for table in self._tables:
            variant = 0 if self.data.sample_rationales else table.variant
            groups[table.objective, variant].append(table)
        return [groups[key] for key in sorted(groups)]

    def examples(self, step: int) -> ExampleIds:
        """The examples of a step, in the order in which they are drawn."""
        first = step * self.batch_size
        return self._sampler(np.arange(first, first + self.batch_size))

    def __call__(self, step: int) -> Batch:
        """The global batch of a step."""
        shards = [self.shard(step, number) for number in range(self.num_shards)]
        return self.arrays(shards, max(shard[0].num_rows for shard in shards))

    def shard(self, step: int, number: int) -> Shard:
        """Returns where the tokens of one shard of a step go, in its own rows."""
        first, end = (
            step * self.batch_size + n * self.batch_size // self.num_shards
            for n in (number, number + 1)
        )
        drawn = self._sampler(np.arange(first, end))
        each = zip(self._groups, self.lengths, strict=True)
        return tuple(self._packed(drawn, tables, lengths) for tables, lengths in each)

    def batch_rows(self, fullest: int) -> int:
        """Returns the rows of each group of a batch whose fullest shard needs so many."""
        if not self.pack:
            return self.rounded(self._shard_size)
        return next(c for c in self.row_counts if c >= self.num_shards * fullest)

    def arrays(self, shards: Sequence[Shard], fullest: int) -> Batch:
        """Returns the rows of some of a step's shards, block after block.

        Args:
            shards: of the step.
            fullest: rows that the fullest of all its shards needs, these or others.
        """
        count, features = self.batch_rows(fullest) // self.num_shards, self._features
        batch = tuple(empty_group(count * len(shards), *of, **features) for of in self.lengths)
        for place, shard in enumerate(shards):
            block = slice(place * count, (place + 1) * count)
            for group, packed in zip(batch, shard, strict=True):
                if packed.encodings is None or packed.packing is None:
                    continue
                own = {name: array[block] for name, array in group.items()}
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
        """One group of a shard: the rows drawn, the encodings they read, and where these lie."""
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
        """Those of rows by their input lengths, decoder lengths and places, each [rows]."""
        inputs, targets, places = map(np.concatenate, zip(*rows, strict=True))
        sizes = np.stack([inputs, targets], 1)
        # all targets of a pair fit into a row (`longest`), so its input is never encoded again
        room = int(targets.sum()) if self.pairs else self.row_lengths[1]
        return Encodings.of(sizes, places, room, shared=self.shared)

    def _units(self, encodings: Encodings) -> tuple[np.ndarray, np.ndarray]:
        """Places and sizes of what is packed as one: an encoding or, with `pairs`, an example."""
        return encodings.of_examples() if self.pairs else (encodings.places, encodings.sizes)

    def _all_encodings(self, store: int) -> Encodings:
        """Those of all examples of a store, each at the place of its number, with all rationales.

        With `pairs` and sampled rationales an example has but one, as in a step: as long as its longest.
        """
        groups = collections.defaultdict(list)
        for column, table in enumerate(self._tables_of(store)):
            one_of_them = self.pairs and self.data.sample_rationales
            groups[table.objective if one_of_them else column].append(table)
        rows = []
        for tables in groups.values():
            inputs = np.max([np.where(t.present, t.inputs.lengths, 0) for t in tables], axis=0)
            targets = np.max([t.decoder_lengths for t in tables], axis=0)
            examples = np.flatnonzero(targets)
            rows.append((inputs[examples], targets[examples], examples))
        return self._encodings_of(rows)

    def sizes(self) -> np.ndarray:
        """[units, 2] input and target length of what is packed as one, of all examples of the data."""
        stores = range(len(self.data.stores))
        return np.concatenate([self._units(self._all_encodings(store))[1] for store in stores])

    def cut_counts(self) -> dict[str, dict[str, int]]:
        """For each objective how many inputs and targets in use are longer than the lengths."""
        counts = {o.name: {"inputs": 0, "targets": 0} for o in self.data.objectives}
        for table in self._tables:
            pool = self._sampler.pools[table.store]
            pool = pool[table.present[pool]]
            name = self.data.objectives[table.objective - 1].name
            counts[name]["inputs"] += int(table.inputs.is_cut[pool].sum())
            counts[name]["targets"] += int(table.targets.is_cut[pool].sum())
        return counts


def filled_rows(batch: Batch) -> int:
    """Returns the number of rows that hold tokens."""
    return sum(int((group["encoder_segment_ids"] > 0).any(1).sum()) for group in batch)
