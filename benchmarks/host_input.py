"""Measures the CPU time of one host's input, for several global batches and numbers of processes.

    python benchmarks/host_input.py --json

It draws made-up examples with CommonsenseQA's lengths, each with a rationale, and packs them into rows of
192 input and 72 target tokens. A process makes the shards of its own devices
(`stepdistill_jax/batches/host.py`); the benchmark plays the first of many processes. Times are CPU times of
one thread, which a busy machine changes little: the medians of `--rounds` steps, without the copy to devices.
`need` is the number of examples per second that 8 H100s would train on at 45% of their peak, with rows as
full as these. `ours` is the rate of one thread at the second batch size (or the only one), with the fewest
processes.

`opening` has two times: to open the token store, which reads a part of it (`opened`), and to compare every
byte, as `inspect --verify` does (`every_byte`).
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Iterator
from typing import Any

import timing

LENGTHS = (192, 72)
GPUS, UTILISATION = 8, 0.45
MODELS = ("base", "large")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--examples", type=int, default=100_000, help="number of made-up examples")
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[64, 4096, 65536])
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 64])


def examples(count: int) -> Iterator[Any]:
    """Yields examples with mean lengths of 45 (input), 3 (label) and 29 (rationale) tokens."""
    import numpy as np

    from stepdistill_jax.tasks.token_store import TokenExample

    rng = np.random.default_rng(0)

    def ids(length: int) -> list[int]:
        return [*rng.integers(3, 32_000, length).tolist(), 1]

    for _ in range(count):
        inputs = ids(int(np.clip(rng.normal(44, 10), 20, 120)))
        rationale = ids(int(np.clip(rng.normal(28, 10), 5, 70)))
        yield TokenExample([(inputs, ids(int(rng.integers(1, 4)))), (inputs, rationale)])


def of_process(batches: Any, processes: int, rounds: int) -> dict[str, float]:
    """Returns the CPU milliseconds per step in the first process, and what a rate is computed from."""
    own = range(-(-batches.num_shards // processes))
    times = []
    for step in range(rounds + 1):
        began = time.process_time()
        shards = [batches.shard(step, number) for number in own]
        fullest = max(shard[0].num_rows for shard in shards)
        batches.arrays(shards, fullest)
        times.append(time.process_time() - began)
    seconds = statistics.median(times[1:])  # the first step draws a permutation
    return {
        "shards": len(own),
        "of_shards": batches.num_shards,
        "examples": len(own) * batches.batch_size / batches.num_shards,
        "milliseconds": 1e3 * seconds,
        "examples_per_row": batches.batch_size / batches.batch_rows(fullest),
    }


def needs(examples_per_row: float) -> dict[str, float]:
    """Returns the examples per second that the GPUs would train on, for each model."""
    from stepdistill_jax.models.families import model_config
    from stepdistill_jax.models.flops import train_flops
    from stepdistill_jax.runtime.chips import CHIPS

    peak, found = CHIPS["NVIDIA H100"].bfloat16, {}
    for size in MODELS:
        model = model_config("t5_v1_1", size, vocab_size=32_128)
        inputs, targets = LENGTHS
        row = train_flops(model, rows=1, input_length=inputs, target_length=targets)
        found[size] = GPUS * UTILISATION * peak / row * examples_per_row
    return found


def main() -> None:
    args = timing.start(__doc__.splitlines()[0], add_arguments, rounds=5)
    from stepdistill_jax.batches.batch import Batches
    from stepdistill_jax.data.objectives import step_by_step
    from stepdistill_jax.tasks.task_data import TaskData
    from stepdistill_jax.tasks.token_store import open_store, verify_store, write_store

    with tempfile.TemporaryDirectory() as folder:
        path = f"{folder}/store"
        store = write_store(path, ("label", "rationale"), examples(args.examples))
        opening = {}
        for name, open_it in (("opened", open_store), ("every_byte", verify_store)):
            began = time.process_time()
            open_it(store.directory)
            opening[name] = 1e3 * (time.process_time() - began)
        data = TaskData.of_store("made up", "train", step_by_step(1.0, 0.5), store, None)
        cells = []
        for batch_size in args.batch_sizes:
            batches = Batches(data, batch_size, *LENGTHS, seed=0, row_multiple=8)
            _ = batches.row_counts  # computed once per run
            for processes in args.processes:
                results = of_process(batches, processes, args.rounds)
                cells.append({"batch_size": batch_size, "processes": processes, **results})
    print(f"{timing.device()}, one thread, {args.rounds} rounds")
    print(f"opening {args.examples} examples, ms of CPU: {opening}")
    print(
        "| batch | processes | shards of one | CPU ms per step | examples per second and thread |"
    )
    print("|---|---|---|---|---|")
    for c in cells:
        rate = c["examples"] / c["milliseconds"] * 1e3
        c["examples_per_second"] = rate
        print(
            f"| {c['batch_size']:,} | {c['processes']} | {c['shards']} of {c['of_shards']} |"
            f" {c['milliseconds']:.2f} | {rate:,.0f} |"
        )
    one, second = min(args.processes), args.batch_sizes[min(1, len(args.batch_sizes) - 1)]
    of_thread = next(c for c in cells if c["processes"] == one and c["batch_size"] == second)
    need = needs(of_thread["examples_per_row"])
    for size, rate in need.items():
        print(f"{GPUS} H100 of T5 v1.1 {size} at {UTILISATION:.0%} MFU: {rate:,.0f} examples/s")
    if args.json:
        ours = {"examples_per_second": of_thread["examples_per_second"]}
        result = {
            "ours": ours,
            "peers": {},
            "ratio": {n: ours["examples_per_second"] / rate for n, rate in need.items()},
            "need": need,
            "cells": cells,
            "opening": opening,
            "threads": 1,
            "device": timing.device(),
        }
        print(json.dumps(result), flush=True)


if __name__ == "__main__":
    timing.run(main)
