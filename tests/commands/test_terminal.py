"""Foreign text on a terminal: no sequence in it reaches the terminal as one."""

import ast
import io
import json
import pathlib
import sys

import pytest

import stepdistill_jax
from stepdistill_jax.commands.main import main
from stepdistill_jax.commands.terminal import console, say
from stepdistill_jax.errors import escaped
from stepdistill_jax.runtime.progress import log, progress
from stepdistill_jax.teacher.stub_server import Reply, StubServer

PACKAGE = pathlib.Path(stepdistill_jax.__file__).parent
# clears the screen, colours, sets the title, turns the direction, rings, overwrites the line
HOSTILE = "\x1b[2J\x1b[31mred\x9b1m\x1b]0;title\x07\u202egnp\u2066\rover\x08\x7f\x00"
FORBIDDEN = {c for c in HOSTILE if not (c.isascii() and c.isprintable())}
HARMLESS = "naïve 漢字\u3000नमस्\u200dते 👩\u200d🔬 [not markup] \\x1b"


def is_clean(text):
    return not FORBIDDEN & set(text) and "red" in text


def test_only_what_can_steer_a_terminal_is_escaped():
    assert escaped(f"a\n\tb {HARMLESS}") == f"a\n\tb {HARMLESS}"
    assert escaped("\x1b[2J\u202e\r\ud800") == "\\x1b[2J\\u202e\\r\\ud800"
    assert is_clean(escaped(HOSTILE))


@pytest.mark.parametrize("write", [log, say], ids=["log", "say"])
def test_lines_are_escaped(capsys, write):
    write(f"{HOSTILE}\nmore: {HARMLESS}")
    printed = "".join(capsys.readouterr())
    assert is_clean(printed)
    assert printed.count("\n") == 2
    assert HARMLESS in printed


def test_tables_and_their_titles_are_escaped_and_keep_their_colours():
    from rich.table import Table
    from rich.text import Text

    table = Table(title=Text(HOSTILE))
    table.add_column(HARMLESS.replace("[", "\\["))
    table.add_row(Text(HOSTILE, style="bold"))
    for is_terminal in (False, True):
        out = io.StringIO()
        colours = "standard" if is_terminal else None
        screen = console(file=out, force_terminal=is_terminal, color_system=colours, width=200)
        screen.print(table)
        screen.print(HOSTILE, markup=False, highlight=False)
        written = out.getvalue()
        assert "漢字" in written
        assert written.count("\\x1b[2J\\x1b[31mred") == 3
        assert "\x1b[2J" not in written and "\x1b[31m" not in written
        assert ("\x1b[1m" in written) == is_terminal  # our own
        assert is_clean(written.replace("\x1b", ""))


def test_a_bar_of_a_hostile_file_name_is_escaped(capsys, monkeypatch):
    for is_terminal in (False, True):
        monkeypatch.setattr(sys.stderr, "isatty", lambda t=is_terminal: t)
        with progress(1, f"reading {HOSTILE}[/bold]") as bar:
            bar.update(1)
        err = capsys.readouterr().err
        assert "\x1b[2J" not in err and "\u202e" not in err and "red" in err


def test_usage_errors_and_unexpected_errors_are_escaped(capsys, monkeypatch):
    with pytest.raises(SystemExit):
        main(["predict", f"--{HOSTILE}".replace("\x00", "")])
    assert is_clean(capsys.readouterr().err)

    def broken(*_, **__):
        raise RuntimeError(HOSTILE)

    monkeypatch.setattr("stepdistill_jax.teacher.annotate", broken)
    assert main(["annotate", "in.jsonl", "out.jsonl", "--task", "generic"]) == 1
    err = capsys.readouterr().err
    assert "Traceback" in err
    assert is_clean(err)


@pytest.mark.parametrize("status", [500, 404, 429])
def test_what_a_teachers_server_says_is_escaped(tmp_path, capsys, monkeypatch, status):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-test")
    (tmp_path / "in.jsonl").write_text('{"input": "Is it late?"}\n')
    replies = iter(
        [Reply(status=status, body=json.dumps({"error": {"message": HOSTILE}}).encode())]
    )
    good = Reply("Because. So the answer is yes.")
    paths = [str(tmp_path / name) for name in ("in.jsonl", "out.jsonl")]
    argv = ["annotate", *paths, "--task", "generic", "--model", "m", "--attempts", "1"]
    with StubServer(lambda _: next(replies, good)).serve() as server:
        main([*argv, "--base-url", server.url])
    printed = "".join(capsys.readouterr())
    assert not FORBIDDEN & set(printed)
    assert ("\\x1b[2J" in printed) == (status != 500)  # that one stands in the list of defects


ALLOWED = {
    "print": {
        "commands/main.py",  # JSON, which escapes by itself
        "commands/sweep.py",  # a script, to be run as it is
        "commands/terminal.py",
        "data/builder.py",  # to its parent process, which raises it again
        "runtime/progress.py",
        "teacher/stub_server.py",
    },
    "Console": {"commands/terminal.py", "runtime/progress.py"},
    "traceback.print_exc": set(),
}


def test_every_message_takes_one_of_these_ways():
    found = {name: set() for name in ALLOWED}
    for file in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text("utf-8"))):
            if isinstance(node, ast.Call) and (name := ast.unparse(node.func)) in found:
                found[name].add(file.relative_to(PACKAGE).as_posix())
    assert found == ALLOWED
