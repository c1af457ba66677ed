"""A stop signal in each phase of `train`, in real processes; the resume ends as nobody had stopped it."""

import contextlib
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

from stepdistill_jax.runtime.checkpoints.manager import Checkpoints, restore_params, saved_steps
from stepdistill_jax.runtime.metrics import MetricsWriter, read_metrics
from stepdistill_jax.training import TrainConfig, train
from stepdistill_jax.training.run import assemble

pytestmark = pytest.mark.timeout(300)
# holds the run at one place until FOLDER/go is there; a place in C++ cannot be called off
CHILD = """
import ctypes, json, os, pathlib, sys, time
phase, folder = sys.argv[1], pathlib.Path(sys.argv[2])
settings, workdir, data_dir = json.loads(sys.argv[3]), sys.argv[4], sys.argv[5]
from stepdistill_jax.runtime.distributed import join, leave
join()
import stepdistill_jax.training.validation as evaluate
import stepdistill_jax.training.loop as loop
import stepdistill_jax.training.run as run
from stepdistill_jax.runtime.checkpoints.manager import Checkpoints
from stepdistill_jax.decoding.greedy import LabelDecoder
from stepdistill_jax.training.supervisor import Supervisor

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
    before(run, "load_split")
elif phase == "restoring":
    before(Checkpoints, "restore")
elif phase == "compiling":
    loop.jit_train_step = lambda *args, **kwargs: compiling
elif phase == "training":
    after(Supervisor, "record", lambda _, step, *rest: step == 4)
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
def undisturbed(tmp_path_factory, delivery_data_dir, settings):
    workdir = tmp_path_factory.mktemp("undisturbed")
    train(TrainConfig(**settings), workdir=workdir, data_dir=delivery_data_dir)
    return workdir


@pytest.fixture
def start(children, settings, tmp_path, delivery_data_dir):
    """`start(phase, workdir)`: a run that will be held in its phase."""

    def begun(phase, workdir, process=None, **changes):
        env = os.environ | ({} if process is None else process)
        given = json.dumps(settings | changes)
        arguments = [phase, str(tmp_path), given, str(workdir), str(delivery_data_dir)]
        children.append(
            subprocess.Popen(
                [sys.executable, "-c", CHILD, *arguments],
                stderr=subprocess.PIPE,
                text=True,
                env=env,
            )
        )
        return children[-1]

    return begun


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


def params_of(workdir, data_dir, config):
    abstract = assemble(config, workdir, data_dir).abstract.params
    return [np.asarray(x) for x in jax.tree.leaves(restore_params(workdir, 12, abstract))]


def untimed(workdir):
    return [
        {k: v for k, v in x.items() if not k.startswith("timing/")} for x in read_metrics(workdir)
    ]


@pytest.fixture
def assert_goes_on(undisturbed, delivery_data_dir, settings):
    """`assert_goes_on(workdir)`: the resume ends as the run that nobody stopped."""

    def checked(workdir):
        config = TrainConfig(**settings)
        assert train(config, workdir=workdir, data_dir=delivery_data_dir)["step"] == 12
        got, wanted = (params_of(w, delivery_data_dir, config) for w in (workdir, undisturbed))
        for a, b in zip(got, wanted, strict=True):
            np.testing.assert_array_equal(a, b)
        assert untimed(workdir) == untimed(undisturbed)

    return checked


@pytest.fixture
def cut_off_in_settle(delivery_data_dir, settings):
    """`cut_off_in_settle(workdir)`: a resume that ends between the validation's line and the manifest."""

    def killed(*_):
        raise RuntimeError("killed")

    def resumed(workdir):
        with pytest.MonkeyPatch.context() as patch, pytest.raises(RuntimeError, match="killed"):
            patch.setattr(Checkpoints, "set_metrics", killed)
            train(TrainConfig(**settings), workdir=workdir, data_dir=delivery_data_dir)

    return resumed


def test_a_validation_that_its_checkpoint_does_not_have_is_written_once(tmp_path):
    with contextlib.closing(MetricsWriter(tmp_path, start_step=0)) as writer:
        for step, line in ((11, "loss"), (12, "loss"), (12, "eval/validation/loss")):
            writer.write(step, {line: 1.5})
    for validated, lines in ((True, 3), (False, 2)):
        MetricsWriter(tmp_path, start_step=12, validated=validated).close()
        assert len(read_metrics(tmp_path)) == lines


