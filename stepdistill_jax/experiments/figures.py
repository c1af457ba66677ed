"""Draws the plots of a report."""

import pathlib
from collections import defaultdict
from collections.abc import Sequence

import numpy as np

from stepdistill_jax.experiments.comparison import Comparison, Point
from stepdistill_jax.experiments.plots import (
    ACCURACY,
    figure,
    learning_axes,
    look_of,
    plain,
    save,
    series,
    smoothed,
)


def share_of_data(fraction: float) -> str:
    """Returns the fraction in words, such as `12.5% of the data` or `all of the data`."""
    return "all of the data" if fraction == 1 else f"{100 * fraction:g}% of the data"


def _runs_of(points: Sequence[Point]) -> str:
    """Returns the runs per point in words: `mean of 3 runs`, `mean of 2 to 3 runs` or `one run`."""
    counts = sorted({len(p.runs) for p in points})
    if counts == [1]:
        return "one run"
    return f"mean of {' to '.join(map(str, dict.fromkeys((counts[0], counts[-1]))))} runs"


def accuracy_figure(comparison: Comparison, split: str, stem: pathlib.Path) -> pathlib.Path:
    """Draws accuracy against the share of the data, with a line for each arm.

    Whiskers show 95 % intervals. Crosses in an arm's colour mark its collapsed runs. Returns the path of the
    SVG file.
    """
    made, axis = figure()
    fractions = sorted({p.fraction for p in comparison.points})
    for i, arm in enumerate(comparison.arms):
        points, look = comparison.of_arm(arm), look_of(i)
        label = f"{plain(arm)}, {_runs_of(points)}"
        _whiskers(axis, [p.fraction for p in points], points, i, look | {"label": label})
        crosses = [(r.fraction, r.accuracy) for p in points for r in p.runs if r.collapsed]
        if crosses:
            axis.plot(*zip(*crosses, strict=True), "x", color=look["color"], ms=9, mew=1.6)
            axis.plot(
                [],
                [],
                "x",
                color=look["color"],
                label=f"{plain(arm)}, a run with one answer for all rows",
            )
    _key_of_whiskers(axis, comparison.points)
    _lines(axis, comparison)
    axis.set(xlabel="share of the training data", ylabel=f"label accuracy on {plain(split)}")
    if len(fractions) > 1:
        axis.set_xscale("log")
    else:  # the small distances between the arms would fill the figure
        axis.set_xlim(0.5 * fractions[0], 1.5 * fractions[0])
    axis.set_xticks(fractions, [_tick(comparison, f) for f in fractions])
    axis.minorticks_off()
    made.legend(loc="outside right upper", frameon=False, fontsize=9)
    return save(made, stem)


def _tick(comparison: Comparison, fraction: float) -> str:
    """Returns an axis label such as `25%`, with a second line such as `375 labels` if all arms have the same number."""
    labels = {f"{p.labels:.0f}" for p in comparison.points if p.fraction == fraction}
    return f"{100 * fraction:g}%" + (f"\n{labels.pop()} labels" if len(labels) == 1 else "")


def _whiskers(axis, places: Sequence[float], points: Sequence[Point], i: int, look: dict) -> None:
    # shifts odd arms to the right and even arms to the left, by a few per cent: whiskers must not overlap
    at = np.asarray(places) * 1.012 ** (i if i % 2 else -i)
    axis.plot(at, [p.accuracy for p in points], ms=5, **look)
    for x, p in zip(at, points, strict=True):
        if p.low is not None and p.high is not None:
            axis.plot([x, x], [max(0.0, p.low), min(1.0, p.high)], color=look["color"], lw=1.1)


def _key_of_whiskers(axis, points: Sequence[Point]) -> None:
    if any(p.low is not None for p in points):
        axis.plot([], [], "|", color="0.3", ms=11, mew=1.1, label="95% interval of a mean")


