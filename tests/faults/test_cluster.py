"""One of two real processes (gloo) dies, freezes, or cannot read what the other one can."""

import os
import pathlib
import signal
import socket
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from stepdistill_jax.runtime.checkpoints.manager import restore_params, saved_steps
from stepdistill_jax.runtime.metrics import read_metrics
from stepdistill_jax.training import TrainConfig
from stepdistill_jax.training.run import assemble

pytestmark = pytest.mark.timeout(600)
LAUNCH = pathlib.Path(__file__).parents[2] / "launch"
# JAX's heartbeat is 30 s, and the network notices a closed connection at once; the rest is a busy machine
ENDS_WITHIN_SECS = 75

# `stepdistill`; process VICTIM kills or freezes itself at a place, or meets an error there
CHILD = """
import os, sys
victim, how, where, *argv = sys.argv[1:]
import stepdistill_jax.training.loop as loop
from orbax.checkpoint import CheckpointManager
from stepdistill_jax.runtime.checkpoints.manager import Checkpoints
from stepdistill_jax.commands.main import main
from stepdistill_jax.training.validation import Validator

PLACES = {
    "step": (loop, "placed", 8),
    "save": (Checkpoints, "_seal", 2),  # Orbax is still writing, the other one waits for it
    "validation": (Validator, "_decode", 1),
    "restore": (CheckpointManager, "restore", 1),
}

def fail():
    print("here", file=sys.stderr, flush=True)
    if how == "error":
        raise OSError(5, "Input/output error", "checkpoints/5/params/d/0123")
    os.kill(os.getpid(), int(how))

if os.environ["JAX_PROCESS_ID"] == victim:
    owner, name, wanted = PLACES[where]
    function, calls = getattr(owner, name), []
    def replaced(*args, **kwargs):
        calls.append(1)
        if len(calls) == wanted:
            fail()
        return function(*args, **kwargs)
    setattr(owner, name, replaced)
sys.exit(main(argv))
"""
# at each place, the last step that is saved to its end
GOOD = {"step": 5, "save": 5, "validation": 10}
LOST = (1, 134, -signal.SIGABRT)


def arguments(settings, workdir, data_dir):
    """Of `stepdistill train` for a run of `settings`."""
    argv = ["train", "demo_step_by_step", "--workdir", str(workdir), "--data-dir", str(data_dir)]
    return argv + [x for name, v in settings.items() for x in ("--set", f"{name.upper()}={v}")]


class Pair:
    """Two processes of one device each."""

    def __init__(self, folder, argv, *, victim="", how="", where=""):
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            job = {
                "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{s.getsockname()[1]}",
                "JAX_NUM_PROCESSES": "2",
                "XLA_FLAGS": "--xla_backend_optimization_level=0",  # compiles in 60 % of the time
            }
        self._errors = [folder / f"stderr{process}" for process in range(2)]
        command = [sys.executable, "-c", CHILD, str(victim), str(how), where, *argv]
        self.processes = [
            subprocess.Popen(
                command,
                env=os.environ | job | {"JAX_PROCESS_ID": str(process)},
                stdout=subprocess.DEVNULL,
                stderr=self._errors[process].open("w"),
            )
            for process in range(2)
        ]

    def errors(self, process):
        return self._errors[process].read_text()

    def wait_for(self, process, text):
        """Until a process has written `text`."""
        deadline = time.monotonic() + 280
        while text not in self.errors(process):
            assert time.monotonic() < deadline, (self.errors(0), self.errors(1))
            assert self.processes[1 - process].poll() is None, self.errors(1 - process)
            time.sleep(0.05)

    def codes(self, seconds=280):
        return [process.wait(seconds) for process in self.processes]

    def kill(self):
        for process in self.processes:
            process.kill()
            process.wait()


@pytest.fixture
def start(tmp_path):
    """`Pair` in the test's folder; none outlives the test."""
    pairs = []

    def started(*args, **kwargs):
        pairs.append(Pair(tmp_path, *args, **kwargs))
        return pairs[-1]

    yield started
    for pair in pairs:
        pair.kill()


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, delivery_data_dir, settings):
    workdir = tmp_path_factory.mktemp("undisturbed")
    pair = Pair(tmp_path_factory.mktemp("errors"), arguments(settings, workdir, delivery_data_dir))
    try:
        assert pair.codes() == [0, 0], (pair.errors(0), pair.errors(1))
    finally:
        pair.kill()
    return workdir


def params_of(workdir, data_dir, settings):
    abstract = assemble(TrainConfig(**settings), workdir, data_dir).abstract.params
    return [np.asarray(x) for x in jax.tree.leaves(restore_params(workdir, 12, abstract))]


def same(a, b, data_dir, settings):
    """Whether two runs have the same parameters, bitwise, and the same metrics."""
    left, right = (
        [{k: v for k, v in x.items() if not k.startswith("timing/")} for x in read_metrics(w)]
        for w in (a, b)
    )
    arrays = zip(*(params_of(w, data_dir, settings) for w in (a, b)), strict=True)
    return left == right and all(np.array_equal(x, y) for x, y in arrays)


# every two of: which process, how, where
CASES = [
    (0, signal.SIGKILL, "step"),
    (1, signal.SIGKILL, "save"),
    (0, signal.SIGKILL, "validation"),
    (1, signal.SIGSTOP, "step"),
    (0, signal.SIGSTOP, "save"),
    (1, signal.SIGSTOP, "validation"),
]


