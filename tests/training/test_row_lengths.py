"""Packed rows of a run: chosen once, kept on a resume, longer where a held-out example needs it."""

import dataclasses
import json
import re
import shutil

import pytest

from stepdistill_jax.data.prepare import prepare
from stepdistill_jax.errors import InputError
from stepdistill_jax.models.sharding import Layout
from stepdistill_jax.runtime.metrics import read_metrics
from stepdistill_jax.training import TrainConfig, inspect, train
from stepdistill_jax.training.config import OptimizerConfig
from stepdistill_jax.training.provenance import claim_workdir, describe
from stepdistill_jax.training.run import assemble

# batch shards: two of four devices each, and eight of one
TWO, EIGHT = Layout(fsdp=2, tensor=4), "fsdp"
CONFIG = TrainConfig(
    task="delivery",
    batch_size=4,
    input_length=64,
    target_length=48,
    train_steps=1,
    optimizer=OptimizerConfig(schedule="constant"),
    layout=TWO,
)


def rows_of(config, workdir, data_dir):
    return assemble(config, workdir, data_dir).batches.row_lengths


def rows_said(capfd):
    return re.findall(r"packed rows of (\d+) input and (\d+) target", capfd.readouterr().err)


@pytest.fixture(scope="module")
def first_step(tmp_path_factory, delivery_data_dir):
    workdir = tmp_path_factory.mktemp("first_step") / "run"
    train(CONFIG, workdir=workdir, data_dir=delivery_data_dir)
    return workdir


@pytest.fixture
def begun(tmp_path, delivery_data_dir):
    """A run that was begun, and stopped before its first step."""
    run = assemble(CONFIG, tmp_path / "run", delivery_data_dir)
    claim_workdir(run, describe(run), None)
    return tmp_path / "run"


@pytest.fixture
def workdir(tmp_path, first_step):
    """A copy of the run after its first step."""
    shutil.copytree(first_step, tmp_path / "run")
    return tmp_path / "run"


def further(layout):
    return dataclasses.replace(CONFIG, train_steps=2, layout=layout)


@pytest.mark.slow
def test_a_resume_on_another_layout_has_the_rows_of_the_run(
    workdir, tmp_path, delivery_data_dir, capfd
):
    kept = json.loads((workdir / "run.json").read_text())["row_lengths"]
    assert all(n >= 15 for n in kept) and kept != [64, 48]
    # a new run on eight shards would have others
    assert rows_of(further(EIGHT), tmp_path / "new", delivery_data_dir) != tuple(kept)
    capfd.readouterr()
    train(further(EIGHT), workdir=workdir, data_dir=delivery_data_dir)
    assert rows_said(capfd) == [tuple(map(str, kept))]
    assert json.loads((workdir / "run.json").read_text())["row_lengths"] == kept
    assert [x["step"] for x in read_metrics(workdir) if "loss" in x] == [1, 2]


def test_a_run_of_before_resumes_in_rows_as_long_as_its_texts_may_be(begun, delivery_data_dir):
    """As a version wrote it that had no such fields."""
    run = json.loads((begun / "run.json").read_text())
    assert rows_of(further(EIGHT), begun, delivery_data_dir) == tuple(run["row_lengths"])
    del run["row_lengths"], run["config"]["row_input_length"], run["config"]["row_target_length"]
    (begun / "run.json").write_text(json.dumps(run))
    resumed = assemble(further(EIGHT), begun, delivery_data_dir)
    assert resumed.batches.row_lengths == (64, 48)
    claim_workdir(resumed, describe(resumed), None)
    assert rows_of(further(TWO), begun, delivery_data_dir) == (64, 48)


def test_other_row_lengths_are_another_run(begun, delivery_data_dir):
    changed = dataclasses.replace(further(TWO), row_input_length=64)
    with pytest.raises(InputError, match="`row_input_length` was 'auto', is 64"):
        train(changed, workdir=begun, data_dir=delivery_data_dir)


@pytest.mark.slow
def test_rows_that_are_too_short_for_other_settings_are_said_to_be_of_another_run(
    tmp_path, delivery_data_dir
):
    """The kept rows hold the cut texts of the run, and no text of the other one."""
    cut = dataclasses.replace(CONFIG, input_length=8, target_length=8)
    train(cut, workdir=tmp_path / "run", data_dir=delivery_data_dir)
    whole = dataclasses.replace(cut, input_length=64, target_length=48, train_steps=2)
    with pytest.raises(InputError, match=r"other settings .*`input_length` was 8, is 64"):
        train(whole, workdir=tmp_path / "run", data_dir=delivery_data_dir)


def test_inspect_shows_the_rows_of_a_run_whatever_the_split(tmp_path, delivery_data_dir):
    config = dataclasses.replace(CONFIG, batch_size=8, num_microbatches=8)
    # eight rows at a time, as one device has them with twice the microbatches
    run = assemble(dataclasses.replace(config, num_microbatches=4), tmp_path, delivery_data_dir)
    for split in ("train", "validation"):
        found = inspect(config, split=split, data_dir=delivery_data_dir)
        shown = (found["chosen"]["row_input_length"], found["chosen"]["row_target_length"])
        assert shown == run.batches.row_lengths


def test_rows_of_ones_own_choice_are_had(tmp_path, delivery_data_dir):
    chosen = dataclasses.replace(CONFIG, row_input_length=100, row_target_length=70)
    run = assemble(chosen, tmp_path, delivery_data_dir)
    (group,) = run.batches(0)
    assert group["encoder_input_tokens"].shape[1] == 100
    assert group["decoder_target_tokens"].shape[1] == 70
    one = dataclasses.replace(chosen, row_target_length="auto")
    inputs, targets = rows_of(one, tmp_path, delivery_data_dir)
    assert inputs == 100 and targets != 70
    short = dataclasses.replace(chosen, row_input_length=5)
    with pytest.raises(InputError, match=r"`row_input_length=5`: train of delivery has an example"):
        assemble(short, tmp_path, delivery_data_dir)


def test_validation_has_longer_rows_where_a_held_out_example_needs_them(tmp_path):
    """Bytes, so that lengths are known: inputs of train have 12 ids, one of validation has 43."""
    long = "predict: " + "x" * 33  # and the end of sequence
    rows = {
        "train": [{"input": f"{i:02}", "label": "ab"} for i in range(40)],
        "validation": [{"input": "07", "label": "ab"}, {"input": "x" * 33, "label": "ab"}],
    }
    for split, examples in rows.items():
        (tmp_path / f"{split}.jsonl").write_text("".join(json.dumps(e) + "\n" for e in examples))
    prepare("jsonl", source=tmp_path, new_name="uneven", data_dir=tmp_path)
    config = dataclasses.replace(
        CONFIG, task="uneven", objectives="label_only", model_family="byt5", input_length=100
    )
    run = assemble(config, tmp_path / "run", tmp_path)
    inputs, targets = run.batches.row_lengths
    assert len(long) + 1 == 43 > inputs >= 12
    assert run.validator.batches.row_lengths == (48, targets)
    (group,) = run.validator.batches(0)
    assert (group["encoder_segment_ids"] > 0).sum() == 12 + 43
    assert not any(run.validator.batches.cut_counts()["label"].values())
