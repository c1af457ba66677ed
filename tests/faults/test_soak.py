"""A run of a quarter of an hour, and a process that predicts again and again: nothing may grow.

`FAULTS_SOAK_MINUTES=60` makes it an hour.
"""

import contextlib
import os
import pathlib
import signal
import statistics
import subprocess
import sys
import time

import pytest

from stepdistill_jax.errors import InputError
from stepdistill_jax.inference import export
from stepdistill_jax.runtime.metrics import read_metrics
from stepdistill_jax.training import TrainConfig, train

MINUTES = float(os.environ.get("FAULTS_SOAK_MINUTES", 15))
pytestmark = [pytest.mark.faults, pytest.mark.timeout(60 * MINUTES + 600)]
# memory is read as the median of a minute (or a sixth of a shorter soak), handles and threads as its
# least: a save in the background has some open
GROWTH, GROWTH_MB, MORE_HANDLES = 0.03, 20, 2
MORE_THREADS = 4  # pools start theirs one by one
# TensorStore 0.1.86 never lets go of what `Spec.to_json` returns, and Orbax asks for it for each array:
# 61 KB a save, counted by tracemalloc
SAVE_MB = 0.07
# of an exported directory, which is what a service opens (a workdir takes 0.2 MB, Orbax's): 0.005 MB
CALL_MB = 0.01
# by then the C library holds what each of them frees, about 100 MB; counted, since a busy machine does
# less in a minute. A run's memory is read from the middle of the soak on.
WARM_UP_CALLS, WARM_UP_SAVES = min(300, int(20 * MINUTES)), min(100, int(6 * MINUTES))

PREDICTS = """
import pathlib, sys
model, data_dir, folder = map(pathlib.Path, sys.argv[1:])
from stepdistill_jax.inference import evaluate, predict
test = (data_dir / "delivery" / "test.jsonl").read_text().splitlines()[:100]
(folder / "in.jsonl").write_text("\\n".join(test))
while True:
    predict(model, folder / "in.jsonl", folder / "out.jsonl")
    (folder / "out.jsonl").unlink()
    evaluate(model, task="delivery", split="validation", data_dir=data_dir)
    print("again", flush=True)
"""


class Watched:
    """What a process holds, every two seconds, by the seconds since it began."""

    window = min(60, 60 * MINUTES / 6)

    def __init__(self, process):
        self._process, self._began = process, time.monotonic()
        self._rows = []

    @property
    def seconds(self):
        return time.monotonic() - self._began

    def until(self, seconds):
        """Returns after so many seconds in all, or when the process has ended."""
        while self.seconds < seconds and self._process.poll() is None:
            time.sleep(2)
            proc = pathlib.Path(f"/proc/{self._process.pid}")
            lines = (line.split() for line in (proc / "status").read_text().splitlines())
            status = {line[0]: line[1] for line in lines if len(line) > 1}
            if "VmRSS:" in status:  # it lives
                self._rows.append(
                    (
                        self.seconds,
                        int(status["VmRSS:"]) / 1024,
                        len(list((proc / "fd").iterdir())),
                        int(status["Threads:"]),
                    )
                )

    def at(self, seconds):
        """(MB, handles, threads) in the minute before."""
        rows = [row[1:] for row in self._rows if seconds - self.window < row[0] <= seconds]
        memory, handles, threads = zip(*rows, strict=True)
        return statistics.median(memory), min(handles), min(threads)


