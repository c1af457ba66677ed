"""The command line of `prepare`: what it prints, its JSON, and its exit codes."""

import argparse
import json
import shlex
import subprocess
import sys

import pytest

from stepdistill_jax.commands import prepare as command
from stepdistill_jax.commands.arguments import parse_map
from stepdistill_jax.commands.main import main
from stepdistill_jax.errors import InputError


def _run(*arguments, cwd=None):
    return subprocess.run(
        [sys.executable, "-m", "stepdistill_jax", "prepare", *map(str, arguments)],
        capture_output=True,
        text=True,
        cwd=cwd,
    )


def _arguments(*arguments):
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    return parser.parse_args([str(argument) for argument in arguments])


@pytest.fixture
def rows(tmp_path):
    path = tmp_path / "rows [draft].jsonl"  # brackets are markup to rich
    path.write_text(
        "".join(
            json.dumps(
                {"question": f"is {i} even ?", "answer": "no" if i % 2 else "yes"}
                | {"choices": ["yes", "no"], "llm_label": "maybe" if i == 3 else "yes"}
            )
            + "\n"
            for i in range(40)
        )
    )
    return path


def test_a_run_ends_with_one_json_object_and_keeps_quiet_beside_its_table(rows, tmp_path):
    done = _run(
        "jsonl", "--source", rows, "--name", "mine", "--map", "input=question,label=answer",
        "--data-dir", tmp_path / "data", "--json",
    )  # fmt: skip
    assert done.returncode == 0
    # nothing of TensorFlow's: one line of progress
    assert [line.split("  ")[0] for line in done.stderr.splitlines()] == [
        "writing mine, rows: 40/40"
    ]
    *_, next_command, result = done.stdout.splitlines()
    assert next_command == f"next: stepdistill inspect mine --data-dir {tmp_path / 'data'}"
    result = json.loads(result)
    assert set(result["splits"]) == {"train", "validation", "test"}
    assert sum(figures["rows"] for figures in result["splits"].values()) == 40
    counts = [f"{s} has {result['splits'][s]['rows']}" for s in ("validation", "test")]
    assert f"too few rows to measure accuracy: {', '.join(counts)}" in " ".join(done.stdout.split())
    assert (tmp_path / "data" / "mine" / "1.0.0").is_dir()
    assert "Downloading" not in done.stdout


def test_the_next_command_reads_rows_that_only_the_teacher_has_labelled(tmp_path, capfd):
    rows = [{"input": f"parcel {i}", "rationale": "r", "llm_label": "late"} for i in range(40)]
    source = tmp_path / "rows.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    argv = ["prepare", "jsonl", "--source", source, "--name", "mine", "--data-dir", tmp_path]
    assert main([str(a) for a in argv]) == 0
    *_, line = capfd.readouterr().out.splitlines()
    assert line.endswith("# no row of train has a gold label")
    _, _, *argv = shlex.split(line, comments=True)
    assert "LABEL_SOURCE=gold_else_llm" in argv
    assert main(argv) == 0


def test_the_table_shows_each_split_with_its_defects_and_where_the_first_stands(
    rows, tmp_path, capsys
):
    result = command.run(
        _arguments(
            "jsonl", "--source", rows, "--name", "mine", "--data-dir", tmp_path / "data",
            "--map", "input=question,label=answer",
        )
    )  # fmt: skip
    text = capsys.readouterr().out
    for split, figures in result["splits"].items():
        assert f"{split}: {figures['rows']} rows" in text
    (split,) = [s for s, f in result["splits"].items() if f["defects"]]
    assert result["splits"][split]["first_defects"] == {
        "label_not_a_choice": "rows [draft].jsonl:4"
    }
    assert "label_not_a_choice" in text
    assert "[draft].jsonl:4" in " ".join(text.split())
    assert "note: " in text and "split by hashed ids" in " ".join(text.split())
    assert "labels: 2" in text
    for label in ("yes", "no"):
        (line,) = [line for line in text.splitlines() if f"│ {label} " in line]
        assert [int(cell) for cell in line.split("│")[2:-1]] == [
            figures["labels"].get(label, 0) for figures in result["splits"].values()
        ]


def test_bad_rows_are_a_table_and_one_line_and_exit_2(rows, tmp_path, capfd, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    lines = rows.read_text().splitlines()
    lines[6], lines[9] = lines[6][:-1], '{"question": "is 9 even ?", "answer": ""}'
    rows.write_text("\n".join(lines))
    argv = [
        "prepare",
        "jsonl",
        "--source",
        str(rows),
        "--name",
        "mine",
        "--data-dir",
        str(tmp_path),
    ]
    argv += ["--map", "input=question,label=answer"]
    assert main([*argv, "--json"]) == 2
    out, err = capfd.readouterr()
    assert json.loads(out)["error"].startswith("2 of 40 rows cannot be used, the first at ")
    *table, line = err.splitlines()
    assert table[0].strip() == "bad rows: 2" and max(map(len, table)) <= 80
    cells = [[cell.strip() for cell in row.split("│")[1:-1]] for row in table if row[0] == "│"]
    assert ["rows [draft].jsonl", "10", "the field 'answer' is empty"] in cells
    assert ["rows [draft].jsonl", "7"] in [row[:2] for row in cells]
    assert f"all are listed in {tmp_path}/mine.defects.jsonl" in line
    assert line.endswith("Correct them, or pass --on-error skip to skip them")


def test_what_is_odd_is_said_while_a_bad_row_stops_it(tmp_path, capfd):
    rows = [{"input": f"q{i}", "label": "Yes" if i == 4 else "yes"} for i in range(30)]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) + "{}\n")
    argv = ["prepare", "jsonl", "--source", str(path), "--name", "mine"]
    assert main([*argv, "--data-dir", str(tmp_path / "data")]) == 2
    err = " ".join(capfd.readouterr().err.split())
    assert err.startswith("warning: some labels differ only in case or blanks: 'yes' in 29 rows")
    assert f"error: {path}:31: no field 'input'" in err


def test_rows_of_other_datasets_are_not_skipped(tmp_path):
    with pytest.raises(InputError, match="`on_error`: only `prepare jsonl` can skip rows, not cqa"):
        command.run(_arguments("cqa", "--source", tmp_path, "--on-error", "skip"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("cqa",), "pass the folder of its files"),
        (("cqua", "--source", "."), "did you mean 'cqa'"),
        (("cqa", "--source", "absent"), "absent: no such folder"),
    ],
)
def test_bad_input_is_one_line_and_exit_2(arguments, message, tmp_path):
    done = _run(*arguments, "--data-dir", tmp_path / "data", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert message in done.stderr and len(done.stderr.splitlines()) == 1


def test_broken_json_names_its_line_and_exits_with_2(rows, tmp_path):
    lines = rows.read_text().splitlines()
    lines[6] = lines[6][:-1]
    rows.write_text("\n".join(lines))
    done = _run("jsonl", "--source", rows, "--name", "mine", "--map",
                "input=question,label=answer", "--data-dir", tmp_path / "data")  # fmt: skip
    assert done.returncode == 2
    assert f"{rows}:7: broken JSON" in done.stderr and len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    ("text", "field_map"),
    [
        (None, {}),
        ("input=question", {"input": "question"}),
        ("input = question , label=answer", {"input": "question", "label": "answer"}),
    ],
)
def test_a_map_is_parsed(text, field_map):
    assert parse_map(text) == field_map


@pytest.mark.parametrize("text", ["input", "input=", "=question", "input=a,input=b"])
def test_a_bad_map_is_an_input_error(text):
    with pytest.raises(InputError, match="--map"):
        parse_map(text)
