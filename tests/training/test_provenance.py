import copy
import json
import re

import optax
import pytest

from stepdistill_jax.commands.main import main
from stepdistill_jax.errors import InputError
from stepdistill_jax.training import (
    LearningRate,
    OptimizerConfig,
    OptimizerFunction,
    TrainConfig,
    train,
)
from stepdistill_jax.training.provenance import claim_workdir, describe, differences
from stepdistill_jax.training.run import assemble
from stepdistill_jax.training.workdir import check_workdir

SETTINGS = {"task": "delivery", "input_length": 64, "target_length": 64, "train_steps": 2}


def plain(config):
    return json.loads(json.dumps(config.to_json()))


@pytest.fixture(scope="module")
def described(tmp_path_factory, delivery_data_dir):
    workdir = tmp_path_factory.mktemp("run") / "w"
    return describe(assemble(TrainConfig(**SETTINGS), workdir, delivery_data_dir))


def test_a_run_equals_itself_whatever_runs_it(described):
    other = copy.deepcopy(described) | {"device": "another", "commit": None, "process_count": 4}
    other["config"] |= {"layout": "fsdp", "profile_steps": [1, 2], "watchdog_medians": 0}
    assert differences(described, other) == []


@pytest.mark.parametrize(
    "key,name,value,said",
    [
        ("config", "train_steps", 3, "`train_steps` was 2, is 3"),
        ("config", "train_steps", 1, "`train_steps` was 2, is 1"),
        ("config", "dtype", "bfloat16", "`dtype` was 'float32', is 'bfloat16'"),
        ("fingerprint", "train", 8 * "0123abcd", "is 0123abcd0123"),
        ("fingerprint", "validation", "abc", "the validation data: fingerprint was "),
        ("model", "emb_dim", 32, "model.emb_dim was 64, is 32"),
    ],
)
def test_a_difference_that_matters_is_named(described, key, name, value, said):
    other = copy.deepcopy(described)
    other[key][name] = value
    (found,) = differences(described, other)
    assert said in found and not re.search(r"[0-9a-f]{13}", found)


def test_data_that_another_vocabulary_has_tokenised_names_the_initial_weights(described):
    other = copy.deepcopy(described)
    other["config"]["init_from"] = "runs/first"
    assert differences(described, other) == []
    other["fingerprint"]["train"] = "abc"
    first, second = differences(described, other)
    assert first == "`init_from` was None, is 'runs/first'" and "the train data" in second


FURTHER = {
    "constant": ({"schedule": "constant"}, True),
    "rsqrt": ({"schedule": "rsqrt", "warmup_steps": 1}, True),
    "linear": ({}, False),
    "cosine": ({"schedule": "cosine"}, False),
    "a cosine of the run": ({"schedule": LearningRate("cosine")}, False),
    "a cosine of 9 steps": ({"schedule": LearningRate("cosine", train_steps=9)}, True),
}


@pytest.mark.parametrize(("optimizer", "allowed"), FURTHER.values(), ids=FURTHER)
@pytest.mark.parametrize("function", [False, True], ids=["ours", "function"])
def test_steps_are_added_where_no_rate_depends_on_their_number(
    described, optimizer, allowed, function
):
    given = OptimizerConfig(**optimizer)
    if function:
        given = OptimizerFunction(optax.lion, {"learning_rate": given.rate})
    fields = SETTINGS | {"optimizer": given}
    short, long, shorter = (
        {**described, "config": plain(TrainConfig(**fields | {"train_steps": steps}))}
        for steps in (10, 11, 9)
    )
    assert (differences(short, long) == []) is allowed
    assert differences(short, short) == []
    assert differences(short, shorter) == ["`train_steps` was 10, is 9"]


def test_another_function_or_argument_is_another_run(described):
    def of(function, **arguments):
        optimizer = OptimizerFunction(function, {"learning_rate": 0.1, **arguments})
        return {**described, "config": plain(TrainConfig(**SETTINGS, optimizer=optimizer))}

    assert differences(of(optax.lion, b1=0.9), of(optax.lion)) == []  # its default
    for other in (of(optax.lion, b1=0.8), of(optax.sgd), described):
        (found,) = differences(of(optax.lion), other)
        assert found.startswith("`optimizer` was {'function': 'optax.lion'")


def test_a_setting_that_an_older_version_lacked_counts_as_its_default(described):
    older = copy.deepcopy(described)
    del older["config"]["remat_policy"], older["config"]["optimizer"]["eps_before_correction"]
    assert differences(older, described) == []
    older["config"]["optimizer"]["eps"] = 1.0
    (said,) = differences(older, described)
    assert said.startswith("`optimizer` was {") and "'eps': 1.0" in said


