"""`stepdistill sweep`: trains and evaluates a run for each arm, data fraction, seed and grid value."""

import argparse
import itertools
import os
import pathlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from stepdistill_jax.commands.arguments import (
    add_config_arguments,
    add_data_arguments,
    require_seqio,
)
from stepdistill_jax.commands.terminal import say
from stepdistill_jax.errors import InputError, nearest
from stepdistill_jax.runtime.checks import whole

if TYPE_CHECKING:
    from stepdistill_jax.experiments.sweep import Cell

PRINT = ("local", "slurm", "xpk")
OWN = {"OBJECTIVES": "--arms", "DATA_FRACTION": "--fractions", "SEED": "--seeds"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of `sweep`."""
    add_config_arguments(parser)
    parser.add_argument(
        "--workdir",
        required=True,
        metavar="DIR",
        help="folder for sweep.json and for the workdir ARM/FRACTION/SEED of each cell; an"
        " existing sweep is continued, and new cells are added",
    )
    parser.add_argument(
        "--arms",
        required=True,
        metavar="A,B",
        help="names of objectives (label_only, step_by_step, ...), names of shipped parts in"
        " objectives/, or paths of gin files; parts and files override CONFIG",
    )
    parser.add_argument(
        "--fractions", default="1.0", metavar="F,G", help="shares of the train split (default: 1.0)"
    )
    parser.add_argument(
        "--seeds", default="0,1,2,3", metavar="S,T", help="random seeds (default: 0,1,2,3)"
    )
    parser.add_argument(
        "--grid",
        action="append",
        default=[],
        metavar="NAME=A,B",
        help="setting, named as in --set, and the values to try; may be given several times",
    )
    parser.add_argument(
        "--evaluate",
        dest="split",
        default="test",
        metavar="SPLIT",
        help="split on which to evaluate each run's best step; `none` skips the evaluation"
        " (default: test)",
    )
    parser.add_argument(
        "--with-rationale",
        action="store_true",
        help="also decode the split's rationales, for `report`",
    )
    parser.add_argument(
        "--retries",
        type=int,
        default=1,
        metavar="N",
        help="number of times to retry a failed cell, after all other cells (default: 1)",
    )
    parser.add_argument(
        "--print",
        choices=PRINT,
        dest="printed",
        help="run nothing; print the commands of the cells as a shell script, a Slurm array, or xpk commands",
    )
    add_data_arguments(parser)


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Builds the config of every cell, then runs `experiments.sweep` or prints the commands."""
    whole("retries", args.retries, 0)
    cells = build_cells(args)
    if args.printed:
        from stepdistill_jax.commands.sweep_script import script

        print(script(args, cells))
        return {"cells": len(cells)}
    require_seqio("sweep")
    from stepdistill_jax.experiments.sweep import sweep
    from stepdistill_jax.models.cpu_speed import keep_pages
    from stepdistill_jax.runtime import compile_cache
    from stepdistill_jax.runtime.distributed import join

    keep_pages()
    join()
    compile_cache.enable(compile_cache.folder_for(os.path.join(args.workdir, "cell")))
    result = sweep(
        [cell for cell, _ in cells],
        workdir=args.workdir,
        data_dir=args.data_dir,
        split=None if args.split == "none" else args.split,
        with_rationale=args.with_rationale,
        retries=args.retries,
        asked={
            "config": args.config,
            "arms": args.arms,
            "fractions": args.fractions,
            "seeds": args.seeds,
            "grid": args.grid,
            "set": [*args.overrides, *args.gin_bindings],
        },
    )
    failed = f", {len(result['failed_cells'])} failed" if result["failed_cells"] else ""
    say(f"{result['workdir']}: {result['done']} of {result['cells']} cells are done{failed}")
    return result


def build_cells(args: argparse.Namespace) -> list[tuple["Cell", list[str]]]:
    """Returns a pair for each cell of a sweep: the cell, and the flags for `train`.

    Raises:
        InputError: a flag is not a valid list, or the config of a cell is wrong.
    """
    from stepdistill_jax.commands.gin_config import load_config
    from stepdistill_jax.experiments.sweep import Cell, cell_name

    arms = {_arm_name(arm): arm for arm in _list(args.arms, "--arms")}
    if len(arms) < len(_list(args.arms, "--arms")):
        raise InputError(f"--arms: {args.arms}: two arms have the same name")
    fractions = _numbers(args.fractions, "--fractions", float, "0.25,1.0")
    seeds = _numbers(args.seeds, "--seeds", int, "0,1,2")
    grid = [_grid_axis(text) for text in args.grid]
    names = [name for name, _ in grid]
    for text in (*args.overrides, *args.gin_bindings, *args.grid):
        name = text.partition("=")[0].strip()
        if name in OWN:
            raise InputError(f"{text}: the sweep sets {name}; use {OWN[name]} instead")
        if names.count(name) > 1 or (name in names and text not in args.grid):
            raise InputError(
                f"--grid {name}: the setting is given more than once; list all its values in one --grid"
            )
    module = [f"TASK_MODULE={args.task_module}"] if args.task_module else []
    cells = []
    for arm, fraction, seed in itertools.product(arms, fractions, seeds):
        for values in itertools.product(*(values for _, values in grid)):
            chosen = dict(zip(names, values, strict=True))
            objectives, part = _arm(arms[arm])
            overrides = [
                *args.overrides,
                *objectives,
                *(f"{n}={v}" for n, v in chosen.items()),
                f"DATA_FRACTION={fraction!r}",
                f"SEED={seed}",
            ]
            files, bindings = [*args.gin_files, *part], [*args.gin_bindings, *module]
            try:
                config, text = load_config(args.config, overrides, files, bindings)
            except InputError as error:
                name = cell_name(arm, fraction, seed, chosen)
                raise InputError(f"cell {name}: {error}") from None
            flags = [*([args.config] if args.config else [])]
            flags += [x for f in files for x in ("--gin_file", f)]
            flags += [x for o in overrides for x in ("--set", o)]
            flags += [f"--gin.{b}" for b in bindings]
            cells.append((Cell(arm, fraction, seed, chosen, config, text), flags))
    return cells


def _arm(arm: str) -> tuple[list[str], list[str]]:
    """Returns the `--set` overrides and the gin files that select an arm."""
    from stepdistill_jax.commands.shipped import find_config, shipped_folder
    from stepdistill_jax.data.objectives import ARMS

    if arm in ARMS:
        return [f"OBJECTIVES={arm}"], []
    part = f"objectives/{arm}.gin"
    if "/" not in arm and (shipped_folder("gin") / part).is_file():
        return [], [part]
    try:
        find_config(arm)
    except InputError:
        raise InputError(
            f"--arms: {arm!r} is neither a name of objectives (known: {', '.join(ARMS)}) nor a gin file"
            f"{nearest(arm, ARMS)}"
        ) from None
    return [], [arm]


def _arm_name(arm: str) -> str:
    return pathlib.PurePath(arm).stem


def _list(text: str, flag: str) -> list[str]:
    values = [value.strip() for value in text.split(",")]
    if not all(values):
        raise InputError(f"{flag} {text}: expected a list without empty values, such as a,b")
    if doubled := next((v for v in values if values.count(v) > 1), None):
        raise InputError(f"{flag} {text}: the value {doubled} is repeated")
    return values


def _numbers(text: str, flag: str, kind: type, example: str) -> list[Any]:
    try:
        return [kind(value) for value in _list(text, flag)]
    except ValueError as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{flag} {text}: expected numbers, such as {example}") from None


def _grid_axis(text: str) -> tuple[str, list[str]]:
    """Returns the name and the values of a `--grid`."""
    name, equals, values = text.partition("=")
    if not equals or not name.strip():
        raise InputError(f"--grid {text}: expected NAME=A,B")
    return name.strip(), _split_values(values, text)


def _split_values(values: str, text: str) -> list[str]:
    # only commas outside brackets and quotes separate values: `(1,2),"a,b",3` has three values
    found, depth, quote = [""], 0, ""
    for c in values:
        if quote:
            quote = "" if c == quote else quote
        elif c in "'\"":
            quote = c
        elif c in "([{":
            depth += 1
        elif c in ")]}":
            depth -= 1
        if c == "," and not depth and not quote:
            found.append("")
        else:
            found[-1] += c
    found = [value.strip() for value in found]
    if not all(found) or len(set(found)) < len(found):
        raise InputError(
            f"--grid {text}: expected different values, none of them empty, such as a,b"
        )
    return found


def describe(cells: Sequence[tuple["Cell", list[str]]]) -> str:
    """Returns the size of a sweep, such as `8 cells: 2 arms x 2 fractions x 2 seeds`."""
    counts = {
        "arms": len({c.arm for c, _ in cells}),
        "fractions": len({c.fraction for c, _ in cells}),
        "seeds": len({c.seed for c, _ in cells}),
        "settings": len({tuple(c.grid.items()) for c, _ in cells}),
    }
    parts = [f"{n} {k}" for k, n in counts.items() if k != "settings" or n > 1]
    return f"{len(cells)} cells: {' x '.join(parts)}"
