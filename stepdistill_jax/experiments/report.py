"""Compares runs on an HTML page, and writes plots and tables for a paper."""

import base64
import dataclasses
import hashlib
import math
import os
import pathlib
import re
import tempfile
from collections.abc import Sequence
from typing import Any

import numpy as np

from stepdistill_jax import __version__
from stepdistill_jax.data.objectives import fields_of
from stepdistill_jax.experiments import tables
from stepdistill_jax.experiments.comparison import Comparison, Enough, compare
from stepdistill_jax.experiments.figures import (
    accuracy_figure,
    learning_figure,
    share_of_data,
    size_figure,
)
from stepdistill_jax.experiments.results import read_runs
from stepdistill_jax.experiments.stats import DRAWS
from stepdistill_jax.inference.rationale_quality import INCONSISTENT, VERDICTS
from stepdistill_jax.runtime.checks import whole
from stepdistill_jax.runtime.files import atomic_write
from stepdistill_jax.runtime.overwriting import Made, check_folder, check_outputs
from stepdistill_jax.runtime.stores import local_path

PAGE = "report.html"
_HEAD = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; \
style-src 'unsafe-inline'; script-src 'sha256-"""
MADE = Made("report", _HEAD.encode())  # pages of all versions begin like this


@dataclasses.dataclass(frozen=True)
class Report:
    """The result of `report`.

    Attributes:
        page: the HTML file.
        files: all written files, the page first.
        left_out: {"run": folder, "why": reason} for each run that is in no table.
    """

    page: pathlib.Path
    files: Sequence[pathlib.Path]
    comparisons: Sequence[Comparison]
    left_out: Sequence[dict[str, str]]


def report(
    runs: Sequence[os.PathLike | str],
    *,
    output: os.PathLike | str,
    split: str = "test",
    baseline: str | None = None,
    examples: int = 500,
    data_dir: os.PathLike | str | None = None,
) -> Report:
    """Compares runs, and writes the page `report.html` and a file for each plot and table.

    The page needs no network and no other files. The same runs give the same bytes.

    Args:
        runs: workdirs, folders of `sweep`, or folders that contain such folders.
        output: folder for the files. The files of an earlier report are replaced.
        baseline: as for `compare`.
        examples: number of rows to show with the arms' answers.
        data_dir: folder of prepared datasets. If it lacks the runs' dataset, the report has no significance tests
            and shows no rows.

    Raises:
        InputError: a path contains no runs, no run has answers on the split, no run belongs to the arm
            `baseline`, or the folder cannot be written.
    """
    whole("examples", examples, 0)
    folder = local_path(output, "`output`")
    check_outputs({folder / PAGE: MADE}, name="`output`")
    found, left_out = read_runs(runs, split=split, data_dir=data_dir)
    comparisons, doubled = compare(found, baseline)
    left_out = [*left_out, *doubled]
    with tempfile.TemporaryDirectory() as name:
        work = pathlib.Path(name)
        files, shown = [], []
        for comparison, suffix in zip(comparisons, _suffixes(comparisons), strict=True):
            written, about = _write_comparison(comparison, work, suffix, split)
            files += written
            shown.append(about | _examples(comparison, examples))
        sizes = size_figure(comparisons, split, work / "size")
        files += [] if sizes is None else [sizes, sizes.with_suffix(".png")]
        every = tables.runs_table(comparisons, split)
        files.append(every.write(work))
        text = _page(
            comparisons=shown,
            size_figure=sizes and _embedded(sizes),
            runs_table=every,
            runs=len(every.rows),
            left_out=left_out,
            split=split,
            title="Runs compared: " + ", ".join(dict.fromkeys(c.name for c in comparisons)),
        )
        names = [file.name for file in files]
        check_folder(folder, PAGE, MADE, names)
        with atomic_write(folder / PAGE) as f:  # first: it marks the other files as ours
            f.write(text)
        for file in files:
            with atomic_write(folder / file.name, "wb") as f:
                f.write(file.read_bytes())
    written = [folder / name for name in (PAGE, *names)]
    return Report(written[0], written, comparisons, left_out)


