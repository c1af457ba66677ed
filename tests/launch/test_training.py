"""The launchers with the real `stepdistill`: two processes train as one does."""

import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from stepdistill_jax.runtime.metrics import read_metrics

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]  # half a minute to a minute each

# `stepdistill`, which also says at a save what share of params and optimizer state this process holds
COMMAND = """
import sys
import jax
from stepdistill_jax.runtime.checkpoints.manager import Checkpoints
from stepdistill_jax.commands.main import main
save = Checkpoints.save
def say_and_save(self, step, params, rest, metrics):
    arrays = jax.tree.leaves((params, rest.opt_state))
    here = sum(s.data.nbytes for a in arrays for s in a.addressable_shards)
    share = here / sum(a.nbytes for a in arrays)
    print(f"held {jax.process_index()} of {jax.process_count()}: {share:.2f}", file=sys.stderr)
    save(self, step, params, rest, metrics)
Checkpoints.save = say_and_save
sys.exit(main())
"""
STEPDISTILL = [sys.executable, "-c", COMMAND]


def train(config, workdir, data_dir, **settings):
    """Arguments of `stepdistill` for a short run."""
    sets = [arg for name, value in settings.items() for arg in ("--set", f"{name}={value}")]
    where = ["--workdir", str(workdir), "--data-dir", str(data_dir)]
    return [*STEPDISTILL, "train", config, *where, *sets, "--json"]


def losses(workdir):
    """Metrics of every step but those of time, and of padding: packed rows fill up the devices."""
    left_out = ("timing/", "non_padding_fraction/")
    return [
        {k: v for k, v in line.items() if not k.startswith(left_out)}
        for line in read_metrics(workdir)
    ]


def two_processes_train_as_one(config, tmp_path, data_dir, launch, **settings):
    alone = subprocess.run(
        train(config, tmp_path / "one", data_dir, **settings),
        env=os.environ | {"XLA_FLAGS": ""}, capture_output=True, text=True, timeout=280,
    )  # fmt: skip
    assert alone.returncode == 0, alone.stderr
    command = train(config, tmp_path / "two", data_dir, LAYOUT="fsdp", **settings)
    done = launch("local.sh", "-n", 2, "--", *command, timeout=280)

    assert json.loads(done.stdout.splitlines()[-1])["step"] == settings["TRAIN_STEPS"]
    assert json.loads((tmp_path / "two" / "run.json").read_text())["process_count"] == 2
    held = [line.split() for line in done.stderr.splitlines() if " held " in line]
    assert [(line[0], line[2:5]) for line in sorted(held)] == [
        (f"[{k}]", [str(k), "of", "2:"]) for k in range(2)
    ]
    # half, and what is too small to be cut
    assert all(0.5 <= float(line[-1]) < 0.6 for line in held), held
    one, two = losses(tmp_path / "one"), losses(tmp_path / "two")
    assert [line["step"] for line in one] == [line["step"] for line in two]
    for expected, got in zip(one, two, strict=True):
        assert expected.keys() == got.keys()
        for key in expected:
            np.testing.assert_allclose(got[key], expected[key], rtol=1e-5, atol=1e-7, err_msg=key)


def test_local_trains_over_two_processes_with_the_losses_of_one(
    tmp_path, delivery_data_dir, launch
):
    two_processes_train_as_one(
        "demo_step_by_step", tmp_path, delivery_data_dir, launch,
        TRAIN_STEPS=3, EVAL_EVERY=3, BATCH_SIZE=8,
    )  # fmt: skip


def test_local_trains_cqa_over_two_processes_with_the_losses_of_one(tmp_path, paper_data, launch):
    from stepdistill_jax.data import prepare

    prepare("cqa", source=paper_data / "cqa", data_dir=tmp_path / "data")
    two_processes_train_as_one(
        "cqa_cpu_tiny", tmp_path, tmp_path / "data", launch,
        TRAIN_STEPS=3, EVAL_EVERY=3, CHECKPOINT_EVERY=3, BATCH_SIZE=8,
    )  # fmt: skip


def test_a_slurm_job_trains_stops_is_queued_again_and_goes_on(
    tmp_path, delivery_data_dir, slurm, stubs
):
    """Two nodes by JAX's own Slurm detection; the warning before the end of the time comes early."""
    workdir = tmp_path / "run"
    command = train(
        "demo_step_by_step", workdir, delivery_data_dir, TRAIN_STEPS=60, EVAL_EVERY=60, BATCH_SIZE=8
    )
    first = slurm(*command, XLA_FLAGS="", EXPECT_DEVICES=2)
    deadline = time.monotonic() + 200
    while not (workdir / "metrics.jsonl").exists() or not read_metrics(workdir):
        assert time.monotonic() < deadline and first.poll() is None, first.communicate()
        time.sleep(0.02)
    first.send_signal(signal.SIGTERM)
    _, errors = first.communicate(timeout=200)
    assert first.returncode == 75, errors
    assert "process 0 of 2, 1 of 2 devices" in errors
    assert "process 1 of 2, 1 of 2 devices" in errors
    assert len([call for call in stubs.calls if call[:2] == ["scontrol", "requeue"]]) == 1
    stopped_after = read_metrics(workdir)[-1]["step"]
    assert 1 <= stopped_after < 60

    second = slurm(*command, XLA_FLAGS="", EXPECT_DEVICES=2, SLURM_RESTART_COUNT=1)
    output, errors = second.communicate(timeout=280)
    assert second.returncode == 0, errors
    assert json.loads(output.splitlines()[-1])["step"] == 60
    assert [line["step"] for line in read_metrics(workdir) if "loss" in line] == list(range(1, 61))
