import json
import os
import pathlib
import subprocess
import sys

import pytest

from stepdistill_jax.data.prepare import prepare

SCRIPT = pathlib.Path(__file__).parents[2] / "benchmarks" / "pretraining.py"


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_base_is_pretrained_and_compared_with_a_random_one(tmp_path, paper_data):
    """Few steps: the figures say nothing, but they are those of both bases, of one vocabulary."""
    prepare("svamp", source=paper_data / "svamp", data_dir=tmp_path / "data")
    flags = ["--tasks", "svamp", "--steps", "3", "--main-steps", "2", "--seeds", "1"]
    folders = ["--workdir", tmp_path / "runs", "--data-dir", tmp_path / "data"]
    command = [sys.executable, SCRIPT, *flags, *folders]
    environment = os.environ | {"XLA_FLAGS": ""}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    *table, last = done.stdout.splitlines()
    result = json.loads(last)
    assert {name: base["steps"] for name, base in result["bases"].items()} == {
        "random": 1,
        "pretrained": 3,
    }
    assert result["found"].keys() == {"svamp random", "svamp pretrained"}
    for base in result["bases"]:
        assert any(line.startswith(f"| svamp | {base} |") for line in table)
        model = tmp_path / "runs" / f"{base}_base" / "spiece.model"
        assert model.read_bytes() == (tmp_path / "runs" / "spiece.model").read_bytes()
    again = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert again.stdout.splitlines()[:-1] == table, "nothing is trained twice"
    assert "2 of 2 cells are already done" in again.stderr