def _suffixes(comparisons: Sequence[Comparison]) -> list[str]:
    """Returns the suffix of each comparison's file names, which is empty for a single comparison."""
    if len(comparisons) == 1:
        return [""]
    names = [re.sub(r"[^A-Za-z0-9.]+", "-", c.name).strip("-.")[:80] for c in comparisons]
    return [
        f"-{name}" if name and names.count(name) == 1 else f"-{name}-{i}"
        for i, name in enumerate(names, 1)
    ]


def _write_comparison(
    comparison: Comparison, folder: pathlib.Path, suffix: str, split: str
) -> tuple[list[pathlib.Path], dict[str, Any]]:
    """Writes a comparison's files. Returns their paths, and the values that the page shows."""
    folder.mkdir(parents=True, exist_ok=True)
    accuracy = accuracy_figure(comparison, split, folder / f"accuracy{suffix}")
    learning = learning_figure(comparison, folder / f"learning{suffix}")
    figures = [f for f in (accuracy, learning) if f is not None]
    made = {
        "accuracy": tables.accuracy_table(comparison, f"accuracy{suffix}"),
        "tests": tables.tests_table(comparison, f"tests{suffix}"),
        "cost": tables.cost_table(comparison, f"cost{suffix}"),
        "settings": tables.settings_table(comparison, f"settings{suffix}"),
    }
    rationales = tables.rationale_table(comparison, f"rationales{suffix}")
    if rationales.rows:
        made["rationales"] = rationales
    written = [path for f in figures for path in (f, f.with_suffix(".png"))]
    written += [table.write(folder) for table in made.values()]
    return written, {
        "rationales": None,
        **made,
        "name": comparison.name,
        "headline": headline(comparison),
        "accuracy_figure": _embedded(accuracy),
        "learning_figure": learning and _embedded(learning),
        "collapsed": [
            f"{r.arm} {r.fraction:g} seed {r.seed}: accuracy {r.accuracy:.4f}, every answer is"
            f" {r.answers[0]!r}"
            if r.answers
            else f"{r.arm} {r.fraction:g} seed {r.seed}: accuracy {r.accuracy:.4f}"
            for p in comparison.points
            for r in p.runs
            if r.collapsed
        ],
        "no_tests": (
            "there is only one arm"
            if len(comparison.arms) == 1
            else "no two arms of the same fraction have answers that can be compared row by row"
        ),
    }


def headline(comparison: Comparison) -> list[str]:
    """Returns the main results in sentences.

    They say how much data each arm needs to reach the accuracy that the baseline has with all data, and which
    arms need a teacher at test time.
    """
    sentences = []
    base, point = comparison.baseline, comparison.of_arm(comparison.baseline)[-1]
    data = share_of_data(point.fraction)
    if comparison.enough and comparison.is_chance(point):
        sentences.append(
            f"{base}, trained on {data} ({point.labels:.0f} labels), has an accuracy of"
            f" {point.accuracy:.4f}. The runs do not show that this is better than always answering the"
            f" commonest label ({comparison.majority:.4f}), so an arm that reaches this accuracy proves nothing."
        )
        sentences += _better(comparison.enough, base)
    else:
        sentences += [_reached(comparison, e, data) for e in comparison.enough]
    for arm in comparison.arms:
        first = comparison.of_arm(arm)[-1].runs[0].config["objectives"][0]
        if shown := [name for name in fields_of(first["input_template"]) if name != "input"]:
            sentences.append(
                f"In addition to the input, {arm} reads each row's {' and '.join(shown)}, so a teacher must"
                " write this for test rows as well."
            )
    return sentences


def _reached(comparison: Comparison, enough: Enough, data: str) -> str:
    """Returns sentences on how much data an arm needs to reach the baseline's accuracy.

    Args:
        data: the baseline's share of the data, in words.
    """
    base, full = comparison.baseline, comparison.of_arm(comparison.baseline)[-1].fraction
    theirs = (
        f"the accuracy that {base} has with {data} ({enough.target:.4f}, with"
        f" {enough.baseline_labels:.0f} labels)"
    )
    if enough.fraction is None or enough.labels is None:
        return f"{enough.arm} does not reach {theirs} at any tested share."
    times = enough.baseline_labels / enough.labels
    fewer = f", {times:.3g} times fewer" if times > 1 else ""
    part = "the same data" if enough.fraction == full else share_of_data(enough.fraction)
    sentences = [
        f"With {part} ({enough.labels:.0f} labels{fewer}), {enough.arm} reaches {theirs}.",
        *_better([enough], base),
    ]
    if enough.reverse is None:
        last = comparison.of_arm(enough.arm)[-1]
        sentences.append(
            f"{base} does not reach {enough.arm}'s {last.accuracy:.4f} at any tested share."
        )
    return " ".join(sentences)


