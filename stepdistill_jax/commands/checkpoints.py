"""`stepdistill checkpoints`: lists a workdir's saved steps, and checks them for damage."""

import argparse
from typing import Any

from stepdistill_jax.commands.terminal import say

MB = 1e6
COLUMNS = ("step", "state", "MB", "label accuracy", "label loss", "", "problem")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of `checkpoints`."""
    parser.add_argument(
        "workdir", metavar="WORKDIR", help="folder of a training run, local or on gs://"
    )
    parser.add_argument(
        "--verify",
        action="store_true",
        help="read every file and compare its bytes with the saved digest",
    )


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Prints a table of the checkpoints, and changes nothing.

    Returns:
        `checkpoints`: for each, a dict with `step`, `state`, `bytes`, `metrics`, `problem`, `folder`.
        `best`, `last`: the best and the last usable step, or None.
        `damaged`: the damaged steps. If there are any, the command exits with status 1.
    """
    result = look(args.workdir, verify=args.verify)
    rows = [COLUMNS, *(_cells(entry, result) for entry in result["checkpoints"])]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        say("  ".join(f"{cell:<{w}}" for cell, w in zip(row, widths, strict=True)).rstrip())
    if any(entry["state"] == "sealed" for entry in result["checkpoints"]):
        say("sealed: file names and sizes are as saved; --verify also checks every byte")
    return result


def look(workdir: str, *, verify: bool) -> dict[str, Any]:
    """Returns the result of `run`.

    States of a checkpoint:
    `good`: every byte is as saved (only with `verify`).
    `sealed`: file names and sizes are as saved.
    `damaged`: files are missing or changed.
    `unsealed`: the save is in progress or was interrupted.
    `quarantined`: a run moved the damaged checkpoint away.

    Raises:
        InputError: `workdir` is not a workdir.
    """
    from stepdistill_jax.runtime.checkpoints.manager import (
        checkpoints_folder,
        rank,
        require_workdir,
    )
    from stepdistill_jax.runtime.checkpoints.manifest import UNSEALED, defect, quarantined, saved

    require_workdir(workdir)
    folder = checkpoints_folder(workdir)
    entries, known = [], {}
    for step in saved(folder):
        problem = step.problem or (defect(step.folder) if verify else None)
        if not step.folder.exists():
            continue  # a live run has just removed it
        state = "good" if verify else "sealed"
        if problem is not None:
            state = "unsealed" if problem == UNSEALED else "damaged"
        elif step.metrics is not None:
            known[step.number] = step.metrics
        entries.append(
            {
                "step": step.number,
                "state": state,
                "bytes": step.size,
                "metrics": step.metrics,
                "problem": problem,
                "folder": str(step.folder),
            }
        )
    for path in quarantined(folder):
        number = int(path.name.partition(".")[0])
        entry = {"step": number, "state": "quarantined", "bytes": None, "metrics": None}
        entries.append(entry | {"problem": path.name, "folder": str(path)})
    return {
        "checkpoints": entries,
        "best": max(known, key=lambda n: rank(known[n]), default=None),
        "last": max(known, default=None),
        "damaged": [e["step"] for e in entries if e["state"] == "damaged"],
    }


def _cells(entry: dict[str, Any], result: dict[str, Any]) -> tuple[str, ...]:
    metrics = entry["metrics"] or {}
    scores = (metrics.get(name) for name in ("label_accuracy", "label_loss"))
    usable = entry["state"] in ("good", "sealed")
    marks = [name for name in ("best", "last") if usable and entry["step"] == result[name]]
    return (
        str(entry["step"]),
        entry["state"],
        "-" if entry["bytes"] is None else f"{entry['bytes'] / MB:.1f}",
        *("-" if score is None else f"{score:.4f}" for score in scores),
        ", ".join(marks),
        entry["problem"] or "",
    )
