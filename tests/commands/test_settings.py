"""`stepdistill settings`: what it lists is what a config takes."""

import json
import re

import pytest

from stepdistill_jax.commands import main
from stepdistill_jax.commands.gin_config import load_config
from stepdistill_jax.commands.settings import settings
from stepdistill_jax.experiments.comparison import flat_settings
from stepdistill_jax.training import TrainConfig


def listed(capsys, *argv):
    """Names by `--json`, and what was printed before."""
    assert main.main(["settings", *argv, "--json"]) == 0
    *text, last = capsys.readouterr().out.splitlines()
    return {s["name"]: s for s in json.loads(last)["settings"]}, "\n".join(text)


def test_all_are_listed_with_unit_and_meaning(capsys):
    found, text = listed(capsys)
    units = {"BATCH_SIZE": "examples", "INPUT_LENGTH": "tokens", "EVAL_EVERY": "steps"}
    units |= {"train.grace_secs": "seconds", "optimizer.b1": None, "lora.key": None}
    assert {name: found[name]["unit"] for name in units} == units
    assert all(s["meaning"].endswith(".") and f"  {name}" in text for name, s in found.items())
    assert found["BATCH_SIZE"]["field"] == "train.batch_size"
    assert found["RATIONALES"]["field"] == "supervision.rationales"
    required = {name for name, s in found.items() if s["required"] and name.isupper()}
    assert required == {"TASK", "OBJECTIVES", "TRAIN_STEPS", "LEARNING_RATE"}


def test_each_default_is_the_one_of_a_config_that_binds_nothing(tmp_path):
    """Giving all of them at once changes nothing, and each is a name that `--set` knows."""
    config = tmp_path / "least.gin"
    config.write_text(
        'include "train.gin"\nTASK = "delivery"\nTRAIN_STEPS = 20\nLEARNING_RATE = 1e-3\n'
        'OBJECTIVES = "label_only"\n'
    )
    owners = ("train", "optimizer", "supervision")
    given = [f"{s.name}={s.value}" for s in settings() if s.owner in owners and not s.required]
    assert len(given) > 40
    assert load_config(config, given)[0] == load_config(config)[0]


def test_a_report_names_settings_as_set_takes_them():
    shown = flat_settings(TrainConfig(task="delivery").to_json() | {"objectives": []})
    assert "LABEL_SOURCE" in shown and shown.keys() <= {s.name for s in settings()}


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("BATCH_SIZE", {"BATCH_SIZE"}),
        ("%BATCH_SIZE", {"BATCH_SIZE"}),
        ("train.batch_size", {"BATCH_SIZE"}),
        ("train.remat_policy", {"train.remat_policy"}),
        ("REMAT_POLICY", {"train.remat_policy"}),
        ("layout", {"LAYOUT", *(f"Layout.{n}" for n in ("data", "fsdp", "tensor", "dcn_data"))}),
        ("@rsqrt()", {"rsqrt.warmup_steps", "rsqrt.learning_rate"}),
        ("dropout", {"DROPOUT_BROADCAST", "train.dropout_rate"}),
    ],
)
def test_a_name_filters(capsys, name, found):
    assert set(listed(capsys, name)[0]) == found


def test_a_config_shows_its_own_values_and_what_it_still_needs(capsys):
    found, text = listed(capsys, "finetune")
    assert found["LEARNING_RATE"]["default"] == 5e-5 and "LEARNING_RATE = 5e-05" in text
    assert found["OBJECTIVES"]["default"] == "@step_by_step()"
    assert {name for name, s in found.items() if s["required"]} == {"TASK", "INIT_FROM"}
    assert "SEED" not in found
    assert listed(capsys, "demo_step_by_step", "rationale_weight")[0].keys() >= {
        "step_by_step.rationale_weight"
    }
    assert main.main(["settings", "finetune", "SEED", "EXTRA"]) == 2


def test_the_line_of_a_setting(capsys):
    _, text = listed(capsys, "EVAL_EVERY")
    assert text.splitlines()[1:3] == [
        "  EVAL_EVERY = 250  [steps]",
        "      steps between two validations. The last step is always validated.",
    ]


def test_texts_name_settings_as_they_are_typed():
    known, meanings = {s.field for s in settings()}, {s.name: s.meaning for s in settings()}
    for s in settings():
        for name in re.findall(r"`(\w+)`", s.meaning):
            fields = {f"{owner}.{name}" for owner in ("train", "supervision", s.owner)}
            assert known.isdisjoint(fields - {s.field}), (s.name, name)
    assert meanings["MODEL_SIZE"].endswith("Not used with INIT_FROM.")
    assert "if optimizer.schedule is a name" in meanings["optimizer.warmup_steps"]
    assert meanings["linear.train_steps"].endswith("None means the run's TRAIN_STEPS.")
    assert meanings["rsqrt.warmup_steps"] == "number of steps at the peak, at least 1."


@pytest.mark.parametrize(
    ("typed", "hint"),
    [
        ("BATCH_SIEZ", "did you mean 'BATCH_SIZE'?"),
        ("batchsize", "did you mean 'BATCH_SIZE'?"),
        ("train.remat_polcy", "did you mean 'train.remat_policy'?"),
        ("INITIAL_CHECKPOINT_PATH", "here it is INIT_FROM"),
    ],
)
def test_a_typo_names_the_nearest(capsys, typed, hint):
    assert main.main(["settings", typed]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1
    assert f"no setting '{typed}'; {hint}" in err
