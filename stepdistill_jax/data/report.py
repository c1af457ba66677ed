"""Writes an HTML page about a dataset and its defects. The page needs no network and no scripts."""

import base64
import html
import io
import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from stepdistill_jax.data.counts import LENGTH_FIELDS, TEACHER_METRICS, SplitCounts
from stepdistill_jax.data.defects import KINDS
from stepdistill_jax.data.labels import label_counts
from stepdistill_jax.runtime.files import atomic_write
from stepdistill_jax.runtime.overwriting import Made

PAGE = Made(
    "prepare",
    b'<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
    b'<meta name="viewport" content="width=device-width, initial-scale=1">\n<title>Dataset ',
)
MOST_LABELS = 100  # in the table of labels
BARS = 24  # at most, in a histogram
Z_95 = 1.959964  # standard normal quantile of 97.5 %

_STYLE = """
body { font: 16px/1.5 Georgia, serif; color: #111; background: #fff; max-width: 60rem;
       margin: 2rem auto; padding: 0 1rem; }
h1, h2, h3, th, figcaption { font-family: Helvetica, Arial, sans-serif; }
h2 { margin-top: 2.5rem; border-bottom: 1px solid #999; }
table { border-collapse: collapse; margin: 1rem 0; }
th, td { text-align: left; vertical-align: top; padding: .2rem .8rem .2rem 0;
         border-bottom: 1px solid #ddd; font-size: .9rem; }
td.n, th.n { text-align: right; font-variant-numeric: tabular-nums; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; margin: 0; font-size: .85rem; }
figure { display: inline-block; margin: 0 1rem 1rem 0; break-inside: avoid; }
img { max-width: 100%; height: auto; }
.scroll { overflow-x: auto; }
@media print { body { font-size: 10pt; max-width: none; margin: 0; } tr { break-inside: avoid; } }
"""


def wilson(right: int, rows: int, z: float = Z_95) -> tuple[float, float]:
    """Returns Wilson's score interval for a share.

    With p = right / rows and n = rows (E. B. Wilson 1927, JASA 22:209):
    (p + z^2 / 2n -+ z sqrt(p (1 - p) / n + z^2 / 4n^2)) / (1 + z^2 / n).

    Example: `wilson(74, 100)` is (0.646, 0.816), rounded.

    Args:
        rows: at least 1.
        z: standard normal quantile; the default gives 95 %.
    """
    share, square = right / rows, z * z / rows
    middle = (share + square / 2) / (1 + square)
    half = z / (1 + square) * math.sqrt(share * (1 - share) / rows + square / (4 * rows))
    return max(0.0, middle - half), min(1.0, middle + half)


def write_report(
    path: pathlib.Path, result: Mapping[str, Any], splits: Mapping[str, SplitCounts]
) -> None:
    """Writes the page about a result of `prepare`, atomically."""
    with atomic_write(path) as f:
        f.write(page(result, splits))


def page(result: Mapping[str, Any], splits: Mapping[str, SplitCounts]) -> str:
    """Returns the HTML text; see `write_report`. Every text of the dataset is escaped."""
    name = html.escape(result["name"])
    parts = [
        f"<h1>Dataset {name}</h1>",
        f"<p>Fingerprint {html.escape(result['fingerprint'][:16])}; labels are compared by"
        f" {html.escape(result['metric'])}.</p>",
        _list(result["notes"]),
        "<h2>Rows</h2>",
        _counts(splits),
        "<h2>Labels</h2>",
        _list([warning["message"] for warning in result["warnings"]]),
        _labels(splits),
        "<h2>The teacher's answers</h2>",
        _accuracies(splits),
        "<h2>What each filter would keep</h2>",
        "<p>Share of a split's rows that each filter would keep. No filter has been applied.</p>",
        _filters(splits),
        "<h2>Defects</h2>",
        _defects(splits),
        "<h2>Lengths</h2>",
        "<p>In words separated by whitespace; <code>stepdistill inspect</code> shows lengths in"
        " tokens. Empty texts are not counted.</p>",
        *(_lengths(split, counts) for split, counts in splits.items()),
    ]
    body = "\n".join(part for part in parts if part)
    return (
        f"{PAGE.head.decode()}{name}</title>\n<style>{_STYLE}</style>\n</head>\n"
        f"<body>\n{body}\n</body>\n</html>\n"
    )


def _list(notes: Sequence[str]) -> str:
    items = "".join(f"<li>{html.escape(note)}</li>" for note in notes)
    return f"<ul>{items}</ul>" if items else ""


def _table(head: Sequence[str], rows: Sequence[Sequence[str]], numbers: Sequence[int]) -> str:
    """Returns an HTML table. Cells are HTML, and columns whose index is in `numbers` are right-aligned."""

    def cells(tag: str, row: Sequence[str]) -> str:
        classes = [' class="n"' if i in numbers else "" for i in range(len(row))]
        return "".join(f"<{tag}{c}>{x}</{tag}>" for c, x in zip(classes, row, strict=True))

    body = "\n".join(f"<tr>{cells('td', row)}</tr>" for row in rows)
    return (
        f'<div class="scroll"><table>\n<thead><tr>{cells("th", head)}</tr></thead>\n'
        f"<tbody>\n{body}\n</tbody></table></div>"
    )


