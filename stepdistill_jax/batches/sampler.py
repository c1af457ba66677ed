"""Which examples a position of a run stands for: a pure function of (pools, rates, seed)."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

# Positions of a mixture are dealt out in blocks, so that a block is drawn in a millisecond and the
# rates hold to 1 in 65,536
MIXTURE_BLOCK = 65_536


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
class Order:
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
        if len(self.pools) == 1:
            stores, turns = np.zeros(len(position), np.int64), position
        else:
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
        rows = position - np.concatenate([[0], ends])[stores]
        indices = [int(self.pools[s][r]) for s, r in zip(stores, rows, strict=True)]
        return ExampleIds(stores, np.array(indices, np.int64), np.zeros(len(stores), np.int64))

    @functools.cached_property
    def _epoch(self):
        """(store, epoch) -> the pool in that epoch's order; the last two of each store are kept."""

        def permuted(store: int, epoch: int) -> np.ndarray:
            return np.random.default_rng((self.seed, store, 1, epoch)).permutation(
                self.pools[store]
            )

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
