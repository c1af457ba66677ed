"""Plots runs. The curves can be told apart by colour-blind readers and in grey print."""

import importlib
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from stepdistill_jax.runtime.metrics import read_metrics

# Okabe and Ito 2008
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
STYLES = ("-", "--", "-.", ":")
MARKERS = ("o", "s", "^", "D", "v")
ACCURACY = "eval/validation/label_accuracy"
SMOOTHED = 20  # steps


def learning_curves(
    runs: Mapping[str, Sequence[Mapping[str, Any]]],
    path: os.PathLike | str,
    *,
    chance: float | None = None,
) -> None:
    """Draws validation accuracy and the label's training loss against the step, and writes a PNG file.

    Args:
        runs: {name to show: lines of `metrics.jsonl`}.
        chance: accuracy of always answering the commonest label; None draws none.
    """
    made, accuracy, loss = learning_axes("label loss on train, nats per token")
    for i, (name, lines) in enumerate(runs.items()):
        look = look_of(i) | {"label": plain(name)}
        steps, values = series(lines, ACCURACY)
        accuracy.plot(steps, values, ms=3, **look)
        steps, values = series(lines, "loss/label")
        loss.plot(steps, smoothed(values), **look | {"marker": ""})
    if chance is not None:
        accuracy.axhline(chance, color="0.5", lw=0.8, label="always the commonest label", zorder=0)
    loss.set_ylim(0, None)
    accuracy.legend(loc="lower right", frameon=False)
    made.savefig(path, dpi=130)


def plot_curves(workdir: os.PathLike | str) -> Any:
    """Returns a `matplotlib.figure.Figure` with validation accuracy and each objective's loss.

    Lines are training losses, averaged over 20 steps. Markers are validation losses.

    Raises:
        InputError: the metrics cannot be read.
    """
    importlib.import_module("matplotlib.pyplot")  # registers the display of figures in a notebook
    lines = read_metrics(workdir)
    names = dict.fromkeys(name for line in lines for name in line if name.startswith("loss/"))
    made, accuracy, loss = learning_axes("loss, nats per token")
    steps, values = series(lines, ACCURACY)
    accuracy.plot(steps, values, ms=4, **look_of(0))
    for i, name in enumerate(names):
        look, objective = look_of(i), plain(name.removeprefix("loss/"))
        steps, values = series(lines, name)
        label = f"{objective}, train (mean of {SMOOTHED} steps)"
        loss.plot(steps, smoothed(values), **look | {"marker": "", "label": label})
        steps, values = series(lines, f"eval/validation/{name}")
        if steps:
            loss.plot(
                steps, values, **look | {"ls": "", "ms": 5, "label": f"{objective}, validation"}
            )
    loss.set_ylim(0, None)
    if names:
        loss.legend(frameon=False, fontsize=9)
    return made


def series(lines: Sequence[Mapping[str, Any]], key: str) -> tuple[list[int], list[float]]:
    """Returns the steps and values of the metric `key`, from the lines that contain it."""
    found = [(line["step"], line[key]) for line in lines if line.get(key) is not None]
    return [step for step, _ in found], [value for _, value in found]


def smoothed(values: Sequence[float], window: int = SMOOTHED) -> list[float]:
    """Returns for each value the mean of this value and up to `window` - 1 earlier ones.

    Example: `smoothed([1, 2, 4], 2)` is [1.0, 1.5, 3.0].
    """
    return [
        sum(values[max(0, i + 1 - window) : i + 1]) / min(i + 1, window) for i in range(len(values))
    ]


def look_of(i: int) -> dict[str, Any]:
    """Returns the colour, line style and marker of the i-th curve."""
    return {
        "color": COLOURS[i % len(COLOURS)],
        "ls": STYLES[i % len(STYLES)],
        "marker": MARKERS[i % len(MARKERS)],
    }


def plain(text: str) -> str:
    """Escapes dollar signs, since matplotlib typesets text between two of them as mathematics."""
    return text.replace("$", r"\$")


def save(figure: Any, stem: pathlib.Path) -> pathlib.Path:
    """Writes a figure to STEM.png and STEM.svg, and returns the path of STEM.svg.

    The same figure always gives the same bytes.
    """
    import matplotlib

    with matplotlib.rc_context({"svg.hashsalt": "stepdistill"}):
        figure.savefig(stem.with_suffix(".svg"), metadata={"Date": None})
        figure.savefig(stem.with_suffix(".png"), dpi=150)
    return stem.with_suffix(".svg")


def learning_axes(loss_label: str) -> tuple[Any, Any, Any]:
    """Returns a new figure, its axes for validation accuracy, and its axes for a loss, both against the step."""
    from matplotlib.ticker import MaxNLocator

    made, (accuracy, loss) = figure(2)
    accuracy.sharex(loss)
    loss.xaxis.set_major_locator(MaxNLocator(integer=True))
    accuracy.set(xlabel="step", ylabel="label accuracy on validation", ylim=(0, 1.03))
    loss.set(xlabel="step", ylabel=loss_label)
    return made, accuracy, loss


def figure(columns: int = 1) -> tuple[Any, Any]:
    """Returns a new figure and its axes, which are an array if `columns` is above 1.

    The figure opens no window and need not be closed, since it is made without pyplot.
    """
    from matplotlib.figure import Figure

    made = Figure(figsize=(8.0 if columns == 1 else 10.5, 4.2), layout="constrained")
    axes = made.subplots(1, columns)
    for axis in made.axes:
        axis.spines[["top", "right"]].set_visible(False)
    return made, axes
