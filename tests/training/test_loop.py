"""Runs of a tiny model on the built-in dataset, in processes of their own where they are hurt."""

import collections
import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from stepdistill_jax.errors import InputError
from stepdistill_jax.runtime.checkpoints.manager import resolve_step, restore_params, saved_steps
from stepdistill_jax.runtime.metrics import read_metrics
from stepdistill_jax.training import TrainConfig, train
from stepdistill_jax.training.config import OptimizerConfig
from stepdistill_jax.training.loop import empty_rows
from stepdistill_jax.training.run import assemble

SETTINGS = {
    "task": "delivery",
    "batch_size": 16,
    "input_length": 64,
    "target_length": 64,
    "train_steps": 30,
    "eval_every": 10,
    "checkpoint_every": 5,
    "learning_rate": 1e-3,
    "layout": "fsdp",
}
CHILD = """
import json, sys
from stepdistill_jax.training import TrainConfig, train
settings, workdir, data_dir = json.loads(sys.argv[1]), sys.argv[2], sys.argv[3]
train(TrainConfig(**settings), workdir=workdir, data_dir=data_dir)
"""


def start(workdir, data_dir, **changes):
    return subprocess.Popen(
        [sys.executable, "-c", CHILD, json.dumps(SETTINGS | changes), str(workdir), str(data_dir)],
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ,
    )


def wait_for_step(process, workdir, step):
    deadline = time.monotonic() + 200
    while time.monotonic() < deadline and process.poll() is None:
        path = workdir / "metrics.jsonl"
        if path.exists() and f'{{"step": {step},' in path.read_text():
            return
        time.sleep(0.01)
    pytest.fail(f"step {step} was not reached: {process.stderr.read()}")


def params_of(workdir, step, data_dir):
    abstract = assemble(TrainConfig(**SETTINGS), workdir, data_dir).abstract.params
    return jax.tree.map(np.asarray, restore_params(workdir, step, abstract))


def assert_bitwise(one, other):
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, delivery_data_dir, built_once):
    """(workdir, summary) of a run that nobody stops."""

    def run(folder):
        config = TrainConfig(**SETTINGS)
        workdir = folder / "run"
        summary = train(config, workdir=workdir, data_dir=delivery_data_dir, config_text="# text")
        (folder / "summary.json").write_text(json.dumps(summary))

    built = built_once("undisturbed", run)
    workdir = tmp_path_factory.mktemp("undisturbed") / "run"
    shutil.copytree(built / "run", workdir)
    return workdir, json.loads((built / "summary.json").read_text())


def timeless(lines):
    return [{k: v for k, v in x.items() if not k.startswith("timing/")} for x in lines]


def test_a_run_leaves_what_its_contract_says(undisturbed):
    workdir, summary = undisturbed
    assert summary["step"] == 30
    assert {"loss", "loss/label", "loss/rationale", "examples_per_second"} <= summary.keys()
    lines = read_metrics(workdir)
    steps = [x for x in lines if "loss" in x]
    assert [x["step"] for x in steps] == list(range(1, 31))
    assert {
        "loss",
        "loss/label",
        "loss/rationale",
        "target_tokens/label",
        "target_tokens/rationale",
        "accuracy/label",
        "grad_norm",
        "learning_rate",
        "non_padding_fraction/inputs",
        "non_padding_fraction/targets",
        "timing/examples_per_second",
        "timing/target_tokens_per_second",
        "timing/tflops_per_second",
        "timing/seconds_waiting_for_data",
    } <= steps[0].keys()
    assert [x["step"] for x in lines if "eval/validation/label_accuracy" in x] == [10, 20, 30]
    assert steps[-1]["loss/rationale"] < steps[0]["loss/rationale"] / 2
    assert steps[-1]["loss/label"] < steps[0]["loss/label"] / 2
    run = json.loads((workdir / "run.json").read_text())
    assert run["weights"] == {"label": 0.5, "rationale": 0.5}
    assert run["process_count"] == 1 and run["device_count"] == 8 and run["fingerprint"]["train"]
    assert (workdir / "config.gin").read_text() == "# text"
    for name in ("config.json", "stepdistill.json", "spiece.model"):
        assert (workdir / name).is_file()
    assert list(workdir.glob("events.out.tfevents.*"))


def test_the_loss_is_the_weighted_sum_of_its_objectives(undisturbed):
    steps = [line for line in read_metrics(undisturbed[0]) if "loss" in line]
    assert len(steps) == 30
    for line in steps:
        expected = 0.5 * line["loss/label"] + 0.5 * line["loss/rationale"]
        np.testing.assert_allclose(line["loss"], expected, rtol=1e-5)


