"""docs/how-to/losses.md: its files are written and trained with, its example's numbers and its claims computed."""

import importlib.util
import json
import pathlib
import re
import sys

import jax
import numpy as np
import optax
import pytest

from stepdistill_jax.commands.gin_config import load_config
from stepdistill_jax.errors import InputError
from stepdistill_jax.runtime.metrics import read_metrics
from stepdistill_jax.training import loop, train
from stepdistill_jax.training.config import OptimizerConfig, TrainConfig
from stepdistill_jax.training.data import on_this_host
from stepdistill_jax.training.learning_rate import FALLING, SHAPES
from stepdistill_jax.training.optimizer import make_optimizer, make_schedule

PAGE = pathlib.Path(__file__).parents[2] / "docs" / "how-to" / "losses.md"
FILE = re.compile(r"`([\w./]+)`:\n\n```\w+\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LENGTH = 12


@pytest.fixture(scope="module")
def reader(tmp_path_factory):
    """The folder of someone who has typed in every file of the page."""
    folder = tmp_path_factory.mktemp("reader")
    for name, text in FILE.findall(PAGE.read_text(encoding="utf-8")):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text, encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def agreement(reader):
    """The page's module; once, since gin keeps what it registers."""
    spec = importlib.util.spec_from_file_location("agreement", reader / "agreement.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["agreement"] = module  # dataclasses look their module up, and a config imports it
    spec.loader.exec_module(module)
    yield module
    del sys.modules["agreement"]


@pytest.fixture
def group():
    """Three rows: three examples of which the third has no rationale; one example; padding."""
    group = {
        n: np.zeros((3, LENGTH), np.int32) for n in ("decoder_example_ids", "decoder_objective_ids")
    }
    group["decoder_example_ids"][0, :11] = [1, 1, 1, 1, 1, 3, 3, 2, 2, 2, 2]
    # the first rationale has a decoder prefix of one token, which is of no objective
    group["decoder_objective_ids"][0, :11] = [1, 1, 0, 2, 2, 1, 1, 1, 1, 2, 2]
    group["decoder_example_ids"][1, :5] = 1
    group["decoder_objective_ids"][1, :5] = [1, 1, 2, 2, 2]
    return group


def test_the_example_compares_the_states_of_each_pair(agreement, group):
    states = np.random.default_rng(0).normal(size=(3, LENGTH, 4)).astype(np.float32)

    def unit(row, first, last):
        x = states[row, first:last].sum(0)
        return x / np.linalg.norm(x)

    labels = [unit(0, 0, 2), unit(0, 7, 9), unit(1, 0, 2)]
    rationales = [unit(0, 3, 5), unit(0, 9, 11), unit(1, 2, 5)]
    wanted = sum(1 - a @ b for a, b in zip(labels, rationales, strict=True))
    loss = agreement.Agreement()
    assert loss.count(group) == 3
    total, gradient = jax.jit(jax.value_and_grad(loss.total))(states, None, group)
    np.testing.assert_allclose(total, wanted, rtol=1e-5)
    assert np.isfinite(gradient).all()
    moved = np.abs(gradient).max(-1) > 1e-3
    assert moved[0].tolist() == [True, True, False, True, True, *[False] * 2, *[True] * 4, False]
    assert moved[1:].sum(1).tolist() == [5, 0]


def test_all_weights_and_clip_and_epsilon_times_a_half_is_the_same_run():
    rng = np.random.default_rng(0)
    start = {"w": rng.normal(size=(3, 4)).astype(np.float32)}
    gradients = [{"w": rng.normal(size=(3, 4)).astype(np.float32) / n} for n in range(1, 9)]

    def trained(factor, clip_norm, eps):
        optimizer = OptimizerConfig(clip_norm=clip_norm, eps=eps, weight_decay=0.1)
        tx = make_optimizer(TrainConfig("t", learning_rate=0.1, train_steps=9, optimizer=optimizer))
        update, params, state = jax.jit(tx.update), start, jax.jit(tx.init)(start)
        for g in gradients:  # the first are clipped, the last are not
            updates, state = update({"w": factor * g["w"]}, state, params)
            params = jax.tree.map(np.add, params, updates)
        return np.asarray(params["w"])

    whole = trained(1.0, 1.0, 1e-2)
    np.testing.assert_array_equal(trained(0.5, 0.5, 0.5e-2), whole)
    # and each of the two matters
    assert np.abs(trained(0.5, 1.0, 0.5e-2) - whole).max() > 1e-3
    assert np.abs(trained(0.5, 0.5, 1e-2) - whole).max() > 1e-3


CHANGING = """
include "agreement.gin"
step_by_step.rationale_weight = @linear_schedule()
linear_schedule.init_value = 1.0
linear_schedule.end_value = 0.0
linear_schedule.transition_steps = 4
BATCH_SIZE = 8
TRAIN_STEPS = 6
EVAL_EVERY = 6
CHECKPOINT_EVERY = 2
"""


@pytest.mark.slow
def test_its_files_train_and_a_resumed_run_is_the_same(
    reader, agreement, monkeypatch, delivery_data_dir, tmp_path
):
    monkeypatch.chdir(reader)
    (reader / "changing.gin").write_text(CHANGING)
    config, text = load_config("changing.gin")
    where = {"data_dir": delivery_data_dir, "config_text": text}
    whole = train(config, workdir=tmp_path / "whole", **where)
    lines = read_metrics(tmp_path / "whole")
    steps = [x for x in lines if "loss" in x]
    assert [x["loss_weight/rationale"] for x in steps] == [1.0, 0.75, 0.5, 0.25, 0.0, 0.0]
    for x in steps:
        assert not {"loss_weight/label", "accuracy/agreement", "target_tokens/agreement"} & x.keys()
        parts = x["loss/label"], x["loss_weight/rationale"] * x["loss/rationale"]
        wanted = sum(parts) + 0.1 * x["loss/agreement"]
        assert x["loss"] == pytest.approx(wanted, rel=1e-5)
    # a validation takes the last weights and no extra loss: here the label's loss alone
    assert whole["eval/validation/loss"] == whole["eval/validation/loss/label"]
    told = json.loads((tmp_path / "whole" / "run.json").read_text())
    assert told["weights"] == {"label": 1.0, "rationale": "linear 1 to 0 over steps 0 to 4"}
    assert told["config"]["extra_loss"] == {
        "class": "agreement.Agreement",
        "weight": 0.1,
    }

    stop_after(3, config, tmp_path / "cut", **where)
    train(config, workdir=tmp_path / "cut", **where)
    assert timeless(read_metrics(tmp_path / "cut")) == timeless(lines)
    other, _ = load_config("changing.gin", ["Agreement.weight=0.2"])
    with pytest.raises(InputError, match=r"`extra_loss` was .*0.1.*, is .*0.2"):
        train(other, workdir=tmp_path / "cut", **where)


def stop_after(step, config, workdir, **where):
    """A life that ends by an error after this step."""

    class Ended(Exception):
        pass

    def batches(*args, **kwargs):
        for number, batch in enumerate(on_this_host(*args, **kwargs)):
            if number == step:
                raise Ended
            yield batch

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "on_this_host", batches)
        with pytest.raises(Ended):
            train(config, workdir=workdir, **where)


def timeless(lines):
    return [{k: v for k, v in x.items() if not k.startswith("timing/")} for x in lines]


def test_the_page_names_every_schedule():
    rows = re.findall(
        r'^\| `"(\w+)"`, `@(\w+)\(\)` \|.*\| (yes|no) \|$', PAGE.read_text(), re.MULTILINE
    )
    assert {(a, b) for a, b, _ in rows} == {(shape, shape) for shape in SHAPES}
    assert {a for a, _, further in rows if further == "no"} == set(FALLING)


def test_its_own_optimizer_clips_spares_the_norms_and_follows_the_cosine(reader, monkeypatch):
    """A step of Lion by hand: rate x (sign + decay); the scale of a norm does not decay."""
    monkeypatch.chdir(reader)
    monkeypatch.syspath_prepend(str(reader))
    config, _ = load_config("my_optimizer.gin")
    assert config.optimizer.name == "my_optimizer.clipped_lion"
    rate = make_schedule(config)
    assert (float(rate(25)), float(rate(50))) == pytest.approx((0.5e-4, 1e-4))
    tx = make_optimizer(config)
    params = {"w": np.float32([[2.0, -4.0]]), "scale": np.float32([2.0, -4.0])}
    state = optax.tree.set(tx.init(params), count=50)
    updates, after = tx.update(jax.tree.map(lambda x: 30 * x, params), state, params)
    np.testing.assert_allclose(updates["scale"], [-1e-4, 1e-4], rtol=1e-5)
    np.testing.assert_allclose(updates["w"], [[-1.2e-4, 1.4e-4]], rtol=1e-5)
    clipped = np.float32([2.0, -4.0]) / np.sqrt(40)  # the norm of both is 1
    (moment,) = optax.tree.get_all_with_path(after, "mu")
    np.testing.assert_allclose(moment[1]["scale"], 0.01 * clipped, rtol=1e-5)


@pytest.mark.slow
def test_its_own_optimizer_trains(reader, monkeypatch, delivery_data_dir, tmp_path):
    monkeypatch.chdir(reader)
    monkeypatch.syspath_prepend(str(reader))
    steps = ["TRAIN_STEPS=4", "EVAL_EVERY=4", "BATCH_SIZE=8", "cosine.warmup_steps=2"]
    config, text = load_config("my_optimizer.gin", steps)
    train(config, workdir=tmp_path / "run", data_dir=delivery_data_dir, config_text=text)
    rates = [x["learning_rate"] for x in read_metrics(tmp_path / "run") if "loss" in x]
    assert rates == pytest.approx([0, 0.5e-4, 1e-4, 0.5e-4])
    told = json.loads((tmp_path / "run" / "run.json").read_text())["config"]["optimizer"]
    assert told["function"] == "my_optimizer.clipped_lion"
    assert told["arguments"]["clip_norm"] == 1.0
