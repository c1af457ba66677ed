"""Real processes that hang, and one that only slept; one of two: tests/faults/test_cluster.py."""

import json
import signal
import subprocess
import sys
import time

import pytest

from stepdistill_jax.training.supervisor import SLOW_FACTOR, State, Watchdog

HANGS = """
import sys, threading, time
from stepdistill_jax.training.supervisor import State, Watchdog

def a_step_that_hangs():
    threading.Event().wait()

with Watchdog(5, float(sys.argv[1])) as watchdog:
    for watchdog.last_step in range(1, 20):
        time.sleep(0.01)
        watchdog.enter(State.STEPPING)
    watchdog.enter(State[sys.argv[2]])
    print("hanging", flush=True)
    a_step_that_hangs()
"""


def start(*argv):
    return subprocess.Popen(
        [sys.executable, "-c", *map(str, argv)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.parametrize(
    ("kind", "secs"), [("STEPPING", 0.5), ("VALIDATING", 0.1), ("SAVING", 0.1)]
)
def test_a_step_that_hangs_ends_the_process_with_its_stack(kind, secs):
    process = start(HANGS, secs, kind)
    assert process.stdout.readline() == "hanging\n"
    began = time.monotonic()
    _, err = process.communicate(timeout=60)
    assert process.returncode == 134
    factor = 1 if kind == "STEPPING" else SLOW_FACTOR
    assert factor * secs * 0.9 < time.monotonic() - began < factor * secs + 10
    assert "stuck: no progress for" in err and "after step 19, a step takes" in err
    assert "in a_step_that_hangs" in err
    assert "start the same command again" in err.splitlines()[-1]


@pytest.mark.slow
def test_a_process_that_was_stopped_and_goes_on_is_not_stuck():
    """Ctrl-Z and `fg`, or a laptop's lid: the time outside does not count."""
    process = start(HANGS, 2, "STEPPING")
    assert process.stdout.readline() == "hanging\n"
    process.send_signal(signal.SIGSTOP)
    time.sleep(4)
    began = time.monotonic()
    process.send_signal(signal.SIGCONT)
    process.wait(60)
    assert time.monotonic() - began > 1


def test_many_medians_of_slow_steps_are_waited_for(monkeypatch):
    now = [0.0]
    monkeypatch.setattr("stepdistill_jax.training.supervisor.time.monotonic", lambda: now[0])
    watchdog = Watchdog(20, 600)  # not entered: no thread
    assert watchdog.limit_secs() == SLOW_FACTOR * 600
    for step in range(1, 6):
        now[0] += 100 if step == 1 else 40  # the first one compiles and is no measure
        watchdog.enter(State.STEPPING)
    assert watchdog.limit_secs() == 800
    watchdog.enter(State.SAVING)
    assert watchdog.limit_secs() == SLOW_FACTOR * 600
    now[0] += 1000
    for _ in range(2):
        watchdog.enter(State.STEPPING)
        assert watchdog.limit_secs() == 800
        now[0] += 40


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
made = loop.on_this_host
def stopping(batches, start, *others):
    for step, batch in enumerate(made(batches, start, *others), start + 1):
        if step == 15:
            threading.Event().wait()
        yield batch
loop.on_this_host = stopping
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
