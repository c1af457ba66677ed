import re
import types

import numpy as np
import pytest

from stepdistill_jax.batches.sampler import ExampleIds
from stepdistill_jax.data.objectives import step_by_step
from stepdistill_jax.models.config import t5_config
from stepdistill_jax.training import TrainConfig, throughput
from stepdistill_jax.training.config import OptimizerConfig
from stepdistill_jax.training.loss import ObjectiveSums
from stepdistill_jax.training.optimizer import make_schedule
from stepdistill_jax.training.recorder import SILENT_STEPS, StepRecorder


class Result:
    """A scalar on a device whose step ends `after` seconds from now; who reads it waits for that."""

    def __init__(self, value, clock=None, after=0.0):
        self.value, self.clock = value, clock
        self.end = clock.now + after if clock else 0.0

    def is_ready(self):
        return self.clock is None or self.end <= self.clock.now

    def __array__(self, dtype=None, copy=None):
        if self.clock is not None:
            self.clock.now = max(self.clock.now, self.end)
        return np.array(self.value, dtype)


@pytest.fixture
def clock(monkeypatch):
    """What `timing/...` is measured by; stands still until a test moves it."""
    clock = types.SimpleNamespace(now=100.0)
    clock.monotonic = lambda: clock.now
    monkeypatch.setattr(throughput, "time", clock)
    return clock


class Lines(list):
    flagged = ()

    def write(self, step, metrics):
        self.append({"step": step, **metrics})

    def flag(self, step, entry):
        self.flagged += ((step, entry["reason"]),)


