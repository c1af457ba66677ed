"""`stepdistill report`: compares runs on one page, with plots and tables."""

import argparse
from typing import TYPE_CHECKING, Any

from stepdistill_jax.commands.arguments import add_data_dir_argument
from stepdistill_jax.commands.terminal import console

if TYPE_CHECKING:
    from stepdistill_jax.experiments.comparison import Comparison


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of `report`."""
    parser.add_argument(
        "runs",
        nargs="+",
        metavar="RUNS",
        help="folders that `sweep` or `train` wrote, or folders of such folders",
    )
    parser.add_argument(
        "--output",
        required=True,
        metavar="DIR",
        help="folder for report.html, its plots (SVG, PNG) and tables (CSV)",
    )
    parser.add_argument(
        "--split",
        default="test",
        metavar="SPLIT",
        help="split whose answers are compared (default: test)",
    )
    parser.add_argument(
        "--baseline",
        metavar="ARM",
        help="arm with which the other arms are compared (default: label_only, or an arm"
        " with the objectives of label_only)",
    )
    parser.add_argument(
        "--examples",
        type=int,
        default=500,
        metavar="N",
        help="number of rows shown on the page, with the answer of each arm (default: 500)",
    )
    add_data_dir_argument(parser)


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Calls `experiments.report`, prints a table for each comparison, and returns the numbers."""
    from stepdistill_jax.experiments.report import report

    written = report(
        args.runs,
        output=args.output,
        split=args.split,
        baseline=args.baseline,
        examples=args.examples,
        data_dir=args.data_dir,
    )
    screen = console()
    for comparison in written.comparisons:
        _show(comparison, args.split, screen)
    for entry in written.left_out:
        screen.print(f"left out: {entry['run']}: {entry['why']}", markup=False, soft_wrap=True)
    screen.print(f"\n{written.page}", markup=False, highlight=False, soft_wrap=True)
    return {
        "page": str(written.page),
        "files": [str(path) for path in written.files],
        "comparisons": [_values(c) for c in written.comparisons],
        "left_out": list(written.left_out),
    }


def _show(comparison: "Comparison", split: str, console) -> None:
    from rich.table import Table
    from rich.text import Text

    from stepdistill_jax.experiments.report import headline

    table = Table(title=Text(f"{comparison.name}: accuracy on {split}"))
    table.add_column("arm")
    accuracy = "accuracy ± 95%"
    if any(p.high is None for p in comparison.points):
        accuracy += "\n(one run:\nno interval)"  # in short lines, so that 80 columns suffice
    for column in ("fraction", "labels", "runs", accuracy, "collapsed"):
        table.add_column(column, justify="right")
    for p in comparison.points:
        half = " " * 9 if p.high is None else f" ± {p.high - p.accuracy:.4f}"
        table.add_row(
            Text(p.arm),
            f"{p.fraction:g}",
            f"{p.labels:.0f}",
            str(len(p.runs)),
            f"{p.accuracy:.4f}{half}",
            str(p.collapsed or ""),
        )
    console.print(table)
    for name in ("teacher", "majority"):
        value = getattr(comparison, name)
        if value is not None:
            words = {"teacher": "The teacher", "majority": "Always answering the commonest label"}
            console.print(f"{words[name]}: {value:.4f}.", highlight=False)
    for sentence in headline(comparison):
        console.print(sentence, markup=False, highlight=False)


def _values(comparison: "Comparison") -> dict[str, Any]:
    fields = ("arm", "fraction", "labels", "accuracy", "low", "high", "collapsed")
    return {
        "name": comparison.name,
        "baseline": comparison.baseline,
        "teacher_accuracy": comparison.teacher,
        "majority_baseline": comparison.majority,
        "points": [
            {f: getattr(p, f) for f in fields} | {"runs": len(p.runs)} for p in comparison.points
        ],
        "enough": [vars(e) for e in comparison.enough],
        "tests": [vars(t) for t in comparison.tests],
    }
