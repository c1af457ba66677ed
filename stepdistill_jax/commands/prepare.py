"""`stepdistill prepare`: reads the original files of a dataset, checks them, and writes a prepared dataset."""

import argparse
import collections
import pathlib
import shlex
from collections.abc import Sequence
from typing import Any

from stepdistill_jax.commands.terminal import console, say
from stepdistill_jax.errors import printable

MOST_LABELS = 20  # rows of the table of labels
FEW_ROWS = 50  # with so many rows, the 95% interval of an accuracy of one half is 0.36 to 0.64


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of `prepare`."""
    from stepdistill_jax.commands.arguments import add_data_arguments, add_map_argument

    parser.add_argument(
        "name",
        metavar="NAME",
        help="cqa, svamp, esnli or anli (the paper's files, or exports from Hugging Face or TFDS); jsonl (your"
        " own rows, also CSV or TSV); delivery (built into the package); or gsm_symbolic (word problems;"
        " needs the extra [gsm])",
    )
    parser.add_argument(
        "--source",
        type=pathlib.Path,
        metavar="PATH",
        help="folder of the original files; for jsonl, a file (.jsonl, .csv or .tsv), or a folder with"
        " train.jsonl (or .csv, .tsv) and optionally validation and test",
    )
    parser.add_argument(
        "--name",
        dest="new_name",
        metavar="NEW",
        help="name of the new dataset, in lower_snake_case; required for jsonl",
    )
    add_map_argument(
        parser, "for jsonl: a pair OURS=YOURS for each field that has another name in your rows"
    )
    parser.add_argument(
        "--fields",
        metavar="NAME,...",
        help="for jsonl: further text fields to keep, for the templates of objectives",
    )
    parser.add_argument(
        "--no-teacher",
        dest="teacher",
        action="store_false",
        help="leave out the teacher's rationales and labels",
    )
    parser.add_argument(
        "--paper-exact",
        action="store_true",
        help="read the paper's files as the paper's published code does, and name the dataset"
        " NAME_paper (NAME may also be asdiv)",
    )
    parser.add_argument(
        "--on-error",
        choices=("stop", "skip"),
        default="stop",
        help="for jsonl: what to do after listing all unusable rows: stop, or skip them"
        " (default: stop)",
    )
    parser.add_argument(
        "--rows",
        type=int,
        metavar="N",
        help="for gsm_symbolic: number of rows of the train split (default: 20000)",
    )
    parser.add_argument(
        "--seed",
        type=int,
        metavar="S",
        help="for gsm_symbolic: random seed of the rows (default: 0)",
    )
    parser.add_argument(
        "--report",
        type=pathlib.Path,
        metavar="DIR",
        help="folder for the page NAME.html, with counts, examples of defects, lengths and"
        " the accuracy of the teacher",
    )
    add_data_arguments(parser)


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Prepares a dataset, prints a table for each split, and returns the counts."""
    from rich.markup import escape

    from stepdistill_jax.commands.arguments import parse_map, require_seqio
    from stepdistill_jax.data.bad_rows import UnusableRows
    from stepdistill_jax.data.prepare import prepare

    require_seqio("prepare")
    try:
        result = prepare(
            args.name,
            source=args.source,
            new_name=args.new_name,
            field_map=parse_map(args.field_map),
            fields=[name.strip() for name in args.fields.split(",")] if args.fields else (),
            teacher=args.teacher,
            paper_exact=args.paper_exact,
            on_error=args.on_error,
            rows=args.rows,
            seed=args.seed,
            report=args.report,
            data_dir=args.data_dir,
        )
    except UnusableRows as error:
        screen = console(highlight=False, stderr=True)
        if error.rows.count > 1:  # for a single row, the error message is enough
            show_bad_rows(error.rows.table(), error.rows.count, screen)
        for notice in error.notices:
            screen.print(f"warning: {escape(notice)}")
        raise
    show(result)
    if "train" in result["splits"]:  # a task needs its vocabulary
        where = [] if args.data_dir is None else ["--data-dir", str(args.data_dir)]
        task, why = [result["name"]], ""
        if not result["splits"]["train"]["with_label"]:
            task = ["demo_step_by_step", "--set", f"TASK={result['name']}"]
            task += ["--set", "LABEL_SOURCE=gold_else_llm"]
            why = "    # no row of train has a gold label"
        say(f"next: {shlex.join(['stepdistill', 'inspect', *task, *where])}{why}")
    return result


