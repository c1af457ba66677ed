"""The pictures of a report."""

import pathlib
from collections import defaultdict
from collections.abc import Sequence

import numpy as np

from stepdistill_jax.experiments.comparison import Comparison, Point
from stepdistill_jax.experiments.plots import figure, look_of, plain, save, series, smoothed


def accuracy_figure(comparison: Comparison, split: str, stem: pathlib.Path) -> pathlib.Path:
    """Accuracy against the fraction of the training data, a line for each arm; the SVG's path.

    Whiskers are the 95 % intervals; a run that collapsed is a cross of its arm's colour.
    """
    made, axis = figure()
    fractions = sorted({p.fraction for p in comparison.points})
    for i, arm in enumerate(comparison.arms):
        points, look = comparison.of_arm(arm), look_of(i)
        _whiskers(axis, [p.fraction for p in points], points, i, look | {"label": plain(arm)})
        crosses = [(r.fraction, r.accuracy) for p in points for r in p.runs if r.collapsed]
        if crosses:
            axis.plot(*zip(*crosses, strict=True), "x", color=look["color"], ms=9, mew=1.6)
            axis.plot([], [], "x", color=look["color"], label=f"{plain(arm)}: collapsed run")
    _lines(axis, comparison)
    axis.set(xlabel="share of the training data", ylabel=f"label accuracy on {plain(split)}")
    if len(fractions) > 1:
        axis.set_xscale("log")
        axis.set_xticks(fractions, [f"{f:g}" for f in fractions])
        axis.minorticks_off()
    made.legend(loc="outside right upper", frameon=False, fontsize=9)
    return save(made, stem)


def _whiskers(axis, places: Sequence[float], points: Sequence[Point], i: int, look: dict) -> None:
    # a few per cent to the side, so that the whiskers of arms do not cover each other
    at = np.asarray(places) * 1.012 ** (i if i % 2 else -i)
    axis.plot(at, [p.accuracy for p in points], ms=5, **look)
    for x, p in zip(at, points, strict=True):
        if p.low is not None and p.high is not None:
            axis.plot([x, x], [max(0.0, p.low), min(1.0, p.high)], color=look["color"], lw=1.1)


def _lines(axis, comparison: Comparison) -> None:
    if comparison.teacher is not None:
        axis.axhline(comparison.teacher, color="0.25", lw=1.2, ls=(0, (6, 2)), label="teacher")
    if comparison.majority is not None:
        label = "always the commonest label"
        axis.axhline(comparison.majority, color="0.6", lw=0.9, label=label, zorder=0)


def learning_figure(comparison: Comparison, stem: pathlib.Path) -> pathlib.Path | None:
    """Validation accuracy and label loss against the step at the largest fraction; None without lines.

    Each run is a thin line, the mean of an arm's runs a thick one.
    """
    largest = {arm: comparison.of_arm(arm)[-1] for arm in comparison.arms}
    if not any(r.lines for p in largest.values() for r in p.runs):
        return None
    made, (accuracy, loss) = figure(2)
    for i, (arm, point) in enumerate(largest.items()):
        look = look_of(i)
        label = f"{plain(arm)} ({point.fraction:g})"
        for axis, key in ((accuracy, "eval/validation/label_accuracy"), (loss, "loss/label")):
            by_step = defaultdict(list)
            for run in point.runs:
                steps, values = series(run.lines, key)
                values = smoothed(values) if axis is loss else values
                axis.plot(steps, values, color=look["color"], lw=0.5, alpha=0.45)
                for step, value in zip(steps, values, strict=True):
                    by_step[step].append(value)
            whole = sorted(s for s, v in by_step.items() if len(v) == len(point.runs))
            means = [float(np.mean(by_step[s])) for s in whole]
            thick = {"color": look["color"], "ls": look["ls"], "lw": 2, "label": label}
            marked = {"marker": look["marker"], "ms": 4} if axis is accuracy else {}
            axis.plot(whole, means, **thick, **marked)
    accuracy.set(xlabel="step", ylabel="label accuracy on validation", ylim=(0, 1.03))
    loss.set(xlabel="step", ylabel="label loss on train, nats per token", ylim=(0, None))
    handles, labels = accuracy.get_legend_handles_labels()
    made.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False, fontsize=9)
    return save(made, stem)


def size_figure(
    comparisons: Sequence[Comparison], split: str, stem: pathlib.Path
) -> pathlib.Path | None:
    """Accuracy at the largest fraction against the number of parameters; None where all are of one size."""
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
        _whiskers(axis, sizes, [p for _, p in points], i, look_of(i) | {"label": plain(arm)})
    best = max(comparisons, key=lambda c: c.teacher or 0.0)
    _lines(axis, best)
    axis.set(
        xscale="log", xlabel="parameters of the model", ylabel=f"label accuracy on {plain(split)}"
    )
    made.legend(loc="outside right upper", frameon=False, fontsize=9)
    return save(made, stem)
