"""How processes join and leave: real processes, on CPU over gloo."""

import json
import os
import pathlib
import socket
import subprocess
import sys
import time

import jax
import pytest

from stepdistill_jax.errors import InputError
from stepdistill_jax.runtime import distributed
from stepdistill_jax.runtime.distributed import Job, find_job

VARIABLES = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID", "EXPECT_DEVICES")
SLURM = {
    "SLURM_JOB_ID": "4097",
    "SLURM_STEP_NODELIST": "node[007-008],other",
    "SLURM_NTASKS": "4",
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_STEP_NUM_NODES": "2",
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "1",
}


@pytest.fixture
def environment(monkeypatch):
    """Sets variables on an environment without any of a job."""
    for name in (*VARIABLES, *SLURM, "CUDA_VISIBLE_DEVICES", "JAX_LOCAL_DEVICE_IDS"):
        monkeypatch.delenv(name, raising=False)
    return lambda **values: [monkeypatch.setenv(name, value) for name, value in values.items()]


def test_without_a_job_nothing_is_joined(environment):
    assert find_job() is None
    environment(JAX_COORDINATOR_ADDRESS="here:1", JAX_NUM_PROCESSES="1", JAX_PROCESS_ID="0")
    assert find_job() is None


def test_a_laptop_pays_nothing():
    """`join` imports no JAX, which alone takes half a second."""
    code = "import sys, stepdistill_jax.runtime.distributed as d; d.join(); print('jax' in sys.modules)"
    environment = {k: v for k, v in os.environ.items() if k not in VARIABLES}
    assert subprocess.check_output([sys.executable, "-c", code], env=environment) == b"False\n"