def test_a_finished_run_started_again_changes_nothing(undisturbed, delivery_data_dir):
    workdir, summary = undisturbed
    before = (workdir / "metrics.jsonl").read_text()
    again = train(TrainConfig(**SETTINGS), workdir=workdir, data_dir=delivery_data_dir)
    assert (workdir / "metrics.jsonl").read_text() == before
    assert again | {"examples_per_second": 0} == summary | {"examples_per_second": 0}


@pytest.mark.slow
def test_a_run_killed_in_the_middle_ends_bitwise_as_the_undisturbed_one(
    undisturbed, tmp_path, delivery_data_dir
):
    """Dropout is on and the epoch is not over: state, masks and data position must all come back."""
    process = start(tmp_path, delivery_data_dir)
    wait_for_step(process, tmp_path, 17)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    newest = max(saved_steps(tmp_path))
    assert newest in (10, 15)  # 15 unless the kill met its save
    (tmp_path / "checkpoints" / "16.orbax-checkpoint-tmp").mkdir()  # a save cut short
    again = start(tmp_path, delivery_data_dir)
    _, errors = again.communicate(timeout=250)
    assert again.returncode == 0, errors
    assert int(errors.split("from step ")[1].split()[0]) == newest, errors
    workdir, _ = undisturbed
    assert_bitwise(
        params_of(tmp_path, 30, delivery_data_dir), params_of(workdir, 30, delivery_data_dir)
    )
    assert timeless(read_metrics(tmp_path)) == timeless(read_metrics(workdir))
    assert saved_steps(tmp_path) == saved_steps(workdir)


@pytest.mark.parametrize(
    "changes,named",
    [
        ({"learning_rate": 2e-3}, "`learning_rate` was 0.001, is 0.002"),
        ({"seed": 1}, "`seed` was 0, is 1"),
        ({"objectives": "label_only"}, "`objectives` was"),
        ({"optimizer": OptimizerConfig(warmup_steps=3)}, "`optimizer` was"),
    ],
    ids=["learning_rate", "seed", "objectives", "optimizer"],
)
def test_another_config_is_refused_and_the_difference_named(
    undisturbed, delivery_data_dir, changes, named
):
    workdir, _ = undisturbed
    before = {p: p.read_bytes() for p in workdir.iterdir() if p.is_file()}
    with pytest.raises(InputError, match=named):
        train(TrainConfig(**SETTINGS | changes), workdir=workdir, data_dir=delivery_data_dir)
    assert {p: p.read_bytes() for p in workdir.iterdir() if p.is_file()} == before


LONGER = {"train_steps": 10, "eval_every": 4, "checkpoint_every": 3}


@pytest.mark.slow
def test_a_finished_run_trained_further_is_the_longer_run(tmp_path, delivery_data_dir):
    """Bitwise; the validation of the old last step stays, and no step is done twice."""
    optimizer = OptimizerConfig(schedule="rsqrt", warmup_steps=3)
    config = TrainConfig(**SETTINGS | LONGER, optimizer=optimizer)
    short = dataclasses.replace(config, train_steps=6)
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    train(config, workdir=whole, data_dir=delivery_data_dir)
    given = {"workdir": parts, "data_dir": delivery_data_dir}
    assert train(short, **given)["step"] == max(saved_steps(parts)) == 6
    assert train(config, **given)["step"] == 10

    def steps(workdir):
        return [x for x in timeless(read_metrics(workdir)) if "loss" in x]

    def validations(workdir):
        found = [x for x in timeless(read_metrics(workdir)) if "eval/validation/loss" in x]
        return {x["step"]: x for x in found}

    assert [x["step"] for x in steps(parts)] == list(range(1, 11))
    assert steps(parts) == steps(whole)
    assert validations(parts).keys() == {4, 6, 8, 10}
    others = {n: x for n, x in validations(parts).items() if n != 6}
    assert validations(whole) == others
    assert_bitwise(params_of(parts, 10, delivery_data_dir), params_of(whole, 10, delivery_data_dir))
    assert 10 in saved_steps(parts)
    run = json.loads((parts / "run.json").read_text())
    assert run["config"]["train_steps"] == 10
    assert [life["train_steps"] for life in run["lives"]] == [6, 10]
    info = json.loads((parts / "stepdistill.json").read_text())
    assert info["provenance"]["config"]["train_steps"] == 10
    assert len(info["provenance"]["dataset"]) == 64
    with pytest.raises(InputError, match="`train_steps` was 10, is 6"):  # it has gone on
        train(short, **given)


