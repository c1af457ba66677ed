"""Decoder prefixes of objectives: what is refused, and how they come through stepdistill.json."""

import dataclasses
import json
import pathlib
import re

import pytest

from stepdistill_jax.commands.gin_config import load_config
from stepdistill_jax.errors import InputError
from stepdistill_jax.formats.directory import TASK_INFO, TaskInfo, read_task_info, write_model_files
from stepdistill_jax.models.config import t5_config
from stepdistill_jax.objectives import (
    ARMS,
    Objective,
    resolve,
    share_encoding,
    shared_encoder,
    step_by_step,
)
from stepdistill_jax.text.vocabulary import ByteVocabulary
from stepdistill_jax.training.config import TrainConfig
from stepdistill_jax.training.provenance import differences


@pytest.mark.parametrize(
    ("prefix", "message"),
    [
        (7, "a text is wanted, got 7"),
        (" ", "blank"),
        ("w" * 201, "at most 200 characters"),
        ("why {input}: ", "no {fields}"),
    ],
)
def test_a_bad_prefix_is_refused(prefix, message):
    with pytest.raises(InputError, match="Objective why: decoder_prefix: ") as caught:
        Objective("why", "{input}", "{rationale}", decoder_prefix=prefix)
    assert message in str(caught.value)


def test_the_objective_that_is_served_has_none():
    label, rationale = shared_encoder()
    assert resolve((label, rationale)) == ARMS["shared_encoder"]()
    with pytest.raises(InputError, match=r"Objective rationale: the first .* 'explain: '"):
        resolve((rationale, label))


def test_the_shared_encoder_asks_for_the_label_as_step_by_step_does():
    assert shared_encoder(1.0, 3.0)[0] == step_by_step(1.0, 3.0)[0]
    fields = {"input": "2 + 2", "label": "4", "rationale": "two and two"}
    inputs = [o.render(fields)[0] for o in shared_encoder()]
    assert inputs == ["predict: 2 + 2"] * 2


@pytest.fixture
def directory(tmp_path):
    info = TaskInfo("sums", shared_encoder(), 40, 24, 8)
    config = t5_config("t5_v1_1", "tiny", vocab_size=259)
    write_model_files(tmp_path, config, ByteVocabulary(), info)
    assert read_task_info(tmp_path) == info
    return tmp_path


def rewrite(directory, change):
    raw = json.loads((directory / TASK_INFO).read_text())
    change(raw["objectives"])
    (directory / TASK_INFO).write_text(json.dumps(raw))


def test_a_directory_of_an_older_version_has_no_prefixes(directory):
    def forget(objectives):
        for o in objectives:
            del o["decoder_prefix"]

    rewrite(directory, forget)
    expected = tuple(dataclasses.replace(o, decoder_prefix="") for o in shared_encoder())
    assert read_task_info(directory).objectives == expected


def test_a_directory_whose_label_has_a_prefix_is_refused(directory):
    rewrite(directory, lambda objectives: objectives.reverse())
    with pytest.raises(
        InputError, match=r"stepdistill.json: objectives: Objective rationale: the f"
    ):
        read_task_info(directory)


def test_a_run_of_an_older_version_goes_on():
    now = json.loads(json.dumps(TrainConfig(task="sums").to_json()))
    described = {"config": now, "fingerprint": {}, "model": {}}
    before = json.loads(json.dumps(described))
    for o in before["config"]["objectives"]:
        del o["decoder_prefix"]
    assert differences(before, described) == []
    now["objectives"][1]["decoder_prefix"] = "explain: "
    assert [line.split()[0] for line in differences(before, described)] == ["OBJECTIVES"]


def test_the_objectives_of_the_page_share_an_encoding(tmp_path):
    page = pathlib.Path(__file__).parents[1] / "docs" / "shared_encoder.md"
    (block,) = re.findall(r"```gin\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)
    parts = ("train.gin", "models/t5_v1_1.gin", "optimizers/adamw.gin")
    text = "".join(f'include "{part}"\n' for part in parts)
    (tmp_path / "own.gin").write_text(f'{text}TASK = "mine"\nTRAIN_STEPS = 1\n{block}')
    config, _ = load_config(str(tmp_path / "own.gin"))
    assert [o.name for o in config.objectives] == ["label", "rationale", "teacher"]
    assert [o.decoder_prefix for o in config.objectives] == ["", "explain: ", "the teacher says: "]
    assert share_encoding(config.objectives)
