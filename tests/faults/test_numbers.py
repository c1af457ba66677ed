"""Losses that are not finite, spikes and collapse, in whole runs of a tiny model."""

import dataclasses
import json
import math
import os
import signal
import time

import jax
import numpy as np
import pytest

from stepdistill_jax.batches import host
from stepdistill_jax.decoding.greedy import LabelDecoder
from stepdistill_jax.errors import InputError
from stepdistill_jax.runtime.checkpoints.manager import Checkpoints, saved_steps
from stepdistill_jax.runtime.metrics import read_flagged, read_metrics
from stepdistill_jax.training import TrainConfig, train
from stepdistill_jax.training.run import assemble
from stepdistill_jax.training.supervisor import SPIKE_LEAST, Supervisor


class Trainer:
    """Calls `train` and keeps parameters and optimizer of every step, and of what is saved.

    Loss weights of bad steps are not a number; after the steps in `told` a SIGTERM comes, and the
    run is started again.
    """

    def __init__(self, monkeypatch, data_dir, settings):
        self._settings = settings | {"max_consecutive_nonfinite": 3}
        self.states, self.summary = {}, {}
        self._data_dir, self._bad, self._told = data_dir, (), []
        call, save = host._Maker.__call__, Checkpoints.save
        record, ended = Supervisor.record, Supervisor.save

        def poisoned(maker, step):
            batch = call(maker, step)
            if maker._batches.shuffle and step + 1 in self._bad:
                nan, name = np.float32(np.nan), "decoder_loss_weights"
                groups = tuple(group | {name: nan * group[name]} for group in batch.groups)
                batch = dataclasses.replace(batch, groups=groups)
            return batch

        def signalled(supervisor, step, *rest):
            record(supervisor, step, *rest)
            if self._told and step == self._told[0]:
                os.kill(os.getpid(), signal.SIGTERM)

        def seen(supervisor, step, state):
            self.states[step] = jax.tree.map(np.array, (state.params, state.opt_state))
            ended(supervisor, step, state)

        def saved(checkpoints, step, params, rest, metrics):
            self.states[step] = jax.tree.map(np.array, (params, rest.opt_state))
            save(checkpoints, step, params, rest, metrics)

        monkeypatch.setattr(host._Maker, "__call__", poisoned)
        monkeypatch.setattr(Supervisor, "record", signalled)
        monkeypatch.setattr(Supervisor, "save", seen)
        monkeypatch.setattr(Checkpoints, "save", saved)

    def __call__(self, workdir, bad_steps=(), told=(), **changes):
        """{step: (parameters, optimizer)}; what a run raises passes through."""
        self.states, self._bad, self._told = {}, bad_steps, list(told)
        config = TrainConfig(**self._settings | changes)
        while self._told:
            with pytest.raises(SystemExit, match="75"):
                train(config, workdir=workdir, data_dir=self._data_dir)
            self._told.pop(0)
        self.summary = train(config, workdir=workdir, data_dir=self._data_dir)
        return self.states


@pytest.fixture
def trained(monkeypatch, delivery_data_dir, settings):
    return Trainer(monkeypatch, delivery_data_dir, settings)


@pytest.fixture(scope="module")
def clean(tmp_path_factory, delivery_data_dir, settings):
    """(workdir, states) of a run in which nothing goes wrong."""
    workdir = tmp_path_factory.mktemp("clean")
    with pytest.MonkeyPatch.context() as monkeypatch:
        return workdir, Trainer(monkeypatch, delivery_data_dir, settings)(workdir)


def same(one, other):
    return all(map(np.array_equal, jax.tree.leaves(one), jax.tree.leaves(other)))


def untimed(workdir):
    return [
        {k: v for k, v in x.items() if not k.startswith("timing/")} for x in read_metrics(workdir)
    ]


def steps_of(workdir):
    return {x["step"]: x for x in read_metrics(workdir) if "loss" in x}


def flags(workdir):
    return [(x["step"], x["reason"]) for x in read_flagged(workdir)]


