"""Draws validation and shares of the training data as the paper's published code does."""

import math

import numpy as np

VALIDATION_SHARE, VALIDATION_SEED = 0.1, 0
WHOLE = (1.0, 0)  # all training rows, as (share, seed)


def train_test_split(rows: int, test_size: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns the rows that `datasets.Dataset.train_test_split(test_size, seed=seed)` draws.

    Example: `train_test_split(5, 0.4, 0)` is ([3, 0, 1], [2, 4]).

    Args:
        rows: number of rows.
        test_size: share of rows that go to test, rounded up to whole rows.
        seed: seed of the permutation; its first rows are test.

    Returns:
        [train] and [test] int64 row numbers from 0, in drawn order.
    """
    order = np.random.default_rng(seed).permutation(rows)
    test = math.ceil(test_size * rows)
    return order[test:], order[:test]


def drawn_splits(
    rows: int, *, fraction: float = 1.0, seed: int = 0, validation: bool = True
) -> tuple[np.ndarray, np.ndarray]:
    """Returns the rows of train and validation that a run of the published code uses.

    First the run's seed draws the share, then seed 0 draws a tenth of it for validation.

    Args:
        rows: number of training rows, in the order of their file.
        fraction: share of them to use (`subsample` in that code).
        seed: seed of the run (`run` in that code).
        validation: whether to draw validation; if False it is empty, since it has its own file.

    Returns:
        [train] and [validation] int64 row numbers from 0.
    """
    used = np.arange(rows)
    if fraction < 1.0:
        used = train_test_split(rows, 1.0 - fraction, seed)[0]
    if not validation:
        return used, used[:0]
    train, held_out = train_test_split(len(used), VALIDATION_SHARE, VALIDATION_SEED)
    return used[train], used[held_out]
