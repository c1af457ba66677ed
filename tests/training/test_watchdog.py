"""Real processes that hang, and one that only slept."""

import json
import os
import signal
import socket
import subprocess
import sys
import time

import pytest

from stepdistill_jax.training.watchdog import SLOW_FACTOR, Watchdog

HANGS = """
import sys, threading, time
from stepdistill_jax.training.watchdog import Watchdog

def a_step_that_hangs():
    threading.Event().wait()

with Watchdog(5, float(sys.argv[1])) as watchdog:
    for step in range(1, 20):
        time.sleep(0.01)
        watchdog.step(step)
    print("hanging", flush=True)
    if sys.argv[2] == "slow":
        with watchdog.slow():
            a_step_that_hangs()
    a_step_that_hangs()
"""


def start(*argv):
    return subprocess.Popen(
        [sys.executable, "-c", *map(str, argv)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.parametrize(("kind", "secs"), [("step", 0.5), ("slow", 0.1)])
def test_a_step_that_hangs_ends_the_process_with_its_stack(kind, secs):
    process = start(HANGS, secs, kind)
    assert process.stdout.readline() == "hanging\n"
    began = time.monotonic()
    _, err = process.communicate(timeout=60)
    assert process.returncode == 134
    factor = SLOW_FACTOR if kind == "slow" else 1
    assert factor * secs * 0.9 < time.monotonic() - began < factor * secs + 10
    assert "stuck: nothing for" in err and "after step 19, a step takes" in err
    assert "in a_step_that_hangs" in err
    assert "start the same command again" in err.splitlines()[-1]


def test_a_process_that_was_stopped_and_goes_on_is_not_stuck():
    """Ctrl-Z and `fg`, or a laptop's lid: the time outside does not count."""
    process = start(HANGS, 2, "step")
    assert process.stdout.readline() == "hanging\n"
    process.send_signal(signal.SIGSTOP)
    time.sleep(4)
    began = time.monotonic()
    process.send_signal(signal.SIGCONT)
    process.wait(60)
    assert time.monotonic() - began > 1


def test_many_medians_of_slow_steps_are_waited_for(monkeypatch):
    now = [0.0]
    monkeypatch.setattr("stepdistill_jax.training.watchdog.time.monotonic", lambda: now[0])
    watchdog = Watchdog(20, 600)  # not entered: no thread
    assert watchdog.limit_secs() == SLOW_FACTOR * 600
    for step in range(1, 6):
        now[0] += 100 if step == 1 else 40  # the first one compiles and is no measure
        watchdog.step(step)
    assert watchdog.limit_secs() == 800
    with watchdog.slow():
        assert watchdog.limit_secs() == SLOW_FACTOR * 600
        now[0] += 1000
    now[0] += 40
    watchdog.step(6)
    assert watchdog.limit_secs() == 800


# --- in training

SETTINGS = {
    "task": "delivery",
    "batch_size": 8,
    "input_length": 64,
    "target_length": 64,
    "train_steps": 100_000,
    "eval_every": 10**6,
    "checkpoint_every": 10,
    "watchdog_min_secs": 15.0,
}
# the data of step 15 never come
NO_DATA = """
import json, sys, threading
import stepdistill_jax.training.loop as loop
from stepdistill_jax.training import TrainConfig
iterate = loop.iterate
def stopping(batches, start, stop):
    for step, batch in enumerate(iterate(batches, start, stop), start + 1):
        if step == 15:
            threading.Event().wait()
        yield batch
loop.iterate = stopping
settings, workdir, data_dir = json.loads(sys.argv[1]), *sys.argv[2:]
loop.train(TrainConfig(**settings), workdir=workdir, data_dir=data_dir)
"""


@pytest.mark.slow
def test_data_that_never_come_end_a_run_that_can_go_on(tmp_path, delivery_data_dir):
    process = start(NO_DATA, json.dumps(SETTINGS), tmp_path, delivery_data_dir)
    _, err = process.communicate(timeout=250)
    assert process.returncode == 134, err
    assert "after step 14" in err and "in stopping" in err
    assert (tmp_path / "checkpoints" / "10").is_dir()


@pytest.mark.slow
def test_one_of_two_processes_that_is_frozen_ends_the_other(tmp_path, delivery_data_dir):
    """By the watchdog (1) or by JAX's heartbeat (SIGABRT), whichever is sooner."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    overrides = {k.upper(): v for k, v in SETTINGS.items() if k != "watchdog_min_secs"}
    argv = [sys.executable, "-m", "stepdistill_jax", "train", "demo_step_by_step"]
    argv += ["--workdir", tmp_path / "w", "--data-dir", delivery_data_dir]
    argv += ["--set", "train.watchdog_min_secs=15.0"]
    argv += [x for k, v in overrides.items() for x in ("--set", f"{k}={v}")]
    pair = [
        subprocess.Popen(
            list(map(str, argv)),
            env=os.environ
            | {"JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}", "JAX_NUM_PROCESSES": "2"}
            | {"JAX_PROCESS_ID": str(i), "XLA_FLAGS": ""},
            stderr=(tmp_path / f"err{i}").open("w"),
        )
        for i in range(2)
    ]
    try:
        deadline, metrics = time.monotonic() + 200, tmp_path / "w" / "metrics.jsonl"
        while not metrics.exists() or '"step": 30,' not in metrics.read_text():
            assert time.monotonic() < deadline and pair[0].poll() is None
            time.sleep(0.1)
        pair[1].send_signal(signal.SIGSTOP)
        began = time.monotonic()
        code = pair[0].wait(90)
        seconds, err = time.monotonic() - began, (tmp_path / "err0").read_text()
    finally:
        for process in pair:
            process.kill()
            process.wait()
    assert code in (1, -signal.SIGABRT), err
    assert seconds < 75
    if code == 1:
        assert "stuck: nothing for" in err and "in _train" in err
    else:
        assert "JAX distributed service detected fatal errors" in err
    print(f"ended with {code} after {seconds:.0f} s")
