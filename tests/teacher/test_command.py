"""The command line: its flags, what it prints, and its exit codes."""

import json
import os
import pathlib
import re
import subprocess
import sys
import tomllib

import pytest

from stepdistill_jax.commands.main import main
from stepdistill_jax.teacher import prompts
from stepdistill_jax.teacher.stub_server import Reply, StubServer

ROOT = pathlib.Path(__file__).parents[2]


@pytest.fixture
def typed(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    rows = [{"input": f"Is parcel {i} late?", "label": "yes"} for i in range(30)]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def run(*argv, reply=None):
        with StubServer(*([reply] if reply else [])).serve() as server:
            argv = [str(tmp_path / "in.jsonl"), str(tmp_path / "out.jsonl"), *argv]
            model = ["--model", "stub", "--base-url", server.url]
            code = main(["annotate", *argv, "--task", "generic", *model, "--json"])
        out, err = capsys.readouterr()
        return code, out, err

    return run


def test_the_last_line_is_json_and_the_table_names_each_defect(typed, tmp_path):
    rows = [{"input": f"Is parcel {i} late?", "label": "yes" if i < 20 else ""} for i in range(30)]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def reply(request):
        vague = "parcel 4 " in request["messages"][0]["content"]
        return Reply("Hm." if vague else "Late. So the answer is yes.")

    code, out, err = typed("--choices", "yes,no", "--price-input", "1", "--price-output", "2",
                           reply=reply)  # fmt: skip
    assert code == 0
    result = json.loads(out.splitlines()[-1])
    assert (result["rows"], result["with_rationale"], result["asked_again"]) == (30, 29, 1)
    assert result["teacher_accuracy"] == pytest.approx(19 / 20)
    assert "19 │ 95.00% │ of 20 rows with a gold label" in re.sub(" +", " ", out)
    assert "no_answer" in out and "first: row 5" in " ".join(out.split())
    assert "30 rows, 30 answers to request" in err and "cost about" in err
    assert "30/30" in err and "cost 0.0" in err


def test_a_dry_run_prints_the_prompt_and_sends_nothing(typed, tmp_path):
    code, out, _ = typed("--dry-run", "--instructions", "Say yes or no.")
    assert code == 0
    assert out.startswith("Say yes or no.\n")
    assert "Q: Is parcel 0 late?\nA:\n" in out
    assert "nothing was sent" in out and "4 characters per token" in out
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in.jsonl"]


def test_a_cap_ends_with_1_and_says_that_the_command_goes_on(typed):
    code, out, err = typed("--max-tokens-total", "3000", "--concurrency", "2")
    assert code == 1
    assert json.loads(out.splitlines()[-1])["stopped"]
    assert re.search(
        r"stopped: the next request may need 1,0\d\d tokens, more than this run has left of"
        r" --max-tokens-total 3000; .*; run the same command again to continue",
        err,
    )
    assert "asked again" not in out
    assert "Traceback" not in err


@pytest.mark.parametrize(
    ("limit", "needs"),
    [
        (["--max-tokens-total", "500"], "may need 1,081 tokens"),
        (
            ["--max-cost", "0.001", "--price-input", "1", "--price-output", "2"],
            "may cost 0.002105",
        ),
    ],
    ids=["tokens", "cost"],
)
def test_a_cap_below_one_request_ends_with_2_and_does_not_advise_the_same_again(
    typed, limit, needs
):
    code, _, err = typed(*limit)
    assert code == 2
    assert err.splitlines()[-1] == (
        f"stepdistill: error: {' '.join(limit[:2])}: the next request {needs}; raise the limit, or lower"
        " --max-tokens"
    )


def test_a_file_without_a_usable_answer_ends_with_1_and_names_its_defects(typed, tmp_path):
    rows = "".join(json.dumps({"input": f"Is crate {i} late?"}) + "\n" for i in range(5))
    (tmp_path / "in.jsonl").write_text(rows)
    code, out, err = typed(reply=lambda _: Reply(""))
    assert code == 1
    assert "stopped: none of the 5 rows got a usable answer; see" in err
    assert "out.defects.jsonl.partial" in err and "empty" in out
    assert json.loads(out.splitlines()[-1])["defects"] == {"empty": 5}


def test_a_refusal_ends_with_2_in_one_line(typed):
    reply = lambda _: Reply(status=404, body=b'{"error": {"message": "no such model"}}')  # noqa: E731
    code, _, err = typed(reply=reply)
    assert code == 2
    assert err.splitlines()[-1].startswith("stepdistill: error: the server refuses")
    assert "Traceback" not in err


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["--parameter", "top_p"], "NAME=JSON"),
        (["--choices", "a,,b"], "--choices"),
        (["--instructions", "@nowhere.txt"], "--instructions @nowhere.txt"),
        (["--batch-file", "send", "x"], "--batch-file"),
        (["--temperature", "warm"], "--temperature"),
    ],
)
def test_bad_flags_end_with_2_and_are_named(typed, argv, says):
    code, _, err = typed(*argv)
    assert code == 2
    assert says in err.splitlines()[-1]


def test_choices_may_be_a_json_list_and_parameters_any_json(typed):
    seen = []

    def reply(request):
        seen.append(request)
        return Reply("Hm. So the answer is yes, sir.")

    argv = ["--choices", '["yes, sir", "no"]', "--parameter", 'kwargs={"thinking": false}']
    code, out, _ = typed(*argv, "--temperature", "default", reply=reply)
    assert code == 0
    assert seen[0]["kwargs"] == {"thinking": False}
    assert "temperature" not in seen[0]
    assert json.loads(out.splitlines()[-1])["with_rationale"] == 30


def test_the_teacher_starts_without_jax_torch_or_a_client():
    code = (
        "import sys, stepdistill_jax.teacher as t, stepdistill_jax.commands.annotate;"
        "print([m for m in ('jax', 'torch', 'transformers', 'openai', 'tensorflow') if m in"
        " sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_wheel_carries_every_template_and_exemplar():
    """What setuptools would pack, without building it; tests/test_packaging.py builds one."""
    from setuptools import Distribution
    from setuptools.command.build_py import build_py

    files = {p.name for p in prompts.TEMPLATES.iterdir()}
    assert files == {f"{t}.jinja" for t in prompts.TASKS} | {
        f"{t}.jsonl" for t in prompts.TASKS if t != "generic"
    }
    tool = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    here = pathlib.Path.cwd()
    os.chdir(ROOT)
    try:
        distribution = Distribution(
            {
                "packages": ["stepdistill_jax.teacher"],
                "package_data": tool.get("package-data", {}),
            }
        )
        command = build_py(distribution)
        command.finalize_options()
        command.manifest_files = {}
        found = command.find_data_files("stepdistill_jax.teacher", "stepdistill_jax/teacher")
    finally:
        os.chdir(here)
    assert {pathlib.Path(f).name for f in found} >= files
