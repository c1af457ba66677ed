"""docs/lab/accelerators.md: its cells are those of the benchmark, and `plan` takes their flags."""

import importlib.util
import pathlib
import re
import shlex

import pytest

from stepdistill_jax.commands import main

ROOT = pathlib.Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "lab" / "accelerators.md").read_text("utf-8")
SPEC = importlib.util.spec_from_file_location("cells", ROOT / "benchmarks" / "accelerators.py")
BENCHMARK = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(BENCHMARK)


def test_the_table_has_each_cell_once():
    assert re.findall(r"^\| `(\w+)` \|", PAGE, re.M) == list(BENCHMARK.CELLS)


def test_the_command_of_the_page_is_a_cell():
    (command,) = re.findall(
        r"^    stepdistill plan paper_cqa (.*)$", PAGE.replace("\\\n", " "), re.M
    )
    cell = [*shlex.split(BENCHMARK.CELLS["large_8_h100"]), "--set", "DTYPE=bfloat16"]
    assert shlex.split(command) == cell


@pytest.mark.parametrize("cell", BENCHMARK.CELLS)
def test_plan_takes_the_flags_of_a_cell(cell, capsys):
    """All but one flag too many, which is refused before anything is compiled."""
    flags = shlex.split(BENCHMARK.CELLS[cell])
    assert main.main(["plan", "paper_cqa", *flags, "--devices", "8"]) == 2
    assert "--devices: the topology says" in capsys.readouterr().err
