"""docs/how-to/arms.md: its table is that of the program, its rows and commands work as they stand."""

import json
import pathlib
import re

import pytest

from stepdistill_jax.commands.gin_config import load_config
from stepdistill_jax.commands.main import main
from stepdistill_jax.data.objectives import ARMS

PAGE = (pathlib.Path(__file__).parents[2] / "docs" / "how-to" / "arms.md").read_text("utf-8")


def block(language):
    (text,) = re.findall(rf"^```{language}\n(.*?)^```$", PAGE, re.M | re.S)
    return text


COMMANDS = [line.removeprefix("stepdistill ").split() for line in block("sh").splitlines()]


@pytest.fixture
def reader(tmp_path, monkeypatch):
    """The folder of someone who has typed in the files of the page."""
    (tmp_path / "asked.jsonl").write_text(block("json"))
    (tmp_path / "own.gin").write_text(block("gin"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("STEPDISTILL_DATA_DIR", str(tmp_path / "data"))
    return tmp_path


def test_every_arm_is_in_the_table_and_in_no_other():
    assert set(re.findall(r"^\| `(\w+)` \|", PAGE, re.M)) == set(ARMS)


@pytest.mark.slow
def test_the_rows_and_commands_of_the_page_work(reader, capsys):
    prepare, inspect, train = COMMANDS
    assert main(prepare) == 0
    assert "why_not is in 2 of 2 rows" in capsys.readouterr().out.replace("\n", " ")
    assert main([*inspect, "--json"]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert {n: o["rows"] for n, o in found["objectives"].items()} == {
        "label": 2,
        "rationale": 2,
        "why_not": 2,
    }
    config, _ = load_config(train[1], train[5:10:2], ["objectives/step_by_step_multi.gin"])
    assert config.objectives == ARMS["step_by_step_multi"]()
    own = ["inspect", "demo_step_by_step", "--gin_file", "own.gin", *inspect[4:]]
    assert main([*own, "--json"]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert {n: (o["rows"], o["absent"]) for n, o in found["objectives"].items()} == {
        "label": (2, 0),
        "rationale": (2, 0),
        "why_not": (2, 0),
        "rewrite": (1, 1),
    }
    assert main(["prepare", *prepare[1:-1], "why_not,rewritten"]) == 2
    assert "no row of asked.jsonl has a text in the field 'rewritten'" in (capsys.readouterr().err)
