"""What a supervisor writes, warns of and saves; whole runs: tests/faults/test_numbers.py, test_stops.py."""

import contextlib
import os
import re
import signal
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from stepdistill_jax.batches.host import HostBatch
from stepdistill_jax.batches.sampler import ExampleIds
from stepdistill_jax.data.objectives import step_by_step
from stepdistill_jax.models.families import model_config
from stepdistill_jax.runtime.checkpoints.manager import resolve_step, saved_steps
from stepdistill_jax.runtime.metrics import read_flagged, read_metrics
from stepdistill_jax.runtime.signals import StopSignals
from stepdistill_jax.training import TrainConfig, throughput, train
from stepdistill_jax.training.config import OptimizerConfig
from stepdistill_jax.training.loss import ObjectiveSums
from stepdistill_jax.training.optimizer import make_schedule
from stepdistill_jax.training.state import TrainState
from stepdistill_jax.training.supervisor import SILENT_STEPS, Supervisor


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


def state_of(step):
    return TrainState(jnp.int32(step), {"w": jnp.ones(4)}, (), jax.random.key(0))


@pytest.fixture
def begin(tmp_path):
    """`begin(validate, **settings)`: a supervisor of 100 steps in the test's folder, begun."""
    with contextlib.ExitStack() as closing:

        def begun(validate=None, **settings):
            closing.close()  # of the life before
            given = {"task": "any", "batch_size": 2, "train_steps": 100} | settings
            run = types.SimpleNamespace(
                config=TrainConfig(**given),
                workdir=tmp_path,
                data=types.SimpleNamespace(
                    objectives=step_by_step(), parts=(types.SimpleNamespace(name="any"),)
                ),
                model=model_config("t5_v1_1", "tiny", vocab_size=128),
                batches=types.SimpleNamespace(
                    examples=lambda step: ExampleIds(*np.zeros((3, 0), int))
                ),
                validator=validate and types.SimpleNamespace(compute=validate, ranking=by_accuracy),
                initial_state=lambda: state_of(0),
                abstract=state_of(0),
            )
            supervisor = Supervisor(run, StopSignals(None))
            supervisor.begin(closing)
            return supervisor

        yield begun


def by_accuracy(found, best_metric):
    assert best_metric is None
    return [found["eval/validation/label_accuracy"], -found["eval/validation/loss/label"]]


def record(supervisor, step, *, loss=2.0, grad_norm=1.0, rationale_tokens=0):
    """One row of three label tokens and some rationale tokens, one place of four left empty."""
    targets = 3 + rationale_tokens
    batch = HostBatch(
        groups=(),
        shards=(0,),
        num_shards=1,
        shapes=((1, 4, targets),),
        input_tokens=3,
        target_tokens=targets,
        objective_tokens=(3, rationale_tokens),
    )
    sums = ObjectiveSums(
        loss=np.array([6.0, 3.0 * rationale_tokens]),
        correct=np.array([1.0, 0.0]),
        count=np.array([3.0, rationale_tokens]),
    )
    loss = loss if isinstance(loss, Result) else Result(loss)
    supervisor.record(step, batch, {"loss": loss, "grad_norm": grad_norm, "sums": sums}, 0.5)


# --- recording


def test_a_step_is_written_when_the_next_one_runs(begin, tmp_path):
    supervisor = begin()
    record(supervisor, 1, rationale_tokens=2)
    assert read_metrics(tmp_path) == []
    record(supervisor, 2)
    (line,) = read_metrics(tmp_path)
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


def rates(workdir):
    return [x["timing/examples_per_second"] for x in read_metrics(workdir) if "loss" in x]


def test_a_step_that_ends_before_its_call_returns_has_its_own_time(clock, begin, tmp_path):
    """As on a CPU; the last one is not that of a step which nobody waited for."""
    supervisor = begin()
    for step, seconds in enumerate([8.0, 2.0, 4.0], 1):
        clock.now += seconds
        record(supervisor, step, loss=Result(2.0, clock))
    clock.now += 60  # on the way to the end
    supervisor.flush()
    assert rates(tmp_path) == [2 / 8, 2 / 2, 2 / 4]


def test_a_step_that_runs_on_has_the_time_until_it_ended_and_nobody_waits(clock, begin, tmp_path):
    """As on a GPU: each step of 4 s starts when the one before it ends, its call returns at once."""
    supervisor = begin()
    for step in (1, 2, 3):
        record(supervisor, step, loss=Result(2.0, clock, after=104 + 4 * (step - 1) - clock.now))
        assert clock.now == 100 + 4 * (step - 1), "the step before it was waited for, no other"
    supervisor.flush()
    assert clock.now == 112
    assert rates(tmp_path) == [2 / 4] * 3


def test_two_steps_that_end_between_two_looks_share_the_time(clock, begin, tmp_path):
    """The first runs on when its call returns; both have ended when the second one's does."""
    supervisor = begin()
    record(supervisor, 1, loss=Result(2.0, clock, after=3))
    clock.now += 8
    record(supervisor, 2, loss=Result(2.0, clock))
    clock.now += 60
    supervisor.flush()
    assert rates(tmp_path) == [2 / 4, 2 / 4]


@pytest.mark.parametrize("optimizer", [{}, {"schedule": "constant"}, {"warmup_steps": 10}], ids=str)
def test_a_line_has_its_learning_rate_and_asks_no_device_for_it(
    begin, tmp_path, monkeypatch, optimizer
):
    asked = []
    schedule = lambda config: lambda step: asked.append(step) or make_schedule(config)(step)  # noqa: E731
    monkeypatch.setattr("stepdistill_jax.training.supervisor.make_schedule", schedule)
    settings = {"learning_rate": 1e-3, "optimizer": OptimizerConfig(**optimizer)}
    supervisor = begin(**settings)
    asked.clear()
    for step in range(1, 101):
        record(supervisor, step)
    supervisor.flush()
    assert asked == [], "it would wait in the device's queue until the step that runs has ended"
    of_step = make_schedule(TrainConfig(task="any", train_steps=100, **settings))
    want = [float(of_step(step)) for step in range(100)]
    # float32 of the peak, 1e-3: an array and a Python integer round differently
    got = [line["learning_rate"] for line in read_metrics(tmp_path)]
    assert got == pytest.approx(want, abs=1e-9)


