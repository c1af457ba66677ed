import gzip
import json

import jax
import pytest

from stepdistill_jax.errors import InputError
from stepdistill_jax.training import TrainConfig, train
from stepdistill_jax.training.profile import StepProfile

SETTINGS = {
    "task": "delivery",
    "batch_size": 8,
    "input_length": 64,
    "target_length": 64,
    "train_steps": 4,
    "eval_every": 100,
}


def names_of(folder):
    """Names of the events in the one trace of a folder."""
    (trace,) = folder.glob("plugins/profile/*/*.trace.json.gz")
    (xplane,) = folder.glob("plugins/profile/*/*.xplane.pb")
    assert xplane.stat().st_size > 1000
    with gzip.open(trace) as f:
        events = json.load(f)["traceEvents"]
    return [(e["name"], e.get("args", {})) for e in events if "name" in e]


@pytest.mark.slow
def test_the_profile_of_a_run_holds_its_steps(tmp_path, delivery_data_dir):
    config = TrainConfig(**SETTINGS, profile_steps=[2, 3])
    train(config, workdir=tmp_path, data_dir=delivery_data_dir)
    names = names_of(tmp_path / "profile")
    assert {args["step_num"] for name, args in names if name == "train"} == {"2", "3"}
    assert any("train_step" in name for name, _ in names)


def test_a_run_that_ends_inside_the_profile_leaves_what_it_has(tmp_path):
    double = jax.jit(lambda x: 2 * x)
    with pytest.raises(KeyboardInterrupt), StepProfile(tmp_path, (3, 99)) as profile:
        for step in range(1, 6):
            with profile.step(step):
                double(1.0).block_until_ready()
            profile.ended(step, lambda: None)
        raise KeyboardInterrupt
    names = names_of(tmp_path / "profile")
    assert {args["step_num"] for name, args in names if name == "train"} == {"3", "4", "5"}


@pytest.mark.parametrize("steps", [[3, 2], [0, 2], [1], [1, 2, 3], [1.0, 2], 5, "1,2", [True, 2]])
def test_other_values_are_bad_input(steps):
    with pytest.raises(InputError, match=r"`profile_steps` must be \[FIRST, LAST\]"):
        TrainConfig(**SETTINGS, profile_steps=steps)


def test_steps_after_the_last_one_are_bad_input():
    steps = [SETTINGS["train_steps"] + 1, SETTINGS["train_steps"] + 9]
    with pytest.raises(InputError, match="begins after the last step"):
        TrainConfig(**SETTINGS, profile_steps=steps)
