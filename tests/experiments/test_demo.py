import json
import os
import subprocess
import sys

import pytest

from stepdistill_jax.experiments.demo import demo
from stepdistill_jax.experiments.plots import series, smoothed
from stepdistill_jax.experiments.report import report
from stepdistill_jax.training import TrainConfig


@pytest.mark.slow
def test_the_demo_compares_its_arms_and_finds_them_done_the_second_time(
    tmp_path, delivery_data_dir
):
    arms = {
        name: (
            TrainConfig(
                task="delivery",
                objectives=name,
                batch_size=16,
                input_length=60,
                target_length=36,
                train_steps=2,
            ),
            "# text",
        )
        for name in ("label_only", "step_by_step")
    }
    first = demo(arms, workdir=tmp_path, data_dir=delivery_data_dir)
    assert [a["arm"] for a in first["arms"]] == list(arms)
    assert all(a["labels"] == 1500 and a["seconds"] > 0 for a in first["arms"])
    assert first["majority_baseline"] == 0.5
    assert (tmp_path / "demo.png").read_bytes().startswith(b"\x89PNG")
    assert json.loads((tmp_path / "demo.json").read_text()) == first
    assert [row.keys() for row in first["rows"]] == [
        {"input": 0, "gold": 0, "label": 0, "rationale": 0}.keys()
    ] * 3
    again = demo(arms, workdir=tmp_path, data_dir=delivery_data_dir)
    assert all(a["seconds"] is None for a in again["arms"])
    assert [a["test_accuracy"] for a in again["arms"]] == [
        a["test_accuracy"] for a in first["arms"]
    ]
    written = report([tmp_path], output=tmp_path / "report", data_dir=delivery_data_dir)
    assert written.comparisons[0].arms == list(arms) and not written.left_out


def test_a_curve_has_the_steps_that_have_its_key():
    lines = [{"step": 1, "loss": 4.0}, {"step": 1, "eval": 0.5}, {"step": 2, "loss": 2.0}]
    assert series(lines, "loss") == ([1, 2], [4.0, 2.0])
    assert smoothed([4.0, 2.0, 0.0], window=2) == [4.0, 3.0, 1.0]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_rationales_teach_what_labels_and_copies_do_not(tmp_path):
    """The demo as users run it, from no data at all: the claim, and what serving costs."""
    done = subprocess.run(
        [sys.executable, "-m", "stepdistill_jax", "demo", "--data-dir", "data", "--json"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env=os.environ | {"XLA_FLAGS": ""},
    )
    assert done.returncode == 0, done.stderr
    summary = json.loads(done.stdout.splitlines()[-1])
    accuracy = {a["arm"]: a["test_accuracy"] for a in summary["arms"]}
    assert accuracy["step_by_step"] > 0.97
    assert 0.4 < accuracy["label_only"] < 0.6
    assert 0.4 < accuracy["copy_control"] < 0.6
    assert {a["tokens_per_row"] for a in summary["arms"]} == {2.0}
    assert "predict: with" in done.stdout and "explain: with" in done.stdout
    assert "stepdistill prepare jsonl" in done.stdout
