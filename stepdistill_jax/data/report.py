"""One page about a prepared dataset: what is in it and what is wrong with it. No network, no scripts."""

import base64
import html
import io
import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from stepdistill_jax.data.counts import LENGTH_FIELDS, TEACHER_FIGURES, Tally
from stepdistill_jax.data.defects import KINDS
from stepdistill_jax.data.labels import label_counts
from stepdistill_jax.runtime.files import atomic_write
from stepdistill_jax.runtime.overwriting import Made

PAGE = Made(
    "prepare",
    b'<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
    b'<meta name="viewport" content="width=device-width, initial-scale=1">\n<title>Dataset ',
)
MOST_LABELS = 100  # in the table
BARS = 24  # of a histogram, at most
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
    """Wilson's score interval of a share, which stays within 0 and 1 and serves small samples.

    E. B. Wilson 1927, JASA 22:209. Example: `wilson(74, 100)` is (0.646, 0.816), rounded.

    Args:
        right: number of rows that count.
        rows: of all of them, at least 1.
        z: quantile; the default gives 95 %.
    """
    share, square = right / rows, z * z / rows
    middle = (share + square / 2) / (1 + square)
    half = z / (1 + square) * math.sqrt(share * (1 - share) / rows + square / (4 * rows))
    return max(0.0, middle - half), min(1.0, middle + half)


def write_report(
    path: pathlib.Path, result: Mapping[str, Any], tallies: Mapping[str, Tally]
) -> None:
    """Writes the page, atomically.

    Args:
        path: of the HTML file.
        result: of `prepare`.
        tallies: the same splits'.
    """
    with atomic_write(path) as f:
        f.write(page(result, tallies))


