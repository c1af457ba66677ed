import os
import pathlib
import subprocess
import sys

import pytest

from stepdistill_jax.data.prepare import prepare

SCRIPTS = pathlib.Path(__file__).parents[2] / "benchmarks"


def run(script, folder, data_dir):
    """Each arm once, two steps: what the page says is then worth nothing, but it says it."""
    flags = ["--steps", "2", "--seeds", "1", "--least-share", "1", "--docs", folder / "docs"]
    folders = ["--workdir", folder / "runs", "--data-dir", data_dir]
    command = [sys.executable, SCRIPTS / script, *flags, *folders]
    environment = os.environ | {"XLA_FLAGS": ""}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_one_command_writes_the_page_of_the_claim(tmp_path, delivery_data_dir):
    run("claim.py", tmp_path, delivery_data_dir)
    page = (tmp_path / "docs/lab/experiments.md").read_text()
    assert page.count("**is not shown**") == 17
    table = page.split("## Accuracy")[1].splitlines()
    arms = [line.split(" | ")[0].removeprefix("| ") for line in table if line.startswith("| ")]
    assert len(arms) == 17 and {"label_only", "step_by_step_mi", "missing_50"} <= set(arms)
    assert "With all 12824 possible labels (8.5 times as many)" in page
    for name in ("claim", "controls"):
        assert (tmp_path / f"docs/images/{name}.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_one_command_writes_the_page_of_the_claim_on_word_problems(tmp_path):
    """On rows that are prepared already: those of the package are `prepare gsm_symbolic`'s to test."""
    rows = [
        {
            "input": f"Ann has {i} and {i % 7}.",
            "label": f"{i + i % 7}",
            "rationale": f"so the answer is {i} + {i % 7}",
        }
        for i in range(90)
    ]
    source = {"train": rows[:60], "validation": rows[60:70], "test": rows[70:]}
    prepare("jsonl", source=source, new_name="gsm_short", data_dir=tmp_path / "data")
    run("claim_gsm.py", tmp_path, tmp_path / "data")
    page = (tmp_path / "docs/lab/experiments_gsm.md").read_text()
    claims = [line for line in page.splitlines() if "| **" in line]
    assert len(claims) == 6 and "5 arms, 1 seed, 2 steps of 32 examples: 5 runs" in page
    assert "| claim | 60 labels |" in page
    for arm in (
        "label_only",
        "step_by_step",
        "step_by_step_3",
        "step_by_step_mi",
        "shuffled",
    ):
        assert f"| {arm} | 0." in page
    for name in ("claim_gsm", "controls_gsm"):
        assert (tmp_path / f"docs/images/{name}.png").read_bytes().startswith(b"\x89PNG")
