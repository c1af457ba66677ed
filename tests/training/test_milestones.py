"""A stop signal in any step ends in the same run as none: also at a validation, also at the end."""

import json
import os
import subprocess
import sys

import pytest

from stepdistill_jax.checkpoints.manager import saved_steps
from stepdistill_jax.training.writers import read_metrics

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
