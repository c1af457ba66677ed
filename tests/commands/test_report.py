import csv
import json
import shutil

import pytest

from stepdistill_jax.commands import main
from stepdistill_jax.training import TrainConfig


@pytest.fixture
def runs(tmp_path):
    """Two workdirs whose dataset is not at hand: their accuracy is what was kept."""
    for arm, accuracy in (("label_only", 0.5), ("step_by_step", 0.75)):
        workdir = tmp_path / "runs" / arm
        (workdir / "evaluation").mkdir(parents=True)
        config = TrainConfig(task="elsewhere", objectives=arm).to_json()
        described = {"config": config, "examples": 100, "parameters": 9}
        (workdir / "run.json").write_text(json.dumps(described))
        kept = {"step": 3, "accuracy": accuracy, "rows": 8, "collapsed": arm == "label_only"}
        (workdir / "evaluation" / "test.json").write_text(json.dumps(kept))
    return tmp_path / "runs"


def head_of_accuracy(lines):
    return [line.split("┃")[5].strip() for line in lines if line.startswith("┃")]


def test_report_prints_a_table_and_a_line_of_json(runs, tmp_path, capsys):
    argv = ["report", str(runs), "--output", str(tmp_path / "out"), "--json"]
    assert main.main([*argv, "--data-dir", str(tmp_path / "data")]) == 0
    *text, line = capsys.readouterr().out.splitlines()
    assert any("step_by_step" in x and "0.7500" in x for x in text)
    assert "(one run:" in head_of_accuracy(text) and "no interval)" in head_of_accuracy(text)
    sentences = " ".join(x.strip() for x in text)
    assert "step_by_step reaches the accuracy that label_only has with all of the data" in sentences
    told = json.loads(line)
    assert told["page"] == str(tmp_path / "out" / "report.html")
    (comparison,) = told["comparisons"]
    assert [(p["arm"], p["accuracy"], p["collapsed"]) for p in comparison["points"]] == [
        ("label_only", 0.5, 1),
        ("step_by_step", 0.75, 0),
    ]
    assert not any("chance" in x for x in text)  # nothing is known row by row
    assert told["left_out"] == [] and comparison["tests"] == []


def test_the_head_speaks_of_an_arm_without_an_interval_only_if_there_is_one(runs, tmp_path, capsys):
    def head_with_another_seed_of(arm):
        again = runs / f"{arm}_again"
        shutil.copytree(runs / arm, again)
        described = json.loads((again / "run.json").read_text())
        described["config"]["seed"] += 1
        (again / "run.json").write_text(json.dumps(described))
        argv = ["report", str(runs), "--output", str(tmp_path / "out")]
        assert main.main([*argv, "--data-dir", str(tmp_path / "data")]) == 0
        return head_of_accuracy(capsys.readouterr().out.splitlines())

    assert head_with_another_seed_of("label_only") == [
        "accuracy ± 95%",
        "(one run:",
        "no interval)",
    ]
    assert head_with_another_seed_of("step_by_step") == ["accuracy ± 95%"]


def test_the_papers_figures_stand_beside_runs_of_its_kind(runs, tmp_path):
    for arm in ("label_only", "step_by_step"):
        path = runs / arm / "run.json"
        described = json.loads(path.read_text())
        described["config"]["task"], described["parameters"] = "cqa", 247_577_856
        path.write_text(json.dumps(described))
    argv = ["report", str(runs), "--output", str(tmp_path / "out")]
    assert main.main([*argv, "--data-dir", str(tmp_path / "data")]) == 0
    rows = list(csv.DictReader((tmp_path / "out" / "accuracy.csv").read_text().splitlines()))
    assert [row["paper, T5 base"] for row in rows] == ["0.6219", "0.6329"]


@pytest.mark.parametrize(
    ("flags", "part"),
    [
        (["nowhere"], "no such folder"),
        (["RUNS", "--baseline", "labels"], "no run of the arm 'labels'"),
        (["RUNS", "--examples", "-1"], "--examples"),
        (["RUNS", "--split", "validation"], "validation"),
        ([], "required"),
    ],
)
def test_bad_flags_are_one_line_and_exit_2(runs, tmp_path, capsys, flags, part):
    argv = ["report", *(str(runs) if f == "RUNS" else f for f in flags)]
    try:
        code = main.main([*argv, "--output", str(tmp_path / "out")])
    except SystemExit as stop:
        code = stop.code
    assert code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert part in line