@pytest.fixture
def make_recorder(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    config = {"task": "any", "batch_size": 2, "train_steps": 100}
    return lambda **settings: _recorder(tmp_path, TrainConfig(**config, **settings))


@pytest.fixture
def recorder(make_recorder):
    return make_recorder()


def _recorder(workdir, config):
    run = types.SimpleNamespace(
        config=config,
        data=types.SimpleNamespace(objectives=step_by_step()),
        model=t5_config("t5_v1_1", "tiny", vocab_size=128),
        workdir=workdir,
        batches=types.SimpleNamespace(examples=lambda step: ExampleIds(*np.zeros((3, 0), int))),
    )
    bar = types.SimpleNamespace(update=lambda *_, **__: None)
    return StepRecorder(run, Lines(), bar, start=0)


def note(recorder, step, *, loss=2.0, grad_norm=1.0, rationale_tokens=0):
    """One row of three label tokens and some rationale tokens, one place of four left empty."""
    ids = np.array([[1, 1, 1, *[2] * rationale_tokens]])
    ones = np.ones_like(ids)
    group = {
        "decoder_objective_ids": ids,
        "decoder_segment_ids": ones,
        "encoder_segment_ids": np.array([[1, 1, 1, 0]]),
    }
    sums = ObjectiveSums(
        loss=np.array([6.0, 3.0 * rationale_tokens]),
        correct=np.array([1.0, 0.0]),
        count=np.array([3.0, rationale_tokens]),
    )
    loss = loss if isinstance(loss, Result) else Result(loss)
    recorder.note(step, (group,), {"loss": loss, "grad_norm": grad_norm, "sums": sums}, 0.5)


def test_a_step_is_written_when_the_next_one_runs(recorder):
    note(recorder, 1, rationale_tokens=2)
    assert recorder._writer == []
    note(recorder, 2)
    (line,) = recorder._writer
    expected = {
        "step": 1,
        "loss": 2.0,
        "loss/label": 2.0,
        "loss/rationale": 3.0,
        "accuracy/label": 1 / 3,
        "target_tokens/label": 3.0,
        "target_tokens/rationale": 2.0,
        "non_padding_fraction/inputs": 0.75,
        "non_padding_fraction/targets": 1.0,
        "timing/seconds_waiting_for_data": 0.5,
    }
    assert {name: line[name] for name in expected} == pytest.approx(expected)


def rates(recorder):
    return [line["timing/examples_per_second"] for line in recorder._writer]


def test_a_step_that_ends_before_its_call_returns_has_its_own_time(clock, recorder):
    """As on a CPU; the last one is not that of a step which nobody waited for."""
    for step, seconds in enumerate([8.0, 2.0, 4.0], 1):
        clock.now += seconds
        note(recorder, step, loss=Result(2.0, clock))
    clock.now += 60  # on the way to the end
    recorder.flush()
    assert rates(recorder) == [2 / 8, 2 / 2, 2 / 4]


def test_a_step_that_runs_on_has_the_time_until_it_ended_and_nobody_waits_for_it(clock, recorder):
    """As on a GPU: each step of 4 s starts when the one before it ends, its call returns at once."""
    for step in (1, 2, 3):
        note(recorder, step, loss=Result(2.0, clock, after=104 + 4 * (step - 1) - clock.now))
        assert clock.now == 100 + 4 * (step - 1), "the step before it was waited for, no other"
    recorder.flush()
    assert clock.now == 112
    assert rates(recorder) == [2 / 4] * 3


def test_two_steps_that_end_between_two_looks_share_the_time(clock, recorder):
    """The first runs on when its call returns; both have ended when the second one's does."""
    note(recorder, 1, loss=Result(2.0, clock, after=3))
    clock.now += 8
    note(recorder, 2, loss=Result(2.0, clock))
    clock.now += 60
    recorder.flush()
    assert rates(recorder) == [2 / 4, 2 / 4]


@pytest.mark.parametrize("optimizer", [{}, {"schedule": "constant"}, {"warmup_steps": 10}], ids=str)
def test_a_line_has_its_learning_rate_and_asks_no_device_for_it(
    make_recorder, monkeypatch, optimizer
):
    asked = []
    schedule = lambda config: lambda step: asked.append(step) or make_schedule(config)(step)  # noqa: E731
    monkeypatch.setattr("stepdistill_jax.training.recorder.make_schedule", schedule)
    settings = {"learning_rate": 1e-3, "optimizer": OptimizerConfig(**optimizer)}
    recorder = make_recorder(**settings)
    asked.clear()
    for step in range(1, 101):
        note(recorder, step)
    recorder.flush()
    assert asked == [], "it would wait in the device's queue until the step that runs has ended"
    of_step = make_schedule(TrainConfig(task="any", train_steps=100, **settings))
    want = [float(of_step(step)) for step in range(100)]
    # float32 of the peak, 1e-3: an array and a Python integer round differently
    assert [line["learning_rate"] for line in recorder._writer] == pytest.approx(want, abs=1e-9)


def test_validation_and_saving_are_no_part_of_a_step(clock, recorder):
    clock.now += 2
    note(recorder, 1, loss=Result(2.0, clock))
    recorder.flush()
    clock.now += 50
    recorder.validation(1, {"eval/validation/label_accuracy": 0.5})
    clock.now += 4
    note(recorder, 2, loss=Result(2.0, clock))
    recorder.flush()
    first, _, second = recorder._writer
    assert first["timing/examples_per_second"] == 2 / 2
    assert second["timing/examples_per_second"] == 2 / 4


def test_an_objective_without_tokens_is_warned_of_once_and_has_no_loss(recorder, capsys):
    for step in range(1, SILENT_STEPS + 10):
        note(recorder, step)
        if step == SILENT_STEPS:
            assert "no target token" not in capsys.readouterr().err
    assert "loss/rationale" not in recorder._writer[0]
    err = capsys.readouterr().err
    assert err.count("objective rationale had no target token in 20 steps") == 1


def test_tokens_now_and_then_are_no_reason_to_warn(recorder, capsys):
    for step in range(1, 60):
        note(recorder, step, rationale_tokens=1 if step % 19 == 0 else 0)
    assert capsys.readouterr().err == ""


def test_a_loss_of_exactly_zero_is_warned_of(recorder, capsys):
    for step in range(1, 5):
        note(recorder, step, loss=0.0)
    assert capsys.readouterr().err.count("the loss is exactly 0") == 1


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["loss", "grad_norm"])
def test_a_step_that_is_not_finite_is_counted_flagged_and_written(recorder, name, number, capsys):
    """Each of the two suffices: a finite loss may have a gradient that is not."""
    note(recorder, 7, **{name: number})
    recorder.flush()
    assert recorder._writer[-1]["step"] == 7 and recorder._writer[-1]["skipped_steps"] == 1
    assert recorder._writer.flagged == ((7, "nonfinite"),)
    assert re.search(rf"step 7: .*{name} {number}", capsys.readouterr().err)
