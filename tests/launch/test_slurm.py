"""`slurm.sbatch` with an srun that starts its tasks on this machine and a scontrol that notes."""

import os
import signal
import sys
import time

import pytest


def requeues(stubs):
    return [call for call in stubs.calls if call[:2] == ["scontrol", "requeue"]]


def task(body):
    return [sys.executable, "-IS", "-c", f"import os, signal, sys, time\n{body}"]


def test_one_task_a_node_has_all_of_its_gpus(slurm, stubs, hard):
    show = task(
        "print(os.environ['EXPECT_DEVICES'], os.environ['XLA_FLAGS'].split()[0], sys.argv[1:])"
    )
    job = slurm(*show, *hard, SLURM_GPUS_ON_NODE=8, XLA_FLAGS="")
    output, errors = job.communicate(timeout=30)
    assert (job.returncode, errors) == (0, "")
    assert output.splitlines() == 2 * [f"16 --xla_gpu_enable_latency_hiding_scheduler=true {hard}"]
    (srun,) = [call for call in stubs.calls if call[0] == "srun"]
    assert srun == ["srun", "--kill-on-bad-exit=0", "--wait=300", "--label", *show, *hard]
    assert requeues(stubs) == []


def test_all_tasks_have_one_token_of_this_start(slurm):
    def tokens(**given):
        output, _ = slurm(*task("print(os.environ['STEPDISTILL_JOB_TOKEN'])"), **given).communicate(
            timeout=30
        )
        return output.splitlines()

    (first, same), (second, _) = tokens(), tokens()
    assert first == same != second
    assert len(first) == len(second) == 32
    assert tokens(STEPDISTILL_JOB_TOKEN="given") == ["given"] * 2


@pytest.mark.parametrize(
    ("tasks", "gpus", "code"), [(2, 8, 0), (16, 8, 0), (4, 8, 2), (2, 0, 0), (16, 0, 0)]
)
def test_tasks_a_node_are_one_or_one_for_each_gpu(tasks, gpus, code, slurm, stubs):
    stubs.add("srun")
    job = slurm("true", SLURM_NTASKS=tasks, SLURM_GPUS_ON_NODE=gpus)
    _, errors = job.communicate(timeout=30)
    assert job.returncode == code
    assert ("2 tasks per node and 8 GPUs" in errors) == (code == 2)


@pytest.mark.parametrize(
    ("codes", "restarts", "code", "queued"),
    [
        ((0, 0), 0, 0, 0),
        ((0, 1), 0, 1, 0),
        ((2, 2), 0, 2, 0),
        ((75, 75), 0, 75, 1),
        ((75, 75), 1000, 75, 1),  # a stop is no failure: as often as the queue wants
        ((134, 1), 0, 134, 1),
        ((134, 137), 8, 137, 1),
        ((134, 137), 9, 137, 0),
    ],
)
def test_what_is_queued_again(codes, restarts, code, queued, slurm, stubs):
    command = task(f"os._exit({codes}[int(os.environ['SLURM_PROCID'])])")
    job = slurm(*command, SLURM_RESTART_COUNT=restarts)
    _, errors = job.communicate(timeout=30)
    assert job.returncode == code
    identity = [call[2] for call in requeues(stubs)]
    assert len(identity) == queued and all(i.isdigit() for i in identity)
    assert ("requeueing job" in errors) == bool(queued)
    assert ("134 is SIGABRT" in errors) == (code > 128)


def test_a_job_that_may_not_be_queued_again_keeps_its_code(slurm, stubs):
    path = stubs.folder / "scontrol"
    path.write_text(path.read_text() + "sys.exit(sys.argv[1] == 'requeue')\n")
    job = slurm(*task("os._exit(75)"))
    _, errors = job.communicate(timeout=30)
    assert job.returncode == 75 and "not requeued" in errors


@pytest.mark.parametrize("signals", [1, 2])
def test_the_warning_before_the_end_of_the_time_reaches_every_task(signals, slurm, stubs, tmp_path):
    """Slurm sends SIGTERM to the batch shell only (`--signal=B:TERM@120`)."""
    body = """
me = os.environ['SLURM_PROCID']
count = 0
def stop(*_):
    global count
    count += 1
signal.signal(signal.SIGTERM, stop)
open('ready' + me, 'w').close()
while count < SIGNALS:
    time.sleep(0.01)
time.sleep(0.5)
open('saved' + me, 'w').write(str(count))
os._exit(75)
"""
    job = slurm(*task(body.replace("SIGNALS", str(signals))))
    deadline = time.monotonic() + 20
    while not all((tmp_path / f"ready{k}").exists() for k in range(2)):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    for _ in range(signals):
        os.kill(job.pid, signal.SIGTERM)
        time.sleep(0.3)
    _, errors = job.communicate(timeout=30)
    assert job.returncode == 75
    assert [(tmp_path / f"saved{k}").read_text() for k in range(2)] == 2 * [str(signals)]
    assert len(requeues(stubs)) == 1 and "stopped after a clean save; requeueing job" in errors
