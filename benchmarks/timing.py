"""Provides what the benchmarks share: thread limits, turns, medians and printing.

Import it first: JAX, TensorFlow and torch read thread counts when they are imported.
"""

import argparse
import dataclasses
import importlib
import json
import os
import pathlib
import platform
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

from stepdistill_jax.errors import InputError, how_to_install

REST_SECS = 0.1  # before a turn, so that spinning OpenMP threads of the last turn go to sleep
BUSY = 0.2  # if other processes use more cores than this, results are not reliable

# A contender prepares a round, untimed, and returns the round's work: a function that returns its units.
Contender = Callable[[int], Callable[[], int]]


def start(
    description: str,
    add_arguments: Callable[[argparse.ArgumentParser], None],
    *,
    rounds: int,
) -> argparse.Namespace:
    """Parses the command line, and limits this process and its libraries to `--threads` cores.

    Args:
        description: text for `--help`.
        add_arguments: function that adds the benchmark's own arguments.
        rounds: default of `--rounds`.
    """
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    usable = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    cores = len(usable) or os.cpu_count() or 1
    parser.add_argument("--task", default="delivery", help="a prepared dataset")
    parser.add_argument("--data-dir", type=pathlib.Path, help="folder of prepared datasets")
    parser.add_argument("--threads", type=int, default=min(2, cores), help="cores per contender")
    parser.add_argument("--rounds", type=int, default=rounds, help="timed turns per contender")
    parser.add_argument("--json", action="store_true", help="end the output with a JSON object")
    add_arguments(parser)
    args = parser.parse_args()
    if not 1 <= args.threads <= cores:
        raise InputError(f"--threads {args.threads}: from 1 to {cores}, the cores of this process")
    for name, value in vars(args).items():
        if isinstance(value, int) and not isinstance(value, bool) and value < 1 and name != "seed":
            raise InputError(f"--{name.replace('_', '-')} {value}: expected at least 1")
    if usable:  # other systems cannot limit JAX, which uses every core there
        os.sched_setaffinity(0, usable[: args.threads])
    os.environ |= {"JAX_PLATFORMS": "cpu", "OMP_NUM_THREADS": str(args.threads)}
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    args.began, args.load = Clock.now(), load()
    return args


def peer_module(name: str, threads: int | None = None) -> Any:
    """Imports a module that only a peer needs; sets torch's number of threads.

    Raises:
        InputError: the module is not installed.
    """
    try:
        module = importlib.import_module(name)
    except ImportError as error:
        raise InputError(
            f"{name} cannot be imported ({error}); {how_to_install('bench')}"
        ) from None
    if threads is not None:
        module.set_num_threads(threads)
    return module


def fill_in_lengths(args: argparse.Namespace, objectives: str = "step_by_step") -> None:
    """Sets packed row lengths that were not given, as a run on one device chooses them."""
    from stepdistill_jax.training.config import TrainConfig
    from stepdistill_jax.training.inspection import inspect

    if args.input_length is None or args.target_length is None:
        settings = {"batch_size": args.batch_size, "objectives": objectives}
        if "size" in args:
            settings["model_size"] = args.size
        config = TrainConfig(task=args.task, **settings)
        inputs, targets = inspect(config, data_dir=args.data_dir)["row_lengths"]
        args.input_length = args.input_length or inputs
        args.target_length = args.target_length or targets


@dataclasses.dataclass(frozen=True)
class Clock:
    """Wall time, CPU time of all cores, and CPU time of our processes, in seconds."""

    wall: float
    machine: float | None
    own: float

    @classmethod
    def now(cls) -> "Clock":
        stat, machine = pathlib.Path("/proc/stat"), None
        if stat.exists():  # user, nice, system, idle, iowait, irq, softirq, steal
            ticks = [int(x) for x in stat.read_text().splitlines()[0].split()[1:9]]
            machine = (sum(ticks) - sum(ticks[3:5])) / os.sysconf("SC_CLK_TCK")
        # this process, and its children that have ended
        return cls(time.perf_counter(), machine, sum(os.times()[:4]))


def busy_cores(since: Clock, until: Clock) -> float | None:
    """Returns the mean number of cores that other processes used (load averages would include ours)."""
    if since.machine is None or until.machine is None:
        return None
    others = until.machine - since.machine - (until.own - since.own)
    return round(max(others, 0.0) / (until.wall - since.wall), 2)


