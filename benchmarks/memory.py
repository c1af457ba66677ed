"""Measures the ways to save memory: planned and actual memory, and the time of a step.

    python benchmarks/memory.py --json

Each row is a process that trains T5 v1.1 on made-up rows, with the gin parts of the row. It reports `plan`'s
numbers for its step, the growth of resident memory over real steps, and the median step time. The last row
saves and restores a state.
"""

import argparse
import ctypes
import dataclasses
import gc
import json
import os
import pathlib
import resource
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from typing import Any

import timing

from stepdistill_jax.errors import InputError

GIB = 2**30
ROWS: dict[str, list[str]] = {
    "scan over layers (always on)": [],
    "remat minimal": ["memory/remat_minimal.gin"],
    "remat full": ["memory/remat_full.gin"],
    "4 microbatches": ["memory/microbatches.gin"],
    "bfloat16 activations": ["memory/bfloat16.gin"],
    "bfloat16 first moment": ["memory/bfloat16_moment.gin"],
    "Adafactor": ["optimizers/adafactor.gin"],
    "full, 4 microbatches, Adafactor": [
        "memory/remat_full.gin",
        "memory/microbatches.gin",
        "optimizers/adafactor.gin",
    ],
}
CHECKPOINT = "checkpoint"
CONFIG = """
include "train.gin"
include "models/t5_v1_1.gin"
include "objectives/step_by_step.gin"
include "optimizers/adamw.gin"

TASK = "made_up_rows"
TRAIN_STEPS = 100
"""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--size", default="small", help="size of T5 v1.1")
    parser.add_argument("--rows", type=int, default=4, help="packed rows per step")
    parser.add_argument("--input-length", type=int, default=512)
    parser.add_argument("--target-length", type=int, default=128)
    parser.add_argument("--steps", type=int, default=3, help="timed steps, after the first")
    parser.add_argument("--json", action="store_true", help="end the output with a JSON object")
    parser.add_argument("--only", choices=[*ROWS, CHECKPOINT], help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.rows % 4 or args.rows < 1:
        raise InputError(
            f"--rows {args.rows}: expected a multiple of 4, the number of microbatches"
        )
    if args.only:
        print(json.dumps(checkpoint(args) if args.only == CHECKPOINT else train(args)))
        return
    results = {name: run_alone(name) for name in (*ROWS, CHECKPOINT)}
    show(results)
    if args.json:
        print(json.dumps({"rows": results, "device": timing.device(), "load": timing.load()}))


def run_alone(name: str) -> dict[str, Any]:
    """Runs one row in its own process."""
    done = subprocess.run(
        [sys.executable, __file__, *sys.argv[1:], "--only", name],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        env={**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""},
    )
    result = json.loads(done.stdout.splitlines()[-1])
    print(f"{name}: {result}", file=sys.stderr, flush=True)
    return result


def show(results: dict[str, dict[str, Any]]) -> None:
    """Prints the table of docs/lab/planning.md."""
    print("| | state | temp planned | memory grew | planned / grew | step |")
    print("|---|---|---|---|---|---|")
    for name in ROWS:
        r = results[name]
        sizes = [f"{r[key] / GIB:.2f} GiB" for key in ("state", "temp", "grew")]
        print(
            f"| {name} | {' | '.join(sizes)} | {r['temp'] / r['grew']:.2f} |"
            f" {r['step_seconds']:.2f} s |"
        )
    r = results[CHECKPOINT]
    print(
        f"\nOf {r['state'] / GIB:.2f} GiB saved: memory grew {r['save'] / r['state']:.2f} times as much"
        f" while saving, {r['restore'] / r['state']:.2f} while restoring"
    )


def setting(args: argparse.Namespace, parts: list[str]) -> Any:
    """Returns the config of a row, read from gin parts like a user's run."""
    from stepdistill_jax.commands.gin_config import load_config

    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder) / "config.gin"
        path.write_text(f"{CONFIG}MODEL_SIZE = {args.size!r}\n")
        config, _ = load_config(path, gin_files=parts)
    return dataclasses.replace(
        config,
        batch_size=args.rows,
        input_length=args.input_length,
        target_length=args.target_length,
    )