@pytest.mark.slow
def test_a_bad_step_changes_nothing_is_counted_and_names_its_examples(
    trained, clean, tmp_path, delivery_data_dir, settings, capsys, survives
):
    with survives("two steps with a loss that is no number") as seen:
        seen.append("skipped, counted, their examples kept")
        states = trained(tmp_path, {5, 9})
        assert same(states[4], clean[1][4])
        for bad in (5, 9):
            (before, optimizer), (after, skipped) = states[bad - 1], states[bad]
            assert same(before, after) and same(optimizer, skipped)
            assert not same(after, states[bad + 1][0])
        steps = steps_of(tmp_path)
        assert [steps[s]["skipped_steps"] for s in range(1, 13)] == [0] * 4 + [1] * 4 + [2] * 4
        assert steps[5]["loss"] is None and steps[5]["target_tokens/label"] > 0
        assert trained.summary["skipped_steps"] == 2
        assert capsys.readouterr().err.count("its update is skipped (1 in a row") == 2

        # the schedule goes on with the step, Adam's count with the updates
        assert sorted(int(x) for x in jax.tree.leaves(states[12][1]) if x.dtype == np.int32) == [
            10,
            12,
        ]
        rates = [x["learning_rate"] for x in steps_of(clean[0]).values()]
        assert [x["learning_rate"] for x in steps.values()] == rates

        assert flags(tmp_path) == [(5, "nonfinite"), (9, "nonfinite")]
        examples = read_flagged(tmp_path)[0]["examples"]
        assert len(examples) == settings["batch_size"]
        lines = (delivery_data_dir / "delivery" / "train.jsonl").read_text().splitlines()
        for example in examples:
            row = json.loads(lines[example["row"]])
            assert row["label"] == example["label"] and row["input"][:40] in example["input"]


@pytest.mark.slow
def test_too_many_in_a_row_go_on_from_the_last_good_checkpoint(trained, tmp_path, capsys, survives):
    with survives("three such steps in a row") as seen:
        seen.append("back to the last good checkpoint, also where the run is stopped in between")
        states = trained(tmp_path / "whole", {7, 8, 9})
        err = capsys.readouterr().err
        assert "steps 7 to 9 were not finite: rolled back to the parameters of step 5" in err
        assert same(states[9][0], states[5][0]) and not same(states[9][0], states[6][0])
        assert not same(states[10][0], states[9][0])
        expected = [(7, "nonfinite"), (8, "nonfinite"), (9, "nonfinite"), (9, "rolled_back")]
        assert flags(tmp_path / "whole") == expected
        assert sorted(steps_of(tmp_path / "whole")) == list(range(1, 13))

        # stopped amid the bad steps, and after them
        again = trained(tmp_path / "cut", {7, 8, 9}, told=[8, 11])
        assert same(again[12], states[12])
        assert untimed(tmp_path / "cut") == untimed(tmp_path / "whole")
        assert read_flagged(tmp_path / "cut") == read_flagged(tmp_path / "whole")


@pytest.mark.slow
def test_the_second_time_the_run_stops_and_so_it_does_when_started_again(
    trained, tmp_path, survives
):
    with survives("three in a row for the second time") as seen:
        seen.append("exit 1 with the step")
        bad = set(range(7, 13))
        for _ in range(2):
            with pytest.raises(
                FloatingPointError,
                match=r"step 12: loss nan.*second time, 3 steps in a row have a loss or gradient that is not finite",
            ):
                trained(tmp_path, bad)
            assert flags(tmp_path).count((9, "rolled_back")) == 1
            assert len(flags(tmp_path)) == 7


@pytest.mark.slow
def test_where_a_stop_has_pushed_the_good_checkpoint_out_the_run_stops(trained, tmp_path, survives):
    """It must not go on from other parameters than a run that nobody stopped."""
    with survives("three in a row, the good checkpoint let go since") as seen:
        seen.append("exit 1 with the step")
        with pytest.raises(
            FloatingPointError, match=r"no checkpoint of step 5 exists to roll back to"
        ):
            trained(tmp_path, {7, 8, 9}, told=[6, 8], eval_every=4)


