"""Prints the table of docs/lab/accelerators.md: lower bounds of step times on accelerators that are not here.

    python benchmarks/accelerators.py --keep FOLDER
    python benchmarks/accelerators.py base_h100 --set DROPOUT_BROADCAST=True

It needs the extras [aot-cuda] and [tpu], but no device and no dataset. Each cell is a `stepdistill plan`
in its own process: half a minute for H100s, two minutes for a TPU slice. `--keep` writes the JSON of
each cell to a folder, and skips cells whose JSON is already there.
"""

import argparse
import json
import pathlib
import shlex
import subprocess
import sys
import tempfile
from typing import Any

BASE, LARGE = (f"--set MODEL_SIZE={size}" for size in ("base", "large"))
SHORT = "--set ROW_INPUT_LENGTH=512 --set ROW_TARGET_LENGTH=114"
LONG = "--set ROW_INPUT_LENGTH=1024 --set ROW_TARGET_LENGTH=256"
# 32 rows per H100; 16 rows of base and 8 of large per v5e; 16 long rows per H100
CELLS = {
    "base_h100": f"--topology cuda:1 --layout data --rows 32 {BASE} {SHORT}",
    "base_8_h100": f"--topology cuda:8 --layout data --rows 256 {BASE} {SHORT}",
    "base_8_v5e": f"--topology v5e:2x4 --layout data --rows 128 {BASE} {SHORT}",
    "large_h100": f"--topology cuda:1 --layout data --rows 32 {LARGE} {SHORT}",
    "large_8_h100": f"--topology cuda:8 --layout fsdp --rows 256 {LARGE} {SHORT}",
    "large_8_v5e": f"--topology v5e:2x4 --layout fsdp --rows 64 {LARGE} {SHORT}",
    "large_8_h100_long": f"--topology cuda:8 --layout fsdp --rows 128 {LARGE} {LONG}",
}
GIB = 2**30


def main() -> None:
    """Runs the cells and prints a table row for each."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("cells", nargs="*", metavar="CELL", help=f"{', '.join(CELLS)} (all)")
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", dest="settings")
    parser.add_argument("--keep", type=pathlib.Path, help="folder for the JSON of the cells")
    args = parser.parse_args()
    if wrong := set(args.cells) - CELLS.keys():
        parser.error(f"unknown cell {', '.join(sorted(wrong))} (known: {', '.join(CELLS)})")
    print(
        "| cell | rows/chip | GiB of | bound, ms | rows/s per chip | MFU | links, ms | compiler, ms |"
    )
    print("|---|---|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as nowhere:
        folder = args.keep or pathlib.Path(nowhere)
        folder.mkdir(parents=True, exist_ok=True)
        for cell in args.cells or CELLS:
            print(row(cell, result(cell, args.settings, folder, nowhere)), flush=True)


def result(cell: str, settings: list[str], folder: pathlib.Path, no_data: str) -> dict[str, Any]:
    """Returns the JSON that `plan` prints for a cell."""
    kept = folder / f"{'+'.join([cell, *settings])}.json"
    if not kept.is_file():
        more = [word for setting in settings for word in ("--set", setting)]
        command = [*shlex.split(CELLS[cell]), "--set", "DTYPE=bfloat16", *more]
        done = subprocess.run(
            [sys.executable, "-m", "stepdistill_jax", "plan", "paper_cqa", *command, "--json"]
            + ["--data-dir", no_data],
            stdout=subprocess.PIPE,
            text=True,
        )
        if done.returncode:  # `plan` has printed the reason
            sys.exit(done.returncode)
        kept.write_text(done.stdout.splitlines()[-1])
    return json.loads(kept.read_text())


def row(cell: str, found: dict[str, Any]) -> str:
    """Returns a row of the table."""
    (candidate,) = found["candidates"]
    if (bound := candidate.get("bound")) is None:
        return f"| {cell} | does not fit: {candidate['error'][:80]} |"
    rows = candidate["groups"][0][0] / found["devices"]
    memory = f"{candidate['per_device']['total'] / GIB:.1f} of {found['limit'] / GIB:.1f}"
    fits = "" if candidate["fits"] else ", does not fit"
    own = f"{bound['compiler_ms']:.0f}" if bound["compiler_ms"] else "-"
    return (
        f"| {cell} | {rows:g} | {memory}{fits} | {bound['bound_ms']:.1f} |"
        f" {bound['rows_per_second_per_device']:.1f} | {100 * bound['mfu']:.1f}% |"
        f" {bound['links_ms']:.1f} | {own} |"
    )


if __name__ == "__main__":
    main()
