"""`stepdistill inspect`: shows rows as the model sees them, their lengths, and how many are truncated."""

import argparse
import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from stepdistill_jax.commands.terminal import console, say
from stepdistill_jax.errors import InputError, nearest

if TYPE_CHECKING:
    from rich.console import Console

COLOURS = ("cyan", "magenta", "yellow", "green", "blue")
BAR = 30
SEGMENTS, BRIEF_SEGMENTS = 8, 4  # segments shown per packed row


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of `inspect`."""
    from stepdistill_jax.commands.arguments import add_config_arguments, add_data_arguments

    add_config_arguments(
        parser,
        metavar="CONFIG_OR_MIXTURE",
        help="path or name of a config, or name of a prepared dataset, SeqIO task or mixture",
    )
    parser.add_argument("--split", default="train", help="split to show (default: train)")
    parser.add_argument("--rows", type=int, default=2, help="number of rows to show (default: 2)")
    parser.add_argument(
        "--verify",
        action="store_true",
        help="read all token stores of the split, and check every byte for damage",
    )
    add_data_arguments(parser)


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Inspects a config or a task, prints the result, and returns it."""
    from stepdistill_jax.training import inspect

    config = _config_or_task(args)
    result = inspect(
        config,
        split=args.split,
        rows=args.rows,
        data_dir=args.data_dir,
        task_module=args.task_module,
        verify=args.verify,
    )
    show(result, console())
    if isinstance(config, str):
        say(
            "The default settings were used. To use the settings of a run, pass its config:"
            f" stepdistill inspect CONFIG --set TASK={config}"
        )
    return result


def _config_or_task(args: argparse.Namespace) -> Any:
    """Returns the `TrainConfig` that the arguments describe or, if they name a task, the task's name."""
    from stepdistill_jax.commands.gin_config import load_config
    from stepdistill_jax.commands.shipped import find_config, shipped_configs
    from stepdistill_jax.tasks.load import splits_of

    name: str | None = args.config
    settings = (args.overrides, args.gin_files, args.gin_bindings)
    if name is None and not args.gin_files:
        raise InputError("inspect: expected the name of a config or a task")
    if name is None or _is_config(name, find_config):
        bindings = list(args.gin_bindings)
        if args.task_module:
            bindings.append(f"TASK_MODULE={args.task_module}")
        return load_config(name, args.overrides, args.gin_files, bindings)[0]
    try:
        splits_of(name, data_dir=args.data_dir, task_module=args.task_module)
    except InputError as error:
        if not str(error).startswith("unknown task"):
            raise
        hint = nearest(name, shipped_configs())
        raise InputError(f"{name}: no config has this name{hint}; {error}") from None
    if any(settings):
        raise InputError(
            f"--set, --gin_file and --gin.NAME=VALUE need a config, but {name} is a task; pass a config with"
            f" TASK = {name!r} instead"
        )
    return name


def _is_config(name: str, find_config: Callable[[str], Any]) -> bool:
    """Returns whether `name` is the name or path of a config. Raises InputError for a path at which no file exists."""
    try:
        find_config(name)
    except InputError:
        if name.endswith(".gin") or os.sep in name:
            raise
        return False
    return True


def show(result: dict[str, Any], console: "Console", *, brief: bool = False) -> None:
    """Prints the result of `training.inspect`, or only the rows if `brief` is set."""
    colours = {name: COLOURS[i % len(COLOURS)] for i, name in enumerate(result["objectives"])}
    _show_rows(result, console, colours, brief)
    if brief:
        return
    _show_lengths(result, console, colours)
    _show_fill(result, console)
    for store in result.get("verified", ()):
        console.print(
            f"Verified {store['store']}: {store['bytes']:,} bytes in {store['files']} files are"
            " undamaged",
            highlight=False,
            soft_wrap=True,
        )