def test_a_workdir_that_says_none_for_the_elementwise_policy_is_resumed(
    tmp_path, delivery_data_dir
):
    run = assemble(TrainConfig(**SETTINGS), tmp_path / "w", delivery_data_dir)
    described = describe(run)
    assert described["config"]["remat_policy"] == "elementwise"
    claim_workdir(run, described, None)
    older = json.loads((run.workdir / "run.json").read_text())
    older["config"]["remat_policy"] = older["model"]["remat_policy"] = "none"
    (run.workdir / "run.json").write_text(json.dumps(older))
    claim_workdir(run, described, None)
    now = described | {"config": described["config"] | {"remat_policy": "full"}}
    with pytest.raises(InputError, match="`remat_policy` was 'elementwise', is 'full'"):
        claim_workdir(run, now, None)


def test_git_is_not_needed(described, tmp_path, delivery_data_dir, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    run = assemble(TrainConfig(**SETTINGS), tmp_path / "w", delivery_data_dir)
    assert describe(run)["commit"] is None


@pytest.mark.parametrize("name", ["checkpoints", "config.json", "model.safetensors"])
def test_a_folder_of_something_else_is_left_alone(tmp_path, name):
    (tmp_path / name).mkdir()
    with pytest.raises(InputError, match=name):
        check_workdir(tmp_path)


def test_a_workdir_that_cannot_be_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    for workdir in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(InputError, match=r"cannot be written .* is not a folder"):
            check_workdir(workdir)


CONFIG = TrainConfig(**SETTINGS).to_json()
DAMAGED = {
    "a list": [],
    "null": None,
    "config is null": {"config": None, "examples": 1, "parameters": 1},
    "task is null": {"config": CONFIG | {"task": None}, "examples": 1, "parameters": 1},
    "a null in a list": {"config": CONFIG | {"objectives": [None]}, "examples": 1, "parameters": 1},
    "no examples": {"config": CONFIG, "examples": None, "parameters": 1},
    "model is null": {"config": CONFIG, "examples": 1, "parameters": 1, "model": None},
    "row lengths are texts": {
        **{"config": CONFIG, "examples": 1, "parameters": 1},
        "row_lengths": ["64", "64"],
    },
    "lives are null": {"config": CONFIG, "examples": 1, "parameters": 1, "lives": None},
}


@pytest.mark.parametrize("content", DAMAGED.values(), ids=DAMAGED)
@pytest.mark.parametrize("command", ["train", "sweep", "report"])
def test_a_damaged_run_json_is_one_line_and_left_as_it_is(
    tmp_path, delivery_data_dir, capfd, command, content
):
    workdir = tmp_path / "label_only" / "1.0" / "0"
    workdir.mkdir(parents=True)
    path = workdir / "run.json"
    path.write_text(json.dumps(content))
    argv = {
        "train": ["train", "demo_label_only", "--workdir", workdir],
        "sweep": [
            *("sweep", "demo_label_only", "--workdir", tmp_path, "--seeds", "0"),
            *("--arms", "label_only", "--fractions", "1.0", "--evaluate", "none"),
        ],
        "report": ["report", workdir, "--output", tmp_path / "out"],
    }[command]
    assert main([*map(str, argv), "--data-dir", str(delivery_data_dir)]) == 2
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith(f"stepdistill: error: {path}: is not the run.json of a run (")
    assert path.read_text() == json.dumps(content)
    assert [p.name for p in workdir.iterdir()] == ["run.json"]


@pytest.mark.slow
def test_each_life_is_kept_and_a_moved_init_from_is_no_difference(tmp_path, delivery_data_dir):
    from stepdistill_jax.inference import export

    start = TrainConfig(**SETTINGS)
    train(start, workdir=tmp_path / "first", data_dir=delivery_data_dir)
    export(tmp_path / "first", tmp_path / "model")
    config = TrainConfig(**SETTINGS, init_from=str(tmp_path / "model"))
    train(config, workdir=tmp_path / "second", data_dir=delivery_data_dir)
    (tmp_path / "model").rename(tmp_path / "moved")
    train(config, workdir=tmp_path / "second", data_dir=delivery_data_dir)
    moved = TrainConfig(**SETTINGS, init_from=str(tmp_path / "moved"), layout="fsdp")
    train(moved, workdir=tmp_path / "second", data_dir=delivery_data_dir)
    lives = json.loads((tmp_path / "second" / "run.json").read_text())["lives"]
    assert [life["mesh"]["fsdp"] for life in lives] == [1, 1, 8]
    with open(tmp_path / "moved" / "model.safetensors", "ab") as f:
        f.write(b"x")
    with pytest.raises(InputError, match="the weights of `init_from`: fingerprint was"):
        train(moved, workdir=tmp_path / "second", data_dir=delivery_data_dir)