def _counts(splits: Mapping[str, SplitCounts]) -> str:
    head = ("split", "rows", "with a rationale", "explained by people", "defects")
    rows = [
        (html.escape(s), *map(str, (t.rows, t.with_rationale, t.human, t.defects.total())))
        for s, t in splits.items()
    ]
    return _table(head, rows, (1, 2, 3, 4))


def _labels(splits: Mapping[str, SplitCounts]) -> str:
    counts = label_counts(splits)
    if not counts:
        return "<p>Few rows share a label, so labels count as free text and are not listed.</p>"
    rows = [
        (html.escape(label), *(str(by_split.get(split, 0)) for split in splits))
        for label, by_split in [*counts.items()][:MOST_LABELS]
    ]
    if more := len(counts) - len(rows):
        rows.append((f"and {more:,} more", *("" for _ in splits)))
    return _table(("label", *map(html.escape, splits)), rows, range(1, len(splits) + 1))


def _accuracies(splits: Mapping[str, SplitCounts]) -> str:
    rows = []
    for split, counts in splits.items():
        for metric, what in TEACHER_METRICS.items():
            if metric in counts.right:
                right = counts.right[metric]
                low, high = wilson(right, counts.labelled)
                rows.append(
                    (
                        html.escape(split),
                        metric,
                        f"{right / counts.labelled:.2%}",
                        f"{low:.2%} to {high:.2%}",
                        f"{right} of {counts.labelled}",
                        what,
                    )
                )
    if not rows:
        return "<p>There are none.</p>"
    head = ("split", "metric", "share", "95 % interval", "rows", "how it counts")
    return "<p>The intervals are Wilson's score intervals.</p>" + _table(head, rows, (2, 3, 4))


def _filters(splits: Mapping[str, SplitCounts]) -> str:
    names = dict.fromkeys(name for counts in splits.values() for name in counts.kept)
    kept = {name: [counts.kept[name] for counts in splits.values()] for name in names}
    for kind in _kinds(splits):
        kept[f"without {kind}"] = [counts.rows - counts.defects[kind] for counts in splits.values()]
    totals = [counts.rows for counts in splits.values()]
    rows = [
        (html.escape(name), *(f"{n / m:.1%}" for n, m in zip(counts, totals, strict=True)))
        for name, counts in kept.items()
    ]
    return _table(("filter", *map(html.escape, splits)), rows, range(1, len(splits) + 1))


def _kinds(splits: Mapping[str, SplitCounts]) -> list[str]:
    """Returns the kinds of defect that occur, in the order of `KINDS`."""
    found = dict.fromkeys(kind for counts in splits.values() for kind in counts.defects)
    return sorted(found, key=list(dict.fromkeys((*KINDS, *found))).index)


def _defects(splits: Mapping[str, SplitCounts]) -> str:
    kinds = _kinds(splits)
    if not kinds:
        return "<p>None found.</p>"
    rows = [
        (
            kind,
            *(str(counts.defects[kind]) for counts in splits.values()),
            KINDS.get(kind, ""),
        )
        for kind in (html.escape(kind) for kind in kinds)
    ]
    head = ("defect", *map(html.escape, splits), "meaning and handling")
    parts = [_table(head, rows, range(1, len(splits) + 1))]
    for kind in kinds:
        shown = [
            (
                html.escape(defect.where),
                html.escape(f"{split}, {example_id}"),
                f"<pre>{html.escape(defect.text) or '(no text)'}</pre>",
            )
            for split, counts in splits.items()
            for example_id, defect in counts.examples.get(kind, ())
        ]
        parts.append(f"<h3>{html.escape(kind)}</h3>")
        parts.append(_table(("where", "split, id", "text (up to 200 characters)"), shown, ()))
    return "\n".join(parts)


def _lengths(split: str, counts: SplitCounts) -> str:
    figures = []
    for name in LENGTH_FIELDS:
        if lengths := counts.lengths[name]:
            caption = f"{split}: words of {'an' if name == 'input' else 'a'} {name}"
            caption = html.escape(f"{caption} ({_quantiles(lengths)})")
            figures.append(
                f'<figure><img src="{_histogram(lengths)}" alt="histogram">'
                f"<figcaption>{caption}</figcaption></figure>"
            )
    return "".join(figures)


def _quantiles(counts: Mapping[int, int]) -> str:
    values, rows = zip(*counts.items(), strict=True)
    middle, most = np.quantile(values, [0.5, 0.95], weights=rows, method="inverted_cdf")
    return f"median {middle:g}, at most {most:g} in 95 % of rows, greatest {max(values)}"


def _histogram(counts: Mapping[int, int]) -> str:
    """Returns an SVG histogram of {length: number of rows} as a data URI."""
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(3.6, 2.0), layout="constrained")
    axes = figure.subplots()
    low, high = min(counts), max(counts)
    width = -(-(high - low + 1) // BARS)  # whole words: other widths leave gaps
    edges = [length - 0.5 for length in range(low, high + width + 1, width)]
    axes.hist(list(counts), edges, weights=list(counts.values()), color="#0072B2", rwidth=0.9)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(4, integer=True))
    axes.set_ylabel("rows")
    axes.spines[["top", "right"]].set_visible(False)
    out = io.BytesIO()
    # a fixed salt and no date, so that the same rows give the same bytes
    with matplotlib.rc_context({"svg.hashsalt": "stepdistill", "svg.fonttype": "none"}):
        figure.savefig(out, format="svg", metadata={"Date": None})
    return f"data:image/svg+xml;base64,{base64.b64encode(out.getvalue()).decode()}"
