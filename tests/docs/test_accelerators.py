"""docs/lab/accelerators.md: its cells are those of the benchmark, and `plan` takes their flags."""

import importlib.util
import pathlib
import re
import shlex

import pytest

from stepdistill_jax import planning
from stepdistill_jax.commands import main
from stepdistill_jax.errors import InputError

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
def test_plan_takes_the_flags_of_a_cell(cell, monkeypatch):
    asked = []

    def plan(config, **options):
        asked.append((config, options))
        raise InputError("compiles nothing")

    monkeypatch.setattr(planning, "plan", plan)
    assert main.main(["plan", "paper_cqa", *shlex.split(BENCHMARK.CELLS[cell])]) == 2
    ((config, options),) = asked
    lengths = (1024, 256) if cell.endswith("long") else (512, 114)
    assert (config.row_input_length, config.row_target_length) == lengths
    size, *chips = cell.removesuffix("_long").split("_")
    assert config.model_size == size
    assert options["topology"].startswith("v5e" if "v5e" in chips else "cuda")
    assert options["layout"] == ("fsdp" if size == "large" and "8" in chips else "data")
    assert options["rows"] % (8 if "8" in chips else 1) == 0
