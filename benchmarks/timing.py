"""What the benchmarks share: threads, turns, medians, and how figures are printed.

Import it first: thread counts are read when JAX, TensorFlow and torch are imported.
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

from stepdistill_jax.errors import InputError

REST_SECS = 0.1  # before a turn: OpenMP threads of the one before that spin have gone to sleep
BUSY = 0.2  # cores in use by others above which figures are not to be trusted

# A contender prepares a round, untimed, and returns the work, which returns how many units it did.
Contender = Callable[[int], Callable[[], int]]


def start(
    description: str,
    add_arguments: Callable[[argparse.ArgumentParser], None],
    *,
    rounds: int,
) -> argparse.Namespace:
    """Parses the command line, takes `--threads` cores and keeps every library to them.

    Args:
        description: for `--help`.
        add_arguments: adds the benchmark's own.
        rounds: default of `--rounds`.
    """
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    usable = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    cores = len(usable) or os.cpu_count() or 1
    parser.add_argument("--task", default="delivery", help="a prepared dataset")
    parser.add_argument("--data-dir", type=pathlib.Path, help="where it lies")
    parser.add_argument("--threads", type=int, default=min(2, cores), help="CPU cores for each")
    parser.add_argument("--rounds", type=int, default=rounds, help="timed turns of each")
    parser.add_argument("--json", action="store_true", help="end with one JSON object")
    add_arguments(parser)
    args = parser.parse_args()
    if not 1 <= args.threads <= cores:
        raise InputError(f"--threads {args.threads}: from 1 to {cores}, the cores of this process")
    for name, value in vars(args).items():
        if isinstance(value, int) and not isinstance(value, bool) and value < 1 and name != "seed":
            raise InputError(f"--{name.replace('_', '-')} {value}: at least 1 is wanted")
    if usable:  # elsewhere JAX, which has no setting for it, uses every core
        os.sched_setaffinity(0, usable[: args.threads])
    os.environ |= {"JAX_PLATFORMS": "cpu", "OMP_NUM_THREADS": str(args.threads)}
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    args.began, args.load = Clock.now(), load()
    return args


def peer_module(name: str, threads: int | None = None) -> Any:
    """A module that only a peer needs; torch is told how many threads it has.

    Raises:
        InputError: it is not installed.
    """
    try:
        module = importlib.import_module(name)
    except ImportError as error:
        raise InputError(
            f"{name} cannot be imported ({error}); pip install 'stepdistill-jax[bench]'"
        ) from None
    if threads is not None:
        module.set_num_threads(threads)
    return module


def fill_in_lengths(args: argparse.Namespace, objectives: str = "step_by_step") -> None:
    """Packed row lengths that were not given: those that a run on one device has."""
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
    """Seconds of wall time, of all cores' work and of our processes' work, at one moment."""

    wall: float
    machine: float | None
    own: float

    @classmethod
    def now(cls) -> "Clock":
        stat, machine = pathlib.Path("/proc/stat"), None
        if stat.exists():  # user, nice, system, idle, iowait, irq, softirq, steal
            ticks = [int(x) for x in stat.read_text().splitlines()[0].split()[1:9]]
            machine = (sum(ticks) - sum(ticks[3:5])) / os.sysconf("SC_CLK_TCK")
        # ours, and that of children that have ended
        return cls(time.perf_counter(), machine, sum(os.times()[:4]))


def busy_cores(since: Clock, until: Clock) -> float | None:
    """Cores that others kept busy, on average; the load average would count us, too."""
    if since.machine is None or until.machine is None:
        return None
    others = until.machine - since.machine - (until.own - since.own)
    return round(max(others, 0.0) / (until.wall - since.wall), 2)


def load() -> float | None:
    """Runnable processes, mean of the last minute."""
    return round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None


def alternate(contenders: dict[str, Contender], rounds: int) -> dict[str, list[float]]:
    """Units per second of each contender in each round.

    They take turns, so that a slow minute of the machine hits all of them. Round 0 is a warm-up
    and not counted; every second round goes the other way about.
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
    """Returns the ratio of each round: a slow minute of the machine hits both of its turns."""
    return [a / b for a, b in zip(ours, peer, strict=True)]


def device() -> str:
    """Kind of processor."""
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
        args: of `start`.
        rates: of `alternate`; the key `ours`, and one for each peer.
        unit: name of the figure, e.g. `rows_per_second`.
        environments: of contenders in processes of their own, over the one of this process.
        more: JSON-like facts, kept as they are.
    """
    figures = {
        name: {unit: statistics.median(r), "lowest": min(r), "highest": max(r)}
        for name, r in rates.items()
    }
    ours, peers = figures.pop("ours"), figures
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
        print(f"others kept {busy} cores busy meanwhile: do not quote these figures")
    for name, value in more.items():
        print(f"{name}: {value}")
    title = unit.replace("_", " ")
    print(f"{'':<24}{title:>20}{'lowest':>10}{'highest':>10}{'ours is':>10}  in pairs")
    for name, figure in {"ours": ours, **peers}.items():
        ratio = spread = ""
        if name in peers:
            ratio = f"{result['ratio'][name]:.2f}x"
            spread = f"{min(pairs[name]):.2f} to {max(pairs[name]):.2f}"
        cells = (figure["lowest"], figure["highest"])
        numbers = f"{figure[unit]:>20.4g}{cells[0]:>10.4g}{cells[1]:>10.4g}{ratio:>10}"
        print(f"{name:<24}{numbers}  {spread}")
    if args.json:
        print(json.dumps(result), flush=True)


def run(main: Callable[[], None]) -> None:
    """Runs a benchmark's `main`; what a user can mend is one line and exit 2."""
    try:
        main()
    except InputError as error:
        print(f"{pathlib.Path(sys.argv[0]).name}: error: {error}", file=sys.stderr)
        sys.exit(2)
