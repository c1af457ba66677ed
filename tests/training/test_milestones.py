"""Which steps are saved; a stop signal in any step ends in the same run as none."""

import contextlib
import json
import os
import subprocess
import sys
import types

import jax
import jax.numpy as jnp
import pytest

from stepdistill_jax.data.objectives import step_by_step
from stepdistill_jax.runtime.checkpoints.manager import Checkpoints, resolve_step, saved_steps
from stepdistill_jax.runtime.metrics import read_metrics
from stepdistill_jax.training import TrainConfig
from stepdistill_jax.training.milestones import Milestones
from stepdistill_jax.training.state import TrainState

SETTINGS = {
    "task": "delivery",
    "batch_size": 16,
    "input_length": 64,
    "target_length": 64,
    "train_steps": 6,
    "eval_every": 3,
    "checkpoint_every": 100,
    "learning_rate": 1e-3,
}
# signals itself while the step is computed, which no outside process can time
CHILD = """
import json, os, signal, sys
from stepdistill_jax.training import TrainConfig, loop, train
settings, workdir, data_dir, stop_at = json.loads(sys.argv[1]), *sys.argv[2:]
step_fn_of = loop.jit_train_step
def jit_train_step(*args, **kwargs):
    step_fn = step_fn_of(*args, **kwargs)
    def step(state, batch):
        if int(state.step) + 1 == int(stop_at):
            os.kill(os.getpid(), signal.SIGTERM)
        return step_fn(state, batch)
    return step
loop.jit_train_step = jit_train_step
train(TrainConfig(**settings), workdir=workdir, data_dir=data_dir)
"""


def run(workdir, data_dir, *, stop_at=0):
    done = subprocess.run(
        [sys.executable, "-c", CHILD, json.dumps(SETTINGS), workdir, data_dir, str(stop_at)],
        capture_output=True,
        text=True,
        timeout=250,
        env=os.environ | {"XLA_FLAGS": ""},
    )
    return done.returncode, done.stderr


def timeless(workdir):
    lines = read_metrics(workdir)
    return [{k: v for k, v in x.items() if not k.startswith("timing/")} for x in lines]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, delivery_data_dir):
    workdir = tmp_path_factory.mktemp("undisturbed")
    code, errors = run(workdir, delivery_data_dir)
    assert code == 0, errors
    return workdir


@pytest.mark.slow
@pytest.mark.parametrize("stop_at", [3, 6], ids=["at_a_validation", "at_the_last_step"])
def test_a_stop_loses_no_validation(undisturbed, tmp_path, delivery_data_dir, stop_at):
    code, errors = run(tmp_path, delivery_data_dir, stop_at=stop_at)
    assert code == 75, errors
    assert f"SIGTERM: saved step {stop_at}" in errors
    assert not saved_steps(tmp_path)[stop_at]["validated"]
    code, errors = run(tmp_path, delivery_data_dir)
    assert code == 0, errors
    assert timeless(tmp_path) == timeless(undisturbed)
    assert saved_steps(tmp_path) == saved_steps(undisturbed)


def walk(workdir, steps, accuracies):
    """Goes through steps of a run that is validated every second one; returns what is saved then.

    Validations find these accuracies, in order; the run of 12 steps saves every fifth.
    """
    found = iter(accuracies)

    def compute(params):
        accuracy = next(found)
        return {"eval/validation/label_accuracy": accuracy, "eval/validation/loss/label": 1.0}

    config = TrainConfig(task="any", train_steps=12, eval_every=2, checkpoint_every=5)
    run = types.SimpleNamespace(
        config=config,
        workdir=workdir,
        data=types.SimpleNamespace(objectives=step_by_step()),
        validator=types.SimpleNamespace(compute=compute),
    )
    record = types.SimpleNamespace(
        flush=lambda: None,
        sync=lambda: None,
        validation=lambda step, metrics: None,
        throughput=types.SimpleNamespace(pause=lambda: None),
    )
    saved = {}
    with contextlib.closing(Checkpoints(workdir)) as checkpoints:
        milestones = Milestones(run, checkpoints, record)
        for step in steps:
            state = TrainState(jnp.int32(step), {"w": jnp.ones(4)}, (), jax.random.key(0))
            milestones.reached(step, state, stopping=False)
            checkpoints.wait()
            saved |= {s: m["validated"] for s, m in saved_steps(workdir).items()}
    assert next(found, None) is None
    return saved


def test_a_better_validated_step_is_saved_between_two_checkpoints(tmp_path):
    """Steps 2 and 4 are each the best so far, 6 is not; 5 is due."""
    assert walk(tmp_path, range(1, 7), [0.25, 0.75, 0.5]) == {2: True, 4: True, 5: False}
    assert resolve_step(tmp_path, "best") == 4
    # a resume knows the best: step 8 is not better; 10 is due, 12 is the last
    saved = walk(tmp_path, range(7, 13), [0.625, 0.5, 0.5])
    assert saved == {4: True, 5: False, 10: True, 12: True}
    assert resolve_step(tmp_path, "best") == 4
