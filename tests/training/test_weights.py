"""Objective weights that change along a run: their values, configs and files.

`test_extra_loss.py` has the step's gradient, `tests/docs/test_losses.py` runs that are resumed.
"""

import json

import jax
import numpy as np
import pytest

from stepdistill_jax.commands.gin_config import load_config
from stepdistill_jax.data.objectives import step_by_step
from stepdistill_jax.data.schedules import Schedule, cosine_schedule, linear_schedule
from stepdistill_jax.data.vocabulary import ByteVocabulary
from stepdistill_jax.errors import InputError
from stepdistill_jax.formats.directory import TaskInfo, read_task_info, write_model_files
from stepdistill_jax.models.families import model_config
from stepdistill_jax.training.optimizer import weights_at

CONFIG = """\
include "demo_step_by_step.gin"
step_by_step.rationale_weight = @linear_schedule()
linear_schedule.init_value = 3.0
linear_schedule.end_value = 0.0
linear_schedule.transition_steps = 1000
"""


@pytest.mark.parametrize(
    "weight, at",
    [
        (0.7, {0: 0.7, 99: 0.7}),
        (linear_schedule(1.0, 0.0, 1000), {0: 1, 250: 0.75, 1000: 0, 5000: 0}),
        (linear_schedule(0.0, 2.0, 10, transition_begin=5), {0: 0, 5: 0, 10: 1, 15: 2, 16: 2}),
        # (1 - cos(pi / 4)) / 2 = 0.14645 of the way after a quarter of the steps
        (cosine_schedule(0.0, 1.0, 8, 2), {0: 0, 2: 0, 4: 0.14645, 6: 0.5, 10: 1, 99: 1}),
        (cosine_schedule(3.0, 1.0, 8), {0: 3, 4: 2, 8: 1}),
    ],
)
def test_values(weight, at):
    for step, value in at.items():
        got = weights_at((weight, 0.5), step)
        np.testing.assert_allclose(got, [value, 0.5], atol=1e-5)


@pytest.mark.parametrize("make", [linear_schedule, cosine_schedule])
def test_a_compiled_weight_ends_exactly_with_its_last_value(make):
    """XLA multiplies by 1 / 30, and 30 times that is not 1: the weight would end below 0."""
    at = jax.jit(lambda step: weights_at((make(3.0, 0.0, 30, 5),), step)[0])
    weights = [float(at(step)) for step in range(40)]
    assert weights[35:] == [0.0] * 5 and all(w > 0 for w in weights[:35])


@pytest.mark.parametrize(
    "values, wanted",
    [
        (("square", 1.0, 0.0, 10), "one of linear, cosine, not 'square'"),
        (("linear", -1.0, 0.0, 10), "`linear_schedule.init_value` must be a number of at least 0, not -1.0"),
        (("cosine", 1.0, float("nan"), 10), "cosine_schedule.end_value` must be a number of at least 0, not nan"),
        (("linear", True, 0.0, 10), "init_value` must be a number of at least 0, not True"),
        (("linear", 1.0, 0.0, 0), "transition_steps` must be a whole number of at least 1, not 0"),
        (("linear", 1.0, 0.0, 2.5), "transition_steps` must be a whole number of at least 1, not 2.5"),
        (("linear", 1.0, 0.0, 5, -1), "transition_begin` must be a whole number of at least 0, not -1"),
        (("linear", 0.0, 0.0, 5), "both 0"),
        (("linear", 1.0, 0.0, 2**31 - 1, 1), "transition_begin + transition_steps is over 2147483647"),
    ],
)  # fmt: skip
def test_a_bad_schedule_is_refused(values, wanted):
    with pytest.raises(InputError, match=r"[Ss]chedule") as caught:
        Schedule(*values)
    assert wanted in str(caught.value)


def test_a_config_binds_schedules_and_is_written_as_it_was_read(tmp_path):
    path, again = tmp_path / "mine.gin", tmp_path / "again.gin"
    path.write_text(CONFIG)
    overrides = ["linear_schedule.end_value=1.0"]
    config, text = load_config(path, overrides)
    assert [o.weight for o in config.objectives] == [1.0, Schedule("linear", 3.0, 1.0, 1000)]
    again.write_text(text)
    assert load_config(again)[0] == config
    scoped = CONFIG.replace("@linear_", "@why/linear_").replace("\nlinear_", "\nwhy/linear_")
    path.write_text(scoped + "step_by_step.label_weight = @cosine_schedule()\n" + "".join(
        f"cosine_schedule.{n} = {v}\n" for n, v in [("init_value", 0), ("end_value", 1), ("transition_steps", 5)]
    ))  # fmt: skip
    weights = [o.weight for o in load_config(path)[0].objectives]
    assert weights == [Schedule("cosine", 0, 1, 5), Schedule("linear", 3.0, 0.0, 1000)]


@pytest.mark.parametrize(
    "change, wanted",
    [
        (("0.0", "-1.0"), "linear_schedule.end_value must be a number of at least 0, not -1.0"),
        (("1000", "0"), "linear_schedule.transition_steps must be a whole number of at least 1"),
        (("linear_schedule.end_value = 0.0\n", ""), "end_value"),
        (
            ("@linear_schedule()", "@linear_schedule"),
            "rationale_weight must be a number of at least 0",
        ),
        (("end_value", "last_value"), "no parameter 'last_value'"),
    ],
)
def test_a_config_with_a_bad_schedule_is_refused_in_one_line(tmp_path, change, wanted):
    path = tmp_path / "mine.gin"
    assert change[0] in CONFIG
    path.write_text(CONFIG.replace(*change))
    with pytest.raises(InputError) as caught:
        load_config(path)
    assert wanted in str(caught.value) and "\n" not in str(caught.value)
    assert "mine.gin" in str(caught.value)


def test_a_model_directory_keeps_the_schedule(tmp_path):
    info = TaskInfo("sums", step_by_step(1.0, cosine_schedule(0.5, 0.0, 10)), 40, 24, 8)
    write_model_files(
        tmp_path, model_config("t5_v1_1", "tiny", vocab_size=259), ByteVocabulary(), info
    )
    assert read_task_info(tmp_path) == info
    path = tmp_path / "stepdistill.json"
    raw = json.loads(path.read_text())
    raw["objectives"][1]["weight"] = {"shape": "linear"}
    path.write_text(json.dumps(raw))
    with pytest.raises(
        InputError, match=r"stepdistill\.json: .*a schedule must have the fields end_value"
    ):
        read_task_info(tmp_path)