@pytest.mark.parametrize(
    "phase",
    [
        pytest.param("tokenising", marks=pytest.mark.slow),
        pytest.param("restoring", marks=pytest.mark.slow),
        pytest.param("compiling", marks=pytest.mark.slow),
    ],
)
def test_before_the_first_step_the_run_ends_at_once(undisturbed, start, tmp_path, survives, phase):
    workdir = tmp_path / "run"
    if phase == "restoring":
        shutil.copytree(undisturbed, workdir)
    child = start(phase, workdir)
    wait_for(tmp_path / "held", child)
    with survives(f"SIGTERM while {phase}") as seen:
        child.send_signal(signal.SIGTERM)
        told = time.monotonic()
        _, errors = child.communicate(timeout=60)  # nobody lets it go on
        seconds = time.monotonic() - told
        seen += ["exit 75", f"{seconds:.1f} s after the signal"]
        assert child.returncode == 75, errors
        assert seconds < 12, errors
        assert "start again" in errors
        assert not (workdir / "checkpoints" / "1").exists()
        if phase == "restoring":
            assert saved_steps(workdir) == saved_steps(undisturbed)


@pytest.mark.parametrize(
    "phase",
    [
        pytest.param("training", marks=pytest.mark.slow),
        pytest.param("validation", marks=pytest.mark.slow),
        pytest.param("decoding", marks=pytest.mark.slow),
        pytest.param("saving", marks=pytest.mark.slow),
    ],
)
def test_later_the_step_is_saved_and_the_resume_is_bitwise(
    start, assert_goes_on, cut_off_in_settle, tmp_path, survives, phase
):
    workdir = tmp_path / "run"
    child = start(phase, workdir)
    wait_for(tmp_path / "held", child)
    number = signal.SIGINT if phase == "training" else signal.SIGTERM
    with survives(f"{number.name} during {phase}") as seen:
        seconds, errors = stop(child, tmp_path, number)
        seen += ["exit 75", f"saved {seconds:.1f} s after the signal", "the resume is bitwise"]
        assert child.returncode == 75, errors
        assert f"{number.name}: saved step {SAVED[phase]};" in errors
        assert seconds < 60, errors
        assert max(saved_steps(workdir)) == SAVED[phase]
        assert not saved_steps(workdir)[SAVED[phase]]["validated"]
        assert not [x for x in read_metrics(workdir) if "eval/validation/loss" in x]
        if phase == "validation":
            cut_off_in_settle(workdir)
            assert [x for x in read_metrics(workdir) if "eval/validation/loss" in x]
            assert not saved_steps(workdir)[SAVED[phase]]["validated"]
        assert_goes_on(workdir)


@pytest.mark.slow
def test_a_second_signal_stops_at_once(start, assert_goes_on, tmp_path, survives):
    workdir = tmp_path / "run"
    child = start("saving", workdir)
    wait_for(tmp_path / "held", child)
    with survives("a second SIGTERM during a save") as seen:
        child.send_signal(signal.SIGTERM)
        time.sleep(0.5)
        assert child.poll() is None
        child.send_signal(signal.SIGTERM)
        told = time.monotonic()
        _, errors = child.communicate(timeout=60)
        seconds = time.monotonic() - told
        seen += ["exit 143", f"{seconds:.1f} s after it", "the resume is bitwise"]
        assert child.returncode == 128 + signal.SIGTERM, errors
        assert seconds < 5 and "second signal" in errors
        assert_goes_on(workdir)


@pytest.mark.slow
def test_the_grace_time_ends_a_run_that_cannot_save(start, assert_goes_on, tmp_path, survives):
    workdir = tmp_path / "run"
    child = start("saving", workdir, grace_secs=1.5)
    wait_for(tmp_path / "held", child)
    with survives("SIGTERM, and a save that takes longer than 1.5 s of grace") as seen:
        child.send_signal(signal.SIGTERM)
        told = time.monotonic()
        _, errors = child.communicate(timeout=60)
        seconds = time.monotonic() - told
        seen += ["exit 75", f"{seconds:.1f} s after the signal", "the resume is bitwise"]
        assert child.returncode == 75, errors
        assert 1.4 < seconds < 10 and "without a save" in errors
        assert_goes_on(workdir)


@pytest.mark.slow
@pytest.mark.parametrize("phase", ["tokenising", "decoding"])
def test_of_two_processes_one_is_told_and_both_stop(start, tmp_path, survives, phase):
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
            "XLA_FLAGS": os.environ["XLA_FLAGS_OF_ONE_DEVICE"],
        }
        given = {"eval_every": 2, "train_steps": 4}
        job.append(start(phase, workdir, env, **given))
    for process in range(2):
        wait_for(tmp_path / f"held{process}", *job)
    with survives(f"SIGTERM to one of two processes during {phase}") as seen:
        job[1].send_signal(signal.SIGTERM)
        told = time.monotonic()
        time.sleep(3)  # until JAX has told the other process
        (tmp_path / "go").touch()
        errors = [child.communicate(timeout=200)[1] for child in job]
        seconds = time.monotonic() - told
        seen += ["both exit 75", f"{seconds:.1f} s after the signal"]
        assert [child.returncode for child in job] == [75, 75], errors
        if phase == "decoding":
            assert saved_steps(workdir)[2]["validated"] is False
            assert errors[0].count("saved step 2;") == 1
        else:
            assert not (workdir / "run.json").exists()