@pytest.mark.faults
@pytest.mark.parametrize(
    ("victim", "how", "where"), CASES, ids=lambda x: getattr(x, "name", str(x))
)
def test_the_other_one_ends_soon_and_both_go_on_from_the_last_checkpoint(
    undisturbed, start, tmp_path, delivery_data_dir, settings, record_fault, victim, how, where
):
    workdir = tmp_path / "run"
    argv = arguments(settings, workdir, delivery_data_dir)
    pair = start(argv, victim=victim, how=int(how), where=where)
    pair.wait_for(victim, "here")
    began = time.monotonic()
    code = pair.processes[1 - victim].wait(ENDS_WITHIN_SECS)
    seconds = time.monotonic() - began
    pair.kill()
    good = max(saved_steps(workdir))
    again = start(argv)
    codes = again.codes()
    bitwise = codes == [0, 0] and same(workdir, undisturbed, delivery_data_dir, settings)
    kept = code in LOST and good == GOOD[where] and bitwise
    record_fault(
        f"{how.name} of process {victim} of two, in a {where}",
        tried=1,
        survived=int(kept),
        seen=f"the other one ended after {seconds:.0f} s with {code}; resumed from step {good}, bitwise",
    )
    assert code in LOST, pair.errors(1 - victim)
    assert good == GOOD[where]
    assert codes == [0, 0], (again.errors(0), again.errors(1))
    assert f"resumed {workdir} from step {good}" in again.errors(0)
    assert bitwise


@pytest.mark.faults
@pytest.mark.parametrize("victim", [0, 1])
def test_a_checkpoint_that_one_host_cannot_read_ends_both(
    start, tmp_path, delivery_data_dir, settings, record_fault, victim
):
    workdir = tmp_path / "run"
    argv = arguments(settings | {"train_steps": 5}, workdir, delivery_data_dir)
    assert start(argv).codes() == [0, 0]
    argv = arguments(settings | {"train_steps": 5, "eval_every": 12}, workdir, delivery_data_dir)
    pair = start(argv, victim=victim, how="error", where="restore")
    pair.wait_for(victim, "here")
    began = time.monotonic()
    codes = pair.codes(ENDS_WITHIN_SECS)
    seconds = time.monotonic() - began
    (*_, line) = pair.errors(victim).splitlines()
    kept = codes[victim] == 1 and codes[1 - victim] in LOST and list(saved_steps(workdir)) == [5]
    record_fault(
        f"process {victim} of two cannot read the checkpoint that process 0 has verified",
        tried=1,
        survived=int(kept),
        seen=f"both ended after {seconds:.0f} s, with {codes}; one line names the file",
    )
    assert kept, (codes, pair.errors(0), pair.errors(1))
    assert line.startswith(f"stepdistill: failed: {workdir}/checkpoints/5: process {victim} cannot")
    assert "Traceback" not in pair.errors(victim)


def process_of(workdir, number):
    """A process of the job in the system."""
    for entry in pathlib.Path("/proc").glob("[0-9]*"):
        try:
            command = (entry / "cmdline").read_bytes()
            variables = (entry / "environ").read_bytes().split(b"\0")
        except OSError:
            continue  # ended meanwhile
        if str(workdir).encode() in command and f"JAX_PROCESS_ID={number}".encode() in variables:
            return int(entry.name)
    return None


@pytest.mark.skipif(sys.platform != "linux", reason="finds the process in /proc")
@pytest.mark.parametrize(
    "how",
    [
        pytest.param(signal.SIGKILL, marks=pytest.mark.slow),
        pytest.param(signal.SIGSTOP, marks=pytest.mark.faults),
    ],
    ids=lambda how: how.name,
)
def test_the_launcher_starts_both_again(tmp_path, delivery_data_dir, settings, record_fault, how):
    workdir = tmp_path / "run"
    given = settings | {"train_steps": 20, "eval_every": 20, "checkpoint_every": 1}
    train = [sys.executable, "-m", "stepdistill_jax", *arguments(given, workdir, delivery_data_dir)]
    run = subprocess.Popen(
        ["bash", str(LAUNCH / "local.sh"), "-n", "2", "--", *train],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        deadline = time.monotonic() + 200
        while not (workdir / "checkpoints").exists() or not saved_steps(workdir):
            assert time.monotonic() < deadline and run.poll() is None, run.communicate()
            time.sleep(0.05)
        os.kill(process_of(workdir, 1), how)
        began = time.monotonic()
        _, errors = run.communicate(timeout=400)
        seconds = time.monotonic() - began
    finally:
        run.terminate()
    said = [x for x in errors.splitlines() if x.startswith("launch: ")]
    steps = [line["step"] for line in read_metrics(workdir) if "loss" in line]
    again = len(said) == 1 and said[0].endswith("starting again, 2 left")
    record_fault(
        f"{how.name} of process 1 of two under `launch/local.sh`",
        tried=1,
        survived=int(run.returncode == 0 and again and steps == list(range(1, 21))),
        seen=f"said in a line, started again, done {seconds:.0f} s after the signal",
    )
    assert run.returncode == 0, errors
    assert again, said
    assert steps == list(range(1, 21))
