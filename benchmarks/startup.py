"""Seconds from `stepdistill train` to the end of its first step, and where they go.

    python benchmarks/startup.py --task cqa --size small --json

Each start is a process of its own, the line that `train` logs after its first step is read, and the
process is killed. `cold` finds neither tokens nor compiled programs, `new_program` finds the tokens
of an earlier run, and `again`, called `ours` where figures are compared, finds both, as a resumed
run does. Seconds count from the process's start: `first_step` is all of them; `imports` (the
interpreter's start is in it), `data`, `state`, `compiling` and `step` are its parts. `cpu` is the
work of all cores, which a busy machine changes least. A first start is not counted: it brings the
libraries from disk into memory.
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
STARTS = {  # what is removed before
    "cold": ("token_store", "compiled"),
    "new_program": ("compiled",),
    "again": (),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--size", default="small", help="of T5 v1.1: tiny, small, base, ...")
    parser.add_argument("--batch-size", type=int, default=8, help="examples a step")


def first_step(config: pathlib.Path, folder: pathlib.Path) -> dict[str, float]:
    """Seconds of one start, by part.

    Raises:
        SystemExit: it ended before its first step; what it said is shown.
    """
    shutil.rmtree(folder / "workdir", ignore_errors=True)
    command = [sys.executable, "-m", "stepdistill_jax", "train", os.fspath(config)]
    command += ["--workdir", os.fspath(folder / "workdir"), "--data-dir", os.fspath(folder)]
    environment = os.environ | {"JAX_COMPILATION_CACHE_DIR": os.fspath(folder / "compiled")}
    began, said = time.perf_counter(), []
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment) as process:
        try:
            for line in process.stderr:
                said.append(line)
                if line.startswith("first step after "):
                    seconds, cpu = time.perf_counter() - began, cpu_seconds(process.pid)
                    break
            else:
                sys.exit(f"train ended before its first step:\n{''.join(said)}")
        finally:
            process.kill()
    parts = {name: float(s) for name, s in re.findall(r"(\w+) ([\d.]+)(?:, |$)", line.strip())}
    parts["imports"] += seconds - sum(parts.values())  # before the command looks at the clock
    return {"first_step": seconds, **({} if cpu is None else {"cpu": cpu}), **parts}


def cpu_seconds(pid: int) -> float | None:
    """User's and system's, of all threads so far; None where there is no /proc."""
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