def growth(watched, seconds, early, known_mb):
    """(whether nothing grew but what is known to, in words)."""
    (mb, handles, threads), (mb_end, handles_end, threads_end) = map(watched.at, (early, seconds))
    flat = (
        mb_end - mb < min(GROWTH_MB, GROWTH * mb) + known_mb
        and handles_end <= handles + MORE_HANDLES
        and threads_end <= threads + MORE_THREADS
    )
    course = ", ".join(f"{watched.at(seconds * n / 6)[0]:.0f}" for n in range(1, 7))
    return flat, (
        f"MB at each sixth: {course}; minute {early / 60:.3g}: {mb:.0f} MB, {handles} handles, {threads} threads;"
        f" minute {seconds / 60:.3g}: {mb_end:.0f} MB, {handles_end} handles, {threads_end} threads"
    )


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_long_run_does_not_grow(tmp_path, delivery_data_dir, settings, record_fault):
    workdir, seconds = tmp_path / "run", 60 * MINUTES
    given = settings | {"train_steps": 10**7, "eval_every": 40, "checkpoint_every": 40}
    argv = [sys.executable, "-m", "stepdistill_jax", "train", "demo_step_by_step"]
    argv += ["--workdir", str(workdir), "--data-dir", str(delivery_data_dir)]
    argv += [x for name, value in given.items() for x in ("--set", f"{name.upper()}={value}")]
    errors = tmp_path / "errors"
    with errors.open("w") as file:
        process = subprocess.Popen(
            argv, env=os.environ | {"XLA_FLAGS": ""}, stdout=subprocess.DEVNULL, stderr=file
        )
    try:
        watched, early = Watched(process), seconds / 2
        watched.until(early)
        saved = _saves(workdir, given)
        watched.until(seconds)
        assert process.poll() is None, errors.read_text()[-2000:]
        process.send_signal(signal.SIGTERM)
        code = process.wait(120)
    finally:
        process.kill()
    steps, saves = read_metrics(workdir)[-1]["step"], _saves(workdir, given)
    flat, seen = growth(watched, seconds, early, SAVE_MB * (saves - saved))
    kept = [p.name for p in (workdir / "checkpoints").iterdir()]
    files = len([p for p in workdir.rglob("*") if p.is_file()])
    record_fault(
        f"{MINUTES:g} minutes of training, validation and checkpoints",
        tried=1,
        survived=int(flat and code == 75 and len(kept) <= 4),
        seen=f"{seen}; {steps} steps, {saves} validations and checkpoints, {files} files at the end",
    )
    assert code == 75, errors.read_text()[-2000:]
    assert len(kept) <= 4, kept  # two, the best, and `.deleted`
    assert saved >= WARM_UP_SAVES, "the machine is too busy for a soak"
    assert flat, seen


def _saves(workdir, given):
    with contextlib.suppress(InputError, IndexError):  # not a line yet
        return read_metrics(workdir)[-1]["step"] // given["checkpoint_every"]
    return 0


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_process_that_predicts_again_and_again_does_not_grow(
    tmp_path, delivery_data_dir, settings, record_fault
):
    workdir, seconds = tmp_path / "run", 60 * MINUTES / 3
    train(TrainConfig(**settings), workdir=workdir, data_dir=delivery_data_dir)
    export(workdir, tmp_path / "model")
    process = subprocess.Popen(
        [sys.executable, "-c", PREDICTS, tmp_path / "model", delivery_data_dir, tmp_path],
        env=os.environ | {"XLA_FLAGS": ""},
        stdout=(tmp_path / "times").open("w"),
        stderr=(tmp_path / "errors").open("w"),
    )
    times = tmp_path / "times"
    try:
        watched = Watched(process)
        while times.read_text().count("again") < WARM_UP_CALLS and process.poll() is None:
            watched.until(watched.seconds + 2)
        early = watched.seconds + watched.window
        watched.until(early + seconds)
        end, again = watched.seconds, times.read_text().count("again")
        alive = process.poll() is None
    finally:
        process.kill()
        process.wait()
    assert alive, (tmp_path / "errors").read_text()[-2000:]
    flat, seen = growth(watched, end, early, 2 * CALL_MB * (again - WARM_UP_CALLS))
    record_fault(
        f"{seconds / 60:.3g} minutes of predict and evaluate in one process",
        tried=1,
        survived=int(flat),
        seen=f"{seen}; {again} times each",
    )
    assert flat, seen
