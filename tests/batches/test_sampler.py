"""The examples in the docstrings of `batches/sampler.py`."""

import numpy as np
import pytest

from stepdistill_jax.batches import sampler
from stepdistill_jax.batches.sampler import Sampler, TruncatedRows, nested_pools
from stepdistill_jax.tasks.token_store import TokenRows


@pytest.mark.parametrize(
    ("row", "truncated"), [([5, 6, 7, 1], [5, 6, 1]), ([5, 6, 7, 8], [5, 6, 7])]
)
def test_truncated_rows_docstring(row, truncated):
    rows = TokenRows.of_offsets(np.array(row, np.int32), np.array([0, 4]))
    assert TruncatedRows(rows, 3).ids(np.array([0])).tolist() == truncated


def test_a_block_has_the_shares_of_the_docstring(monkeypatch):
    monkeypatch.setattr(sampler, "MIXTURE_BLOCK", 10)
    drawn = Sampler([np.arange(3), np.arange(4)], [1, 2], seed=0, shuffle=True)(np.arange(10))
    assert np.bincount(drawn.stores).tolist() == [3, 7]
    assert sorted(drawn.indices[drawn.stores == 0]) == [0, 1, 2]
    assert drawn.epochs[drawn.stores == 1].tolist() == [0, 0, 0, 0, 1, 1, 1]


def test_smaller_fractions_are_subsets_of_larger():
    half, most = (nested_pools([np.arange(10)], share, seed=1)[0] for share in (0.5, 0.8))
    assert (len(half), len(most)) == (5, 8) and set(half) < set(most)
