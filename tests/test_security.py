"""What the package never does, and that no key and no code gets where it should not be.

docs/lab/security.md says what is trusted; tests/faults/test_bad_*.py feed the readers.
"""

import ast
import json
import os
import pathlib
import re
import stat
import subprocess
import sys
import tomllib

import pytest

import stepdistill_jax
from stepdistill_jax.data import arithmetic
from stepdistill_jax.errors import InputError

ROOT = pathlib.Path(__file__).parent.parent
PACKAGE = pathlib.Path(stepdistill_jax.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))

# dotted name of a call -> None where it is never right, else the keyword with the only value that is
CALLS = {
    **dict.fromkeys(("eval", "exec", "compile", "__import__", "breakpoint"), None),
    **dict.fromkeys(("os.system", "os.popen", "os.tempnam", "tempfile.mktemp"), None),
    **dict.fromkeys(("yaml.load", "yaml.unsafe_load", "shutil.unpack_archive"), None),
    "torch.load": ("weights_only", True),
    "np.load": ("allow_pickle", False),
    "numpy.load": ("allow_pickle", False),
}
METHODS = {"extractall", "extract", "run_line_magic"}  # of an archive: path traversal
KEYWORDS = {
    "shell": True,
    "verify": False,
    "allow_pickle": True,
    "weights_only": False,
    "trust_remote_code": True,
}
MODULES = {
    *("pickle", "cPickle", "_pickle", "marshal", "shelve", "dill", "cloudpickle", "joblib"),
    *("telnetlib", "ftplib", "xml", "lxml", "code", "codeop", "pty"),
}
DEFAULT_IS_SAFE = {"np.load", "numpy.load"}  # since numpy 1.16.3

# rules of ruff's S (bandit's) that are off for the package, and why
IGNORED = {
    "S101": "asserts are for readers and for types; what is read is checked by InputError",
    "S603": "every subprocess is started from a list without a shell: git, and ourselves",
    "S607": "git is looked for on the PATH",
    "S311": "random numbers spread retries and draw batches, they keep no secret",
}
# lines where a rule is off, and why
SUPPRESSED = {
    ("teacher/cache.py", "S608"): "the table is one of two names in the code",
    ("teacher/prompts.py", "S701"): "prompts are plain text, not HTML",
}