def show(result: dict[str, Any]) -> None:
    """Prints a table for each split, the notes, the warnings, and the folder of the dataset."""
    from rich.markup import escape

    screen = console(highlight=False)
    for split, figures in result["splits"].items():
        screen.print(_table(split, figures))
    if labels := _labels(result["splits"]):
        screen.print(labels)
    if result["skipped"]:
        show_bad_rows(result["bad_rows"], result["skipped"], screen)
    for note in result["notes"]:
        screen.print(f"note: {escape(note)}")
    for warning in result["warnings"]:
        screen.print(f"warning: {escape(warning['message'])}")
    rows = {s: counts["rows"] for s, counts in result["splits"].items() if s != "train"}
    if few := [f"{split} has {n}" for split, n in rows.items() if n < FEW_ROWS]:
        screen.print(
            f"warning: too few rows to measure accuracy: {', '.join(few)} (a folder can have its own"
            " validation and test files)"
        )
    size = result["vocabulary_size"]
    made = f"vocabulary of {size} pieces, " if size else ""
    defects = sum(sum(figures["defects"].values()) for figures in result["splits"].values())
    counts = ((result["skipped"], "skipped row"), (defects, "defect"))
    parts = [f"{count:,} {what}{'s' * (count > 1)}" for count, what in counts if count]
    listed = f"{' and '.join(parts)} listed in defects.jsonl" if parts else "no defects"
    screen.print(
        f"{'Found' if result['reused'] else 'Wrote'} {escape(result['directory'])}: {made}{listed}, labels"
        f" compared by {result['metric']}",
        soft_wrap=True,
    )
    if result["report"]:
        screen.print(f"Report: {escape(result['report'])}", soft_wrap=True)


def show_bad_rows(rows: Sequence[dict[str, Any]], count: int, screen: Any) -> None:
    """Prints a table of unusable rows: `rows` has the first ones, and `count` is the number of all."""
    from rich.markup import escape
    from rich.table import Table

    table = Table(title=f"bad rows: {count:,}", title_justify="left", title_style="bold")
    for name in ("file", "line", "what is wrong"):
        table.add_column(name, justify="right" if name == "line" else "left")
    for row in rows:
        table.add_row(escape(row["file"]), str(row["line"]), escape(row["reason"]))
    if count > len(rows):
        table.add_row("", "", f"and {count - len(rows):,} more")
    screen.print(table)


def _labels(splits: dict[str, Any]) -> Any:
    """Returns a table of the count of each label; None if the labels are not a closed set."""
    from rich.markup import escape
    from rich.table import Table

    totals = collections.Counter[str]()
    for figures in splits.values():
        totals.update(figures["labels"])
    if not totals:
        return None
    table = Table(title=f"labels: {len(totals):,}", title_justify="left", title_style="bold")
    table.add_column("")
    for split in splits:
        table.add_column(split, justify="right")
    for label, _ in totals.most_common(MOST_LABELS):
        counts = [str(figures["labels"].get(label, 0)) for figures in splits.values()]
        table.add_row(escape(printable(label, 40)), *counts)
    if len(totals) > MOST_LABELS:
        table.add_row(f"and {len(totals) - MOST_LABELS:,} more")
    return table


def _table(split: str, figures: dict[str, Any]) -> Any:
    from rich.markup import escape
    from rich.table import Table

    from stepdistill_jax.data.counts import TEACHER_METRICS
    from stepdistill_jax.data.defects import KINDS

    rows = figures["rows"]
    table = Table(title=f"{split}: {rows} rows", title_justify="left", title_style="bold")
    table.add_column("")
    table.add_column("rows", justify="right")
    table.add_column("share", justify="right")
    table.add_column("note")

    def line(name: str, count: int, comment: str = "") -> None:
        table.add_row(name, str(count), f"{count / rows:.2%}", comment)

    line("with a rationale", figures["with_rationale"])
    for name, comment in TEACHER_METRICS.items():
        if figures[name] is not None:
            line(name, round(figures[name] * rows), comment)
    table.add_section()
    for kind, count in figures["defects"].items():
        first = escape(f"first: {figures['first_defects'][kind]}")
        line(kind, count, f"{KINDS[kind]} ({first})" if kind in KINDS else first)
    table.add_section()
    for name, comment in (
        ("changed_rows", "texts that the vocabulary does not reproduce"),
        (
            "changed_whitespace_rows",
            "reproduced except for whitespace (the vocabulary reads a newline as a space)",
        ),
        ("unknown_pieces", "characters unknown to the vocabulary"),
    ):
        count = figures.get("vocabulary", {}).get(name)
        if count and name == "unknown_pieces":
            table.add_row(name, str(count), "", comment)
        elif count:
            line(name, count, comment)
    return table