def load() -> float | None:
    """Returns the mean number of runnable processes in the last minute."""
    return round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None


def alternate(contenders: dict[str, Contender], rounds: int) -> dict[str, list[float]]:
    """Returns the units per second of each contender in each round.

    They take turns, so that a slow minute of the machine affects all of them. Round 0 is a warm-up and does
    not count; every second round has the reverse order.
    """
    rates: dict[str, list[float]] = {name: [] for name in contenders}
    for number in range(rounds + 1):
        names = list(contenders)[:: -1 if number % 2 else 1]
        for name in names:
            work = contenders[name](number)
            time.sleep(REST_SECS)
            began = time.perf_counter()
            units = work()
            seconds = time.perf_counter() - began
            if number:
                rates[name].append(units / seconds)
            print(f"round {number} {name}: {units} in {seconds:.2f} s", file=sys.stderr)
    return rates


def in_pairs(ours: list[float], peer: list[float]) -> list[float]:
    """Returns the ratio in each round: a slow minute of the machine affects both turns of a round."""
    return [a / b for a, b in zip(ours, peer, strict=True)]


def device() -> str:
    """Returns the type of the processor."""
    cpuinfo = pathlib.Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"cpu ({models[0] if models else platform.processor() or platform.machine()})"


def report(
    args: argparse.Namespace,
    rates: dict[str, list[float]],
    *,
    unit: str,
    environments: Mapping[str, Mapping[str, str]] | None = None,
    **more: Any,
) -> None:
    """Prints the table and, with `--json`, the JSON object.

    Args:
        args: result of `start`.
        rates: result of `alternate`, with the key `ours` and a key for each peer.
        unit: name of the rate, e.g. `rows_per_second`.
        environments: variables of contenders that run in their own processes.
        more: further facts, JSON-like.
    """
    results = {
        name: {unit: statistics.median(r), "lowest": min(r), "highest": max(r)}
        for name, r in rates.items()
    }
    ours, peers = results.pop("ours"), results
    pairs = {name: in_pairs(rates["ours"], rates[name]) for name in peers}
    busy = busy_cores(args.began, Clock.now())
    result = {
        "ours": ours,
        "peers": peers,
        "ratio": {name: statistics.median(ratios) for name, ratios in pairs.items()},
        "pairs": pairs,
        "threads": args.threads,
        "device": device(),
        "rounds": args.rounds,
        "busy_cores": busy,
        "load": {"before": args.load, "after": load()},
        "settings": {
            name: str(value) if isinstance(value, pathlib.Path) else value
            for name, value in vars(args).items()
            if name not in ("json", "began", "load", "threads", "rounds")
        },
        "environments": {name: dict(added) for name, added in (environments or {}).items()},
        **more,
    }
    print(f"{result['device']}, {args.threads} threads, {args.rounds} rounds, load {args.load}")
    if busy is not None and busy > BUSY:
        print(f"other processes kept {busy} cores busy: do not quote these numbers")
    for name, value in more.items():
        print(f"{name}: {value}")
    title = unit.replace("_", " ")
    print(f"{'':<24}{title:>20}{'lowest':>10}{'highest':>10}{'ours is':>10}  in pairs")
    for name, result_of in {"ours": ours, **peers}.items():
        ratio = spread = ""
        if name in peers:
            ratio = f"{result['ratio'][name]:.2f}x"
            spread = f"{min(pairs[name]):.2f} to {max(pairs[name]):.2f}"
        cells = (result_of["lowest"], result_of["highest"])
        numbers = f"{result_of[unit]:>20.4g}{cells[0]:>10.4g}{cells[1]:>10.4g}{ratio:>10}"
        print(f"{name:<24}{numbers}  {spread}")
    if args.json:
        print(json.dumps(result), flush=True)


def run(main: Callable[[], None]) -> None:
    """Runs a benchmark's `main`; a user error prints one line and exits with status 2."""
    try:
        main()
    except InputError as error:
        print(f"{pathlib.Path(sys.argv[0]).name}: error: {error}", file=sys.stderr)
        sys.exit(2)