def _show_rows(result: dict, console: "Console", colours: dict[str, str], brief: bool) -> None:
    from rich.text import Text

    for number, row in enumerate(result["shown"], 1):
        inputs = sum(segment["input_tokens"] for segment in row)
        targets = sum(segment["target_tokens"] for segment in row)
        lengths = [f" of {length}" for length in result["row_lengths"]] or ["", ""]
        console.print(
            f"[bold]Row {number}[/bold]: {len(row)} segment{'s' if len(row) > 1 else ''},"
            f" {inputs}{lengths[0]} input tokens, {targets}{lengths[1]} target tokens",
            highlight=False,
        )
        kept = row[: BRIEF_SEGMENTS if brief else SEGMENTS]
        for segment in kept:
            colour = colours[segment["objective"]]
            weight = "" if segment["weight"] == 1 else f", weight {segment['weight']:g}"
            line = Text("  ")
            line.append(f"{segment['objective']}", f"bold {colour}")
            line.append(f" {segment['input_tokens']} -> {segment['target_tokens']}{weight}: ")
            read = segment["input"] if segment["input_tokens"] else "(the same encoding)"
            line.append(read, "dim")
            line.append(" -> ")
            line.append(segment["target"], colour)
            console.print(line)
        if len(kept) < len(row):
            console.print(f"  ... and {len(row) - len(kept)} more segments", highlight=False)


def _show_lengths(result: dict, console: "Console", colours: dict[str, str]) -> None:
    from rich.text import Text

    from stepdistill_jax.tasks.task_data import shares_in_words

    console.print(
        f"\n[bold]{result['task']}[/bold] {result['split']}: {result['examples']} examples,"
        f" vocabulary of {result['vocabulary_size']}",
        highlight=False,
    )
    for line in shares_in_words(result.get("shares", ())):
        console.print(f"  {line}", highlight=False)
    for name, figures in result["objectives"].items():
        absent = f", {figures['absent']} examples without" if figures["absent"] else ""
        weight = figures["weight"]
        console.print(
            Text(f"{name}", f"bold {colours[name]}"),
            f"weight {weight if isinstance(weight, str) else format(weight, 'g')},"
            f" {figures['rows']} rows{absent}",
            highlight=False,
        )
        for side, limit in (("inputs", "input_length"), ("targets", "target_length")):
            lengths, cut = figures[side], result["cut"][name][side]
            share = f" ({cut / figures['rows']:.1%})" if cut else ""
            console.print(
                f"  {side}: {lengths['min']} to {lengths['max']} tokens, mean {lengths['mean']},"
                f" median {lengths['median']}, 99% within {lengths['p99']};"
                f" {cut}{share} truncated at {result[limit]}",
                highlight=False,
            )
            largest = max((b["rows"] for b in lengths["histogram"]), default=1) or 1
            for part in lengths["histogram"]:
                # rounded up, so that a single row is visible
                bar = "█" * -(-part["rows"] * BAR // largest)
                span = f"{part['from']}-{part['to']}" if part["from"] < part["to"] else part["to"]
                console.print(
                    Text(f"    {span:>11} ").append(bar, colours[name]),
                    part["rows"] or "",
                    highlight=False,
                )


def _show_fill(result: dict, console: "Console") -> None:
    from rich.table import Table

    counts = ", ".join(map(str, result["row_counts"]))
    console.print(
        f"\nA step of {result['batch_size']} examples takes {result['rows_per_step']:g}"
        f" {'packed rows' if result['pack'] else 'rows'}"
        + (f" (compiled for {counts})" if counts else "")
        + f"; filled: inputs {result['fill']['inputs']:.0%}, targets"
        f" {result['fill']['targets']:.0%}",
        highlight=False,
    )
    if not result["candidates"]:
        return
    table = Table(
        title="Sizes of packed rows that were tried, and how full the rows are",
        title_justify="left",
    )
    filled = ("inputs", "targets", "all")
    for column in ("input", "target", "rows", *filled, "GFLOP per step"):
        table.add_column(column, justify="right")
    for candidate in result["candidates"]:
        fill = candidate["fill"]
        table.add_row(
            str(candidate["row_input_length"]),
            str(candidate["row_target_length"]),
            f"{candidate['rows_per_step']:g}",
            *(f"{fill[side]:.0%}" for side in filled),
            f"{candidate['flops_per_step'] / 1e9:,.4g}",
            style="bold" if candidate == result["chosen"] else None,
        )
    console.print(table)
    chosen = result["chosen"]
    why = ", the cheapest" if len(result["candidates"]) > 1 else ""
    console.print(
        f"A run on one device uses ROW_INPUT_LENGTH = {chosen['row_input_length']},"
        f" ROW_TARGET_LENGTH = {chosen['row_target_length']}{why}"
        f" (filled {chosen['fill']['all']:.0%})",
        highlight=False,
    )
