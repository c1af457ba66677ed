import contextlib
import errno
import json
import os
import subprocess
import sys
import types

import numpy as np
import pytest

from stepdistill_jax.commands import arguments, main
from stepdistill_jax.errors import InputError
from stepdistill_jax.runtime.progress import log

LOADED = """
import sys
{code}
print()
print(*sorted({{"jax", "flax", "gin", "tensorflow", "seqio", "torch", "rich"}} & set(sys.modules)))
"""


def heavy(code: str) -> list[str]:
    """Heavy libraries that some code imports in a fresh interpreter."""
    command = [sys.executable, "-c", LOADED.format(code=code)]
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return output.splitlines()[-1].split()


@pytest.fixture
def fake(monkeypatch):
    """Makes `stepdistill fake` call a function."""

    def install(run, add_arguments=lambda parser: None):
        module = types.SimpleNamespace(run=run, add_arguments=add_arguments)
        monkeypatch.setitem(sys.modules, "stepdistill_jax.commands.fake", module)
        monkeypatch.setitem(main.COMMANDS, "fake", "a command of this test")
        monkeypatch.setattr(sys, "path", list(sys.path))

    return install


def raising(error):
    def run(args):
        raise error

    return run


def test_import_loads_nothing_heavy():
    assert heavy("import stepdistill_jax") == []
    assert heavy("import rich") == ["rich"]


@pytest.mark.parametrize("command", [None, *sorted(main.COMMANDS)])
def test_help_loads_nothing_heavy(command):
    argv = [*([command] if command else []), "--help"]
    loaded = heavy(
        "from stepdistill_jax.commands.main import main\n"
        f"try: sys.exit(main({argv}))\n"
        "except SystemExit as exit: assert exit.code == 0"
    )
    assert loaded == []


@pytest.mark.parametrize("command", sorted(main.COMMANDS))
def test_every_command_has_json_debug_and_a_function_of_its_own(command):
    _, parser, run = main.parser_of(command)
    text = parser.format_help()
    assert "--json" in text
    assert "--debug" in text
    assert callable(run)


def test_bad_input_is_one_line_and_exit_2(fake, capsys):
    fake(raising(InputError("rows.jsonl:7: broken JSON")))
    assert main.main(["fake"]) == 2
    out, err = capsys.readouterr()
    assert (out, err) == ("", "stepdistill: error: rows.jsonl:7: broken JSON\n")


def test_bad_input_stays_one_line_whatever_is_in_it(fake, capsys):
    fake(raising(InputError("a library said:\n  many\nlines")))
    assert main.main(["fake"]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_debug_shows_the_traceback_of_bad_input(fake, capsys):
    fake(raising(InputError("wrong")))
    assert main.main(["fake", "--debug"]) == 2
    assert "Traceback" in capsys.readouterr().err


def test_a_failure_in_the_run_shows_its_traceback_and_is_exit_1(fake, capsys):
    fake(raising(RuntimeError("out of luck")))
    assert main.main(["fake"]) == 1
    err = capsys.readouterr().err
    assert "Traceback" in err
    assert err.splitlines()[-1].startswith("stepdistill: failed: RuntimeError: out of luck")


def test_a_clean_stop_keeps_its_exit_code(fake):
    fake(raising(SystemExit(75)))
    with pytest.raises(SystemExit) as caught:
        main.main(["fake"])
    assert caught.value.code == 75


def test_control_c_is_exit_130_without_a_traceback(fake, capsys):
    fake(raising(KeyboardInterrupt()))
    assert main.main(["fake"]) == 130
    assert "Traceback" not in capsys.readouterr().err


def test_json_is_the_last_line_and_strict(fake, capsys):
    def run(args):
        print("a library prints, too")
        return {"loss": np.float32(0.5), "nan": float("nan"), "rows": np.int64(3), "by": [(1, 2)]}

    fake(run)
    assert main.main(["fake", "--json"]) == 0
    *_, last = capsys.readouterr().out.splitlines()
    assert json.loads(last, parse_constant=pytest.fail) == {
        "loss": 0.5,
        "nan": None,
        "rows": 3,
        "by": [[1, 2]],
    }


def test_without_json_nothing_is_added_to_standard_output(fake, capsys):
    fake(lambda args: {"rows": 3})
    assert main.main(["fake"]) == 0
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("flags", "raised", "printed"),
    [
        ("", "`num_beams` must be 1", "--num-beams must be 1"),
        ("", "pass `on_error=skip`", "pass --on-error skip"),
        ("", "`new_name`: lower_snake_case", "--name: lower_snake_case"),
        ("", "prepare it with `teacher=False`", "prepare it with --no-teacher"),
        ("", "`teacher=True` needs texts", "`teacher=True` needs texts"),
        ("", "run `evaluate`: `batch_size` rows", "run `evaluate`: `batch_size` rows"),
        ("CONFIG", "`batch_size=8` fits", "BATCH_SIZE=8 fits"),
        ("CONFIG", "`label_source`, `rationales`", "LABEL_SOURCE, RATIONALES"),
        ("CONFIG", "`loss_mean`, `optimizer.b1`", "train.loss_mean, optimizer.b1"),
        ("CONFIG", "`lora` must be a `LoraConfig`", "train.lora must be a @lora()"),
        ("CONFIG", "the field `input` of `task a`", "the field `input` of `task a`"),
    ],
)
def test_messages_name_what_the_command_takes(fake, capsys, flags, raised, printed):
    def add_arguments(parser):
        parser.add_argument("--num-beams")
        parser.add_argument("--on-error")
        parser.add_argument("--name", dest="new_name")
        parser.add_argument("--no-teacher", dest="teacher", action="store_false")
        if flags:
            arguments.add_config_arguments(parser)

    def run(args):
        log(raised)
        raise InputError(raised)

    fake(run, add_arguments)
    assert main.main(["fake"]) == 2
    assert capsys.readouterr().err == f"{printed}\nstepdistill: error: {printed}\n"
    log(raised)  # by another user of the library
    assert capsys.readouterr().err == f"{raised}\n"


