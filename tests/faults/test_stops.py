"""A stop signal in each phase of `train`, in real processes; the resume ends as nobody had stopped it.

`STOPS_LOG=FILE` keeps the seconds from the signal to the end of the process, phase by phase.
"""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from stepdistill_jax.checkpoints.manager import restore_params, saved_steps
from stepdistill_jax.training import TrainConfig, train
from stepdistill_jax.training.run import assemble
from stepdistill_jax.training.writers import read_metrics

pytestmark = pytest.mark.timeout(300)
SETTINGS = {
    "task": "delivery",
    "batch_size": 16,
    "input_length": 64,
    "target_length": 64,
    "train_steps": 12,
    "eval_every": 12,
    "checkpoint_every": 5,
    "learning_rate": 1e-3,
    "layout": "fsdp",
}
# holds the run at one place until FOLDER/go is there; a place in C++ cannot be called off
CHILD = """
import ctypes, json, os, pathlib, sys, time
phase, folder = sys.argv[1], pathlib.Path(sys.argv[2])
settings, workdir, data_dir = json.loads(sys.argv[3]), sys.argv[4], sys.argv[5]
from stepdistill_jax.distributed import join, leave
join()
import stepdistill_jax.training.evaluate as evaluate
import stepdistill_jax.training.loop as loop
import stepdistill_jax.training.run as run
from stepdistill_jax.checkpoints.manager import Checkpoints
from stepdistill_jax.inference.decode import LabelDecoder
from stepdistill_jax.training.recorder import StepRecorder

def hold():
    (folder / f"held{os.environ.get('JAX_PROCESS_ID', '')}").touch()
    while not (folder / "go").exists():
        time.sleep(0.01)

def before(owner, name):
    function = getattr(owner, name)
    def held(*args, **kwargs):
        hold()
        return function(*args, **kwargs)
    setattr(owner, name, held)

def after(owner, name, when=lambda *args: True):
    function = getattr(owner, name)
    def held(*args, **kwargs):
        result = function(*args, **kwargs)
        if when(*args):
            hold()
        return result
    setattr(owner, name, held)

def compiling(*args, **kwargs):
    (folder / "held").touch()
    ctypes.CDLL(None).system(b"exec sleep 20 > /dev/null 2>&1")

if phase == "tokenising":
    before(run, "load_task")
elif phase == "restoring":
    before(Checkpoints, "restore")
elif phase == "compiling":
    loop.jit_train_step = lambda *args, **kwargs: compiling
elif phase == "training":
    after(StepRecorder, "note", lambda _, step, *rest: step == 4)
elif phase == "validation":
    make = evaluate.jit_eval_step
    def made(*args, **kwargs):
        step, calls = make(*args, **kwargs), []
        def held(*batch):
            calls.append(1)
            if len(calls) == 2:
                hold()
            return step(*batch)
        return held
    evaluate.jit_eval_step = made
elif phase == "decoding":
    decode = LabelDecoder.__call__
    def held(self, params, rows, on_progress):
        done = []
        def each(count):
            done.append(count)
            if len(done) == 2:
                hold()
            on_progress(count)
        return decode(self, params, rows, each)
    LabelDecoder.__call__ = held
elif phase == "saving":
    after(Checkpoints, "save")
try:
    loop.train(loop.TrainConfig(**settings), workdir=workdir, data_dir=data_dir)
except SystemExit as stop:
    leave(stop.code)
    raise
"""
# the step in whose work the hold is, and so the step that is saved; a save is followed by one more
SAVED = {"training": 4, "validation": 12, "decoding": 12, "saving": 6}


@pytest.fixture
def children():
    started = []
    yield started
    for child in started:
        child.kill()
        child.wait()


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, delivery_data_dir):
    workdir = tmp_path_factory.mktemp("undisturbed")
    train(TrainConfig(**SETTINGS), workdir=workdir, data_dir=delivery_data_dir)
    return workdir


def start(children, phase, folder, workdir, data_dir, process=None, **changes):
    """A run that is held in its phase; returns when it is."""
    env = os.environ | ({} if process is None else process)
    arguments = [phase, str(folder), json.dumps(SETTINGS | changes), str(workdir), str(data_dir)]
    children.append(
        subprocess.Popen(
            [sys.executable, "-c", CHILD, *arguments], stderr=subprocess.PIPE, text=True, env=env
        )
    )
    return children[-1]


def wait_for(path, *processes):
    deadline = time.monotonic() + 200
    while not path.exists():
        assert time.monotonic() < deadline, f"no {path.name}"
        for process in processes:
            assert process.poll() is None, process.stderr.read()
        time.sleep(0.02)


def stop(child, folder, number=signal.SIGTERM):
    """Seconds from the signal to the end, and standard error; the hold ends with the signal."""
    child.send_signal(number)
    told = time.monotonic()
    time.sleep(0.1)
    (folder / "go").touch()
    _, errors = child.communicate(timeout=200)
    return time.monotonic() - told, errors


def params_of(workdir, data_dir):
    abstract = assemble(TrainConfig(**SETTINGS), workdir, data_dir).abstract.params
    return [np.asarray(x) for x in jax.tree.leaves(restore_params(workdir, 12, abstract))]


def untimed(workdir):
    return [
        {k: v for k, v in x.items() if not k.startswith("timing/")} for x in read_metrics(workdir)
    ]


