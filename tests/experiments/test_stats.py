"""Against tables, counting by hand, and the normal approximation where it must agree."""

import math

import numpy as np
import pytest

from stepdistill_jax.experiments.stats import holm, mean_interval, paired_difference, resample


def test_the_interval_of_a_mean_over_seeds():
    assert mean_interval([0.6, 0.7, 0.8]) == pytest.approx((0.7, 0.4516, 0.9484), abs=1e-4)
    assert mean_interval([0.5]) == (0.5, None, None)
    assert mean_interval([0.5, 0.5]) == (0.5, 0.5, 0.5)


def test_a_difference_of_two_models_has_the_width_that_its_variance_says():
    rng = np.random.default_rng(7)
    right = rng.random((2, 2000)) < np.array([[0.6], [0.7]])
    drawn = resample(right)
    low, high, p = paired_difference(drawn[:, :1], drawn[:, 1:])
    each = right[1].astype(float) - right[0]
    half = 1.96 * each.std() / math.sqrt(len(each))
    assert (low, high) == pytest.approx((each.mean() - half, each.mean() + half), abs=0.004)
    assert p < 0.001


def test_rows_are_drawn_for_both_arms_together():
    """Models that agree on every row differ by nothing, whichever rows are drawn."""
    right = np.random.default_rng(1).random((1, 300)) < 0.5
    drawn = resample(np.concatenate([right, right]), draws=400)
    assert paired_difference(drawn[:, :1], drawn[:, 1:]) == (0.0, 0.0, 1.0)


def test_p_of_a_difference_is_two_sided():
    """10 of 99 draws lie below 0: p is twice (10 + 1) / (99 + 1)."""
    second = np.where(np.arange(99) < 10, -0.1, 0.1)[:, None]
    first = np.zeros_like(second)
    assert paired_difference(first, second)[2] == pytest.approx(0.22)
    assert paired_difference(second, first)[2] == pytest.approx(0.22)


def test_seeds_that_scatter_widen_the_interval_of_an_arm():
    rng = np.random.default_rng(3)
    accuracies = [0.7, 0.7, 0.4, 1.0, 0.7, 0.7]  # an arm with equal seeds and one without, mean 0.7
    right = np.stack([rng.permutation(500) < 500 * a for a in accuracies])
    drawn = resample(right, draws=1000)
    calm = paired_difference(drawn[:, [0, 1]], drawn[:, [4, 5]])
    wild = paired_difference(drawn[:, [0, 1]], drawn[:, [2, 3]])
    assert wild[1] - wild[0] > 3 * (calm[1] - calm[0])


def test_more_tests_need_smaller_p():
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.6, 0.9]) == [1.0, 1.0]
    assert holm([]) == []