def test_a_run_whose_rate_ends_with_it_cannot_be_trained_further(undisturbed, delivery_data_dir):
    """One line says why, and what to do instead."""
    workdir, _ = undisturbed
    with pytest.raises(InputError) as caught:
        train(
            TrainConfig(**SETTINGS | {"train_steps": 40}),
            workdir=workdir,
            data_dir=delivery_data_dir,
        )
    message = str(caught.value)
    assert "`train_steps` was 30, is 40" in message
    assert "the linear learning rate of every step depends on it" in message
    assert "new `workdir` with this one as `init_from`" in message


def test_the_layout_may_change_on_a_resume_and_a_finished_run_says_so(
    undisturbed, delivery_data_dir, capsys
):
    workdir, _ = undisturbed
    config = TrainConfig(**SETTINGS | {"layout": "data", "checkpoint_every": 7})
    assert train(config, workdir=workdir, data_dir=delivery_data_dir)["step"] == 30
    said = capsys.readouterr().err
    assert f"{workdir} is finished: step 30 of 30 is saved\n" in said
    assert "resumed" not in said


def test_the_best_step_is_the_best_validation(undisturbed, delivery_data_dir):
    workdir, summary = undisturbed
    validations = [x for x in read_metrics(workdir) if "eval/validation/loss" in x]
    best = max(
        validations,
        key=lambda x: (x["eval/validation/label_accuracy"], -x["eval/validation/loss/label"]),
    )
    assert summary["best_step"] == best["step"] == resolve_step(workdir, "best")
    rows = (delivery_data_dir / "delivery" / "validation.jsonl").read_text().splitlines()
    ((_, commonest),) = collections.Counter(json.loads(x)["label"] for x in rows).most_common(1)
    assert summary["majority_baseline"] == pytest.approx(commonest / len(rows))


@pytest.mark.slow
def test_a_loss_that_is_not_finite_stops_with_its_step(tmp_path, delivery_data_dir):
    config = TrainConfig(**SETTINGS | {"learning_rate": 1e30})
    with pytest.raises(FloatingPointError, match=r"steps 2 to 6: the loss .*no checkpoint"):
        train(config, workdir=tmp_path, data_dir=delivery_data_dir)
    assert not [s for s in saved_steps(tmp_path) if s > 5]


def test_a_layout_that_leaves_most_rows_empty_is_told(tmp_path, delivery_data_dir):
    """Rows are a multiple of 8 batch shards x 2 microbatches; two examples have four rows to pack."""
    few = TrainConfig(**SETTINGS | {"batch_size": 2, "num_microbatches": 2})
    run = assemble(few, tmp_path, delivery_data_dir)
    said = empty_rows(run)
    filled = sum(int(row.any()) for row in run.batches(1)[0]["encoder_segment_ids"])
    assert 2 <= filled <= 4
    assert (
        f"{1 - filled / 16:.0%} of a batch's rows are empty: 2 examples fill {filled} rows" in said
    )
    assert "a multiple of 16 (8 batch shards x 2 microbatches)" in said
    assert "larger BATCH_SIZE" in said and "LAYOUT with fewer batch shards" in said
    one_row = dataclasses.replace(few, row_input_length=64, row_target_length=64)
    said = empty_rows(assemble(one_row, tmp_path, delivery_data_dir))
    assert "94% of a batch's rows are empty: 2 examples fill 1 rows" in said


def test_a_layout_that_fills_its_rows_is_not_warned_of(tmp_path, delivery_data_dir):
    many = TrainConfig(**SETTINGS | {"batch_size": 64})
    assert empty_rows(assemble(many, tmp_path, delivery_data_dir)) is None


def test_validation_takes_every_example_once_in_order(tmp_path, delivery_data_dir):
    """Whatever the training split's share, and without the rows of its microbatches."""
    config = TrainConfig(**SETTINGS | {"data_fraction": 0.1, "num_microbatches": 2})
    run = assemble(config, tmp_path, delivery_data_dir)
    validation, count = run.validator.batches, len(run.validator.data.stores[0].weights)
    drawn = [validation.examples(step).indices for step in range(validation.num_steps)]
    assert np.concatenate(drawn).tolist() == list(range(count))
    assert validation.row_multiple * 2 == run.batches.row_multiple
    assert run.batches.num_examples < len(run.data.stores[0].weights) / 9


def test_a_config_knows_its_ranges():
    for changes, named in (
        ({"batch_size": 0}, "`batch_size`"),
        ({"train_steps": 1.5}, "`train_steps`"),
        ({"data_fraction": 0}, "`data_fraction`"),
        ({"learning_rate": "high"}, "`learning_rate`"),
        ({"seed": -1}, "`seed`"),
        ({"pack": "yes"}, "`pack`"),
        ({"objectives": "step_by_stp"}, "did you mean 'step_by_step'"),
    ):
        with pytest.raises(InputError, match=named):
            dataclasses.replace(TrainConfig(**SETTINGS), **changes)
