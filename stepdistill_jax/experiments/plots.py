"""Pictures of runs; colours that colour-blind readers tell apart, and lines that print in grey."""

import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

# Okabe and Ito 2008
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
STYLES = ("-", "--", "-.", ":")
MARKERS = ("o", "s", "^", "D", "v")


def learning_curves(
    runs: Mapping[str, Sequence[Mapping[str, Any]]],
    path: os.PathLike | str,
    *,
    chance: float | None = None,
) -> None:
    """Validation accuracy and training loss of the label against the step, as a PNG.

    Args:
        runs: lines of `metrics.jsonl` by the name to show.
        path: of the PNG.
        chance: accuracy of always giving the commonest label, drawn as a thin line.
    """
    from matplotlib import pyplot as plt

    made, (accuracy, loss) = figure(2)
    for i, (name, lines) in enumerate(runs.items()):
        look = look_of(i) | {"label": plain(name)}
        steps, values = series(lines, "eval/validation/label_accuracy")
        accuracy.plot(steps, values, ms=3, **look)
        steps, values = series(lines, "loss/label")
        loss.plot(steps, smoothed(values), **look | {"marker": ""})
    if chance is not None:
        accuracy.axhline(chance, color="0.5", lw=0.8, label="always the commonest label", zorder=0)
    accuracy.set(xlabel="step", ylabel="label accuracy on validation", ylim=(0, 1.03))
    loss.set(xlabel="step", ylabel="label loss on train, nats per token", ylim=(0, None))
    accuracy.legend(loc="lower right", frameon=False)
    made.savefig(path, dpi=130)
    plt.close(made)


def series(lines: Sequence[Mapping[str, Any]], key: str) -> tuple[list[int], list[float]]:
    """Steps and values of the lines that have `key`."""
    found = [(line["step"], line[key]) for line in lines if key in line]
    return [step for step, _ in found], [value for _, value in found]


def smoothed(values: Sequence[float], window: int = 20) -> list[float]:
    """Mean over the last `window` values."""
    return [
        sum(values[max(0, i + 1 - window) : i + 1]) / min(i + 1, window) for i in range(len(values))
    ]


def look_of(i: int) -> dict[str, Any]:
    """Colour, line and marker of the i-th curve: told apart without the colour, too."""
    return {
        "color": COLOURS[i % len(COLOURS)],
        "ls": STYLES[i % len(STYLES)],
        "marker": MARKERS[i % len(MARKERS)],
    }


def plain(text: str) -> str:
    """A name as it is: matplotlib would read mathematics between two dollars."""
    return text.replace("$", r"\$")


def save(figure: Any, stem: pathlib.Path) -> pathlib.Path:
    """Writes STEM.png and STEM.svg, the same bytes for the same picture; gives the second."""
    from matplotlib import pyplot as plt

    with plt.rc_context({"svg.hashsalt": "stepdistill"}):
        figure.savefig(stem.with_suffix(".svg"), metadata={"Date": None})
        figure.savefig(stem.with_suffix(".png"), dpi=150)
    plt.close(figure)
    return stem.with_suffix(".svg")


def figure(columns: int = 1) -> tuple[Any, Any]:
    """A figure without a screen and its axes (one, or a list of them)."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    made, axes = plt.subplots(
        1, columns, figsize=(8.0 if columns == 1 else 10.5, 4.2), layout="constrained"
    )
    for axis in made.axes:
        axis.spines[["top", "right"]].set_visible(False)
    return made, axes
