"""A run with adapters: they alone are trained, and what comes out is a plain model."""

import dataclasses
import json
import shutil

import jax
import numpy as np
import optax
import pytest
import safetensors.numpy
from flax.traverse_util import flatten_dict

from stepdistill_jax.commands.gin_config import load_config
from stepdistill_jax.errors import InputError
from stepdistill_jax.formats.hf import to_hf
from stepdistill_jax.inference import export, load_model, predict
from stepdistill_jax.models.config import LoraConfig
from stepdistill_jax.models.lora import base_of, split
from stepdistill_jax.models.sharding import Layout
from stepdistill_jax.runtime.checkpoints.manager import restore_params, saved_steps
from stepdistill_jax.runtime.metrics import read_metrics
from stepdistill_jax.training import TrainConfig, train
from stepdistill_jax.training.run import assemble

LORA = LoraConfig(query=4, key=4, value=4, out=4, wi=4, wo=4, alpha=8.0)
SETTINGS = {
    "task": "delivery",
    "batch_size": 16,
    "input_length": 64,
    "target_length": 64,
    "train_steps": 20,
    "eval_every": 10,
    "checkpoint_every": 10,
    "learning_rate": 2e-2,
    "layout": "fsdp_tensor",
    "lora": LORA,
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory, delivery_data_dir):
    """Workdir of a finished run."""
    workdir = tmp_path_factory.mktemp("lora")
    train(TrainConfig(**SETTINGS), workdir=workdir, data_dir=delivery_data_dir)
    return workdir


def run_of(workdir, data_dir, **changes):
    return assemble(TrainConfig(**SETTINGS | changes), workdir, data_dir)


def params_at(workdir, step, run):
    return jax.tree.map(np.asarray, restore_params(workdir, step, run.abstract.params))


def assert_bitwise(one, other):
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.slow
def test_the_adapters_alone_move_and_both_losses_fall(trained, delivery_data_dir):
    run = run_of(trained, delivery_data_dir)
    before, after = run.initial_state().params, params_at(trained, 20, run)
    assert_bitwise(base_of(before), base_of(after))
    for path, x in flatten_dict(split(before)[0]).items():
        assert np.abs(x - flatten_dict(after)[path]).max() > 1e-4, path
    steps = [line for line in read_metrics(trained) if "loss" in line]
    for name in ("loss/label", "loss/rationale"):
        assert steps[-1][name] < 0.75 * steps[0][name]


def test_the_optimizer_holds_nothing_of_the_base(delivery_data_dir, tmp_path):
    run = run_of(tmp_path, delivery_data_dir)
    adapters = flatten_dict(split(run.abstract.params)[0])
    moments = run.abstract.opt_state[1][0]  # after the clip: AdamW's moments
    for moment in (moments.mu, moments.nu):
        placed = flatten_dict(moment)
        assert {p: (x.shape, x.sharding) for p, x in placed.items()} == {
            p: (x.shape, x.sharding) for p, x in adapters.items()
        }
    numbers = sum(x.size for x in jax.tree.leaves(run.abstract.opt_state))
    assert numbers <= 2 * sum(x.size for x in adapters.values()) + 2  # two counters


@pytest.mark.slow
def test_run_json_says_how_many_parameters_are_trained(trained):
    run = json.loads((trained / "run.json").read_text())
    # 3 attentions of 3 layers' worth (2 encoder, 1 decoder x 2) and 3 gated blocks, by hand
    attention = 4 * 4 * (64 + 64)
    block = 3 * 4 * (64 + 128)
    assert run["trained_parameters"] == 4 * attention + 3 * block
    assert run["parameters"] > 10 * run["trained_parameters"]
    assert run["config"]["lora"] == dataclasses.asdict(LORA)


@pytest.mark.slow
def test_a_resume_from_a_checkpoint_is_bitwise(trained, tmp_path, delivery_data_dir):
    """As after a kill between steps 10 and 20; dropout is on."""
    shutil.copytree(trained, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "20")
    assert max(saved_steps(tmp_path / "run")) == 10
    train(TrainConfig(**SETTINGS), workdir=tmp_path / "run", data_dir=delivery_data_dir)
    run = run_of(trained, delivery_data_dir)
    assert_bitwise(params_at(tmp_path / "run", 20, run), params_at(trained, 20, run))
    assert saved_steps(tmp_path / "run") == saved_steps(trained)


