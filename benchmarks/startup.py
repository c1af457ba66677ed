"""Measures the seconds from `stepdistill train` to the end of its first step, by part.

    python benchmarks/startup.py --task cqa --size small --json

Each start is a process, which is killed after it has logged its first step. `cold` finds neither tokens
nor compiled programs; `new_program` finds the tokens of an earlier run; `again` (`ours` in comparisons)
finds both, like a resumed run. Seconds count from the start of the process: `first_step` is the total;
`imports` (including the start of the interpreter), `data`, `state`, `compiling` and `step` are its parts.
`cpu` is the CPU time of all cores, which a busy machine changes least. The first start does not count,
since it reads the libraries from disk.
"""

import argparse
import json
import os
import pathlib
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time

import timing

CONFIG = """
include "train.gin"
include "models/t5_v1_1.gin"
include "objectives/step_by_step.gin"
include "optimizers/adamw.gin"

TASK = "{task}"
MODEL_SIZE = "{size}"
BATCH_SIZE = {batch_size}
TRAIN_STEPS = 1000
"""
STARTS = {  # folders that are removed before a start
    "cold": ("token_store", "compiled"),
    "new_program": ("compiled",),
    "again": (),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--size", default="small", help="size of T5 v1.1: tiny, small, base, ...")
    parser.add_argument("--batch-size", type=int, default=8, help="examples per step")


def first_step(config: pathlib.Path, folder: pathlib.Path) -> dict[str, float]:
    """Returns the seconds of one start, by part.

    Raises:
        SystemExit: the process ended before its first step; shows its output.
    """
    shutil.rmtree(folder / "workdir", ignore_errors=True)
    command = [sys.executable, "-m", "stepdistill_jax", "train", os.fspath(config)]
    command += ["--workdir", os.fspath(folder / "workdir"), "--data-dir", os.fspath(folder)]
    environment = os.environ | {"JAX_COMPILATION_CACHE_DIR": os.fspath(folder / "compiled")}
    began, lines = time.perf_counter(), []
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment) as process:
        try:
            for line in process.stderr:
                lines.append(line)
                if line.startswith("first step after "):
                    seconds, cpu = time.perf_counter() - began, cpu_seconds(process.pid)
                    break
            else:
                sys.exit(f"train ended before its first step:\n{''.join(lines)}")
        finally:
            process.kill()
    parts = {name: float(s) for name, s in re.findall(r"(\w+) ([\d.]+)(?:, |$)", line.strip())}
    parts["imports"] += seconds - sum(parts.values())  # time before the command reads the clock
    return {"first_step": seconds, **({} if cpu is None else {"cpu": cpu}), **parts}


def cpu_seconds(pid: int) -> float | None:
    """Returns user and system seconds of all threads so far; None without /proc."""
    path = pathlib.Path(f"/proc/{pid}/stat")
    if not path.exists():
        return None
    fields = path.read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def main() -> None:
    args = timing.start(__doc__.splitlines()[0], add_arguments, rounds=2)
    from stepdistill_jax.data.prepare import ensure_prepared

    dataset = ensure_prepared(args.task, args.data_dir)
    found: dict[str, list[dict[str, float]]] = {name: [] for name in STARTS}
    with tempfile.TemporaryDirectory() as scratch:
        folder = pathlib.Path(scratch)
        (folder / dataset.name).symlink_to(dataset.directory.absolute())
        config = folder / "config.gin"
        config.write_text(CONFIG.format(**vars(args)))
        first_step(config, folder)
        for number in range(1, args.rounds + 1):
            for name, removed in STARTS.items():
                for part in removed:
                    shutil.rmtree(folder / part, ignore_errors=True)
                start = first_step(config, folder)
                print(f"round {number} {name}: {start}", file=sys.stderr, flush=True)
                found[name].append(start)
    rows = {
        name: {part: round(statistics.median(s[part] for s in starts), 2) for part in starts[0]}
        for name, starts in found.items()
    }
    for name, row in rows.items():
        print(f"{name:<12}" + "".join(f"{part:>12}{s:>8.2f}" for part, s in row.items()))
    if args.json:
        result = {"ours": {"seconds": rows["again"]["first_step"]}, "peers": {}, "ratio": {}}
        result |= {"rows": rows, "threads": args.threads, "device": timing.device()}
        result |= {"rounds": args.rounds, "load": {"before": args.load, "after": timing.load()}}
        print(json.dumps(result | {"batch_size": args.batch_size}), flush=True)


if __name__ == "__main__":
    timing.run(main)
