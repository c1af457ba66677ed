import os
import pathlib
import subprocess
import sys

import pytest

SCRIPT = pathlib.Path(__file__).parents[2] / "benchmarks" / "claim.py"


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_one_command_writes_the_page_of_the_claim(tmp_path, delivery_data_dir):
    """Each arm once, two steps: what it says is then worth nothing, but it says it."""
    flags = ["--steps", "2", "--seeds", "1", "--least-share", "1", "--docs", tmp_path / "docs"]
    folders = ["--workdir", tmp_path / "runs", "--data-dir", delivery_data_dir]
    command = [sys.executable, SCRIPT, *flags, *folders]
    environment = os.environ | {"XLA_FLAGS": ""}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    page = (tmp_path / "docs/experiments.md").read_text()
    assert page.count("**is not shown**") == 16
    table = page.split("## Accuracy")[1].splitlines()
    arms = [line.split(" | ")[0].removeprefix("| ") for line in table if line.startswith("| ")]
    assert len(arms) == 16 and {"label_only", "step_by_step_equal", "missing_50"} <= set(arms)
    assert "With 12824 labels, every one that can be made (8.5 times as many)" in page
    for name in ("claim", "controls"):
        assert (tmp_path / f"docs/images/{name}.png").read_bytes().startswith(b"\x89PNG")