@pytest.mark.slow
@pytest.mark.parametrize("lora", [None, dataclasses.replace(LORA, alpha=9.0)], ids=str)
def test_a_resume_with_other_adapters_is_refused(trained, delivery_data_dir, lora):
    with pytest.raises(InputError, match="`lora` was"):
        train(TrainConfig(**SETTINGS | {"lora": lora}), workdir=trained, data_dir=delivery_data_dir)


@pytest.fixture(scope="module")
def exported(trained, tmp_path_factory):
    folder = tmp_path_factory.mktemp("export") / "model"
    export(trained, folder, step=20)
    return folder


@pytest.mark.slow
def test_an_export_is_a_plain_model(trained, exported):
    config = json.loads((trained / "config.json").read_text())
    assert config.pop("stepdistill_lora") == dataclasses.asdict(LORA)
    assert json.loads((exported / "config.json").read_text()) == config
    model = load_model(trained, 20)
    assert model.config.lora is None
    tensors = safetensors.numpy.load_file(exported / "model.safetensors")
    assert not [name for name in tensors if "lora" in name]
    expected = to_hf(model.params, model.config)
    assert tensors.keys() == expected.keys()
    assert_bitwise(tensors, expected)


@pytest.mark.slow
def test_predict_answers_as_the_validation_and_as_the_export(
    trained, exported, tmp_path, delivery_data_dir
):
    rows = delivery_data_dir / "delivery" / "validation.jsonl"
    result = predict(trained, rows, tmp_path / "a.jsonl", step=20)
    predict(exported, rows, tmp_path / "b.jsonl")
    assert (tmp_path / "a.jsonl").read_bytes() == (tmp_path / "b.jsonl").read_bytes()
    measured = saved_steps(trained)[20]["eval/validation/label_accuracy"]
    np.testing.assert_allclose(result["accuracy"], measured, atol=1e-6)


@pytest.mark.slow
def test_init_from_gets_new_adapters_beside_its_weights(exported, tmp_path, delivery_data_dir):
    run = run_of(tmp_path, delivery_data_dir, init_from=str(exported))
    state = run.initial_state()
    assert_bitwise(base_of(state.params), load_model(exported).params)
    for path, x in flatten_dict(split(state.params)[0]).items():
        assert (np.asarray(x).std() == 0) == (path[-1] == "lora_b")
    for x, abstract in zip(jax.tree.leaves(state), jax.tree.leaves(run.abstract), strict=True):
        assert x.sharding == abstract.sharding


@pytest.mark.slow
def test_eight_devices_and_two_slices_give_the_update_of_one(
    tmp_path, delivery_data_dir, take_steps
):
    # rows of a batch are a multiple of 4 parts x 2 slices
    run = run_of(tmp_path, delivery_data_dir, num_microbatches=2)
    model = dataclasses.replace(run.model, dropout_rate=0.0)
    given = {"tx": optax.sgd(1e-1), "weights": (0.5, 0.5), "seed": 0}

    def updated(*layout, **settings):
        """(metrics of two steps, adapters after them) of the run's first batch."""
        state, found = take_steps(model, [run.batches(0)] * 2, *layout, **given, **settings)
        metrics = [[float(m["loss"]), float(m["grad_norm"])] for m in found]
        return metrics, jax.tree.map(np.asarray, split(state.params)[0])

    expected = updated(Layout(), 1)
    metrics, adapters = updated(Layout(fsdp=4, tensor=2), 8, num_microbatches=2)
    np.testing.assert_allclose(metrics, expected[0], rtol=1e-5)
    for path, x in flatten_dict(expected[1]).items():
        np.testing.assert_allclose(flatten_dict(adapters)[path], x, atol=1e-6)


def test_the_gin_part_trains_adapters_and_its_ranks_can_be_set(tmp_path):
    part = {"gin_files": ["optimizers/lora.gin"]}
    config, text = load_config("demo_step_by_step", ["lora.query=16", "lora.wo=4"], **part)
    assert config.lora == LoraConfig(query=16, value=8, wo=4, alpha=16.0)
    assert config.optimizer.name == "adamw"
    (tmp_path / "operative.gin").write_text(text)
    assert load_config(tmp_path / "operative.gin")[0] == config
    with pytest.raises(InputError, match=r"lora\.query"):
        load_config("demo_step_by_step", ["lora.query=many"], **part)
    with pytest.raises(InputError, match="rank must be above 0"):
        load_config("demo_step_by_step", ["lora.query=0", "lora.value=0"], **part)
    assert load_config("demo_step_by_step")[0].lora is None


def test_a_run_wants_a_lora_config():
    with pytest.raises(InputError, match="must be a `LoraConfig` or None"):
        TrainConfig(**SETTINGS | {"lora": 8})
