"""Writes the commands that run the cells of a sweep in a shell, as a Slurm array, or on xpk."""

import argparse
import re
import shlex
from collections.abc import Sequence
from typing import TYPE_CHECKING

from stepdistill_jax.commands.sweep import describe

if TYPE_CHECKING:
    from stepdistill_jax.experiments.sweep import Cell

# the same options as in launch/slurm.sbatch, which each task of the array runs
_SLURM = """\
#!/usr/bin/env bash
#SBATCH --job-name=stepdistill-sweep
#SBATCH --array=0-{last}
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=1
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=stepdistill_%A_%a.log
#SBATCH --signal=B:TERM@120
# {about}
# From the checkout:  sbatch [SBATCH OPTIONS] THIS_FILE    (--array=0-{last}%4: at most four at a time)
set -euo pipefail
case "${{SLURM_ARRAY_TASK_ID:?submit this with sbatch}}" in
{cases}
  *) echo "no cell $SLURM_ARRAY_TASK_ID" >&2; exit 2 ;;
esac
exec bash launch/slurm.sbatch bash -c "$cell"
"""
_XPK = """\
#!/usr/bin/env bash
# {about}
# From the checkout:  CLUSTER=pods TYPE=v5litepod-16 IMAGE=... bash THIS_FILE    (submits all, does not wait)
set -euo pipefail
: "${{CLUSTER:?}}" "${{TYPE:?}}" "${{IMAGE:?}}"
submit() {{ launch/xpk.sh --cluster "$CLUSTER" --type "$TYPE" --image "$IMAGE" --workload "$1" -- bash -c "$2"; }}
{lines}
"""


def script(args: argparse.Namespace, cells: Sequence[tuple["Cell", list[str]]]) -> str:
    """Returns the output of `--print`: for each cell, a command that trains and evaluates the cell.

    A stopped command may be run again. After all commands, the same sweep without `--print` writes
    `sweep.json`.
    """
    commands = [_command(args, cell, flags) for cell, flags in cells]
    about = describe(cells)
    if args.printed == "local":
        return "\n".join(commands)
    if args.printed == "slurm":
        cases = "\n".join(
            f"  {i}) cell={shlex.quote(c)} ;; # {cell.name}"
            for i, (c, (cell, _)) in enumerate(zip(commands, cells, strict=True))
        )
        return _SLURM.format(last=len(cells) - 1, about=about, cases=cases).rstrip()
    stem = re.sub(r"[^a-z0-9]+", "-", args.workdir.rstrip("/").rpartition("/")[2].lower())
    lines = "\n".join(
        f"submit {stem.strip('-')[:24] or 'sweep'}-{i} {shlex.quote(c)} # {cell.name}"
        for i, (c, (cell, _)) in enumerate(zip(commands, cells, strict=True))
    )
    return _XPK.format(about=about, lines=lines).rstrip()


def _command(args: argparse.Namespace, cell: "Cell", flags: Sequence[str]) -> str:
    workdir = f"{args.workdir.rstrip('/')}/{cell.path}"
    data = ["--data-dir", str(args.data_dir)] if args.data_dir else []
    command = shlex.join(["stepdistill", "train", *flags, "--workdir", workdir, *data])
    if args.split == "none":
        return command
    output = f"{workdir}/evaluation/{args.split}.json"
    evaluate = ["stepdistill", "evaluate", workdir, "--task", cell.config.task]
    evaluate += ["--split", args.split, "--output", output, *data]
    return f"{command} && {shlex.join(evaluate)}"