def train(args: argparse.Namespace) -> dict[str, Any]:
    """Runs real steps on one CPU device; returns planned and measured numbers."""
    import jax
    import numpy as np

    from stepdistill_jax.models.sharding import Layout, make_mesh, place_rows
    from stepdistill_jax.planning.compiling import bytes_per_device, lower_step
    from stepdistill_jax.planning.workload import workload
    from stepdistill_jax.training.optimizer import make_optimizer
    from stepdistill_jax.training.state import init_state

    config, mesh = setting(args, ROWS[args.only]), make_mesh(Layout(), jax.devices()[:1])
    work = workload(config, rows=args.rows)
    lowered, abstract = lower_step(config, work.model, work.rows_of(1).groups, mesh)
    compiled = lowered.compile()
    state = init_state(work.model, make_optimizer(config), abstract, seed=0)
    rng = np.random.default_rng(0)
    group = {
        name: rng.integers(1, 3, (args.rows, length)).astype(dtype)
        for name, length, dtype in (
            ("encoder_input_tokens", args.input_length, np.int32),
            ("encoder_segment_ids", args.input_length, np.int32),
            ("decoder_input_tokens", args.target_length, np.int32),
            ("decoder_target_tokens", args.target_length, np.int32),
            ("decoder_segment_ids", args.target_length, np.int32),
            ("decoder_objective_ids", args.target_length, np.int32),
            ("decoder_loss_weights", args.target_length, np.float32),
        )
    }
    batch = jax.block_until_ready(place_rows((group,), mesh))
    jax.block_until_ready(state)
    times = []
    with Growth() as growth:
        for _ in range(1 + args.steps):
            began = time.perf_counter()
            state, metrics = compiled(state, batch)
            jax.block_until_ready((state, metrics))
            times.append(time.perf_counter() - began)
    memory = compiled.memory_analysis()
    return {
        "state": bytes_per_device((abstract.params, abstract.opt_state)),
        "arguments": memory.argument_size_in_bytes,
        "temp": memory.temp_size_in_bytes,
        "grew": growth.bytes,
        "step_seconds": statistics.median(times[1:]),
        "loss": float(metrics["loss"]),
    }


def checkpoint(args: argparse.Namespace) -> dict[str, Any]:
    """Returns the growth of memory while saving and restoring a state, in addition to its arrays."""
    import jax

    from stepdistill_jax.models.sharding import Layout, make_mesh
    from stepdistill_jax.planning.compiling import bytes_per_device
    from stepdistill_jax.planning.workload import workload
    from stepdistill_jax.runtime.checkpoints.manager import Checkpoints
    from stepdistill_jax.training.optimizer import make_optimizer
    from stepdistill_jax.training.state import abstract_state, init_state

    config, mesh = setting(args, []), make_mesh(Layout(), jax.devices()[:1])
    model, tx = workload(config, rows=args.rows).model, make_optimizer(config)
    abstract = abstract_state(model, tx, mesh)
    size = bytes_per_device((abstract.params, abstract.opt_state))
    state = jax.block_until_ready(init_state(model, tx, abstract, seed=0))
    with tempfile.TemporaryDirectory() as folder:
        store = Checkpoints(folder)
        with Growth() as saving:
            store.save(1, state.params, state.replace(params=None), {"step": 1, "validated": False})
            store.wait()
        del state
        with Growth() as restoring:
            got = store.restore(1, abstract.params, abstract.replace(params=None))
            jax.block_until_ready(got)
        store.close()
    return {"state": size, "save": saving.bytes, "restore": restoring.bytes - size}


class Growth:
    """Measures peak growth of resident memory, in `bytes`; VmHWM cannot be reset on every system."""

    def __enter__(self) -> "Growth":
        gc.collect()
        # first return freed memory of compilations to the system: reusing it would hide the growth
        getattr(ctypes.CDLL(None), "malloc_trim", lambda _: None)(0)
        self._before = self._most = resident()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._sample)
        self._thread.start()
        return self

    def _sample(self) -> None:
        while not self._stop.wait(0.002):
            self._most = max(self._most, resident())

    def __exit__(self, *_) -> None:
        self._stop.set()
        self._thread.join()
        self.bytes = max(self._most, resident()) - self._before


def resident() -> int:
    """Returns the resident bytes of this process."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize()


if __name__ == "__main__":
    timing.run(main)
