import json
import os
import re
import shlex
import subprocess
import sys
import time

import pytest

import stepdistill_jax.tasks.load as tasks_load
import stepdistill_jax.training
from stepdistill_jax.commands import main
from stepdistill_jax.commands.gin_config import load_config
from stepdistill_jax.commands.shipped import find_config
from stepdistill_jax.commands.train import in_words

MADE = {
    "step": 400,
    "loss": 0.5,
    "best_step": 300,
    "eval/validation/label_accuracy": 0.452,
    "majority_baseline": 0.211,
}


@pytest.fixture
def called(monkeypatch):
    """Arguments that `training.train` would have been called with; it would have made `MADE`."""
    calls = []

    def train(config, **kwargs):
        calls.append((config, kwargs))
        return MADE

    monkeypatch.setattr(stepdistill_jax.training, "train", train, raising=False)
    monkeypatch.setattr(tasks_load, "has_split", lambda task, split, **where: split == "test")
    return calls


def test_train_passes_config_folders_and_text(called, tmp_path, capsys):
    workdir, data_dir = tmp_path / "run", tmp_path / "data"
    argv = ["train", "demo_step_by_step", "--workdir", str(workdir), "--data-dir", str(data_dir)]
    assert main.main([*argv, "--set", "TRAIN_STEPS=3", "--gin.SEED=4", "--json"]) == 0
    ((config, kwargs),) = called
    expected, text = load_config("demo_step_by_step", ["TRAIN_STEPS=3", "SEED=4"])
    assert config == expected
    assert 0 <= time.monotonic() - kwargs.pop("began") < 60
    assert kwargs == {"workdir": str(workdir), "data_dir": data_dir, "config_text": text}
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == MADE


@pytest.mark.parametrize(("accuracy", "said"), [(0.2, True), (0.211, True), (0.212, False)])
def test_a_model_that_is_no_better_than_the_baseline_is_said(accuracy, said):
    made = MADE | {"eval/validation/label_accuracy": accuracy}
    line = in_words(made, load_config("demo_step_by_step", [])[0], "runs/x")
    assert line.endswith("; not above the baseline yet: a larger TRAIN_STEPS may help") == said


def test_train_ends_with_the_best_step_and_the_next_command(called, tmp_path, capsys):
    workdir, data_dir = str(tmp_path / "my run"), str(tmp_path / "data")
    argv = ["train", "demo_step_by_step", "--workdir", workdir, "--set", "TRAIN_STEPS=400"]
    assert main.main([*argv, "--data-dir", data_dir]) == 0
    made, following = capsys.readouterr().out.splitlines()
    assert made == (
        f"{workdir}: best step 300 of 400, validation accuracy 0.452"
        " (baseline that always gives the commonest label: 0.211)"
    )
    evaluation = ["evaluate", workdir, "--task", "delivery", "--split", "test"]
    word, *command = shlex.split(following)
    assert (word, command) == ("next:", ["stepdistill", *evaluation, "--data-dir", data_dir])
    parser, *_ = main.parser_of("evaluate")
    assert parser.parse_args(command[1:]).split == "test"  # can be copied as it is


