"""Computes confidence intervals and significance tests for few seeds and many rows."""

import math
from collections.abc import Sequence

import numpy as np
import scipy.stats

DRAWS = 4000
CHUNK = 200  # draws at once; [CHUNK, rows] row counts are in memory


def mean_interval(values: Sequence[float]) -> tuple[float, float | None, float | None]:
    """Returns the mean, and the lower and upper end of its 95 % interval by Student's t.

    For n values with standard deviation s, the interval is mean +- t(0.975, n - 1) s / sqrt(n). Both ends are
    None for a single value.

    Example: `mean_interval([0.6, 0.7, 0.8])` is (0.7, 0.452, 0.948), rounded, with s = 0.1 and t = 4.303.
    """
    count = len(values)
    mean = math.fsum(values) / count
    if count == 1:
        return mean, None, None
    variance = math.fsum((v - mean) ** 2 for v in values) / (count - 1)
    half = float(scipy.stats.t.ppf(0.975, count - 1)) * math.sqrt(variance / count)
    return mean, mean - half, mean + half


def resample(right: np.ndarray, *, draws: int = DRAWS, seed: int = 0) -> np.ndarray:
    """Returns each run's accuracy on random draws of rows with replacement, [draws, runs].

    All runs share the draws.

    Args:
        right: whether each answer is right, bool [runs, rows].
        seed: the same seed draws the same rows.
    """
    rng, rows = np.random.default_rng(seed), right.shape[1]
    answers = right.T.astype(np.float32)
    found = []
    for start in range(0, draws, CHUNK):
        # A draw is a count per row: of rows 0, 1, 2, drawing 2, 0, 2 gives counts [1, 0, 2]. The
        # accuracies are one matmul, [draws, rows] @ [rows, runs] / rows.
        chosen = rng.integers(rows, size=(min(CHUNK, draws - start), rows))
        counts = np.stack([np.bincount(c, minlength=rows) for c in chosen])
        found.append(counts.astype(np.float32) @ answers / rows)
    return np.concatenate(found)


def paired_difference(
    first: np.ndarray, second: np.ndarray, *, seed: int = 1
) -> tuple[float, float, float]:
    """Tests the difference between two arms' mean accuracies by a paired bootstrap over rows and seeds.

    The difference is the second arm's accuracy minus the first's. Reference: Efron and Tibshirani 1993.

    Args:
        first: result of `resample` for the first arm's runs, [draws, runs].
        second: the same for the second arm, with the same draws.

    Returns:
        The lower end of the difference's 95 % interval.
        The upper end.
        The two-sided p value.
    """
    rng = np.random.default_rng(seed)

    def drawn(arm: np.ndarray) -> np.ndarray:
        chosen = rng.integers(arm.shape[1], size=arm.shape)
        return np.take_along_axis(arm, chosen, 1).mean(1)

    differences = drawn(second) - drawn(first)
    low, high = np.quantile(differences, [0.025, 0.975])
    # p: twice the share of draws on the rarer side of 0, with 1 added to both counts, so never 0
    fewest = min((differences <= 0).sum(), (differences >= 0).sum())
    return float(low), float(high), float(min(1.0, 2 * (fewest + 1) / (len(differences) + 1)))


def holm(p_values: Sequence[float]) -> list[float]:
    """Returns p values corrected for the number of tests (Holm 1979, Scand. J. Statist. 6:65).

    Of n values, the k-th smallest (k counts from 0) is multiplied by n - k, and the product is limited to 1. If the
    previous corrected value is larger, it replaces the product.

    Example: `holm([0.01, 0.04, 0.03])` is [0.03, 0.06, 0.06]. In ascending order, 0.01 becomes 3 x 0.01 = 0.03,
    0.03 becomes 2 x 0.03 = 0.06, and 0.04 becomes max(1 x 0.04, 0.06) = 0.06.
    """
    corrected, highest = [0.0] * len(p_values), 0.0
    for rank, i in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        highest = max(highest, min(1.0, (len(p_values) - rank) * p_values[i]))
        corrected[i] = highest
    return corrected
