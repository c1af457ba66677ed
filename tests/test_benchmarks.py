"""The benchmarks run at a tiny size; what their figures are worth only a quiet machine can tell."""

import argparse
import importlib.util
import json
import os
import pathlib
import subprocess
import sys

import pytest

BENCHMARKS = pathlib.Path(__file__).parents[1] / "benchmarks"
SMALL = {
    "input": ["--seconds", "0.05", "--batch-size", "4"],
    "train": ["--size", "tiny", "--steps", "1", "--batch-size", "2", "--autocast"],
    "decode": ["--size", "tiny", "--rows", "6", "--batch-size", "4"],
}
UNITS = {"input": "rows_per_second", "train": "examples_per_second", "decode": "rows_per_second"}
PEERS = {
    "input": {"seqio", "sentencepiece"},
    "train": {"transformers", "transformers_bfloat16"},
    "decode": {
        "transformers",
        *("ctranslate2", "ours_ctranslate2", "ctranslate2_int8", "ours_ctranslate2_int8"),
    },
}


def run(name, *argv, environment=None):
    return subprocess.run(
        [sys.executable, BENCHMARKS / f"{name}_throughput.py", "--threads", "1", *argv],
        env={**os.environ, "XLA_FLAGS": "", **(environment or {})},
        capture_output=True,
        text=True,
        timeout=280,
    )


@pytest.fixture
def timing():
    spec = importlib.util.spec_from_file_location("timing_under_test", BENCHMARKS / "timing.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


@pytest.mark.slow
@pytest.mark.parametrize("name", SMALL)
def test_each_benchmark_ends_with_figures_of_ours_and_of_its_peers(name, delivery_data_dir):
    done = run(name, "--data-dir", delivery_data_dir, "--rounds", "1", "--json", *SMALL[name])
    assert done.returncode == 0, done.stderr
    *table, last = done.stdout.splitlines()
    result = json.loads(last)
    unit = UNITS[name]
    assert result["peers"].keys() == result["ratio"].keys() == PEERS[name]
    for peer, figures in result["peers"].items():
        assert figures[unit] > 0
        assert result["ratio"][peer] == pytest.approx(result["ours"][unit] / figures[unit])
        assert any(line.startswith(peer) for line in table)
    assert result["threads"] == 1
    assert result["device"].startswith("cpu")


@pytest.mark.parametrize("name", ["train", "decode"])
def test_without_torch_one_line_says_what_to_install(name, tmp_path):
    (tmp_path / "torch.py").write_text("raise ImportError(\"No module named 'torch'\")")
    done = run(name, environment={"PYTHONPATH": str(tmp_path)})
    assert done.returncode == 2
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert "torch" in line
    assert "stepdistill-jax[bench]" in line


def test_more_threads_than_cores_are_refused():
    done = run("decode", "--threads", "4096")
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1
    assert "--threads 4096" in done.stderr


def test_contenders_take_turns_and_the_warm_up_is_not_counted(timing):
    turns = []

    def contender(name):
        def of_round(number):
            turns.append((number, name, "prepared"))

            def work():
                turns.append((number, name, "worked"))
                return 7

            return work

        return of_round

    rates = timing.alternate({name: contender(name) for name in ("ours", "peer")}, rounds=2)
    order = [(0, "ours"), (0, "peer"), (1, "peer"), (1, "ours"), (2, "ours"), (2, "peer")]
    assert turns == [(*turn, what) for turn in order for what in ("prepared", "worked")]
    assert {name: len(r) for name, r in rates.items()} == {"ours": 2, "peer": 2}
    assert all(rate > 0 for r in rates.values() for rate in r)


def report(timing, rates, *, others=0.0, json=False):
    """The figures of a run of ten seconds of which ours worked four, others so many."""
    began = timing.Clock.now()
    ended = timing.Clock(began.wall + 10, (began.machine or 0.0) + 4 + others, began.own + 4)
    began = timing.Clock(began.wall, began.machine or 0.0, began.own)
    timing.Clock = type("Stopped", (), {"now": staticmethod(lambda: ended)})
    args = argparse.Namespace(threads=2, rounds=3, json=json, began=began, load=0.0, seed=0)
    timing.report(args, rates, unit="rows_per_second")


def test_the_ratio_is_of_medians_and_above_1_where_ours_is_faster(timing, capsys):
    report(timing, {"ours": [30.0, 90.0, 60.0], "peer": [1.0, 20.0, 1000.0]}, json=True)
    *table, last = capsys.readouterr().out.splitlines()
    result = json.loads(last)
    assert result["ours"]["rows_per_second"] == 60.0
    assert result["peers"]["peer"]["rows_per_second"] == 20.0
    assert result["ratio"] == {"peer": 3.0}
    assert "3.00x" in table[-1]
    assert result["busy_cores"] == 0.0
    assert not any("do not quote" in line for line in table)


def test_figures_of_a_machine_that_others_kept_busy_are_marked(timing, capsys):
    report(timing, {"ours": [1.0], "peer": [1.0]}, others=15.0)
    assert "others kept 1.5 cores busy" in capsys.readouterr().out
