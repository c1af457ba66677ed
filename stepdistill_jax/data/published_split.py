"""How the paper's published code draws validation and shares of the training data."""

import math

import numpy as np

VALIDATION_SHARE, VALIDATION_SEED = 0.1, 0
WHOLE = (1.0, 0)  # share of the training rows, and the seed that draws it


def train_test_split(rows: int, test_size: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns the rows that `datasets.Dataset.train_test_split(test_size, seed=seed)` draws.

    Example: `train_test_split(5, 0.4, 0)` is ([3, 0, 1], [2, 4]).

    Args:
        rows: number of all.
        test_size: share of the second part, rounded up to whole rows.
        seed: of the permutation; the second part is its head.

    Returns:
        [train] and [test] int64 numbers of rows from 0, in the order of the parts.
    """
    order = np.random.default_rng(seed).permutation(rows)
    test = math.ceil(test_size * rows)
    return order[test:], order[:test]


def drawn_splits(
    rows: int, *, fraction: float = 1.0, seed: int = 0, validation: bool = True
) -> tuple[np.ndarray, np.ndarray]:
    """Returns the rows of train and validation that a run of the published code uses.

    The share is drawn first, by the run's seed; then validation is a tenth of it, by seed 0.

    Args:
        rows: number of training rows, in the order of their file.
        fraction: share of them that is used (`subsample` there).
        seed: of the run (`run` there).
        validation: whether validation is drawn; else it has a file of its own, and is empty here.

    Returns:
        [train] and [validation] int64 numbers of rows from 0.
    """
    used = np.arange(rows)
    if fraction < 1.0:
        used = train_test_split(rows, 1.0 - fraction, seed)[0]
    if not validation:
        return used, used[:0]
    train, held_out = train_test_split(len(used), VALIDATION_SHARE, VALIDATION_SEED)
    return used[train], used[held_out]
