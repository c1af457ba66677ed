"""Runs the benchmarks one after another and writes their results into docs/lab/benchmarks.md.

    python benchmarks/run_all.py
    python benchmarks/run_all.py --only input,startup --task cqa

Each runs in its own process. Its results go between the marks `<!-- begin NAME -->` and `<!-- end NAME -->`
of the file; all other text is kept, and with `--only` also the results of other benchmarks. If a benchmark
fails or is skipped, the reason is written instead, and the exit code is 1.
"""

import argparse
import dataclasses
import datetime
import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import page
import timing

from stepdistill_jax.data.prepare import ensure_prepared
from stepdistill_jax.data.prepared import data_folder, is_prepared
from stepdistill_jax.errors import InputError, nearest

HERE = pathlib.Path(__file__).resolve().parent
OUTPUT = HERE.parent / "docs" / "lab" / "benchmarks.md"
TIMEOUT_SECS = 1800.0


@dataclasses.dataclass(frozen=True)
class Part:
    """One benchmark with its flags.

    Attributes:
        script: name of its file in this folder, without `.py`.
        title: heading of its section.
        flags: command-line flags.
        quick: further flags for `--quick`, which override earlier ones.
        on_task: whether it accepts `--task` and `--data-dir`.
        printed: whether the table that it prints is copied, instead of making one from its results.
    """

    script: str
    title: str
    flags: str = ""
    quick: str = "--rounds 1"
    on_task: bool = True
    printed: bool = False


