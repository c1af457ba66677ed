"""Runs docs/how-to/annotating.md: from questions to a prepared dataset, with the stub server as the teacher."""

import json
import pathlib
import re
import shlex

import pytest

from stepdistill_jax.commands.annotate import add_arguments
from stepdistill_jax.commands.arguments import Parser, add_common_arguments
from stepdistill_jax.commands.main import main
from stepdistill_jax.teacher.answers import KINDS
from stepdistill_jax.teacher.stub_server import PORT, StubServer

PAGE = pathlib.Path(__file__).parents[2] / "docs" / "how-to" / "annotating.md"
FILE = re.compile(r"^`([\w./]+)`[^\n]*:\n\n```\w+\n(.*?)^```$", re.MULTILINE | re.DOTALL)
SHELL = re.compile(r"^```sh\n(.*?)^```$", re.MULTILINE | re.DOTALL)
ROWS = 200


def commands():
    lines = "".join(SHELL.findall(PAGE.read_text(encoding="utf-8"))).splitlines()
    return [line for line in lines if line.startswith("stepdistill ")]


@pytest.fixture
def typed(tmp_path, monkeypatch, capsys):
    """Runs a line of the page in the folder of someone who made its files; (JSON, all output)."""
    files = dict(FILE.findall(PAGE.read_text(encoding="utf-8")))
    shown = [json.loads(line) for line in files["tickets.jsonl"].splitlines()]
    rows = [
        row | {"id": f"t{i}", "input": f"{row['input']} , number {i}"}
        for i in range(1, ROWS + 1)
        for row in [shown[i % len(shown)]]
    ]
    (tmp_path / "tickets.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "exemplars.jsonl").write_text(files["exemplars.jsonl"])
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("STEPDISTILL_DATA_DIR", str(tmp_path / "data"))
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)

    def run(line, *more):
        code = main([*shlex.split(line)[1:], *more, "--json"])
        out, err = capsys.readouterr()
        assert code == 0, err
        return json.loads(out.splitlines()[-1]), out

    return run


def test_the_estimate_of_the_page_needs_neither_key_nor_server(typed):
    dry = next(line for line in commands() if line.endswith("--dry-run"))
    result, out = typed(dry)
    assert result["rows"] == result["answers"] == ROWS
    tokens = (result["prompt_tokens"], result["completion_tokens"])
    assert result["cost"] == pytest.approx((0.15 * tokens[0] + 0.6 * tokens[1]) / 1e6)
    assert 100 * ROWS < sum(tokens) < 500 * ROWS
    assert out.startswith("Which team answers this ticket?")
    assert "Q: I was billed for a gift\nChoices:\n- delivery\n- billing\nA: The writer" in out


@pytest.fixture
def walk():
    """annotate, prepare, train, predict: the lines that are typed one after another."""
    lines = commands()
    start = next(i for i, line in enumerate(lines) if f"127.0.0.1:{PORT}" in line)
    found = lines[start : start + 4]
    assert [line.split()[1] for line in found] == ["annotate", "prepare", "train", "predict"]
    return found


def annotate(typed, line):
    """Types the line with a free port instead of the page's."""
    with StubServer().serve() as server:
        return typed(line.replace(f"http://127.0.0.1:{PORT}/v1", server.url))[0]


def test_questions_become_a_prepared_dataset(typed, walk, tmp_path):
    result = annotate(typed, walk[0])
    assert (result["rows"], result["with_rationale"], result["defects"]) == (ROWS, ROWS, {})
    prepared, out = typed(walk[1])
    assert "published" not in out
    splits = prepared["splits"]
    assert sum(split["rows"] for split in splits.values()) == ROWS
    assert sum(split["with_rationale"] for split in splits.values()) == ROWS
    accuracy = sum(s["rows"] * s["teacher_accuracy"] for s in splits.values()) / ROWS
    assert accuracy == pytest.approx(result["teacher_accuracy"])


@pytest.mark.slow
def test_the_whole_walk_ends_in_predictions(typed, walk, tmp_path):
    annotate(typed, walk[0])
    typed(walk[1])
    steps = ("TRAIN_STEPS=2", "EVAL_EVERY=2", "CHECKPOINT_EVERY=2", "BATCH_SIZE=8")
    trained, _ = typed(walk[2], *(word for step in steps for word in ("--set", step)))
    assert trained["loss/rationale"] > 0
    predicted, _ = typed(walk[3])
    assert predicted["rows"] == ROWS
    lines = (tmp_path / "predictions.jsonl").read_text().splitlines()
    ids = [json.loads(line)["id"] for line in lines]
    assert ids == [f"t{i}" for i in range(1, ROWS + 1)]


def test_every_flag_of_the_page_exists():
    parser = Parser(prog="stepdistill annotate")
    add_arguments(parser)
    add_common_arguments(parser)
    flags = set(parser._option_string_actions) | {"--set", "--workdir", "--name", "--source"}
    assert set(re.findall(r"--[a-z][a-z-]+", PAGE.read_text(encoding="utf-8"))) <= flags
    for line in commands():
        if line.startswith("stepdistill annotate"):
            parser.parse_args(shlex.split(line)[2:])


def test_every_defect_of_the_page_exists():
    text = PAGE.read_text(encoding="utf-8")
    table = text[text.index("## Defects") :]
    first_cells = re.findall(r"^\| (`.*?`) \|", table, re.MULTILINE)
    names = {name for cell in first_cells for name in re.findall(r"`(\w+)`", cell)}
    assert len(names) > 10
    assert names <= set(KINDS)