def _lines(axis, comparison: Comparison) -> None:
    if comparison.teacher is not None:
        axis.axhline(comparison.teacher, color="0.25", lw=1.2, ls=(0, (6, 2)), label="teacher")
    if comparison.majority is not None:
        label = "always the commonest label"
        axis.axhline(comparison.majority, color="0.6", lw=0.9, label=label, zorder=0)


def learning_figure(comparison: Comparison, stem: pathlib.Path) -> pathlib.Path | None:
    """Draws validation accuracy and label loss against the step, for each arm at its largest fraction.

    Returns:
        The SVG file; None if no run has metrics.
    """
    # a thin line is a single run, and a thick line the mean of an arm's runs
    largest = {arm: comparison.of_arm(arm)[-1] for arm in comparison.arms}
    if not any(r.lines for p in largest.values() for r in p.runs):
        return None
    made, accuracy, loss = learning_axes("label loss on train, nats per token")
    for i, (arm, point) in enumerate(largest.items()):
        look = look_of(i)
        label = f"{plain(arm)}, {share_of_data(point.fraction)}, {_runs_of([point])}"
        for axis, key in ((accuracy, ACCURACY), (loss, "loss/label")):
            by_step = defaultdict(list)
            for run in point.runs:
                steps, values = series(run.lines, key)
                values = smoothed(values) if axis is loss else values
                axis.plot(steps, values, color=look["color"], lw=0.5, alpha=0.45)
                for step, value in zip(steps, values, strict=True):
                    by_step[step].append(value)
            # only steps that all runs have: a mean over fewer runs would jump
            whole = sorted(s for s, v in by_step.items() if len(v) == len(point.runs))
            means = [float(np.mean(by_step[s])) for s in whole]
            thick = {"color": look["color"], "ls": look["ls"], "lw": 2, "label": label}
            marked = {"marker": look["marker"], "ms": 4} if axis is accuracy else {}
            axis.plot(whole, means, **thick, **marked)
    loss.set_ylim(0, None)
    if any(len(point.runs) > 1 for point in largest.values()):
        accuracy.plot([], [], color="0.3", lw=0.5, label="a single run")
    handles, labels = accuracy.get_legend_handles_labels()
    made.legend(handles, labels, loc="outside lower center", ncols=2, frameon=False, fontsize=9)
    return save(made, stem)


def size_figure(
    comparisons: Sequence[Comparison], split: str, stem: pathlib.Path
) -> pathlib.Path | None:
    """Draws the accuracy of each arm at its largest fraction against the size of the model.

    Returns:
        The path of the SVG file; None if all models have the same size.
    """
    by_arm: dict[str, list[tuple[int, Point]]] = defaultdict(list)
    for comparison in comparisons:
        for arm in comparison.arms:
            point = comparison.of_arm(arm)[-1]
            by_arm[arm].append((point.runs[0].parameters, point))
    if len({size for points in by_arm.values() for size, _ in points}) < 2:
        return None
    made, axis = figure()
    for i, (arm, points) in enumerate(by_arm.items()):
        points.sort(key=lambda p: p[0])
        sizes = [size for size, _ in points]
        label = f"{plain(arm)}, {_runs_of([p for _, p in points])}"
        _whiskers(axis, sizes, [p for _, p in points], i, look_of(i) | {"label": label})
    _key_of_whiskers(axis, [p for points in by_arm.values() for _, p in points])
    best = max(comparisons, key=lambda c: c.teacher or 0.0)
    _lines(axis, best)
    axis.set(
        xscale="log", xlabel="parameters of the model", ylabel=f"label accuracy on {plain(split)}"
    )
    every = sorted({size for points in by_arm.values() for size, _ in points})
    axis.set_xticks(every, [_rounded(size) for size in every])
    axis.minorticks_off()
    made.legend(loc="outside right upper", frameon=False, fontsize=9)
    return save(made, stem)


def _rounded(size: int) -> str:
    """Returns a number in a short form, such as `248M` for 247,577,856."""
    for unit, letter in ((10**9, "B"), (10**6, "M"), (10**3, "k")):
        if size >= unit:
            return f"{size / unit:.3g}{letter}"
    return str(size)
