"""Chooses the examples of a step, and the rows of these examples.

The choice depends only on the data, the settings and the step. `Sampler` chooses the examples, and `rows_of` finds
their rows in each `TokenTable`.
"""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import NamedTuple, cast

import numpy as np

from stepdistill_jax.data.vocabulary import EOS_ID
from stepdistill_jax.tasks.task_data import TaskData
from stepdistill_jax.tasks.token_store import TokenRows

# The positions of a mixture are assigned to stores in blocks. A block takes a millisecond to draw. In each
# block, the number of positions of a store is its exact share, rounded to a whole number.
MIXTURE_BLOCK = 65_536


@dataclasses.dataclass(frozen=True)
class TruncatedRows:
    """Rows of ids, truncated to `most` tokens, with the end of sequence (id 1) kept.

    Example: with `most` 3, the row `5 6 7 1` becomes `5 6 1`, and `5 6 7 8` becomes `5 6 7`.
    """

    rows: TokenRows
    most: int

    @functools.cached_property
    def lengths(self) -> np.ndarray:
        """Number of tokens after truncation, [examples] int64."""
        return np.minimum(self.rows.lengths, self.most)

    @functools.cached_property
    def is_truncated(self) -> np.ndarray:
        """Whether each row is longer than `most`, [examples] bool."""
        return self.rows.lengths > self.most

    def used(self, examples: np.ndarray) -> np.ndarray:
        """Returns the index in `rows.ids` of each of the examples' tokens that truncation keeps, [tokens]."""
        return ranges(self.rows.starts[examples], self.lengths[examples])

    def ids(self, examples: np.ndarray) -> np.ndarray:
        """Returns the ids of the examples, one example after the other, [tokens] int32."""
        # the indices are an array, so `ids` is a copy: the store itself is not changed below
        ids, cut = self.rows.ids[self.used(examples)], self.is_truncated[examples]
        if cut.any():
            ends = self.rows.starts[examples] + self.rows.lengths[examples]
            last = self.rows.ids[ends[cut] - 1]  # before truncation
            at = np.cumsum(self.lengths[examples])[cut] - 1  # last token after truncation
            ids[at] = np.where(last == EOS_ID, EOS_ID, ids[at])
        return ids


@dataclasses.dataclass(frozen=True)
class TokenTable:
    """The truncated inputs and targets of a token store's examples, for one objective and one rationale variant.

    Attributes:
        store: index of the store, from 0.
        objective: index of the objective, from 1.
        variant: index of the rationale among the example's rationales, from 0.
        inputs, targets: token ids of each example. An empty target means that the example has no row here.
        prefix: ids of the objective's `decoder_prefix`.
        weights: loss weight of each example's target tokens, [examples] float32.
        token_weights: further factor of each token's loss weight, [tokens] float32; None means 1.
    """

    store: int
    objective: int
    variant: int
    inputs: TruncatedRows
    targets: TruncatedRows
    prefix: tuple[int, ...]
    weights: np.ndarray
    token_weights: np.ndarray | None

    @functools.cached_property
    def present(self) -> np.ndarray:
        """[examples] bool: True for the examples that have a row in this table."""
        return self.targets.lengths > 0

    @functools.cached_property
    def decoder_lengths(self) -> np.ndarray:
        """Number of prefix and target tokens of each example, [examples] int64; 0 where `present` is False."""
        return np.where(self.present, len(self.prefix) + self.targets.lengths, 0)

    def tokens(self, examples: np.ndarray) -> tuple[np.ndarray, ...]:
        """Returns the examples' tokens, one example after the other.

        Returns:
            Input ids, [input tokens].
            Decoder ids, [decoder tokens].
            Task indices, from 1, [decoder tokens].
            Objective indices, [decoder tokens]; 0 in a decoder prefix.
            Loss weights, [decoder tokens]; 0 in a decoder prefix.
        """
        ids, lengths = self.targets.ids(examples), self.targets.lengths[examples]
        objectives = np.full(len(ids), self.objective)
        weights = np.repeat(self.weights[examples], lengths)
        if self.token_weights is not None:
            weights *= self.token_weights[self.targets.used(examples)]
        if self.prefix:
            # np.insert takes indices of the old array: the first token of each target, repeated for each id
            # of the prefix; lengths [2, 3] and a prefix of 2 ids give [0, 0, 2, 2]
            at = np.repeat(np.cumsum(lengths) - lengths, len(self.prefix))
            ids = np.insert(ids, at, np.tile(self.prefix, len(examples)))
            objectives, weights = np.insert(objectives, at, 0), np.insert(weights, at, 0)
        return (
            self.inputs.ids(examples),
            ids,
            np.full(len(ids), self.store + 1),
            objectives,
            weights,
        )


