"""Programs that only a cluster or a cloud has, as stubs that note their calls."""

import json
import os
import pathlib
import signal
import subprocess
import sys

import pytest

LAUNCH = pathlib.Path(__file__).parents[2] / "launch"

NOTE = """#!{python} -IS
import json, os, pathlib, signal, subprocess, sys
with open({calls!r}, "a") as calls:
    calls.write(json.dumps([{name!r}, *sys.argv[1:]]) + "\\n")
"""


class Stubs:
    """A folder in front of PATH, and the calls of what lies in it."""

    def __init__(self, folder: pathlib.Path):
        self.folder = folder / "bin"
        self.folder.mkdir()
        self._calls = folder / "calls.jsonl"

    def add(self, name: str, body: str = "") -> None:
        """A program that notes its arguments and then runs `body`, which is Python."""
        path = self.folder / name
        note = NOTE.format(python=sys.executable, calls=str(self._calls), name=name)
        path.write_text(note + body)
        path.chmod(0o755)

    @property
    def calls(self) -> list[list[str]]:
        if not self._calls.exists():
            return []
        return [json.loads(line) for line in self._calls.read_text().splitlines()]

    @property
    def environment(self) -> dict[str, str]:
        path = os.pathsep.join([str(self.folder), os.environ["PATH"]])
        unset = ("EXPECT_DEVICES", "CUDA_VISIBLE_DEVICES", "LIBTPU_INIT_ARGS", "TPU_NAME", "ZONE")
        return {k: v for k, v in os.environ.items() if k not in unset} | {"PATH": path}


@pytest.fixture
def stubs(tmp_path):
    """None of the programs that cost money or touch a cluster can be the real one."""
    stubs = Stubs(tmp_path)
    for name in ("gcloud", "docker", "xpk", "srun", "scontrol", "sbatch", "nvidia-smi"):
        stubs.add(name, "sys.exit('this test does not expect a call')\n")
    return stubs


@pytest.fixture
def launch(stubs, tmp_path):
    """Runs a script of launch/ from another folder, with the stubs in front of PATH."""

    def launch(script, *args, code=0, timeout=60, **environment):
        process = subprocess.Popen(
            ["bash", str(LAUNCH / script), *map(str, args)],
            cwd=tmp_path,
            env=stubs.environment | {k: str(v) for k, v in environment.items()},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        try:
            output = process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGTERM)  # a script ends what it started
            process.send_signal(signal.SIGTERM)
            pytest.fail(f"{script} did not end in {timeout} s: {process.communicate()}")
        done = subprocess.CompletedProcess(process.args, process.returncode, *output)
        assert done.returncode == code, (done.returncode, done.stdout, done.stderr)
        return done

    return launch


@pytest.fixture
def hard() -> list[str]:
    """Arguments that a careless script takes apart, expands or joins."""
    quotes = ["it's", '"quoted"', "a b", "X=[1, 2]", "two\nlines"]
    return [*quotes, "$HOME", "$(HOME)", "`id`", "*", "", "back\\slash", "!", "#", "--", "&"]


SRUN = """
arguments = sys.argv[1:]
while arguments[0].startswith("-"):
    arguments.pop(0)
tasks = int(os.environ["SLURM_NTASKS"])
running = []
for task in range(tasks):
    own = {
        "SLURM_PROCID": str(task), "SLURM_LOCALID": "0", "SLURM_STEP_NODELIST": "localhost",
        "SLURM_STEP_NUM_NODES": os.environ["SLURM_JOB_NUM_NODES"], "SLURM_STEP_NUM_TASKS": str(tasks),
    }
    running.append(subprocess.Popen(arguments, env=dict(os.environ, **own)))
signal.signal(signal.SIGTERM, lambda *_: [p.send_signal(signal.SIGTERM) for p in running])
codes = [p.wait() for p in running]
sys.exit(max(c if c >= 0 else 128 - c for c in codes))
"""

SCONTROL = """
if sys.argv[1] == "show":
    print("JobId=1 JobName=stepdistill\\n   Command={script} stepdistill train\\n   WorkDir=/tmp")
"""


@pytest.fixture
def slurm(stubs, tmp_path):
    """Starts slurm.sbatch as Slurm does: a copy in a spool folder, two nodes of one task each."""
    stubs.add("srun", SRUN)  # really starts the tasks, on this machine
    stubs.add("scontrol", SCONTROL.format(script=LAUNCH / "slurm.sbatch"))
    copy = tmp_path / "spool" / "slurm_script"
    copy.parent.mkdir()
    copy.write_bytes((LAUNCH / "slurm.sbatch").read_bytes())

    def slurm(*command, **environment):
        job = {
            "SLURM_JOB_ID": str(1000 + os.getpid() % 4000),  # JAX makes a port of it
            "SLURM_JOB_NUM_NODES": "2",
            "SLURM_NTASKS": "2",
        }
        return subprocess.Popen(
            ["bash", str(copy), *map(str, command)],
            cwd=tmp_path,
            env=stubs.environment | job | {k: str(v) for k, v in environment.items()},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    return slurm