def test_launchers_say_it_by_three_variables(environment):
    environment(JAX_COORDINATOR_ADDRESS="host:123", JAX_NUM_PROCESSES="4", JAX_PROCESS_ID="2")
    assert find_job() == Job("host:123", 4, 2)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"JAX_NUM_PROCESSES": "2"}, "JAX_COORDINATOR_ADDRESS is set, but JAX_PROCESS_ID is not"),
        ({"JAX_PROCESS_ID": "0"}, "JAX_COORDINATOR_ADDRESS is set, but JAX_NUM_PROCESSES is not"),
        (
            {"JAX_NUM_PROCESSES": "two", "JAX_PROCESS_ID": "0"},
            "JAX_NUM_PROCESSES=two: expected a whole",
        ),
        (
            {"JAX_NUM_PROCESSES": "0", "JAX_PROCESS_ID": "0"},
            "JAX_NUM_PROCESSES=0: expected a whole",
        ),
        ({"JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "-1"}, "JAX_PROCESS_ID=-1: expected a whole"),
        (
            {"JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "2"},
            "JAX_PROCESS_ID=2: expected a number below",
        ),
    ],
)
def test_a_variable_that_does_not_fit_is_named(environment, values, said):
    environment(JAX_COORDINATOR_ADDRESS="host:123", **values)
    with pytest.raises(InputError, match=said):
        find_job()


def test_processes_without_a_coordinator_do_not_train_side_by_side(environment):
    environment(JAX_NUM_PROCESSES="2", JAX_PROCESS_ID="1")
    with pytest.raises(InputError, match="without JAX_COORDINATOR_ADDRESS"):
        find_job()


@pytest.mark.parametrize("address", ["host", "host:", "host:99999", "host:0", "host:²"])
def test_an_address_has_a_port(environment, address):
    environment(JAX_COORDINATOR_ADDRESS=address, JAX_NUM_PROCESSES="2", JAX_PROCESS_ID="1")
    with pytest.raises(InputError, match=f"JAX_COORDINATOR_ADDRESS={address}: expected HOST:PORT"):
        distributed.join()


@pytest.mark.parametrize(
    ("changes", "devices"),
    [
        ({}, [1]),
        ({"SLURM_STEP_NUM_NODES": "4"}, None),
        ({"CUDA_VISIBLE_DEVICES": "0"}, None),
        ({"CUDA_VISIBLE_DEVICES": "0,1,2,3"}, [1]),
        ({"JAX_LOCAL_DEVICE_IDS": "0,1"}, None),
    ],
    ids=["2 a node", "1 a node", "bound to a GPU", "4 GPUs seen", "said by the user"],
)
def test_srun_tasks_are_a_job_and_each_has_its_devices(environment, changes, devices):
    environment(**SLURM | changes)
    # JAX's own rule of host and port: the first node, 65535 - 4095 + id mod 4096
    assert find_job() == Job("node007:61441", 4, 3, devices)


@pytest.mark.parametrize("one", ["batch script", "interactive step", "one task"])
def test_slurm_without_several_tasks_is_no_job(environment, monkeypatch, one):
    environment(**SLURM)
    if one == "batch script":
        monkeypatch.delenv("SLURM_STEP_NODELIST")
    elif one == "interactive step":
        environment(SLURM_STEP_NUM_TASKS="1")
    else:
        environment(SLURM_NTASKS="1")
        monkeypatch.delenv("SLURM_STEP_NUM_TASKS")
    assert find_job() is None


# --- real processes


def launch(argv, numbers, *, of, each=None, code=None, **variables):
    """`stepdistill argv` in processes with these numbers; `each(number)` adds arguments.

    `code` is Python to run instead.
    """
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    job = {"JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}", "JAX_NUM_PROCESSES": str(of)}
    environment = (
        os.environ
        | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": os.environ["XLA_FLAGS_OF_ONE_DEVICE"]}
        | job
        | variables
    )
    return [
        subprocess.Popen(
            [
                sys.executable,
                *(["-c", code] if code else ["-m", "stepdistill_jax"]),
                *map(str, argv),
                *(each(i) if each else []),
            ],
            env=environment | {"JAX_PROCESS_ID": str(i)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for i in numbers
    ]


def finish(processes, timeout=250):
    """(exit code, standard output, standard error) of each."""
    texts = [p.communicate(timeout=timeout) for p in processes]
    return [(p.returncode, *text) for p, text in zip(processes, texts, strict=True)]


TRAIN = ("train", "demo_step_by_step", "--workdir")
SMALL = tuple(
    x
    for s in ("TRAIN_STEPS=3", "EVAL_EVERY=3", "BATCH_SIZE=8", "DATA_FRACTION=0.1")
    for x in ("--set", s)
)


@pytest.mark.slow
def test_a_process_that_never_comes_is_named_and_all_end(tmp_path):
    argv = [*TRAIN, tmp_path / "w"]
    for code, out, err in finish(launch(argv, [0, 2], of=3, STEPDISTILL_JOIN_TIMEOUT="4")):
        assert code == 1
        assert out == ""
        (line,) = err.splitlines()
        assert "after 4 s 1 of 3 processes is missing: index 1 (counted from 0)" in line


def test_bad_input_ends_every_process_with_2_and_in_seconds(tmp_path):
    pair = launch([*TRAIN, tmp_path / "w", "--set", "BATCH_SIEZ=3"], [0, 1], of=2)
    began = time.monotonic()
    results = finish(pair)
    assert [code for code, _, _ in results] == [2, 2], results
    assert all("BATCH_SIZE" in err for _, _, err in results)
    assert time.monotonic() - began < 60


FAULT = """
import os, socket, time
from stepdistill_jax.commands import main, train

def run(args):
    from stepdistill_jax.runtime.distributed import join
    join()
    port = os.environ["JAX_COORDINATOR_ADDRESS"].rpartition(":")[2]
    for host in ("127.0.0.1", "127.0.0.2"):
        try:
            socket.create_connection((host, port), timeout=5).close()
            print("JAX listens on", host)
        except ConnectionRefusedError:
            pass
    if os.environ["JAX_PROCESS_ID"] == "1":
        raise ValueError("a fault")
    time.sleep(100)

train.run = run
raise SystemExit(main.main(["train", "any", "--workdir", "any"]))
"""


@pytest.mark.slow
def test_a_fault_in_one_process_does_not_wait_for_the_others():
    """JAX's own exit would, for 5 minutes."""
    pair = launch([], [0, 1], of=2, code=FAULT)
    try:
        began = time.monotonic()
        out, err = pair[1].communicate(timeout=100)
        assert pair[1].returncode == 1
        assert "stepdistill: failed: ValueError: a fault" in err
        assert time.monotonic() - began < 40
        assert out == "JAX listens on 127.0.0.1\n", "on no other address of this machine"
    finally:
        for process in pair:
            process.kill()
            process.wait()


def test_another_number_of_devices_ends_all_before_anything_compiles(tmp_path):
    argv = [*TRAIN, tmp_path / "w"]
    for number, (code, _, err) in enumerate(finish(launch(argv, [0, 1], of=2, EXPECT_DEVICES="8"))):
        assert code == 2, err
        assert f"process {number} of 2, 1 of 2 devices" in err
        assert "EXPECT_DEVICES=8, but 2 process(es) see 2 devices (1 here" in err
    assert not (tmp_path / "w").exists()


@pytest.mark.slow
def test_one_process_speaks_for_the_job(tmp_path, delivery_data_dir):
    argv = [*TRAIN, tmp_path / "w", *SMALL, "--data-dir", delivery_data_dir, "--json"]
    first, second = finish(launch(argv, [0, 1], of=2))
    assert (first[0], second[0]) == (0, 0), first[2] + second[2]
    assert json.loads(first[1].splitlines()[-1])["step"] == 3
    assert "{" not in second[1]
    assert "train: 3/3" in first[2] and "train: 3/3" not in second[2]
    assert "objective weights" in first[2] and "objective weights" not in second[2]
    assert "process 1 of 2, 1 of 2 devices" in second[2]


@pytest.mark.slow
def test_workdirs_that_are_not_one_folder_end_all(tmp_path, delivery_data_dir):
    """As where each host has a disk of its own."""
    argv = [*TRAIN[:2], *SMALL, "--data-dir", delivery_data_dir]
    workdir = lambda i: ["--workdir", str(tmp_path / f"host{i}" / "w")]  # noqa: E731
    for code, _, err in finish(launch(argv, [0, 1], of=2, each=workdir)):
        assert code == 2, err
        assert "process 1: --workdir" in err
        assert "does not see the files that process 0 wrote" in err
    assert not list(pathlib.Path(tmp_path / "host1").glob("w/*"))


@pytest.mark.parametrize("joined", [False, True])
def test_who_speaks_for_a_job_that_the_caller_has_joined(joined, monkeypatch):
    monkeypatch.setattr(jax.distributed, "is_initialized", lambda: joined)
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    assert distributed.is_process_0() is not joined
