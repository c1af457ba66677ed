import json

import numpy as np
import pytest

from stepdistill_jax.commands.main import main
from stepdistill_jax.tasks.token_store import TokenExample, write_store


def run(capsys, *argv):
    code = main(["inspect", *map(str, argv)])
    out, err = capsys.readouterr()
    return code, out, err


@pytest.mark.parametrize(
    "name",
    [pytest.param("delivery", marks=pytest.mark.slow), "demo_step_by_step"],
    ids=["task", "config"],
)
def test_rows_histogram_fill_and_lengths_are_shown(capsys, delivery_data_dir, name):
    code, out, _ = run(capsys, name, "--data-dir", delivery_data_dir, "--rows", "1")
    assert code == 0
    told = " ".join(out.split())
    parts = ("predict: with", "rationale weight", "truncated at", "█", ", the cheapest")
    for part in (*parts, "A run on one device uses ROW_INPUT_LENGTH = "):
        assert part in told, out
    assert "Row 2" not in out


def test_json_is_the_last_line(capsys, delivery_data_dir):
    code, out, _ = run(capsys, "delivery", "--data-dir", delivery_data_dir, "--json")
    assert code == 0
    found = json.loads(out.splitlines()[-1])
    assert found["task"] == "delivery"
    assert found["cut"] == {
        "label": {"inputs": 0, "targets": 0},
        "rationale": {"inputs": 0, "targets": 0},
    }


def test_a_configs_lengths_can_be_set_and_its_schedules_are_shown(
    capsys, delivery_data_dir, tmp_path
):
    config = tmp_path / "mine.gin"
    config.write_text(
        'include "demo_step_by_step.gin"\n'
        "step_by_step.rationale_weight = @linear_schedule()\n"
        "linear_schedule.init_value = 3.0\n"
        "linear_schedule.end_value = 0.0\n"
        "linear_schedule.transition_steps = 1000\n"
    )
    argv = (config, "--data-dir", delivery_data_dir, "--json")
    code, out, _ = run(capsys, *argv, "--set", "INPUT_LENGTH=20", "--set", "TARGET_LENGTH=12")
    assert code == 0
    found = json.loads(out.splitlines()[-1])
    assert (found["input_length"], found["target_length"]) == (20, 12)
    assert found["cut"]["rationale"] == {"inputs": 0, "targets": 1500}
    assert found["cut"]["label"] == {"inputs": 0, "targets": 0}
    weight = "linear 3 to 0 over steps 0 to 1000"
    assert found["objectives"]["rationale"]["weight"] == weight
    assert f"rationale weight {weight}, 1500 rows" in out


def test_targets_that_read_one_encoding_are_shown_so(capsys, delivery_data_dir):
    argv = ("demo_shared_encoder", "--data-dir", delivery_data_dir, "--rows", "1")
    argv += ("--set", "ROW_INPUT_LENGTH=32", "--set", "ROW_TARGET_LENGTH=48")
    code, out, _ = run(capsys, *argv)
    assert code == 0
    told = " ".join(out.split())
    assert "label 15 -> 2: predict: with" in told
    assert "rationale 0 -> 18: (the same encoding) -> explain: " in told
    code, out, _ = run(capsys, *argv, "--json")
    assert code == 0
    found = json.loads(out.splitlines()[-1])
    # 32 examples, two a row: 30 of 32 input cells, 2 x (2 + 2 + 16) of 48 target cells
    assert found["rows_per_step"] == 16
    assert found["fill"]["inputs"] == pytest.approx(30 / 32, abs=1e-3)
    assert found["fill"]["targets"] == pytest.approx(40 / 48, abs=1e-3)
    (row,) = found["shown"]
    tokens = [(s["objective"], s["input_tokens"], s["target_tokens"]) for s in row]
    assert tokens == [("label", 15, 2), ("rationale", 0, 18)] * 2


@pytest.mark.slow
def test_verify_says_what_was_compared_and_names_a_damaged_store(
    capsys, delivery_data_dir, tmp_path
):
    (tmp_path / "delivery").symlink_to(delivery_data_dir / "delivery")
    argv = ("delivery", "--data-dir", tmp_path, "--verify")
    code, out, _ = run(capsys, *argv, "--json")
    assert code == 0
    (directory,) = (tmp_path / "token_store").glob("delivery-train-*")
    (found,) = json.loads(out.splitlines()[-1])["verified"]
    assert found["store"] == str(directory)
    sizes = [p.stat().st_size for p in directory.iterdir() if p.name != "manifest.json"]
    assert (found["files"], found["bytes"]) == (len(sizes), sum(sizes))
    assert f"Verified {directory}: {sum(sizes):,} bytes in {len(sizes)} files" in out

    # a store so large that opening it does not read all of it
    rows = [(np.full(1200, 5, np.int32), [6, 1]), ([5, 1], [7, 1])]
    write_store(
        directory, ["label", "rationale"], [TokenExample(rows)] * 1500, {"task": "delivery"}
    )
    assert run(capsys, *argv)[0] == 0
    with open(directory / "1-inputs.ids", "r+b") as f:
        f.seek(5000)
        f.write(b"\1")
    assert run(capsys, *argv[:-1])[0] == 0
    code, _, err = run(capsys, *argv)
    assert code == 2
    assert str(directory) in err and "delete this folder" in err and err.count("\n") == 1


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["delivry"], "did you mean 'delivery'"),
        (["demo_step_by_stp"], "did you mean 'demo_step_by_step'"),
        (["no/such.gin"], "no such config file"),
        (["demo_step_by_step", "--set", "DTYPE=float16"], "DTYPE: float16 overflows"),
        (["demo_step_by_step", "--set", "LAYOUT=ddp"], "LAYOUT must be one of data, fsdp"),
        (["delivery", "--split", "dev"], "no split 'dev'"),
        (["delivery", "--set", "SEED=1"], "need a config"),
        (["delivery", "--module", "no_such_tasks"], "no module 'no_such_tasks'"),
        ([], "expected the name of a config or a task"),
    ],
)
def test_bad_names_are_one_line_and_exit_2(capsys, delivery_data_dir, argv, message):
    code, _, err = run(capsys, *argv, "--data-dir", delivery_data_dir)
    assert code == 2
    assert len(err.splitlines()) == 1
    assert message in err