def _better(found: Sequence[Enough], base: str) -> list[str]:
    """Returns sentences that say how much data each arm needs to be significantly better than the baseline."""
    by_share: dict[float | None, list[str]] = {}
    for enough in found:
        if enough.tested:
            by_share.setdefault(enough.surely, []).append(enough.arm)
    sentences = []
    for share in sorted(by_share, key=lambda share: math.inf if share is None else share):
        *others, last = by_share[share]
        arms = f"{', '.join(others)} and {last}" if others else last
        verb = "are" if others else "is"
        if share is None:
            sentences.append(
                f"{arms} {verb} not significantly better than {base} at any share of the data (95%)."
            )
            continue
        on = "" if share == 1 else " or more"
        sentences.append(
            f"With {share_of_data(share)}{on}, {arms} {verb} significantly better than {base} (95%)."
        )
    return sentences


def _examples(comparison: Comparison, count: int) -> dict[str, Any]:
    """Returns up to `count` rows with each arm's answers.

    An arm's answers come from one of its runs with the largest fraction of the data.
    """
    chosen = [comparison.of_arm(arm)[-1].runs[0] for arm in comparison.arms]
    chosen = [run for run in chosen if run.right is not None]
    if not chosen or not count:
        return {"examples": []}
    golds = [run.gold for run in chosen if run.gold]
    # arms may be trained on variants of the dataset with the same rows: prefer a variant with rationales
    explained = next((g for g in golds if any(e.rationale for e in g.examples)), golds[0])
    rows = len(explained.examples)
    # of 10 rows, 4 examples are rows 0, 3, 6 and 9
    picked = np.unique(np.linspace(0, rows - 1, min(count, rows)).round().astype(int))
    found = []
    for i in picked.tolist():
        example = explained.examples[i]
        answers = []
        for run in chosen:
            named, verdict = run.verdict(i)
            answers.append(
                {
                    "arm": run.arm,
                    "label": run.answers[i] if run.answers else "",
                    "right": bool(run.right[i]) if run.right is not None else False,
                    "rationale": run.rationales[i] if run.rationales else "",
                    "named": named if verdict == INCONSISTENT else None,
                    "verdict": VERDICTS.index(verdict) if verdict else "-",
                }
            )
        fields = ("id", "input", "label", "llm_label", "rationale")
        found.append({f: getattr(example, f) for f in fields} | {"answers": answers})
    fractions = ", ".join(dict.fromkeys(f"{run.fraction:g}" for run in chosen))
    seeds = ", ".join(dict.fromkeys(str(run.seed) for run in chosen))
    return {
        "examples": found,
        "rows": rows,
        "arms": [run.arm for run in chosen],
        "judged": [
            (i, run.arm)
            for i, run in enumerate(chosen)
            if any(e["answers"][i]["verdict"] != "-" for e in found)
        ],
        "shown": f"at fraction {fractions} with seed {seeds}",
    }


def _embedded(figure: pathlib.Path) -> str:
    """Returns an SVG as a data URI. As an image, it runs no script, and its ids cannot clash with the page's."""
    return f"data:image/svg+xml;base64,{base64.b64encode(figure.read_bytes()).decode()}"


def _page(**values: Any) -> str:
    """Returns the HTML of the page. Data is escaped, and only the page's own script may run."""
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("stepdistill_jax.experiments"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
    )
    script = environment.get_template("filter.js").render()
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return environment.get_template("report.html.jinja").render(
        script_hash=f"sha256-{digest}",
        version=__version__,
        draws=DRAWS,
        **values,
    )