def test_an_unknown_command_names_the_nearest(capsys):
    assert main.main(["trian"]) == 2
    err = capsys.readouterr().err
    assert "'trian'" in err
    assert "did you mean 'train'" in err
    assert err.count("\n") == 1


@pytest.mark.parametrize("argv", [["train"], ["train", "x", "--wrkdir", "y"], ["--nonsense"]])
def test_bad_usage_is_one_line_and_exit_2(argv, capsys):
    with pytest.raises(SystemExit) as caught:
        main.main(argv)
    assert caught.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_no_command_shows_the_help(capsys):
    assert main.main([]) == 2
    assert "commands:" in capsys.readouterr().out


def test_version_names_every_library_and_the_devices(capsys):
    assert main.main(["--version"]) == 0
    out = capsys.readouterr().out
    for name in (
        "jax",
        "jaxlib",
        "flax",
        "optax",
        "orbax-checkpoint",
        "seqio",
        "tensorflow",
        "tensorflow-datasets",
        "transformers",
        "python",
        "devices",
    ):
        assert f"\n{name} " in out
    assert "8 x cpu" in out  # conftest's virtual devices


def test_version_as_json_is_the_block_of_run_json(capsys):
    from stepdistill_jax.versions import version_block

    assert main.main(["--version", "--json"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == version_block()


def test_gin_flags_are_told_apart_from_ours():
    assert arguments.split_gin_flags(["--gin.A=1", "--gin_file=x", "--set", "B=2"]) == [
        "--gin-binding=A=1",
        "--gin_file=x",
        "--set",
        "B=2",
    ]


@pytest.mark.parametrize("missing", ["tensorflow_text", "seqio"])
def test_without_tensorflow_text_the_platforms_are_named(monkeypatch, missing):
    present = arguments.importlib.util.find_spec
    monkeypatch.setattr(
        arguments.importlib.util,
        "find_spec",
        lambda name: None if name == missing else present(name),
    )
    with pytest.raises(InputError, match="tensorflow-text") as caught:
        arguments.require_seqio("train")
    assert "\n" not in str(caught.value)


def test_a_reader_that_leaves_is_no_traceback():
    code = (
        "import sys\nfrom stepdistill_jax.commands import main\n"
        "main._run = lambda argv: [print('x' * 1000, flush=True) for _ in range(10000)]\n"
        "sys.exit(main.main([]))"
    )
    reader, writer = os.pipe()
    process = subprocess.Popen([sys.executable, "-c", code], stdout=writer, stderr=subprocess.PIPE)
    os.close(writer)
    os.read(reader, 10)
    os.close(reader)
    assert process.communicate(timeout=60)[1] == b""


def test_a_full_disk_is_one_line_that_names_the_file(fake, capsys):
    fake(raising(OSError(errno.ENOSPC, "No space left on device", "out.jsonl.partial")))
    assert main.main(["fake"]) == 1
    assert capsys.readouterr().err == (
        "stepdistill: failed: OSError: [Errno 28] No space left on device: 'out.jsonl.partial'\n"
    )


@pytest.mark.parametrize(
    ("raised", "code", "message"),
    [
        (InputError("rows.jsonl:7: broken,\n`run_name` is wrong"), 2, "rows.jsonl:7: broken, --run-name is wrong"),
        (RuntimeError("no luck\nat all"), 1, "RuntimeError: no luck"),
        (KeyboardInterrupt(), 130, "interrupted"),
        (KeyboardInterrupt("3 rows are kept"), 130, "interrupted: 3 rows are kept"),
        (SystemExit(75), 75, "stopped by a signal; run the same command again to continue"),
        (SystemExit("a library gave up"), 1, "a library gave up"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else None,
)  # fmt: skip
def test_json_has_one_object_of_an_error_too(fake, capsys, raised, code, message):
    fake(raising(raised), lambda parser: parser.add_argument("--run-name"))
    try:
        assert main.main(["fake", "--json"]) == code
    except SystemExit as stop:
        assert stop is raised
    (line,) = capsys.readouterr().out.splitlines()
    assert json.loads(line) == {"error": message, "exit_code": code}


@pytest.mark.parametrize(
    ("argv", "part"),
    [(["train", "x", "--wrkdir", "y"], "--workdir"), (["trian"], "did you mean 'train'"), ([], "no command")],
)  # fmt: skip
def test_json_has_one_object_of_bad_usage_too(capsys, argv, part):
    with contextlib.suppress(SystemExit):
        main.main([*argv, "--json"])
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert part in found["error"] and found["exit_code"] == 2


def test_a_failed_command_ends_without_the_destructors_of_native_libraries(tmp_path):
    """XLA's crash the process while it compiles in a thread. Functions of `atexit` run all the same."""
    code = """
import atexit, ctypes, os, sys
destructor = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(lambda _: os._exit(99))
ctypes.CDLL(None).__cxa_atexit(destructor, None, None)
atexit.register(print, "exit functions ran")
from stepdistill_jax.commands.main import main
sys.argv = ["stepdistill", "train", "no_such_config", "--workdir", "run"]
main()
"""
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "exit functions ran\n"), done.stderr
