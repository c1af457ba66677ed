"""Who may write in a workdir: one run at a time, on a disk that takes it, with the data that it had."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time

import pytest

from stepdistill_jax.checkpoints.manager import saved_steps
from stepdistill_jax.data.prepare import prepare
from stepdistill_jax.errors import InputError
from stepdistill_jax.training import TrainConfig, train
from stepdistill_jax.training.lock import locked
from stepdistill_jax.training.writers import read_metrics

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
HOLDER = """
import pathlib, sys, time
from stepdistill_jax.training.lock import locked
with locked(pathlib.Path(sys.argv[1])):
    print("locked", flush=True)
    time.sleep(600)
"""
RUN = """
import json, sys
from stepdistill_jax.training import TrainConfig, train
train(TrainConfig(**json.loads(sys.argv[1])), workdir=sys.argv[2], data_dir=sys.argv[3])
"""


@pytest.fixture
def mounted(tmp_path):
    """`mounted(options)`: a small file system of its own."""
    folder = tmp_path / "disk"
    folder.mkdir()

    def mount(options):
        command = ["mount", "-t", "tmpfs", "-o", options, "none", str(folder)]
        try:
            done = subprocess.run(command, capture_output=True, text=True)
        except FileNotFoundError:
            pytest.skip("no `mount`")
        if done.returncode:
            pytest.skip(f"no file system can be mounted here: {done.stderr.strip()}")
        return folder

    yield mount
    while os.path.ismount(folder):
        subprocess.run(["umount", str(folder)], check=True)


def test_a_second_run_is_refused_and_a_killed_one_is_no_obstacle(tmp_path, delivery_data_dir):
    workdir = tmp_path / "run"
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(workdir)], stdout=subprocess.PIPE, text=True
    )
    try:
        assert holder.stdout.readline() == "locked\n"
        who = rf"process {holder.pid} on {re.escape(socket.gethostname())} \(since 20.* is training"
        with pytest.raises(InputError, match=who):
            train(TrainConfig(**SETTINGS), workdir=workdir, data_dir=delivery_data_dir)
        assert [p.name for p in workdir.iterdir()] == ["run.lock"]
    finally:
        holder.send_signal(signal.SIGKILL)
        holder.wait()
    assert (workdir / "run.lock").exists()
    mine = pytest.raises(InputError, match=f"process {os.getpid()} ")
    with locked(workdir), mine, locked(workdir):
        pass
    assert not (workdir / "run.lock").exists()
    with locked(workdir):
        pass


def test_a_read_only_disk_is_named_before_anything_is_done(mounted, delivery_data_dir):
    """A mount, since modes do not hold root back."""
    disk = mounted("size=1m,ro")
    with pytest.raises(InputError, match=f"--workdir {disk}/run: {disk} is on a read-only file"):
        train(TrainConfig(**SETTINGS), workdir=disk / "run", data_dir=delivery_data_dir)


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_a_disk_that_gets_full_ends_the_run_and_a_resume_goes_on(mounted, delivery_data_dir):
    disk = mounted("size=64m")
    workdir, many = disk / "run", 20_000
    given = SETTINGS | {"train_steps": many, "eval_every": many, "checkpoint_every": many}
    command = [sys.executable, "-c", RUN, json.dumps(given), str(workdir), str(delivery_data_dir)]

    def run(step, then):
        """(exit code, standard error) of a life in which `then` is done after `step`."""
        metrics, began = workdir / "metrics.jsonl", time.time()
        child = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        try:
            deadline = time.monotonic() + 150
            # a resume writes the file anew
            while (
                not metrics.exists()
                or metrics.stat().st_mtime < began
                or len(read_metrics(workdir)) < step
            ):
                assert time.monotonic() < deadline and child.poll() is None, child.stderr.read()
                time.sleep(0.05)
            then(child)
            errors = child.communicate(timeout=100)[1]
        finally:
            child.kill()
            child.wait()
        return child.returncode, errors

    def told(child):
        child.send_signal(signal.SIGTERM)

    def fill(_):
        with pytest.raises(OSError), open(disk / "filler", "wb", buffering=0) as f:
            while True:
                f.write(bytes(4096))

    assert run(3, told)[0] == 75
    (saved,) = saved_steps(workdir)
    code, errors = run(saved + 3, fill)
    assert code == 1, errors
    last = errors.strip().splitlines()[-1]
    assert re.search(rf"No space left on device: '{workdir}/(metrics.jsonl|events.out.*)'", last)
    (disk / "filler").unlink()
    code, errors = run(saved + 3, told)
    assert code == 75 and f"from step {saved}" in errors, errors
    newest = max(saved_steps(workdir))
    lines = [x["step"] for x in read_metrics(workdir)]
    assert newest > saved and lines == list(range(1, newest + 1))


@pytest.fixture
def jsonl(tmp_path):
    """`jsonl(word)` writes and prepares a data set; the data dir."""

    def written(word):
        folder = tmp_path / "source"
        folder.mkdir(exist_ok=True)
        for split, count in (("train", 40), ("validation", 8)):
            rows = [
                {"input": f"say {word} {i}", "label": f"{i % 3}", "rationale": f"{word}, of course"}
                for i in range(count)
            ]
            (folder / f"{split}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
        shutil.rmtree(tmp_path / "data", ignore_errors=True)
        prepare("jsonl", source=folder, new_name="sayings", data_dir=tmp_path / "data")
        return tmp_path / "data"

    return written


@pytest.mark.slow
def test_data_that_was_changed_in_place_is_refused(jsonl, tmp_path):
    config = TrainConfig(**SETTINGS | {"task": "sayings", "train_steps": 2, "eval_every": 2})
    data_dir = jsonl("yes")
    train(config, workdir=tmp_path / "run", data_dir=data_dir)
    before = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    jsonl("no")  # the same files, the same numbers of rows
    with pytest.raises(InputError, match=r"other settings \(fingerprint.train was"):
        train(config, workdir=tmp_path / "run", data_dir=data_dir)
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == before
    jsonl("yes")
    assert train(config, workdir=tmp_path / "run", data_dir=data_dir)["step"] == 2
