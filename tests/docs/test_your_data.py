"""Runs docs/guide/your-data.md and docs/how-to/tasks-in-code.md: their files are written, their commands are typed."""

import json
import os
import pathlib
import re
import subprocess
import sys

import pytest

from stepdistill_jax.commands.main import main
from stepdistill_jax.data.prepared import open_prepared

DOCS = pathlib.Path(__file__).parents[2] / "docs"
PAGES = [DOCS / "guide" / "your-data.md", DOCS / "how-to" / "tasks-in-code.md"]
TEXT = "\n".join(page.read_text(encoding="utf-8") for page in PAGES)
FILE = re.compile(r"^`([\w./]+)`:\n\n```\w+\n(.*?)^```$", re.MULTILINE | re.DOTALL)
SHELL = re.compile(r"^```sh\n(.*?)^```$", re.MULTILINE | re.DOTALL)
SHORT = ["TRAIN_STEPS=2", "EVAL_EVERY=2", "CHECKPOINT_EVERY=2", "BATCH_SIZE=2"]
WAYS = {"jsonl": 0, "csv": 1, "add_task": 2, "seqio": 3, "mixture": 4, "metrics": 5}


def files():
    return dict(FILE.findall(TEXT))


@pytest.fixture(scope="module")
def reader(tmp_path_factory):
    """The folder of someone who has typed in every file of the page."""
    folder = tmp_path_factory.mktemp("reader")
    for name, text in files().items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text, encoding="utf-8")
    return folder


@pytest.fixture
def typed(reader, monkeypatch, capsys):
    """Runs a command line of the page in the reader's folder; the JSON that it ends with.

    In this process, which need not import TensorFlow for each; the folder is not on its path.
    """
    monkeypatch.chdir(reader)
    monkeypatch.setenv("STEPDISTILL_DATA_DIR", str(reader / "data"))
    monkeypatch.setattr(sys, "path", [folder for folder in sys.path if folder])

    def run(line, *more):
        program, *argv = line.split()
        assert program == "stepdistill"
        code = main([*argv, *more, "--json"])
        out, err = capsys.readouterr()
        assert code == 0, err
        return json.loads(out.splitlines()[-1])

    return run


@pytest.fixture
def prepared(reader, typed):
    """Types the page's `prepare` lines for a way, once."""

    def run(way):
        for line in commands(way):
            name = re.search(r"^stepdistill prepare .*--name (\w+)", line)
            if name and not (reader / "data" / name[1] / "dataset.json").exists():
                typed(line)

    return run


def typed_into_a_shell(reader, line, *more):
    """The same in a process of its own, with one device."""
    program, *argv = line.split()
    assert program == "stepdistill"
    environment = {
        **os.environ,
        "STEPDISTILL_DATA_DIR": str(reader / "data"),
        "XLA_FLAGS": os.environ["XLA_FLAGS_OF_ONE_DEVICE"],
    }
    done = subprocess.run(
        [sys.executable, "-m", "stepdistill_jax", *argv, *more, "--json"],
        cwd=reader,
        env=environment,
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def command_of(way, name):
    (found,) = [line for line in commands(way) if line.split()[1] == name]
    return found


def commands(way):
    return SHELL.findall(TEXT)[WAYS[way]].splitlines()


@pytest.mark.slow
@pytest.mark.parametrize("way", ["jsonl", "add_task", "seqio", "mixture"])
def test_each_way_shows_its_rows_as_the_page_says(typed, prepared, way):
    inspect = command_of(way, "inspect")
    prepared(way)
    found = typed(inspect, "--rows", "99")
    shown = {(s["objective"], s["input"], s["target"]) for row in found["shown"] for s in row}
    want = {
        "jsonl": {
            ("label", "predict: my parcel is late", "delivery"),
            ("rationale", "explain: my parcel is late", "a late parcel is a matter of transport"),
            ("label", "predict: the courier was rude", "delivery"),
        },
        "add_task": {
            ("label", "predict: sky by day", "blue"),
            ("rationale", "explain: sky by day", "air scatters short waves most"),
            ("label", "predict: coal", "black"),
        },
        "seqio": {("label", "1 + 1", "2"), ("label", "2 + 3", "5")},
        "mixture": {
            ("label", "predict: whale", "mammal"),
            ("rationale", "explain: trout", "it breathes with gills"),
        },
    }[way]
    assert want <= shown
    absent = {(o, i) for o, i, _ in shown}
    assert ("rationale", "explain: the courier was rude") not in absent
    assert ("rationale", "explain: coal") not in absent


@pytest.mark.slow
def test_csv_and_lists_of_dicts_are_prepared_as_the_page_says(reader, typed):
    found = typed(commands("csv")[0])
    assert sum(figures["rows"] for figures in found["splits"].values()) == 3
    dataset = open_prepared("parts", reader / "data")
    rows = {e.id: e for split in dataset.splits for e in dataset.examples(split)}
    assert rows["p2"].input == 'even, and "as new"' and rows["p2"].rationale == ""

    (code,) = re.findall(r"```python\n(from stepdistill_jax.data import .*?)```", TEXT, re.S)
    exec(code, {})
    dataset = open_prepared("tickets_in_memory", reader / "data")
    labels = {e.label for split in dataset.splits for e in dataset.examples(split)}
    assert labels == {"delivery", "billing"}


def test_the_task_in_code_takes_under_25_lines():
    assert len(files()["my_tasks.py"].splitlines()) < 25


@pytest.mark.slow
@pytest.mark.parametrize("way", ["jsonl", "add_task", "seqio", "mixture"])
def test_each_way_trains(reader, prepared, way):
    prepared(way)
    overrides = [argument for setting in SHORT for argument in ("--set", setting)]
    found = typed_into_a_shell(reader, command_of(way, "train"), *overrides)
    assert found["step"] == 2
    assert found["loss/label"] > 0
    assert ("loss/rationale" in found) == (way != "seqio")


@pytest.mark.slow
def test_metrics_of_ones_own_are_in_training_and_evaluation(reader):
    train, evaluate = commands("metrics")
    overrides = [argument for setting in SHORT for argument in ("--set", setting)]
    trained = typed_into_a_shell(reader, train, *overrides)
    assert 0 <= trained["eval/validation/sour_f1"] <= 1
    found = typed_into_a_shell(reader, evaluate)
    assert found["metrics"] == {
        name: trained[f"eval/validation/{name}"] for name in ("sour_f1", "predicted_sour")
    }