def page(result: Mapping[str, Any], tallies: Mapping[str, Tally]) -> str:
    """The HTML text; see `write_report`. Every text of the dataset is escaped."""
    name = html.escape(result["name"])
    parts = [
        f"<h1>Dataset {name}</h1>",
        f"<p>Fingerprint {html.escape(result['fingerprint'][:16])}; labels are compared by"
        f" {html.escape(result['metric'])}.</p>",
        _list(result["notes"]),
        "<h2>Rows</h2>",
        _counts(tallies),
        "<h2>Labels</h2>",
        _list([warning["message"] for warning in result["warnings"]]),
        _labels(tallies),
        "<h2>The teacher's answers</h2>",
        _accuracies(tallies),
        "<h2>What each filter would keep</h2>",
        "<p>Shares of all rows of a split. Nothing has been left out: these say what would remain.</p>",
        _filters(tallies),
        "<h2>Defects</h2>",
        _defects(tallies),
        "<h2>Lengths</h2>",
        "<p>In words, that is runs of characters without whitespace, which do not depend on a"
        " vocabulary; <code>stepdistill inspect</code> shows tokens. Empty texts are not counted.</p>",
        *(_lengths(split, tally) for split, tally in tallies.items()),
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
    """Cells are HTML; the columns `numbers` are set flush right."""

    def cells(tag: str, row: Sequence[str]) -> str:
        classes = [' class="n"' if i in numbers else "" for i in range(len(row))]
        return "".join(f"<{tag}{c}>{x}</{tag}>" for c, x in zip(classes, row, strict=True))

    body = "\n".join(f"<tr>{cells('td', row)}</tr>" for row in rows)
    return (
        f'<div class="scroll"><table>\n<thead><tr>{cells("th", head)}</tr></thead>\n'
        f"<tbody>\n{body}\n</tbody></table></div>"
    )


def _counts(tallies: Mapping[str, Tally]) -> str:
    head = ("split", "rows", "with a rationale", "explained by people", "defects")
    rows = [
        (html.escape(s), *map(str, (t.rows, t.with_rationale, t.human, t.defects.total())))
        for s, t in tallies.items()
    ]
    return _table(head, rows, (1, 2, 3, 4))


def _labels(tallies: Mapping[str, Tally]) -> str:
    counts = label_counts(tallies)
    if not counts:
        return "<p>Few rows share a label, so answers are taken as free, and not listed here.</p>"
    rows = [
        (html.escape(label), *(str(by_split.get(split, 0)) for split in tallies))
        for label, by_split in [*counts.items()][:MOST_LABELS]
    ]
    if more := len(counts) - len(rows):
        rows.append((f"and {more:,} more", *("" for _ in tallies)))
    return _table(("label", *map(html.escape, tallies)), rows, range(1, len(tallies) + 1))


def _accuracies(tallies: Mapping[str, Tally]) -> str:
    rows = []
    for split, tally in tallies.items():
        for figure, what in TEACHER_FIGURES.items():
            if figure in tally.right:
                right = tally.right[figure]
                low, high = wilson(right, tally.labelled)
                rows.append(
                    (
                        html.escape(split),
                        figure,
                        f"{right / tally.labelled:.2%}",
                        f"{low:.2%} to {high:.2%}",
                        f"{right} of {tally.labelled}",
                        what,
                    )
                )
    if not rows:
        return "<p>There are none.</p>"
    head = ("split", "figure", "share", "95 % interval", "rows", "how it counts")
    return "<p>The intervals are Wilson's score intervals.</p>" + _table(head, rows, (2, 3, 4))


def _filters(tallies: Mapping[str, Tally]) -> str:
    names = dict.fromkeys(name for tally in tallies.values() for name in tally.kept)
    kept = {name: [tally.kept[name] for tally in tallies.values()] for name in names}
    for kind in _kinds(tallies):
        kept[f"without {kind}"] = [tally.rows - tally.defects[kind] for tally in tallies.values()]
    totals = [tally.rows for tally in tallies.values()]
    rows = [
        (html.escape(name), *(f"{n / m:.1%}" for n, m in zip(counts, totals, strict=True)))
        for name, counts in kept.items()
    ]
    return _table(("filter", *map(html.escape, tallies)), rows, range(1, len(tallies) + 1))


def _kinds(tallies: Mapping[str, Tally]) -> list[str]:
    """Kinds that occur, in the order in which they are documented."""
    found = dict.fromkeys(kind for tally in tallies.values() for kind in tally.defects)
    return sorted(found, key=list(dict.fromkeys((*KINDS, *found))).index)


def _defects(tallies: Mapping[str, Tally]) -> str:
    kinds = _kinds(tallies)
    if not kinds:
        return "<p>None was found.</p>"
    rows = [
        (kind, *(str(tally.defects[kind]) for tally in tallies.values()), KINDS.get(kind, ""))
        for kind in (html.escape(kind) for kind in kinds)
    ]
    head = ("defect", *map(html.escape, tallies), "what it is, and what is done")
    parts = [_table(head, rows, range(1, len(tallies) + 1))]
    for kind in kinds:
        shown = [
            (
                html.escape(defect.where),
                html.escape(f"{split}, {example_id}"),
                f"<pre>{html.escape(defect.text) or '(no text)'}</pre>",
            )
            for split, tally in tallies.items()
            for example_id, defect in tally.examples.get(kind, ())
        ]
        parts.append(f"<h3>{html.escape(kind)}</h3>")
        parts.append(_table(("where", "split, id", "text (up to 200 characters)"), shown, ()))
    return "\n".join(parts)


def _lengths(split: str, tally: Tally) -> str:
    figures = []
    for name in LENGTH_FIELDS:
        if counts := tally.lengths[name]:
            caption = f"{split}: words of {'an' if name == 'input' else 'a'} {name}"
            caption = html.escape(f"{caption} ({_quantiles(counts)})")
            figures.append(
                f'<figure><img src="{_histogram(counts)}" alt="histogram">'
                f"<figcaption>{caption}</figcaption></figure>"
            )
    return "".join(figures)


def _quantiles(counts: Mapping[int, int]) -> str:
    values, rows = zip(*counts.items(), strict=True)
    middle, most = np.quantile(values, [0.5, 0.95], weights=rows, method="inverted_cdf")
    return f"median {middle:g}, 95 % up to {most:g}, greatest {max(values)}"


def _histogram(counts: Mapping[int, int]) -> str:
    """A data URI of how many rows (values of `counts`) have which length (its keys), as SVG."""
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(3.6, 2.0), layout="constrained")
    axes = figure.subplots()
    low, high = min(counts), max(counts)
    width = -(-(high - low + 1) // BARS)  # in whole words: another width leaves gaps
    edges = np.arange(low, high + width + 1, width) - 0.5
    axes.hist(list(counts), edges, weights=list(counts.values()), color="#0072B2", rwidth=0.9)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(4, integer=True))
    axes.set_ylabel("rows")
    axes.spines[["top", "right"]].set_visible(False)
    out = io.BytesIO()
    # a fixed salt and no date: the same rows give the same bytes
    with matplotlib.rc_context({"svg.hashsalt": "stepdistill", "svg.fonttype": "none"}):
        figure.savefig(out, format="svg", metadata={"Date": None})
    return f"data:image/svg+xml;base64,{base64.b64encode(out.getvalue()).decode()}"