def findings(tree: ast.AST) -> list[str]:
    """`LINE: WHAT` of each thing that the package must not do."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module or ""]
        else:
            names = []
        found += [f"{node.lineno}: import {n}" for n in names if n.split(".")[0] in MODULES]
        if isinstance(node, ast.Call):
            found += [f"{node.lineno}: {problem}" for problem in _problems(node)]
    return found


def _problems(call: ast.Call) -> list[str]:
    name = ast.unparse(call.func)
    given = {k.arg: getattr(k.value, "value", ast.unparse(k.value)) for k in call.keywords}
    problems = [f"{key}={value}" for key, value in KEYWORDS.items() if given.get(key) is value]
    if isinstance(call.func, ast.Attribute) and call.func.attr in METHODS:
        problems.append(name)
    if name in CALLS:
        rule = CALLS[name]
        safe = rule is not None and given.get(rule[0], rule[1] if name in DEFAULT_IS_SAFE else None)
        if rule is None or safe is not rule[1]:
            problems.append(name)
    return problems


def test_nothing_that_is_read_can_run():
    assert len(FILES) > 100
    found = [
        f"{file.relative_to(PACKAGE).as_posix()}:{finding}"
        for file in FILES
        for finding in findings(ast.parse(file.read_text("utf-8")))
    ]
    assert found == []


@pytest.mark.parametrize(
    "line",
    [
        "eval(x)",
        "exec('x')",
        "compile(x, '', 'eval')",
        "__import__(x)",
        "import pickle",
        "from pickle import loads",
        "import xml.etree.ElementTree",
        "os.system(x)",
        "yaml.load(x)",
        "torch.load(x)",
        "torch.load(x, weights_only=False)",
        "torch.load(x, weights_only=flag)",
        "np.load(x, allow_pickle=True)",
        "subprocess.run(x, shell=True)",
        "tarfile.open(x).extractall()",
        "archive.extract(member)",
        "tempfile.mktemp()",
        "AutoModel.from_pretrained(x, trust_remote_code=True)",
        "httpx.Client(verify=False)",
    ],
)
def test_the_walker_sees_what_must_not_be_there(line):
    assert findings(ast.parse(line))


def test_rules_of_ruff_that_are_off_are_those_with_a_reason():
    lint = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["tool"]["ruff"]["lint"]
    assert "S" in lint["select"]
    assert {rule for rule in lint["ignore"] if re.fullmatch(r"S\d+", rule)} == IGNORED.keys()
    off = {files for files, rules in lint["per-file-ignores"].items() if "S" in rules}
    assert off == {"tests/**", "benchmarks/**"}
    page = (ROOT / "docs" / "lab" / "security.md").read_text("utf-8")
    for rule in IGNORED:
        assert rule in page


def test_lines_where_a_rule_is_off_are_those_with_a_reason():
    found = {
        (file.relative_to(PACKAGE).as_posix(), rule)
        for file in FILES
        for rules in re.findall(r"noqa:([^#\n(]*)", file.read_text("utf-8"))
        for rule in re.findall(r"\bS\d+", rules)
    }
    assert found == SUPPRESSED.keys()
    blanket = [f for f in FILES if re.search(r"#\s*(noqa(?!:)|nosec)", f.read_text("utf-8"))]
    assert not blanket


def test_pins_are_of_the_index_alone():
    lines = (ROOT / "constraints.txt").read_text("utf-8").splitlines()
    pins = [line for line in lines if line and not line.startswith("#")]
    assert len(pins) > 100
    for pin in pins:
        assert re.match(r"[A-Za-z0-9._-]+(\[[\w,-]+\])?==[0-9][\w.!+]*( ;.*)?$", pin), pin
        assert not re.search(r"://|git\+|@ |^-", pin), pin


# text that is computed with


@pytest.mark.parametrize(
    "text",
    [
        "__import__('os').system('true')",
        "().__class__",
        "9**9**9**9",
        "9" * 5000,
        "(" * 1000 + "1" + ")" * 1000,
        "-" * 1999 + "1",
        "1e309",
        "1 if 1 else 2",
        "0x10",
        "1_000",
        "\N{ARABIC-INDIC DIGIT ONE} + 1",
        "1\0",
    ],
)
def test_arithmetic_computes_and_never_runs(text):
    value = arithmetic.evaluate(text)
    assert value is None or value in (1.0, -1.0)


# keys

KEY = "sk-secret-0a1b2c3d4e5f6a7b8c9d"


def replies():
    """Answers of a server that says the key back, in every place that is shown or kept."""
    from stepdistill_jax.teacher.stub_server import Reply

    said = f"Incorrect API key provided: {KEY}."
    told = json.dumps({"error": {"message": said, "type": KEY, "code": KEY}}).encode()
    return {
        "answer": Reply(f"{KEY} So the answer is yes."),
        "reason": Reply("So the answer is yes.", finish_reason=KEY),
        "refused": Reply(status=401, body=told),
        "bad request": Reply(status=400, body=told),
        "rate limit": Reply(status=429, body=told),
        "server error": Reply(status=500, body=told),
        "error in 200": Reply(body=told),
        "no JSON": Reply(body=f"<html>{KEY}</html>".encode()),
        "no completion": Reply(body=json.dumps({"choices": KEY}).encode()),
        "cut": Reply(body=told, cut=5),
        "redirect": Reply(status=302, headers={"Location": f"http://127.0.0.1:9/{KEY}"}),
    }


@pytest.mark.parametrize("case", replies())
def test_a_key_appears_in_no_file_and_no_line(tmp_path, monkeypatch, capfd, case):
    pytest.importorskip("openai")
    from stepdistill_jax.commands.main import main
    from stepdistill_jax.teacher.stub_server import StubServer

    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setattr("stepdistill_jax.teacher.client.RATE_LIMIT_PATIENCE", 0.0)
    source = tmp_path / "in.jsonl"
    source.write_text('{"input": "Is it late?", "label": "yes"}\n')
    reply = replies()[case]
    with StubServer(lambda request: reply).serve() as server:
        main(
            [
                *("annotate", str(source), str(tmp_path / "out.jsonl"), "--task", "generic"),
                *("--choices", "yes,no", "--model", "m", "--base-url", server.url),
                *("--attempts", "1", "--retries", "0", "--timeout", "5", "--debug", "--json"),
            ]
        )
    out, err = capfd.readouterr()
    assert KEY not in out + err
    files = [p for p in tmp_path.rglob("*") if p.is_file()]
    assert len(files) > 1 or case in ("refused", "bad request")
    for file in files:
        assert KEY.encode() not in file.read_bytes(), file


def test_a_key_in_the_environment_is_not_in_what_a_run_says_of_itself(monkeypatch):
    from stepdistill_jax.versions import version_block

    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    assert KEY not in json.dumps(version_block(), default=str)
    # run.json is made of these and of TrainConfig; nothing there reads the environment
    text = (PACKAGE / "training" / "provenance.py").read_text("utf-8")
    assert "environ" not in text and "getenv" not in text


# files


def test_files_have_the_users_own_permissions(tmp_path):
    """What is written follows the umask: nothing is made readable to more people than they said."""
    script = (
        "import os, sys, pathlib; os.umask(0o077); os.chdir(sys.argv[1])\n"
        "from stepdistill_jax.runtime.files import atomic_write, write_json\n"
        "from stepdistill_jax.teacher.cache import AnswerCache\n"
        "write_json('a/run.json', {}); AnswerCache('b/cache.sqlite').close()\n"
    )
    subprocess.run([sys.executable, "-c", script, str(tmp_path)], check=True, timeout=60)
    assert (tmp_path / "a/run.json").is_file() and (tmp_path / "b/cache.sqlite").is_file()
    for path in tmp_path.rglob("*"):
        assert not path.stat().st_mode & (stat.S_IRWXG | stat.S_IRWXO), path


def test_an_export_follows_no_link(tmp_path):
    from stepdistill_jax.inference.export import export

    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(InputError, match="is a file or link; choose a new folder"):
        export(tmp_path, tmp_path / "link", format="jax")
    assert os.listdir(tmp_path / "elsewhere") == []