def assert_goes_on_as(undisturbed, workdir, data_dir):
    assert train(TrainConfig(**SETTINGS), workdir=workdir, data_dir=data_dir)["step"] == 12
    for a, b in zip(params_of(workdir, data_dir), params_of(undisturbed, data_dir), strict=True):
        np.testing.assert_array_equal(a, b)
    assert untimed(workdir) == untimed(undisturbed)


def record(phase, seconds):
    if log := os.environ.get("STOPS_LOG"):
        with open(log, "a") as f:
            f.write(f"{phase} {seconds:.2f}\n")


@pytest.mark.parametrize(
    "phase",
    [
        pytest.param("tokenising", marks=pytest.mark.slow),
        pytest.param("restoring", marks=pytest.mark.slow),
        "compiling",
    ],
)
def test_before_the_first_step_the_run_ends_at_once(
    undisturbed, children, tmp_path, delivery_data_dir, phase
):
    workdir = tmp_path / "run"
    if phase == "restoring":
        shutil.copytree(undisturbed, workdir)
    child = start(children, phase, tmp_path, workdir, delivery_data_dir)
    wait_for(tmp_path / "held", child)
    child.send_signal(signal.SIGTERM)
    told = time.monotonic()
    _, errors = child.communicate(timeout=60)  # nobody lets it go on
    record(phase, time.monotonic() - told)
    assert child.returncode == 75, errors
    assert time.monotonic() - told < 12, errors
    assert "start again" in errors
    assert not (workdir / "checkpoints" / "1").exists()
    if phase == "restoring":
        assert saved_steps(workdir) == saved_steps(undisturbed)


@pytest.mark.parametrize(
    "phase",
    [
        pytest.param("training", marks=pytest.mark.slow),
        pytest.param("validation", marks=pytest.mark.slow),
        "decoding",
        pytest.param("saving", marks=pytest.mark.slow),
    ],
)
def test_later_the_step_is_saved_and_the_resume_is_bitwise(
    undisturbed, children, tmp_path, delivery_data_dir, phase
):
    workdir = tmp_path / "run"
    child = start(children, phase, tmp_path, workdir, delivery_data_dir)
    wait_for(tmp_path / "held", child)
    number = signal.SIGINT if phase == "training" else signal.SIGTERM
    seconds, errors = stop(child, tmp_path, number)
    record(phase, seconds)
    assert child.returncode == 75, errors
    assert f"{number.name}: saved step {SAVED[phase]};" in errors
    assert seconds < 60, errors
    assert max(saved_steps(workdir)) == SAVED[phase]
    assert not saved_steps(workdir)[SAVED[phase]]["validated"]
    assert not [x for x in read_metrics(workdir) if "eval/validation/loss" in x]
    assert_goes_on_as(undisturbed, workdir, delivery_data_dir)


@pytest.mark.slow
def test_a_second_signal_stops_at_once(undisturbed, children, tmp_path, delivery_data_dir):
    workdir = tmp_path / "run"
    child = start(children, "saving", tmp_path, workdir, delivery_data_dir)
    wait_for(tmp_path / "held", child)
    child.send_signal(signal.SIGTERM)
    time.sleep(0.5)
    assert child.poll() is None
    child.send_signal(signal.SIGTERM)
    told = time.monotonic()
    _, errors = child.communicate(timeout=60)
    assert child.returncode == 128 + signal.SIGTERM, errors
    assert time.monotonic() - told < 5 and "a second signal" in errors
    assert_goes_on_as(undisturbed, workdir, delivery_data_dir)


@pytest.mark.slow
def test_the_grace_time_ends_a_run_that_cannot_save(
    undisturbed, children, tmp_path, delivery_data_dir
):
    workdir = tmp_path / "run"
    child = start(children, "saving", tmp_path, workdir, delivery_data_dir, grace_secs=1.5)
    wait_for(tmp_path / "held", child)
    child.send_signal(signal.SIGTERM)
    told = time.monotonic()
    _, errors = child.communicate(timeout=60)
    assert child.returncode == 75, errors
    assert 1.4 < time.monotonic() - told < 10 and "without a save" in errors
    assert_goes_on_as(undisturbed, workdir, delivery_data_dir)


@pytest.mark.slow
@pytest.mark.parametrize("phase", ["tokenising", "decoding"])
def test_of_two_processes_one_is_told_and_both_stop(children, tmp_path, delivery_data_dir, phase):
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{s.getsockname()[1]}"
    workdir = tmp_path / "run"
    job = []
    for process in range(2):
        env = {
            "JAX_COORDINATOR_ADDRESS": address,
            "JAX_NUM_PROCESSES": "2",
            "JAX_PROCESS_ID": str(process),
            "XLA_FLAGS": "--xla_force_host_platform_device_count=1",
        }
        given = {"eval_every": 2, "train_steps": 4}
        job.append(start(children, phase, tmp_path, workdir, delivery_data_dir, env, **given))
    for process in range(2):
        wait_for(tmp_path / f"held{process}", *job)
    job[1].send_signal(signal.SIGTERM)
    told = time.monotonic()
    time.sleep(3)  # until JAX has told the other process
    (tmp_path / "go").touch()
    errors = [child.communicate(timeout=200)[1] for child in job]
    record(f"{phase}, two processes", time.monotonic() - told)
    assert [child.returncode for child in job] == [75, 75], errors
    if phase == "decoding":
        assert saved_steps(workdir)[2]["validated"] is False
        assert errors[0].count("saved step 2;") == 1
    else:
        assert not (workdir / "run.json").exists()
