"""Runs made by hand, so that which of them are compared and every p can be said beforehand."""

import pathlib

import numpy as np
import pytest

from stepdistill_jax.data.example import Example
from stepdistill_jax.experiments.comparison import compare
from stepdistill_jax.experiments.results import Gold, RunResult

ROWS = 200


def run(arm, correct, *, task="mine", rows="the same rows"):
    """A run of `arm` that gets the first `correct` of ROWS rows right."""
    right = np.arange(ROWS) < correct
    gold = Gold(rows, [Example(str(i), "q", "yes") for i in range(ROWS)], "text_match", "f")
    return RunResult(
        workdir=pathlib.Path(arm),
        arm=arm,
        fraction=1.0,
        seed=0,
        grid={},
        config={"task": task, "objectives": []},
        gold=gold,
        labels=ROWS,
        parameters=1,
        step=1,
        accuracy=correct / ROWS,
        rows=ROWS,
        majority=0.5,
        collapsed=False,
        answers=["yes" if ok else "no" for ok in right],
        right=right,
        rationales=None,
        explained=None,
        lines=[],
    )


def test_runs_are_compared_where_they_answered_the_same_rows():
    first = run("label_only", 100)
    found, _ = compare([first, run("step_by_step", 150, rows="rows of another test set")])
    assert [(c.arms, c.tests) for c in found] == [(["label_only"], []), (["step_by_step"], [])]
    # a control has its own task, with the same test rows
    found, _ = compare([first, run("step_by_step", 150, task="mine_shuffled")])
    assert [c.arms for c in found] == [["label_only", "step_by_step"]] and len(found[0].tests) == 1


def test_p_is_corrected_for_all_tests_of_a_comparison():
    """Holm: of three tests the smallest p counts three times, the next twice, none below its forerunner."""
    ((comparison,), _) = compare([run("label_only", 100), run("a", 103), run("b", 110)])
    small, middle, large = sorted(comparison.tests, key=lambda t: t.p)
    assert small.p < middle.p < large.p
    assert small.p_holm == pytest.approx(3 * small.p)
    assert middle.p_holm == pytest.approx(max(3 * small.p, 2 * middle.p))
    assert large.p_holm == pytest.approx(max(3 * small.p, 2 * middle.p, large.p))


@pytest.mark.parametrize(("correct", "surely"), [(103, None), (110, 1.0)])
def test_an_arm_is_surely_better_where_its_whole_interval_is_above_0(correct, surely):
    """3 rows more of 200 are not drawn at all in 5% of the draws, 10 in less than 0.01%."""
    ((comparison,), _) = compare([run("label_only", 100), run("a", correct)])
    (enough,) = comparison.enough
    assert enough.fraction == 1.0 and enough.surely == surely