def token_tables(
    data: TaskData, input_length: int, target_length: int, loss_mean: str
) -> tuple[TokenTable, ...]:
    """Returns a table for each column of each store. `Batches` explains the arguments."""
    tables = []
    for number, part in enumerate(data.parts):
        store = part.store
        for column, rows in zip(part.columns, store.rows, strict=True):
            prefix = data.decoder_prefixes[column.objective - 1]
            targets = TruncatedRows(rows["targets"], target_length - len(prefix))
            extra = cast(Mapping[str, np.ndarray], rows)  # only the optional entries are arrays
            weights, token_weights = _loss_weights(
                targets, extra.get("weights", store.weights), extra.get("token_weights"), loss_mean
            )
            table = TokenTable(
                store=number,
                objective=column.objective,
                variant=column.variant,
                inputs=TruncatedRows(rows["inputs"], input_length),
                targets=targets,
                prefix=prefix,
                weights=weights,
                token_weights=token_weights,
            )
            tables.append(table)
    return tuple(tables)


def _loss_weights(
    targets: TruncatedRows, weights: np.ndarray, token_weights: np.ndarray | None, loss_mean: str
) -> tuple[np.ndarray, np.ndarray | None]:
    """Returns `weights` and `token_weights` of a `TokenTable`.

    With `loss_mean` "example", each target's weight is divided by the target's length or, with token weights, by
    their sum over the target. The loss weights of its tokens then add up to the target's weight.
    """
    first, shares = targets.rows.starts, targets.lengths
    ends = first + targets.lengths
    if token_weights is not None:
        # a truncated row keeps its end of sequence as its last token, with weight 1
        token_weights = token_weights.copy()
        token_weights[ends[targets.is_truncated] - 1] = 1
    if loss_mean == "example":
        if token_weights is not None:
            # prefix sums: a target's weights sum to sums[end] - sums[start]
            sums = np.concatenate([[0], np.cumsum(token_weights, dtype=np.float64)])
            shares = sums[ends] - sums[first]
        weights = np.divide(weights, shares, out=np.zeros(len(weights)), where=shares > 0)
        weights = weights.astype(np.float32)
    return weights, token_weights


class ExampleIds(NamedTuple):
    """Drawn examples, identified by three numbers. All arrays are [examples] int64.

    Attributes:
        stores: index of the store that contains the example.
        indices: index of the example in this store.
        epochs: epoch in which the example is drawn.
    """

    stores: np.ndarray
    indices: np.ndarray
    epochs: np.ndarray


def draws(drawn: ExampleIds, seed: int) -> np.ndarray:
    """Returns a uniform random number for each drawn example, [examples] uint64.

    The number depends only on (seed, store, example, epoch). It is mixed as in splitmix64 (Steele et al.
    2014, "Fast splittable pseudorandom number generators").
    """
    # uint64 arrays wrap around without a warning, as the algorithm needs
    mixed = np.full(len(drawn.indices), seed, np.uint64)
    for part in drawn:
        mixed += np.uint64(0x9E3779B97F4A7C15) + part.astype(np.uint64)
        mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        mixed ^= mixed >> np.uint64(31)
    return mixed


def nested_pools(usable: Sequence[np.ndarray], fraction: float, seed: int) -> list[np.ndarray]:
    """Returns, for each store, the sorted indices of the examples that a run uses.

    With the same seed, the examples for a smaller fraction are a subset of those for a larger one.
    """
    if fraction == 1:
        return list(usable)
    pools = []
    for store, examples in enumerate(usable):
        kept = max(1, round(fraction * len(examples)))
        order = np.random.default_rng((seed, store, 0)).permutation(len(examples))
        pools.append(np.sort(examples[order[:kept]]))
    return pools