@pytest.mark.slow
def test_without_a_checkpoint_before_the_run_stops(trained, tmp_path, survives):
    with survives("three in a row before the first checkpoint") as seen:
        seen.append("exit 1 with the step")
        with pytest.raises(
            FloatingPointError, match=r"steps 2 to 4: .*no checkpoint was due before"
        ):
            trained(tmp_path, {2, 3, 4})


@pytest.mark.slow
def test_stop_ends_the_run_at_the_step_and_a_resume_may_skip_it(trained, tmp_path, survives):
    with survives('a loss that is no number, `train.on_nonfinite = "stop"`') as seen:
        seen.append("exit 1 with the step; a resume may skip it")
        with pytest.raises(FloatingPointError, match=r"step 7: .*step 5 is saved.*flagged_batches"):
            trained(tmp_path, {7}, on_nonfinite="stop")
        assert max(saved_steps(tmp_path)) == 5
        trained(tmp_path, {7})
        assert flags(tmp_path) == [(7, "nonfinite")]


@pytest.mark.slow
def test_a_spike_is_reported_and_changes_nothing(
    trained, clean, tmp_path, capsys, monkeypatch, survives
):
    """Every loss is above a thousandth of the median. The clock goes back an hour a look, too."""
    fault = "a spike of the loss, while the clock goes back an hour at each look"
    with survives(fault) as seen:
        seen.append("reported, no rate below 0")
        assert not (clean[0] / "flagged_batches.jsonl").exists()
        clock = [2e9]

        def backwards():
            clock[0] -= 3600
            return clock[0]

        monkeypatch.setattr(time, "time", backwards)
        states = trained(tmp_path, spike_factor=1e-3)
        assert same(states[12], clean[1][12])
        assert flags(tmp_path) == [(s, "spike") for s in range(SPIKE_LEAST + 1, 13)]
        err = capsys.readouterr().err
        assert (
            err.count(f"warning: step {SPIKE_LEAST + 1}: the loss is")
            == err.count("median of the last")
            == 1
        )
        for line in steps_of(tmp_path).values():
            rates = [v for k, v in line.items() if k.startswith("timing/")]
            assert rates and all(0 <= v < math.inf for v in rates)


@pytest.mark.parametrize("collapsed", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_one_answer_for_all_is_said_in_one_line(
    tmp_path, delivery_data_dir, settings, capsys, monkeypatch, survives, collapsed
):
    run = assemble(TrainConfig(**settings), tmp_path, delivery_data_dir)
    decode = LabelDecoder.__call__

    def answers(self, params, rows, on_progress=None):
        decoded = decode(self, params, rows, on_progress)
        answer = [run.data.vocabulary.encode(x) for x in ("by boat", "by air")]
        decoded.ids[:] = [answer[not collapsed and i == 7] for i in range(len(rows))]
        return decoded

    monkeypatch.setattr(LabelDecoder, "__call__", answers)
    with survives("collapse" if collapsed else "collapse but for one answer") as seen:
        seen.append("said in one line" if collapsed else "not taken for one")
        metrics = run.validator.compute(run.initial_state().params)
        assert metrics["eval/validation/collapsed"] == collapsed
        count = capsys.readouterr().err.count(
            "warning: all 500 answers in validation are 'by boat'"
        )
        assert count == collapsed


@pytest.mark.parametrize(
    "changes,named",
    [
        ({"on_nonfinite": "skp"}, "did you mean 'skip'"),
        ({"max_consecutive_nonfinite": 0}, "max_consecutive_nonfinite"),
        ({"spike_factor": -1.0}, "spike_factor"),
        ({"grace_secs": math.nan}, "grace_secs"),
    ],
)
def test_settings_know_their_ranges(settings, changes, named):
    with pytest.raises(InputError, match=named):
        TrainConfig(**settings | changes)
