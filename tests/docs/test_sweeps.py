"""docs/how-to/sweeps.md: its commands are ones that the program takes, and its files those that are written."""

import pathlib
import re
import shlex

from stepdistill_jax.commands import main
from stepdistill_jax.experiments.tables import Table

PAGE = (pathlib.Path(__file__).parents[2] / "docs" / "how-to" / "sweeps.md").read_text("utf-8")


def commands(name):
    joined = PAGE.replace("\\\n", " ")
    lines = re.findall(rf"^(?:\$ )?stepdistill ({name} .*)$", joined, re.M)
    return [shlex.split(line.partition(" >")[0]) for line in lines]


def test_the_sweep_of_the_page_is_the_cells_that_it_shows(capsys):
    first, *_ = commands("sweep")
    assert main.main([*first, "--print", "local"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 40 and "=== cell 1/40 label_only 0.125 seed 0" in PAGE
    assert "runs/mine/label_only/0.125/0" in lines[0]


def test_the_report_of_the_page_has_known_flags(capsys):
    found = commands("report")
    assert found and len(found) == PAGE.count("stepdistill report ")
    for command in found:
        assert main.main(command) == 2  # there is no such sweep here, and that is all
        assert "no such folder" in capsys.readouterr().err


def test_the_files_of_the_page_are_those_of_a_report(tmp_path):
    listed = re.findall(r"^\| `(\w+)\.\{?([\w,]+)\}?`", PAGE, re.M)
    suffixes = dict(listed)
    assert set(suffixes) == {
        "report",
        "accuracy",
        "tests",
        "rationales",
        "cost",
        "settings",
        "learning",
        "size",
        "runs",
    }
    written = Table("tests", ("a",), (("b",),), ()).write(tmp_path)
    assert suffixes["tests"] == written.suffix[1:]
