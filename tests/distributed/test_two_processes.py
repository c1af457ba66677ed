"""Two processes of one device each, over gloo, train as one process of two devices does."""

import json
import os
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest

from stepdistill_jax.checkpoints.manager import saved_steps
from stepdistill_jax.training.writers import read_metrics

pytestmark = pytest.mark.slow  # half a minute to a minute each

SETTINGS = {
    "task": "delivery",
    "batch_size": 8,
    "input_length": 64,
    "target_length": 64,
    "train_steps": 3,
    "eval_every": 3,
    "checkpoint_every": 100,
    "learning_rate": 1e-3,
}
CHILD = """
import json, os, sys
import jax
settings, workdir, data_dir, process, processes, port = json.loads(sys.argv[1]), *sys.argv[2:]
if int(processes) > 1:
    jax.distributed.initialize(f"127.0.0.1:{port}", int(processes), int(process))
assert jax.device_count() == 2 and jax.process_count() == int(processes)
from stepdistill_jax.training import TrainConfig, train
code = 0
try:
    train(TrainConfig(**settings), workdir=workdir, data_dir=data_dir)
except SystemExit as stop:
    code = stop.code
print("left with", code, file=sys.stderr, flush=True)
if int(processes) > 1:
    jax.distributed.shutdown()
os._exit(code)
"""


def start(workdir, data_dir, processes, **changes):
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = str(s.getsockname()[1])
    flags = "" if processes == 2 else "--xla_force_host_platform_device_count=2"
    return [
        subprocess.Popen(
            [
                sys.executable,
                "-c",
                CHILD,
                json.dumps(SETTINGS | changes),
                *map(str, (workdir, data_dir, process, processes, port)),
            ],
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | {"XLA_FLAGS": flags},
        )
        for process in range(processes)
    ]


def finish(processes):
    errors = [p.communicate(timeout=280)[1] for p in processes]
    return [p.returncode for p in processes], "\n".join(errors)


@pytest.mark.parametrize("layout", ["fsdp", "fsdp_tensor"])
def test_two_processes_have_the_losses_of_one(tmp_path, delivery_data_dir, layout):
    """`fsdp_tensor` makes both processes own the same rows, `fsdp` different ones."""
    runs = {}
    for processes in (1, 2):
        workdir = tmp_path / str(processes)
        codes, errors = finish(start(workdir, delivery_data_dir, processes, layout=layout))
        assert codes == [0] * processes, errors
        runs[processes] = [
            {k: v for k, v in x.items() if not k.startswith("timing/")}
            for x in read_metrics(workdir)
        ]
    for one, two in zip(runs[1], runs[2], strict=True):
        assert one.keys() == two.keys()
        for key in one:
            np.testing.assert_allclose(two[key], one[key], rtol=1e-5, atol=1e-7, err_msg=key)


def test_a_signal_to_one_stops_both_at_the_same_step(tmp_path, delivery_data_dir):
    pair = start(
        tmp_path, delivery_data_dir, 2, layout="fsdp", train_steps=100_000, eval_every=10**6
    )
    deadline = time.monotonic() + 200
    while not (tmp_path / "metrics.jsonl").exists() or len(read_metrics(tmp_path)) < 3:
        assert time.monotonic() < deadline and pair[0].poll() is None, finish(pair)
        time.sleep(0.05)
    pair[1].send_signal(signal.SIGTERM)
    codes, errors = finish(pair)
    assert codes == [75, 75], errors
    (step,) = saved_steps(tmp_path)
    assert errors.count(f"saved step {step};") == 2