def test_validation_and_saving_are_no_part_of_a_step(clock, begin, tmp_path):
    def fifty_seconds(params, on_batch, keep):
        clock.now += 50
        return {"eval/validation/label_accuracy": 0.5, "eval/validation/loss/label": 1.0}

    supervisor = begin(fifty_seconds, eval_every=1)
    for step, seconds in ((1, 2), (2, 4)):
        clock.now += seconds
        record(supervisor, step, loss=Result(2.0, clock))
        supervisor.save(step, state_of(step))
    assert rates(tmp_path) == [2 / 2, 2 / 4]
    assert len(read_metrics(tmp_path)) == 4


def test_an_objective_without_tokens_is_warned_of_once_and_has_no_loss(begin, tmp_path, capsys):
    supervisor = begin()
    for step in range(1, SILENT_STEPS + 10):
        record(supervisor, step)
        if step == SILENT_STEPS:
            assert "no target token" not in capsys.readouterr().err
    assert "loss/rationale" not in read_metrics(tmp_path)[0]
    err = capsys.readouterr().err
    assert err.count("objective rationale had no target token in 20 steps") == 1


def test_tokens_now_and_then_are_no_reason_to_warn(begin, capsys):
    supervisor = begin()
    for step in range(1, 60):
        record(supervisor, step, rationale_tokens=1 if step % 19 == 0 else 0)
    assert "warning" not in capsys.readouterr().err


def test_a_loss_of_exactly_zero_is_warned_of(begin, capsys):
    supervisor = begin()
    for step in range(1, 5):
        record(supervisor, step, loss=0.0)
    assert capsys.readouterr().err.count("the loss is exactly 0") == 1


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["loss", "grad_norm"])
def test_a_step_that_is_not_finite_is_counted_flagged_and_written(
    begin, tmp_path, name, number, capsys
):
    """Each of the two suffices: a finite loss may have a gradient that is not."""
    supervisor = begin()
    record(supervisor, 7, **{name: number})
    supervisor.flush()
    assert supervisor.last["step"] == 7 and supervisor.last["skipped_steps"] == 1
    assert [(x["step"], x["reason"]) for x in read_flagged(tmp_path)] == [(7, "nonfinite")]
    assert re.search(rf"step 7: .*{name} {number}", capsys.readouterr().err)


# --- saving


def walk(begin, workdir, steps, accuracies):
    """Goes through steps of a run that is validated every second one; returns what is saved then.

    Validations find these accuracies, in order; the run of 12 steps saves every fifth.
    """
    found, saved = iter(accuracies), {}

    def compute(params, on_batch, keep):
        accuracy = next(found)
        return {"eval/validation/label_accuracy": accuracy, "eval/validation/loss/label": 1.0}

    supervisor = begin(compute, train_steps=12, eval_every=2, checkpoint_every=5)
    for step in steps:
        supervisor.save(step, state_of(step))
        supervisor._checkpoints.wait()
        saved |= {s: m["validated"] for s, m in saved_steps(workdir).items()}
    assert next(found, None) is None
    return saved


def test_a_better_validated_step_is_saved_between_two_checkpoints(begin, tmp_path):
    """Steps 2 and 4 are each the best so far, 6 is not; 5 is due."""
    saved = walk(begin, tmp_path, range(1, 7), [0.25, 0.75, 0.5])
    assert saved == {2: True, 4: True, 5: False}
    assert resolve_step(tmp_path, "best") == 4
    # a resume knows the best: step 8 is not better; 10 is due, 12 is the last
    saved = walk(begin, tmp_path, range(7, 13), [0.625, 0.5, 0.5])
    assert saved == {4: True, 5: False, 10: True, 12: True}
    assert resolve_step(tmp_path, "best") == 4


def timeless(workdir):
    lines = read_metrics(workdir)
    return [{k: v for k, v in x.items() if not k.startswith("timing/")} for x in lines]


@pytest.mark.slow
def test_a_stop_loses_no_validation(tmp_path, delivery_data_dir, monkeypatch, capsys):
    """A signal in step 3, which is validated, and in the last; each resume does its validation."""
    sizes = {"batch_size": 16, "input_length": 64, "target_length": 64, "train_steps": 6}
    config = TrainConfig("delivery", eval_every=3, checkpoint_every=100, **sizes)
    dirs, kept, stop_in = [tmp_path / "whole", tmp_path / "stopped"], Supervisor.record, [3, 6]
    train(config, workdir=dirs[0], data_dir=delivery_data_dir)

    def recorded(supervisor, step, *rest):
        kept(supervisor, step, *rest)
        if step in stop_in:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(Supervisor, "record", recorded)
    for step in (3, 6):
        with pytest.raises(SystemExit, match="75"):
            train(config, workdir=dirs[1], data_dir=delivery_data_dir)
        assert f"SIGTERM: saved step {step};" in capsys.readouterr().err
        assert not saved_steps(dirs[1])[step]["validated"]
        stop_in.remove(step)
    train(config, workdir=dirs[1], data_dir=delivery_data_dir)
    assert timeless(dirs[1]) == timeless(dirs[0])
    assert saved_steps(dirs[1]) == saved_steps(dirs[0])