T5 = "--vocab-size 32128"
TINY = "--rounds 1 --size tiny --vocab-size 8000"
TRAIN = f"{TINY} --batch-size 4"
DECODE = f"{TINY} --rows 8 --batch-size 4"
PARTS = {
    "input": Part(
        "input_throughput",
        "Input: batches of a step, two threads",
        "--threads 2",
        "--rounds 1 --seconds 0.2",
    ),
    "input_1": Part(
        "input_throughput",
        "Input: batches of a step, one thread",
        "--threads 1",
        "--rounds 1 --seconds 0.2",
    ),
    "train_small": Part(
        "train_throughput",
        "Training: `paper_cqa` with T5 v1.1 small, two threads",
        f"--config paper_cqa --size small {T5} --steps 1 --rounds 2 --threads 2",
        TRAIN,
    ),
    "train_small_1": Part(
        "train_throughput",
        "Training: `paper_cqa` with T5 v1.1 small, one thread, 16 examples a step",
        f"--config paper_cqa --size small {T5} --batch-size 16 --steps 1 --rounds 3 --threads 1",
        TRAIN,
    ),
    "train_base": Part(
        "train_throughput",
        "Training: `paper_cqa` with T5 v1.1 base, two threads, 16 examples a step",
        f"--config paper_cqa --size base {T5} --batch-size 16 --steps 1 --rounds 2 --threads 2",
        TRAIN,
    ),
    "train_t5gemma": Part(
        "train_throughput",
        "Training: `paper_cqa` with T5Gemma small, two threads, 8 examples a step",
        "--config paper_cqa --family t5gemma --size small --vocab-size 256000 --batch-size 8"
        " --rounds 4 --threads 2",
        TRAIN,
    ),
    "train_shared": Part(
        "train_throughput",
        "Training with the shared encoder: T5 v1.1 small, two threads",
        f"--config paper_cqa --size small {T5} --peers ours_shared_encoder --steps 1 --rounds 3"
        " --threads 2",
        TRAIN,
    ),
    "decode_small": Part(
        "decode_throughput",
        "Decoding labels: T5 v1.1 small, two threads",
        f"--size small {T5} --rows 2000 --rounds 2 --threads 2",
        DECODE,
    ),
    "decode_small_1": Part(
        "decode_throughput",
        "Decoding labels: T5 v1.1 small, one thread",
        f"--size small {T5} --rows 256 --rounds 1 --threads 1",
        DECODE,
    ),
    "decode_base": Part(
        "decode_throughput",
        "Decoding labels: T5 v1.1 base, two threads",
        f"--size base {T5} --rows 64 --rounds 2 --threads 2",
        DECODE,
    ),
    "choices": Part(
        "choices_throughput",
        "Scoring each allowed label",
        f"--size small {T5} --rows 64 --rounds 2 --max-decode-len 8",
        DECODE,
    ),
    "serving_cost": Part(
        "serving_cost",
        "What a model trained step-by-step costs to serve",
        f"--size small {T5} --rows 64 --rounds 2",
        DECODE,
    ),
    "latency": Part(
        "latency",
        "Latency: one row, and a server under load",
        f"--size small {T5} --seconds 10",
        f"{TINY} --rows 6 --input-length 32 --rates 20 --seconds 1 --batch-size 2",
    ),
    "startup": Part(
        "startup",
        "Start-up: seconds to the end of the first step",
        "--size small --rounds 2",
        "--size tiny --rounds 1",
    ),
    "prepare": Part(
        "prepare_throughput",
        "Preparing e-SNLI, made-up rows",
        "--rows 100000",
        "--rows 500",
        on_task=False,
    ),
    "memory": Part(
        "memory",
        "Memory of a training step",
        "--steps 1",
        "--size tiny --input-length 64 --target-length 32",
        on_task=False,
        printed=True,
    ),
    "tokenising": Part(
        "tokenising_memory",
        "Memory of tokenising, made-up rows",
        quick="--rows 100 200",
        on_task=False,
        printed=True,
    ),
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        epilog=f"benchmarks: {', '.join(PARTS)}",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument(
        "--task", help="a prepared dataset; default: cqa if prepared, else delivery"
    )
    parser.add_argument("--data-dir", type=pathlib.Path, help="folder of prepared datasets")
    parser.add_argument("--only", help="names of benchmarks, separated by commas; default: all")
    parser.add_argument(
        "--quick", action="store_true", help="tiny runs that only show whether benchmarks work"
    )
    parser.add_argument("--output", type=pathlib.Path, default=OUTPUT, help="the file to write")
    args = parser.parse_args()
    names = args.only.split(",") if args.only else list(PARTS)
    for name in names:
        if name not in PARTS:
            raise InputError(f"--only: no benchmark {name!r}{nearest(name, PARTS)}")
    if args.quick and args.output == OUTPUT:
        raise InputError("--quick: its numbers are meaningless; choose a different --output")
    if args.task is None:
        args.task = "cqa" if is_prepared("cqa", data_folder(args.data_dir)) else "delivery"
    ensure_prepared(args.task, args.data_dir)
    failed = []
    for name in names:
        command = command_of(PARTS[name], args)
        print(f"== {name}: {' '.join(command)}", file=sys.stderr, flush=True)
        text, worked = section(PARTS[name], command)
        if not worked:
            failed.append(name)
        page.write(
            args.output, {"machine": page.machine(), name: text}
        )  # a long run may be stopped
        print(text, flush=True)
    print(f"wrote {args.output}", flush=True)
    if failed:
        sys.exit(f"without results: {', '.join(failed)}")


def command_of(part: Part, args: argparse.Namespace) -> list[str]:
    """Returns the command line of a benchmark."""
    command = ["python", f"benchmarks/{part.script}.py", *part.flags.split()]
    if part.on_task:
        command += ["--task", args.task]
        command += ["--data-dir", os.fspath(args.data_dir)] if args.data_dir else []
    return [*command, *(part.quick.split() if args.quick else ()), "--json"]


def section(part: Part, command: list[str]) -> tuple[str, bool]:
    """Runs a benchmark; returns the Markdown of its section, and whether it has results."""
    today = datetime.date.today().isoformat()
    lines = [f"## {part.title}", "", f"`{' '.join(command)}`", ""]
    began = time.monotonic()
    output, problem = run_alone(HERE / f"{part.script}.py", command[2:])
    seconds = time.monotonic() - began
    if problem is not None:
        return "\n".join([*lines, f"**No results** ({today}): {problem}"]), False
    *printed, last = output.splitlines()
    result = json.loads(last)
    if part.printed:
        lines += [*(line for line in printed if line.startswith("|")), ""]
    else:
        lines += [*page.table(result), ""]
    if found := list(page.facts(result)):
        lines += [*found, ""]
    return "\n".join([*lines, page.conditions(result, today, seconds)]), True


def run_alone(script: pathlib.Path, flags: list[str]) -> tuple[str, str | None]:
    """Runs a script; returns (its standard output, None), or ("", the reason why there is none)."""
    if not script.exists():
        return "", f"skipped: {script.name} does not exist"
    with subprocess.Popen(
        [sys.executable, os.fspath(script), *flags],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,  # so that its children end with it
    ) as process:
        try:
            output, errors = process.communicate(timeout=TIMEOUT_SECS)
        except BaseException as error:
            os.killpg(process.pid, signal.SIGKILL)
            if not isinstance(error, subprocess.TimeoutExpired):
                raise
            return "", f"failed: not finished after {TIMEOUT_SECS:g} s"
    print(errors, file=sys.stderr, end="", flush=True)
    message = (errors.strip().splitlines() or ["(no message)"])[-1]
    if process.returncode:
        what = "skipped" if process.returncode == 2 else f"failed, exit code {process.returncode}"
        return "", f"{what}: {message}"
    try:
        json.loads((output.splitlines() or [""])[-1])
    except json.JSONDecodeError:
        return "", "failed: its last line is not JSON"
    return output, None


if __name__ == "__main__":
    timing.run(main)
