"""Draws the validation split and a share of the training rows as the paper's published code does."""

import math

import numpy as np

VALIDATION_SHARE, VALIDATION_SEED = 0.1, 0
WHOLE = (1.0, 0)  # all training rows, as (share, seed)


def train_test_split(rows: int, test_size: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns the rows that `datasets.Dataset.train_test_split(test_size, seed=seed)` draws.

    Example: `train_test_split(5, 0.4, 0)` is ([3, 0, 1], [2, 4]).

    Args:
        test_size: share of the rows that become test, rounded up.

    Returns:
        Indices of the train rows, in the order drawn, [train] int64.
        Indices of the test rows, in the order drawn, [test] int64.
    """
    order = np.random.default_rng(seed).permutation(rows)
    test = math.ceil(test_size * rows)
    return order[test:], order[:test]


def drawn_splits(
    rows: int, *, fraction: float = 1.0, seed: int = 0, validation: bool = True
) -> tuple[np.ndarray, np.ndarray]:
    """Returns the rows of train and validation that a run of the published code uses.

    Args:
        rows: number of rows of the training file.
        fraction: share of them to use (`subsample` in that code).
        seed: draws the used rows (`run` in that code).
        validation: whether to move a tenth of the used rows to validation, always drawn with seed 0.

    Returns:
        Indices of the train rows, in the order drawn, [train] int64.
        Indices of the validation rows, in the order drawn, [validation] int64; empty without `validation`.
    """
    used = np.arange(rows)
    if fraction < 1.0:
        used = train_test_split(rows, 1.0 - fraction, seed)[0]
    if not validation:
        return used, used[:0]
    train, held_out = train_test_split(len(used), VALIDATION_SHARE, VALIDATION_SEED)
    return used[train], used[held_out]
