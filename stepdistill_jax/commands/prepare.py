"""`stepdistill prepare`: original files in, a checked dataset out."""

import argparse
import collections
import pathlib
import shlex
from collections.abc import Sequence
from typing import Any

from stepdistill_jax.commands.terminal import console, say
from stepdistill_jax.errors import InputError, printable

MOST_LABELS = 20  # in the table


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of the command."""
    from stepdistill_jax.commands.arguments import add_data_arguments

    parser.add_argument(
        "name",
        metavar="NAME",
        help="cqa, svamp, esnli or anli (the paper's files, or exports), jsonl (your own rows, CSV and TSV"
        " among them), delivery (embedded), gsm_symbolic (word problems; needs the extra [gsm])",
    )
    parser.add_argument(
        "--source",
        type=pathlib.Path,
        metavar="PATH",
        help="folder of the original files; for jsonl a file (.csv and .tsv are read by their names), or"
        " a folder with train.jsonl (or .csv, .tsv) and perhaps validation and test",
    )
    parser.add_argument(
        "--name",
        dest="new_name",
        metavar="NEW",
        help="what to call the dataset, lower_snake_case; needed for jsonl",
    )
    parser.add_argument(
        "--map",
        dest="field_map",
        metavar="input=question,...",
        help="for jsonl: our field = yours, for each that is called otherwise",
    )
    parser.add_argument(
        "--fields",
        metavar="NAME,...",
        help="for jsonl: other texts of a row to keep, which objectives may name in their templates",
    )
    parser.add_argument(
        "--no-teacher",
        dest="teacher",
        action="store_false",
        help="prepare without the teacher's texts",
    )
    parser.add_argument(
        "--paper-exact",
        action="store_true",
        help="read the paper's files as its published code does, as dataset NAME_paper (NAME may be asdiv)",
    )
    parser.add_argument(
        "--on-error",
        choices=("stop", "skip"),
        default="stop",
        help="for jsonl: when all rows have been read, stop if some cannot be used (default), or skip"
        " these; both list them",
    )
    parser.add_argument(
        "--rows",
        type=int,
        metavar="N",
        help="for gsm_symbolic: rows of the train split (default: 20000)",
    )
    parser.add_argument(
        "--seed",
        type=int,
        metavar="S",
        help="for gsm_symbolic: another seed makes other rows (default: 0)",
    )
    parser.add_argument(
        "--report",
        type=pathlib.Path,
        metavar="DIR",
        help="write DIR/NAME.html: counts, defects with examples, lengths, teacher accuracy",
    )
    add_data_arguments(parser)


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Prepares, prints a table per split, and returns the figures."""
    from rich.markup import escape

    from stepdistill_jax.commands.arguments import require_seqio
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
        if error.rows.count > 1:  # of a single one, the error's line says all
            show_bad_rows(error.rows.table(), error.rows.count, screen)
        for notice in error.notices:
            screen.print(f"warning: {escape(notice)}")
        raise
    show(result)
    if "train" in result["splits"]:  # a task needs its vocabulary
        where = [] if args.data_dir is None else ["--data-dir", str(args.data_dir)]
        say(f"next: {shlex.join(['stepdistill', 'inspect', result['name'], *where])}")
    return result


def parse_map(text: str | None) -> dict[str, str]:
    """{"input": "question"} of `input=question`, several joined by commas.

    Raises:
        InputError: a part without `=`, or a field that is mapped twice.
    """
    field_map: dict[str, str] = {}
    for part in filter(None, (text or "").split(",")):
        ours, equals, theirs = (piece.strip() for piece in part.partition("="))
        if not (ours and equals and theirs):
            raise InputError(f"--map: input=question,label=answer is wanted, got {part!r}")
        if ours in field_map:
            raise InputError(f"--map: the field {ours!r} is mapped twice")
        field_map[ours] = theirs
    return field_map


def show(result: dict[str, Any]) -> None:
    """Prints a table per split, the notes, and where the dataset lies."""
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
    size = result["vocabulary_size"]
    made = f"vocabulary of {size} pieces, " if size else ""
    screen.print(
        f"{'Found' if result['reused'] else 'Wrote'} {escape(result['directory'])}: {made}every"
        f" defect in defects.jsonl, labels compared by {result['metric']}",
        soft_wrap=True,
    )
    if result["report"]:
        screen.print(f"Report: {escape(result['report'])}", soft_wrap=True)


def show_bad_rows(rows: Sequence[dict[str, Any]], count: int, screen: Any) -> None:
    """Prints the table of rows that cannot be used; `rows` are the first of `count`."""
    from rich.markup import escape
    from rich.table import Table

    table = Table(title=f"bad rows: {count:,}", title_justify="left", title_style="bold")
    for name in ("file", "line", "what is wrong"):
        table.add_column(name, justify="right" if name == "line" else "left")
    for row in rows:
        table.add_row(escape(row["file"]), str(row["row"]), escape(row["reason"]))
    if count > len(rows):
        table.add_row("", "", f"and {count - len(rows):,} more")
    screen.print(table)


def _labels(splits: dict[str, Any]) -> Any:
    """The table of a closed set of labels; None where answers are free."""
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
    table.add_column("what")

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
        ("changed_rows", "texts that the vocabulary does not give back"),
        ("changed_whitespace_rows", "given back but for whitespace (a newline is a space to it)"),
        ("unknown_pieces", "characters that it does not know"),
    ):
        count = figures.get("vocabulary", {}).get(name)
        if count and name == "unknown_pieces":
            table.add_row(name, str(count), "", comment)
        elif count:
            line(name, count, comment)
    return table
