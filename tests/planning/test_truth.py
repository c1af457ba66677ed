"""Planned memory beside resident memory of real steps, one process each."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

BENCHMARK = pathlib.Path(__file__).parents[2] / "benchmarks" / "memory.py"


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["scan over layers (always on)", "full, 4 microbatches, Adafactor"]
)
def test_real_steps_take_what_was_planned(name):
    """Small: docs/lab/planning.md has the figures; buffers of the runtime weigh more in small steps."""
    settings = ["--rows", "4", "--input-length", "128", "--target-length", "64", "--steps", "1"]
    done = subprocess.run(
        [sys.executable, BENCHMARK, *settings, "--only", name],
        capture_output=True, text=True, check=True,
        env=os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""},
    )  # fmt: skip
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["arguments"] == pytest.approx(found["state"], rel=0.001)
    assert 0.7 < found["temp"] / found["grew"] < 1.3, found
