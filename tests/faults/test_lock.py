"""Who may write in a workdir: one run at a time, on a disk that takes it, with the data that it had."""

import importlib
import json
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import time

import jax
import pytest

from stepdistill_jax.commands.main import main
from stepdistill_jax.data.objectives import step_by_step
from stepdistill_jax.data.prepare import prepare
from stepdistill_jax.data.vocabulary import BYTES, load_vocabulary
from stepdistill_jax.errors import InputError
from stepdistill_jax.formats.directory import TaskInfo, write_model_files
from stepdistill_jax.formats.hf import save_params
from stepdistill_jax.models.encoder_decoder import init_params
from stepdistill_jax.models.t5 import T5Config
from stepdistill_jax.runtime.checkpoints.manager import saved_steps
from stepdistill_jax.runtime.metrics import read_metrics
from stepdistill_jax.tasks.token_store import MANIFEST, TokenExample, open_store, write_store
from stepdistill_jax.training import TrainConfig, train
from stepdistill_jax.training.workdir import locked_workdir

predict_module = importlib.import_module("stepdistill_jax.inference.predict")
FLIPS = 200
HOLDER = """
import pathlib, sys, time
from stepdistill_jax.training.workdir import locked_workdir
with locked_workdir(pathlib.Path(sys.argv[1])):
    print("locked", flush=True)
    time.sleep(600)
"""
RUN = """
import json, sys
from stepdistill_jax.data.vocabulary import BYTES, load_vocabulary
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


def test_a_second_run_is_refused_and_a_killed_one_is_no_obstacle(
    tmp_path, delivery_data_dir, settings, survives
):
    workdir = tmp_path / "run"
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(workdir)], stdout=subprocess.PIPE, text=True
    )
    try:
        assert holder.stdout.readline() == "locked\n"
        who = rf"process {holder.pid} on {re.escape(socket.gethostname())} \(since 20.* is training"
        with survives("a second run in a workdir") as seen:
            seen.append("exit 2 with process, host and time of the first")
            with pytest.raises(InputError, match=who):
                train(TrainConfig(**settings), workdir=workdir, data_dir=delivery_data_dir)
            assert [p.name for p in workdir.iterdir()] == ["run.lock"]
    finally:
        holder.send_signal(signal.SIGKILL)
        holder.wait()
    with survives("the lock of a killed run") as seen:
        seen.append("no obstacle")
        assert (workdir / "run.lock").exists()
        mine = pytest.raises(InputError, match=f"process {os.getpid()} ")
        with locked_workdir(workdir), mine, locked_workdir(workdir):
            pass
        assert not (workdir / "run.lock").exists()
        with locked_workdir(workdir):
            pass


def test_a_read_only_disk_is_named_before_anything_is_done(
    mounted, delivery_data_dir, settings, survives
):
    """A mount, since modes do not hold root back."""
    disk = mounted("size=1m,ro")
    said = rf"`workdir` {disk}/run: cannot be written \(read-only file system in {disk}"
    with survives("a workdir on a read-only mount") as seen, pytest.raises(InputError, match=said):
        seen.append("exit 2, named")
        train(TrainConfig(**settings), workdir=disk / "run", data_dir=delivery_data_dir)


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_a_disk_that_gets_full_ends_the_run_and_a_resume_goes_on(
    mounted, delivery_data_dir, settings, survives
):
    disk = mounted("size=64m")
    workdir, many = disk / "run", 20_000
    given = settings | {"train_steps": many, "eval_every": many, "checkpoint_every": many}
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

    with survives("a full disk (tmpfs) at a line of metrics") as seen:
        seen.append("exit 1 with the path, goes on once there is room")
        assert run(3, told)[0] == 75
        (saved,) = saved_steps(workdir)
        code, errors = run(saved + 3, fill)
        assert code == 1, errors
        last = errors.strip().splitlines()[-1]
        assert re.search(
            rf"No space left on device: '{workdir}/(metrics.jsonl|events.out.*)'", last
        )
        (disk / "filler").unlink()
        code, errors = run(saved + 3, told)
        assert code == 75 and f"from step {saved}" in errors, errors
        newest = max(saved_steps(workdir))
        lines = [x["step"] for x in read_metrics(workdir)]
        assert newest > saved and lines == list(range(1, newest + 1))


@pytest.fixture
def byte_model(tmp_path):
    """A random model of bytes: one layer, answers of a few tokens."""
    vocabulary, folder = load_vocabulary(BYTES), tmp_path / "model"
    config = T5Config(
        vocab_size=384,
        emb_dim=32,
        num_heads=2,
        head_dim=8,
        mlp_dim=16,
        num_encoder_layers=1,
        num_decoder_layers=1,
    )
    params = jax.jit(init_params, static_argnums=0)(config, jax.random.key(0))
    info = TaskInfo("roads", step_by_step(), 32, 24, 4)
    write_model_files(folder, config, vocabulary, info)
    save_params(folder, params, config)
    return folder


@pytest.mark.slow
def test_a_disk_that_gets_full_keeps_whole_windows_of_predictions(
    mounted, byte_model, tmp_path, capsys, monkeypatch, survives
):
    rows, whole = tmp_path / "rows.jsonl", tmp_path / "whole.jsonl"
    rows.write_text("".join(f'{{"id": {i}, "input": "{i} boxes"}}\n' for i in range(600)))
    monkeypatch.setattr(predict_module, "WINDOW_ROWS", 100)
    monkeypatch.setattr(predict_module, "WINDOW_BATCHES", 0)
    command = ["predict", str(byte_model), str(rows), "--batch-size", "96"]
    assert main([*command, str(whole)]) == 0
    disk = mounted("size=28k")
    out = disk / "out.jsonl"
    with survives("a full disk (tmpfs) at a window of predictions") as seen:
        seen.append("exit 1 with the path, whole windows kept, goes on byte for byte")
        capsys.readouterr()
        assert main([*command, str(out)]) == 1
        last = capsys.readouterr().err.splitlines()[-1]
        assert re.search(rf"No space left on device: '{out}\.partial", last), last
        kept = json.loads((disk / "out.jsonl.partial.json").read_text())["rows"]
        assert kept in (100, 200, 300, 400, 500) and not out.exists()
        subprocess.run(["mount", "-o", "remount,size=1m", str(disk)], check=True)
        assert main([*command, str(out)]) == 0
        assert out.read_bytes() == whole.read_bytes()


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
def test_data_that_was_changed_in_place_is_refused(jsonl, tmp_path, capsys, settings, survives):
    config = TrainConfig(**settings | {"task": "sayings", "train_steps": 2, "eval_every": 2})
    data_dir = jsonl("yes")
    train(config, workdir=tmp_path / "run", data_dir=data_dir)
    before = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    with survives("a dataset prepared anew, with other rows, under a resumed run") as seen:
        seen.append("exit 2, the fingerprints named")
        jsonl("no")  # the same files, the same numbers of rows
        with pytest.raises(InputError, match=r"other settings \(the train data: fingerprint was"):
            train(config, workdir=tmp_path / "run", data_dir=data_dir)
        assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == before
        jsonl("yes")
        assert train(config, workdir=tmp_path / "run", data_dir=data_dir)["step"] == 2
    with survives("a flipped bit in the token store under a resumed run") as seen:
        seen.append("said, tokenised anew, the run goes on")
        (ids,) = (data_dir / "token_store").glob("sayings-train-*/1-inputs.ids")
        whole = ids.read_bytes()
        ids.write_bytes(whole[:9] + bytes([whole[9] ^ 4]) + whole[10:])
        capsys.readouterr()
        assert train(config, workdir=tmp_path / "run", data_dir=data_dir)["step"] == 2
        said = f"warning: {ids.parent}: its files have changed since they were written"
        assert said in capsys.readouterr().err
        assert ids.read_bytes() == whole


def test_any_flipped_bit_of_a_token_store_is_found(tmp_path, record_fault):
    """One in the manifest may lie in what it only tells, so the rows are compared, too."""
    rows = [TokenExample([([5, i, 1], [7, 1])], 1.0, f"{i} boxes") for i in range(50)]
    whole = write_store(tmp_path / "s", ["label"], rows, {"task": "x"})
    files, draw, wrong = sorted((tmp_path / "s").iterdir()), random.Random(0), []
    for trial in range(FLIPS):
        path = files[trial % len(files)]
        data = path.read_bytes()
        place = draw.randrange(len(data))
        flipped = bytes([data[place] ^ 1 << draw.randrange(8)])
        path.write_bytes(data[:place] + flipped + data[place + 1 :])
        found = open_store(tmp_path / "s")
        if found is not None and (path.name != MANIFEST or found.fingerprint != whole.fingerprint):
            wrong.append((path.name, place))
        path.write_bytes(data)
    record_fault(
        "one flipped bit in a token store",
        tried=FLIPS,
        survived=FLIPS - len(wrong),
        seen=f"in {len(files)} files; tokenised anew",
    )
    assert not wrong
    assert open_store(tmp_path / "s") is not None


def test_a_full_disk_names_the_lock_and_a_file_of_its_name_is_left_alone(tmp_path, full_disk):
    too_large = pytest.raises(InputError, match=r"run\.lock: cannot be written \(File too large")
    with full_disk(0), too_large, locked_workdir(tmp_path):
        pass
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "run.lock").write_text("my notes")
    theirs = pytest.raises(InputError, match=r"run\.lock: exists and was not written by `train`")
    with theirs, locked_workdir(tmp_path):
        pass
    assert (tmp_path / "run.lock").read_text() == "my notes"