@dataclasses.dataclass(frozen=True)
class Sampler:
    """Maps positions 0, 1, 2, ... of a run to examples.

    Each position draws from one store. In each epoch, a store gives its examples in a new order. Stores have their
    own epochs.

    Attributes:
        pools: for each store, the indices of the examples in use.
        rates: for each store, its share of the positions. Ignored without `shuffle`.
        shuffle: if False, the positions give each example once and in order, one store after the other.
    """

    pools: Sequence[np.ndarray]
    rates: Sequence[float]
    seed: int
    shuffle: bool

    def __call__(self, position: np.ndarray) -> ExampleIds:
        """Returns the examples at the given positions, [positions] int64. The positions need not be sorted."""
        if not self.shuffle:
            return self._in_order(position)
        # position -> (store, turn), block by block
        stores, turns = np.empty((2, len(position)), np.int64)
        block = position // MIXTURE_BLOCK
        for b in np.unique(block):
            block_stores, block_turns = self._block(int(b))
            at = position[block == b] - b * MIXTURE_BLOCK
            stores[block == b], turns[block == b] = block_stores[at], block_turns[at]
        # (store, turn) -> example, epoch by epoch: turn t of n examples is element t % n of epoch t // n
        indices, epochs = np.empty((2, len(position)), np.int64)
        for store, pool in enumerate(self.pools):
            mine = np.flatnonzero(stores == store)
            epoch, place = np.divmod(turns[mine], len(pool))
            epochs[mine] = epoch
            for e in np.unique(epoch):
                indices[mine[epoch == e]] = self._epoch(store, int(e))[place[epoch == e]]
        return ExampleIds(stores, indices, epochs)

    def _in_order(self, position: np.ndarray) -> ExampleIds:
        # pools of 3 and 2 examples: ends [3, 5], so positions 0 to 2 belong to store 0, and 3 and 4 to store 1
        ends = np.cumsum([len(pool) for pool in self.pools])
        position = position[position < ends[-1]]
        stores = np.searchsorted(ends, position, side="right")
        return ExampleIds(stores, np.concatenate(self.pools)[position], np.zeros_like(stores))

    @functools.cached_property
    def _epoch(self):
        """Cached function that takes a store and an epoch, and returns the store's examples in that epoch's order."""

        def permuted(store: int, epoch: int) -> np.ndarray:
            rng = np.random.default_rng((self.seed, store, 1, epoch))
            return rng.permutation(self.pools[store])

        return functools.lru_cache(maxsize=2 * len(self.pools))(permuted)

    @functools.cached_property
    def _block(self):
        """Cached function from a block's index to two arrays [65,536]: the store and the turn of each position.

        The turn of a position is the number of earlier positions with the same store, previous blocks included.
        """

        def drawn(block: int) -> tuple[np.ndarray, np.ndarray]:
            rng = np.random.default_rng((self.seed, len(self.pools), 2, block))
            stores = rng.permutation(np.repeat(np.arange(len(self.pools)), self._shares))
            turns = np.empty(MIXTURE_BLOCK, np.int64)
            # each block has `share` turns of a store: in block b, they are numbered from b * share
            for store, share in enumerate(self._shares):
                turns[stores == store] = block * share + np.arange(share)
            return stores, turns

        return functools.lru_cache(maxsize=2)(drawn)

    @functools.cached_property
    def _shares(self) -> np.ndarray:
        """Number of positions that each store has in a block, [stores].

        Each number is at least 1. Exact shares are rounded by largest remainders.

        Example: for 10 positions, the rates 1 and 2 give the exact shares 3.33 and 6.67, and the result 3 and 7.
        """
        exact = np.asarray(self.rates, np.float64)
        exact = exact / exact.sum() * MIXTURE_BLOCK
        shares = np.maximum(np.floor(exact).astype(np.int64), 1)
        rest = MIXTURE_BLOCK - int(shares.sum())  # below 0 if tiny rates were raised to 1
        if rest > 0:
            shares[np.argsort(-(exact - shares), kind="stable")[:rest]] += 1
        elif rest < 0:
            shares[np.argmax(shares)] += rest
        return shares


# for each table: the table, the example of each row, [rows], and the index of that example in the shard, [rows]
Rows = list[tuple[TokenTable, np.ndarray, np.ndarray]]


def rows_of(drawn: ExampleIds, tables: Sequence[TokenTable], variant_seed: int | None) -> Rows:
    """Returns the rows of the drawn examples in the given tables.

    With a `variant_seed`, each epoch uses one randomly drawn rationale of each example. If it is None, all
    rationales are used.
    """
    found = []
    random = None if variant_seed is None else draws(drawn, variant_seed)
    for table in tables:
        places = np.flatnonzero(drawn.stores == table.store)
        examples = drawn.indices[places]
        taken = table.present[examples]
        if random is not None:
            # An example with n rationales has the variants 0 to n - 1, so its draw modulo n is one of them.
            # The draw is the same for each table, and a table takes the row if the variant is its own.
            of = (table.store, table.objective)
            variants = [t.present[examples] for t in tables if (t.store, t.objective) == of]
            count = np.maximum(np.sum(variants, axis=0), 1).astype(np.uint64)
            taken = taken & (random[places] % count == table.variant)
        if taken.any():
            found.append((table, examples[taken], places[taken]))
    return found


def ranges(starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Returns the concatenated ranges as int64: `ranges([3, 9], [2, 3])` is [3, 4, 9, 10, 11]."""
    # element i of the result, in a range with `before` elements to its left, is start - before + i
    before = np.cumsum(lengths) - lengths
    return np.repeat(starts - before, lengths) + np.arange(lengths.sum())