def test_the_end_of_a_run_without_validation_and_test(called, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(tasks_load, "has_split", lambda *_, **__: False)
    monkeypatch.delitem(MADE, "majority_baseline")
    argv = ["train", "demo_step_by_step", "--workdir", "runs/x", "--set", "TRAIN_STEPS=300"]
    assert main.main(argv) == 0
    assert capsys.readouterr().out.splitlines() == [
        "runs/x: best step 300 of 300, the last one, since delivery has no validation split",
        "next: stepdistill export runs/x my_model",
    ]


def test_module_is_the_configs_task_module(called, tmp_path):
    argv = ["train", "demo_step_by_step", "--workdir", str(tmp_path), "--module", "pkg.tasks"]
    assert main.main(argv) == 0
    ((config, kwargs),) = called
    assert config.task_module == "pkg.tasks"
    assert "TASK_MODULE = 'pkg.tasks'" in kwargs["config_text"]


def test_gin_file_stands_for_the_config(called, tmp_path):
    argv = ["train", "--gin_file=demo_label_only", "--workdir", str(tmp_path)]
    assert main.main(argv) == 0
    assert [o.name for o in called[0][0].objectives] == ["label"]


@pytest.mark.parametrize(
    ("argv", "part"),
    [
        (["nowhere.gin"], "nowhere.gin"),
        (["demo_step_by_step", "--set", "BATCH_SIEZ=3"], "BATCH_SIZE"),
        ([], "expected a config"),
    ],
)
def test_a_bad_config_is_exit_2_and_makes_no_workdir(called, tmp_path, capsys, argv, part):
    workdir = tmp_path / "run"
    assert main.main(["train", *argv, "--workdir", str(workdir)]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert part in err
    assert err.count("\n") == 1
    assert not called
    assert not workdir.exists()


def test_a_dataset_in_the_place_of_a_config_says_what_to_type(called, tmp_path, capsys):
    (tmp_path / "helpdesk").mkdir()
    (tmp_path / "helpdesk" / "dataset.json").write_text("{}")
    argv = ["train", "helpdesk", "--workdir", str(tmp_path / "run"), "--data-dir", str(tmp_path)]
    assert main.main(argv) == 2
    err = capsys.readouterr().err
    assert "'helpdesk' is a prepared dataset, not a config: run `stepdistill train demo" in err
    assert "--set TASK=helpdesk" in err and err.count("\n") == 1


def test_train_without_seqio_is_exit_2(called, tmp_path, capsys, monkeypatch):
    from stepdistill_jax.commands import arguments

    monkeypatch.setattr(arguments.importlib.util, "find_spec", lambda name: None)
    assert main.main(["train", "demo_step_by_step", "--workdir", str(tmp_path)]) == 2
    assert "tensorflow-text" in capsys.readouterr().err
    assert not called


@pytest.mark.slow
def test_two_steps_in_a_process_of_its_own(delivery_data_dir, tmp_path):
    command = [sys.executable, "-X", "importtime", "-m", "stepdistill_jax", "train", "--json"]
    command += ["demo_step_by_step"]
    command += ["--workdir", str(tmp_path / "run"), "--data-dir", str(delivery_data_dir)]
    for setting in ("TRAIN_STEPS=2", "EVAL_EVERY=2", "CHECKPOINT_EVERY=2", "BATCH_SIZE=8"):
        command += ["--set", setting]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        env=os.environ | {"XLA_FLAGS": os.environ["XLA_FLAGS_OF_ONE_DEVICE"]},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    last = json.loads(done.stdout.splitlines()[-1])
    assert last["step"] == 2
    assert {"loss", "loss/label", "loss/rationale", "examples_per_second"} <= set(last)
    text = (tmp_path / "run" / "config.gin").read_text()
    assert "TRAIN_STEPS = 2" in text
    lines = done.stderr.splitlines()
    (said,) = (line for line in lines if line.startswith("first step after "))
    assert re.sub(r"[\d.]+", "0", said) == (
        "first step after 0 s: imports 0, data 0, state 0, compiling 0, step 0"
    )
    # seconds at each start that no step needs, whether they are installed or not
    imported = {x.rpartition("| ")[2].strip() for x in lines if x.startswith("import time:")}
    assert "jax" in imported
    heavy = ("tensorflow.", "seqio.", "torch.", "transformers.")  # parts: attempts are listed, too
    assert [name for name in imported if name.startswith(heavy)] == []


def _train(config, workdir, data_dir, *more):
    argv = ["train", str(config), "--workdir", str(workdir), "--data-dir", str(data_dir), *more]
    for setting in ("TRAIN_STEPS=2", "EVAL_EVERY=2", "CHECKPOINT_EVERY=2", "BATCH_SIZE=8"):
        argv += ["--set", setting]
    return main.main(argv)


def test_a_config_in_the_workdir_that_a_person_wrote_is_left_alone(
    delivery_data_dir, tmp_path, capsys
):
    config = tmp_path / "config.gin"
    config.write_text("# three weeks of notes\n" + find_config("demo_label_only").read_text())
    before = config.read_bytes()
    assert _train(config, tmp_path, delivery_data_dir) == 2
    err = capsys.readouterr().err
    assert f"--workdir {tmp_path}: has config.gin but no run.json, so there is no run" in err
    assert err.count("\n") == 1
    assert [p.name for p in tmp_path.iterdir()] == ["config.gin"] and config.read_bytes() == before


@pytest.mark.slow
def test_the_config_that_a_run_wrote_is_for_going_on_and_an_edited_one_is_kept(
    delivery_data_dir, tmp_path, capsys
):
    assert _train("demo_label_only", tmp_path, delivery_data_dir) == 0
    config = tmp_path / "config.gin"
    before = config.read_bytes()
    assert _train(config, tmp_path, delivery_data_dir) == 0
    assert config.read_bytes() == before
    config.write_bytes(before + b"# a note\n")
    capsys.readouterr()
    assert _train(config, tmp_path, delivery_data_dir, "--set", "LAYOUT=fsdp") == 2
    assert "config.gin: was not written by `train`" in capsys.readouterr().err
    assert config.read_bytes() == before + b"# a note\n"


@pytest.mark.parametrize("name", ["metrics.jsonl", "flagged_batches.jsonl", "spiece.model"])
def test_a_workdir_with_another_tools_files_is_refused(delivery_data_dir, tmp_path, capsys, name):
    (tmp_path / name).write_text('{"epoch": 1}\n{"epoch": 2}\n')
    assert _train("demo_label_only", tmp_path, delivery_data_dir) == 2
    assert f"has {name} but no run.json" in capsys.readouterr().err
    assert (tmp_path / name).read_text() == '{"epoch": 1}\n{"epoch": 2}\n'
