"""Runs docs/how-to/seqio.md: its files are written, its commands are typed into a shell."""

import ast
import json
import os
import pathlib
import re
import subprocess
import sys

import pytest

pytestmark = pytest.mark.slow  # each command is a Python that imports TensorFlow
PAGE = pathlib.Path(__file__).parents[2] / "docs" / "how-to" / "seqio.md"
FILE = re.compile(r"^`([\w./]+)`:\n\n```\w+\n(.*?)^```$", re.MULTILINE | re.DOTALL)
SHELL = re.compile(r"^```sh\n(.*?)^```$", re.MULTILINE | re.DOTALL)
PROGRAMS = {"stepdistill": ["-m", "stepdistill_jax"], "python": []}


@pytest.fixture(scope="module")
def printed(tmp_path_factory):
    """Standard output of each command of the page, typed in its order; the folder of its reader."""
    folder = tmp_path_factory.mktemp("reader")
    page = PAGE.read_text(encoding="utf-8")
    for name, text in FILE.findall(page):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text, encoding="utf-8")
    found = {}
    for line in "".join(SHELL.findall(page)).splitlines():
        program, *argv = line.split()
        done = subprocess.run(
            [sys.executable, *PROGRAMS[program], *argv],
            cwd=folder,
            env={**os.environ, "STEPDISTILL_DATA_DIR": str(folder / "data")},
            capture_output=True,
            text=True,
            timeout=280,
        )
        assert done.returncode == 0, done.stderr
        found[line] = done.stdout.splitlines()
    return found, folder


def test_every_block_is_a_file_or_a_command(printed):
    page = PAGE.read_text(encoding="utf-8")
    assert page.count("```\n") == len(FILE.findall(page)) + len(SHELL.findall(page))
    assert len(printed[0]) == 5


def test_seqio_reads_a_prepared_dataset(printed):
    label, rationale = printed[0]["python read_with_seqio.py"]
    features = "['decoder_input_tokens', 'decoder_loss_weights', 'decoder_target_tokens', 'encoder_input_tokens']"
    assert label.startswith(features) and rationale.startswith(features)
    assert 0 < int(label.split()[-1]) < int(rationale.split()[-1])


def test_seqios_evaluator_counts_the_answers(printed):
    found, folder = printed
    rows = (folder / "data" / "delivery" / "validation.jsonl").read_text().splitlines()
    labels = [json.loads(row)["label"] for row in rows]
    (line,) = found["python evaluate_with_seqio.py"]
    accuracy = ast.literal_eval(line)["delivery_label"]["accuracy"]
    assert accuracy == pytest.approx(labels.count("smooth") / len(labels))


def test_a_mixture_of_datasets_is_read_by_its_rates(printed):
    rates, rows = printed[0]["python both_tasks.py"]
    assert ast.literal_eval(rates) == {
        "delivery_label": 0.5,
        "delivery_rationale": 0.5,
        "tickets_label": 1.5,
        "tickets_rationale": 1.5,
    }
    assert int(rows.removesuffix(" rows")) > 0
