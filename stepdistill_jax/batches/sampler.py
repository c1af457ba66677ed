"""Chooses the rows of a step: a pure function of (tables, pools, rates, seed).

`Sampler` gives the examples of positions 0, 1, 2, ... of a run, `rows_of` their rows in each
`TokenTable`.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from stepdistill_jax.data.vocabulary import EOS_ID
from stepdistill_jax.tasks.task_data import TaskData
from stepdistill_jax.tasks.token_store import TokenRows

# Positions of a mixture are dealt out in blocks, so that a block is drawn in a millisecond and the
# rates hold to 1 in 65,536
MIXTURE_BLOCK = 65_536


@dataclasses.dataclass(frozen=True)
class CutRows:
    """Rows of ids of which the first `most` are used; a cut row keeps its end of sequence."""

    rows: TokenRows
    most: int

    @functools.cached_property
    def lengths(self) -> np.ndarray:
        """[examples] int64 tokens that are used."""
        return np.minimum(self.rows.lengths, self.most)

    @functools.cached_property
    def is_cut(self) -> np.ndarray:
        """[examples] bool."""
        return self.rows.lengths > self.most

    def used(self, examples: np.ndarray) -> np.ndarray:
        """[tokens] indices into `rows.ids` of the tokens of these examples."""
        return ranges(self.rows.starts[examples], self.lengths[examples])

    def ids(self, examples: np.ndarray) -> np.ndarray:
        """[tokens] int32 ids of these examples, one after the other."""
        ids, cut = self.rows.ids[self.used(examples)], self.is_cut[examples]
        if cut.any():
            ends = self.rows.starts[examples] + self.rows.lengths[examples]
            last = self.rows.ids[ends[cut] - 1]
            at = np.cumsum(self.lengths[examples])[cut] - 1
            ids[at] = np.where(last == EOS_ID, EOS_ID, ids[at])
        return ids


@dataclasses.dataclass(frozen=True)
class TokenTable:
    """One objective of one store, its rows cut.

    Attributes:
        store, objective: number of the store from 0, of the objective from 1.
        variant: which of an example's rationales, from 0.
        inputs, targets: rows of ids; a target of length 0 is an absent row.
        prefix: ids of the objective's `decoder_prefix`.
        weights: [examples] float32 factor of each target token's loss.
        token_weights: [tokens] float32 another factor of each of the targets' ids; None is 1.
    """

    store: int
    objective: int
    variant: int
    inputs: CutRows
    targets: CutRows
    prefix: tuple[int, ...]
    weights: np.ndarray
    token_weights: np.ndarray | None

    @functools.cached_property
    def present(self) -> np.ndarray:
        """[examples] bool, whether there is a target."""
        return self.targets.lengths > 0

    @functools.cached_property
    def decoder_lengths(self) -> np.ndarray:
        """[examples] int64 tokens of the decoder: prefix and target, 0 for an absent row."""
        return np.where(self.present, len(self.prefix) + self.targets.lengths, 0)

    def tokens(self, examples: np.ndarray) -> tuple[np.ndarray, ...]:
        """[tokens] input ids of examples, and decoder ids, tasks, objectives and weights.

        The last two are 0 for a prefix.
        """
        ids, lengths = self.targets.ids(examples), self.targets.lengths[examples]
        objectives = np.full(len(ids), self.objective)
        weights = np.repeat(self.weights[examples], lengths)
        if self.token_weights is not None:
            weights *= self.token_weights[self.targets.used(examples)]
        if self.prefix:
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
    """The tables of each store and column; see `Batches` for the lengths and `loss_mean`."""
    tables = []
    for number, part in enumerate(data.parts):
        store = part.store
        for column, rows in zip(part.columns, store.rows, strict=True):
            prefix = data.decoder_prefixes[column.objective - 1]
            targets = CutRows(rows["targets"], target_length - len(prefix))
            weights, token_weights = _loss_weights(
                targets, rows.get("weights", store.weights), rows.get("token_weights"), loss_mean
            )
            table = TokenTable(
                store=number,
                objective=column.objective,
                variant=column.variant,
                inputs=CutRows(rows["inputs"], input_length),
                targets=targets,
                prefix=prefix,
                weights=weights,
                token_weights=token_weights,
            )
            tables.append(table)
    return tuple(tables)


def _loss_weights(
    targets: CutRows, weights: np.ndarray, token_weights: np.ndarray | None, loss_mean: str
) -> tuple[np.ndarray, np.ndarray | None]:
    """`weights` and `token_weights` of a `TokenTable`.

    With `loss_mean` "example" the tokens of a target share its weight: the sums of a step are over
    targets then, and the compiled step stays the same.
    """
    first, shares = targets.rows.starts, targets.lengths
    ends = first + targets.lengths
    if token_weights is not None:  # the end of sequence that a cut row keeps weighs 1, as others do
        token_weights = token_weights.copy()
        token_weights[ends[targets.is_cut] - 1] = 1
    if loss_mean == "example":
        if token_weights is not None:
            sums = np.concatenate([[0], np.cumsum(token_weights, dtype=np.float64)])
            shares = sums[ends] - sums[first]
        weights = np.divide(weights, shares, out=np.zeros(len(weights)), where=shares > 0)
        weights = weights.astype(np.float32)
    return weights, token_weights


class ExampleIds(NamedTuple):
    """Examples: [examples] int64 number of the store, row in that store, and epoch of the draw."""

    stores: np.ndarray
    indices: np.ndarray
    epochs: np.ndarray


def draws(drawn: ExampleIds, seed: int) -> np.ndarray:
    """[examples] uint64, uniform: a function of (seed, store, row, epoch) of each example alone.

    The mixing is splitmix64's (Steele et al. 2014, "Fast splittable pseudorandom number generators").
    """
    mixed = np.full(len(drawn.indices), seed, np.uint64)
    for part in drawn:
        mixed += np.uint64(0x9E3779B97F4A7C15) + part.astype(np.uint64)
        mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        mixed ^= mixed >> np.uint64(31)
    return mixed


def nested_pools(usable: Sequence[np.ndarray], fraction: float, seed: int) -> list[np.ndarray]:
    """The share of each store that is used: the head of one permutation, so smaller ones nest."""
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
    """Position 0, 1, 2, ... -> example; each store's pool in a new permutation every epoch.

    Attributes:
        pools: for each store the rows in use.
        rates: for each store the share of positions that it gets; not used unshuffled.
        seed: of everything that is drawn.
        shuffle: False is one store after the other, each in its own order, once.
    """

    pools: Sequence[np.ndarray]
    rates: Sequence[float]
    seed: int
    shuffle: bool

    def __call__(self, position: np.ndarray) -> ExampleIds:
        """The examples at positions; they need not be in order."""
        if not self.shuffle:
            return self._in_order(position)
        stores, turns = np.empty((2, len(position)), np.int64)
        block = position // MIXTURE_BLOCK
        for b in np.unique(block):
            block_stores, block_turns = self._block(int(b))
            at = position[block == b] - b * MIXTURE_BLOCK
            stores[block == b], turns[block == b] = block_stores[at], block_turns[at]
        indices, epochs = np.empty((2, len(position)), np.int64)
        for store, pool in enumerate(self.pools):
            mine = np.flatnonzero(stores == store)
            epoch, place = np.divmod(turns[mine], len(pool))
            epochs[mine] = epoch
            for e in np.unique(epoch):
                indices[mine[epoch == e]] = self._epoch(store, int(e))[place[epoch == e]]
        return ExampleIds(stores, indices, epochs)

    def _in_order(self, position: np.ndarray) -> ExampleIds:
        ends = np.cumsum([len(pool) for pool in self.pools])
        position = position[position < ends[-1]]
        stores = np.searchsorted(ends, position, side="right")
        return ExampleIds(stores, np.concatenate(self.pools)[position], np.zeros_like(stores))

    @functools.cached_property
    def _epoch(self):
        """(store, epoch) -> the pool in that epoch's order; the last two of each store are kept."""

        def permuted(store: int, epoch: int) -> np.ndarray:
            rng = np.random.default_rng((self.seed, store, 1, epoch))
            return rng.permutation(self.pools[store])

        return functools.lru_cache(maxsize=2 * len(self.pools))(permuted)

    @functools.cached_property
    def _block(self):
        """Block -> [positions] store, and [positions] turns that this store had before."""

        def drawn(block: int) -> tuple[np.ndarray, np.ndarray]:
            rng = np.random.default_rng((self.seed, len(self.pools), 2, block))
            stores = rng.permutation(np.repeat(np.arange(len(self.pools)), self._shares))
            turns = np.empty(MIXTURE_BLOCK, np.int64)
            for store, share in enumerate(self._shares):
                turns[stores == store] = block * share + np.arange(share)
            return stores, turns

        return functools.lru_cache(maxsize=2)(drawn)

    @functools.cached_property
    def _shares(self) -> np.ndarray:
        """[stores] positions of each block, by largest remainders, at least 1."""
        exact = np.asarray(self.rates, np.float64)
        exact = exact / exact.sum() * MIXTURE_BLOCK
        shares = np.maximum(np.floor(exact).astype(np.int64), 1)
        rest = MIXTURE_BLOCK - int(shares.sum())
        if rest > 0:
            shares[np.argsort(-(exact - shares), kind="stable")[:rest]] += 1
        elif rest < 0:
            shares[np.argmax(shares)] += rest
        return shares


# (table, examples of it, their places in the step); a row is one of these examples
Rows = list[tuple[TokenTable, np.ndarray, np.ndarray]]


def rows_of(drawn: ExampleIds, tables: Sequence[TokenTable], variant_seed: int | None) -> Rows:
    """The rows that drawn examples have in these tables.

    With a `variant_seed` an example shows one of its rationales in each epoch, else all.
    """
    found = []
    random = None if variant_seed is None else draws(drawn, variant_seed)
    for table in tables:
        places = np.flatnonzero(drawn.stores == table.store)
        examples = drawn.indices[places]
        taken = table.present[examples]
        if random is not None:
            # an example's rationales fill its variants from the first on
            of = (table.store, table.objective)
            variants = [t.present[examples] for t in tables if (t.store, t.objective) == of]
            count = np.maximum(np.sum(variants, axis=0), 1).astype(np.uint64)
            taken = taken & (random[places] % count == table.variant)
        if taken.any():
            found.append((table, examples[taken], places[taken]))
    return found


def ranges(starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Counts up from each start: `ranges([3, 9], [2, 3])` is [3, 4, 9, 10, 11]."""
    before = np.cumsum(lengths) - lengths
    return np.repeat(starts - before, lengths) + np.arange(lengths.sum())
