"""The load run at a tiny size; what its figures are worth only a quiet machine can tell."""

import json
import pathlib
import subprocess
import sys

import pytest

BENCHMARK = pathlib.Path(__file__).parents[2] / "benchmarks" / "annotate_load.py"


@pytest.mark.slow
def test_the_load_run_ends_with_figures_of_ours_and_of_the_client_alone():
    done = subprocess.run(
        [sys.executable, BENCHMARK, "--rows", "50", "--concurrency", "8", "--json"],
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    ours, peer = result["ours"], result["peers"]["openai"]
    assert result["ratio"]["openai"] == pytest.approx(
        ours["rows_per_second"] / peer["rows_per_second"]
    )
    assert ours["peak_memory_mib"] > 10
