"""Intervals and tests for few seeds and many rows."""

import math
from collections.abc import Sequence

import numpy as np
import scipy.stats

DRAWS = 4000
CHUNK = 200  # draws at once: [CHUNK, rows] weights are held


def mean_interval(values: Sequence[float]) -> tuple[float, float | None, float | None]:
    """Mean, and the ends of its 95 % interval by Student's t; None for a single value.

    It speaks of other seeds on the same rows. Example: `mean_interval([0.6, 0.7, 0.8])` is
    (0.7, 0.452, 0.948), rounded.
    """
    count = len(values)
    mean = math.fsum(values) / count
    if count == 1:
        return mean, None, None
    variance = math.fsum((v - mean) ** 2 for v in values) / (count - 1)
    half = float(scipy.stats.t.ppf(0.975, count - 1)) * math.sqrt(variance / count)
    return mean, mean - half, mean + half


def resample(right: np.ndarray, *, draws: int = DRAWS, seed: int = 0) -> np.ndarray:
    """[draws, runs] accuracy of each run on rows drawn with replacement, the same rows for all runs.

    Args:
        right: [runs, rows] bool.
        draws: how often.
        seed: of the drawing; the same one draws the same rows.
    """
    rng, rows = np.random.default_rng(seed), right.shape[1]
    answers = right.T.astype(np.float32)
    found = []
    for start in range(0, draws, CHUNK):
        chosen = rng.integers(rows, size=(min(CHUNK, draws - start), rows))
        counts = np.stack([np.bincount(c, minlength=rows) for c in chosen])
        found.append(counts.astype(np.float32) @ answers / rows)
    return np.concatenate(found)


def paired_difference(
    first: np.ndarray, second: np.ndarray, *, seed: int = 1
) -> tuple[float, float, float]:
    """95 % interval of mean accuracy of the second arm less that of the first, and two-sided p.

    A paired bootstrap (Efron and Tibshirani 1993): rows are drawn for both arms together, and the
    runs of an arm (its seeds) for each arm alone, so the interval holds what another test set and
    other seeds would change. With one run an arm it says nothing of other seeds.

    Args:
        first, second: [draws, runs] of `resample`, of the same draws.
        seed: of the drawing of runs.

    Returns:
        Low end, high end, p.
    """
    rng = np.random.default_rng(seed)

    def drawn(arm: np.ndarray) -> np.ndarray:
        chosen = rng.integers(arm.shape[1], size=arm.shape)
        return np.take_along_axis(arm, chosen, 1).mean(1)

    differences = drawn(second) - drawn(first)
    low, high = np.quantile(differences, [0.025, 0.975])
    fewest = min((differences <= 0).sum(), (differences >= 0).sum())
    return float(low), float(high), float(min(1.0, 2 * (fewest + 1) / (len(differences) + 1)))


def holm(p_values: Sequence[float]) -> list[float]:
    """p values of a family of tests, corrected so that one false alarm in all of them is as rare as p says.

    Holm 1979, Scandinavian Journal of Statistics 6:65. Example: `holm([0.01, 0.04, 0.03])` is
    [0.03, 0.06, 0.06].
    """
    corrected, highest = [0.0] * len(p_values), 0.0
    for rank, i in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        highest = max(highest, min(1.0, (len(p_values) - rank) * p_values[i]))
        corrected[i] = highest
    return corrected
