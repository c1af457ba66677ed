"""`stepdistill`: finds the command, runs it, and turns errors into exit codes.

Exit codes:
0: done.
1: the run failed.
2: bad usage, config or input.
75: stopped by a signal after a clean save; run the same command again.
130: interrupted from the keyboard.
If JAX loses a process, SIGABRT ends the others; restart all.
"""

import argparse
import contextlib
import errno
import importlib
import json
import math
import os
import sys
from typing import Any

from stepdistill_jax import __version__
from stepdistill_jax.commands.arguments import (
    Parser,
    UsageExit,
    add_common_arguments,
    split_gin_flags,
)
from stepdistill_jax.commands.flag_names import as_typed
from stepdistill_jax.commands.terminal import say, show_traceback
from stepdistill_jax.errors import EXIT_STOPPED, InputError, nearest, printable
from stepdistill_jax.runtime.checkpoints.manifest import CheckpointError
from stepdistill_jax.runtime.distributed import end, is_process_0, leave
from stepdistill_jax.runtime.files import DISK_ERRORS
from stepdistill_jax.runtime.on_processes import PeerFailed
from stepdistill_jax.runtime.progress import log, translate_names, translated
from stepdistill_jax.runtime.rendezvous import ProcessesMissing
from stepdistill_jax.runtime.stores import StoreError

OK, FAILED, BAD_INPUT, INTERRUPTED = 0, 1, 2, 130

# The help texts are here, so that `--help` imports no command.
COMMANDS = {
    "demo": "train and compare three small models from scratch in a few minutes; needs no data",
    "prepare": "read a dataset with its rationales, check it, and write it as TFDS and JSONL",
    "annotate": "ask a large model for the rationales and labels of a JSONL file",
    "inspect": "show rows as the model sees them, and how many are truncated",
    "settings": "list the settings of a config: default, unit and meaning",
    "plan": "compute memory, FLOPs and traffic of a config on N devices, without the devices",
    "train": "train a config in a workdir, or resume the run in it",
    "checkpoints": "list a workdir's saved steps, and check them for damage",
    "evaluate": "compute the accuracy of a workdir or model on a split",
    "predict": "write labels and scores for the rows of a JSONL file",
    "sweep": "train and evaluate arms x data fractions x seeds; resumable",
    "report": "compare runs: one HTML page, its plots and tables",
    "serve": "serve labels and scores over HTTP",
    "export": "write a workdir's model as a Hugging Face directory, as StableHLO, or for CTranslate2",
}


def main(argv: list[str] | None = None) -> int:
    """Runs one command line and returns its exit code.

    If the process has joined a job of several processes, it exits with this code and never returns.
    """
    typed = split_gin_flags(sys.argv[1:] if argv is None else list(argv))
    try:
        code = _exit_code(typed)
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else FAILED
        if code != OK:
            message = stop.message if isinstance(stop, UsageExit) else str(stop.code)
            if code == EXIT_STOPPED:
                message = "stopped by a signal; run the same command again to continue"
            _ended(typed, code, message)
        _leave(code, owns_process=argv is None)
        raise
    _leave(code, owns_process=argv is None)
    return code


def _leave(code: int, *, owns_process: bool) -> None:
    leave(code)
    if code != OK and owns_process:  # not if a notebook called `main([...])`
        end(code)


def _ended(argv: list[str], code: int, error: str) -> int:
    """Prints the error and the exit code as JSON if `argv` contains `--json`. Returns `code`."""
    if "--json" in argv and is_process_0():
        with contextlib.suppress(BrokenPipeError):
            print(json.dumps({"error": error, "exit_code": code}), flush=True)
    return code


def _exit_code(argv: list[str]) -> int:
    debug = "--debug" in argv
    try:
        return _run(argv)
    except InputError as error:
        if debug:
            show_traceback()
        # one line, even if the message quotes several lines of a library
        log(f"stepdistill: error: {printable(error)}")
        return _ended(argv, BAD_INPUT, translated(printable(error)))
    except KeyboardInterrupt as error:
        message = ": ".join(["interrupted", *map(str, error.args)])
        log(f"stepdistill: {message}")
        return _ended(argv, INTERRUPTED, message)
    except BrokenPipeError:
        # the reader of our output (`| head`) has ended; nothing may be flushed into the pipe at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILED
    except (ProcessesMissing, PeerFailed, CheckpointError, StoreError, MemoryError) as error:
        # their one-line message is complete; a traceback would add nothing
        if debug:
            show_traceback()
        log(f"stepdistill: failed: {printable(error)}")
        return _ended(argv, FAILED, translated(printable(error)))
    except Exception as error:
        full = isinstance(error, OSError) and error.errno in DISK_ERRORS and error.filename
        if debug or not full:  # for a full disk, the message names the file
            show_traceback()
        summary = f"{type(error).__name__}: {error}".split("\n")[0]
        hint = "" if debug or full else " (--debug shows JAX's inner frames, too)"
        log(f"stepdistill: failed: {printable(summary)}{hint}")
        return _ended(argv, FAILED, translated(printable(summary)))
    finally:
        translate_names(str)


def _run(argv: list[str]) -> int:
    command = next((argument for argument in argv if not argument.startswith("-")), None)
    if command is not None and command not in COMMANDS:
        raise InputError(
            f"there is no command {command!r}{nearest(command, COMMANDS)}; see `stepdistill --help`"
        )
    if command is not None:  # flags that all commands share may precede the command
        at = argv.index(command)
        argv = [command, *argv[:at], *argv[at + 1 :]]
    parser, sub, run = parser_of(command)
    # before argparse asks for a required flag, which may only be mistyped
    for flag in (a.partition("=")[0] for a in argv if a.startswith("--") and len(a) > 2):
        if flag not in sub._option_string_actions:
            sub.error(f"unrecognized arguments: {flag}{nearest(flag, sub._option_string_actions)}")
    args, unknown = parser.parse_known_args(argv)
    if unknown:
        sub.error(f"unrecognized arguments: {' '.join(unknown)}")
    if command is None:
        if args.version:
            _print_versions(as_json=args.json)
        else:
            parser.print_help()
        return OK if args.version else _ended(argv, BAD_INPUT, "no command given")
    if args.debug:
        os.environ["JAX_TRACEBACK_FILTERING"] = "off"
    translate_names(as_typed(sub))
    try:
        result = run(args)
    except OSError as error:
        if error.errno != errno.ENAMETOOLONG:  # any path may be too long: pathlib does not check it
            raise
        raise InputError(
            f"{printable(error.filename, 200)}: this is too long for a file name"
        ) from None
    if args.json and is_process_0():
        print(json.dumps(_plain(result or {})), flush=True)
    # keys of results that mean failure: a run that stopped early, damaged checkpoints, failed cells
    ended_badly = ("stopped", "damaged", "failed_cells")
    return FAILED if any((result or {}).get(name) for name in ended_badly) else OK


def parser_of(command: str | None) -> tuple[argparse.ArgumentParser, argparse.ArgumentParser, Any]:
    """Returns the main parser, the command's parser, and the command's function `run`."""
    parser = Parser(
        prog="stepdistill",
        description="Distilling step-by-step: trains small T5 models on labels and rationales.",
        allow_abbrev=False,
    )
    if command is None:
        parser.add_argument(
            "--version", action="store_true", help="print versions and devices, for bug reports"
        )
        add_common_arguments(parser)
    commands = parser.add_subparsers(metavar="COMMAND", title="commands")
    chosen, run = parser, None
    for name, summary in COMMANDS.items():
        sub = commands.add_parser(
            name,
            help=summary,
            description=f"{summary[0].upper()}{summary[1:]}.",
            allow_abbrev=False,
        )
        if name == command:
            module = importlib.import_module(f"stepdistill_jax.commands.{name}")
            module.add_arguments(sub)
            add_common_arguments(sub)
            chosen, run = sub, module.run
    return parser, chosen, run


def _print_versions(*, as_json: bool) -> None:
    from stepdistill_jax.versions import version_block

    block = version_block()
    if as_json:
        print(json.dumps(block))
        return
    say(f"stepdistill {__version__}")
    width = max(map(len, block))
    for name, value in block.items():
        say(f"{name:<{width}}  {'not installed' if value is None else value}")


def _plain(value: Any) -> Any:
    """Converts a value to JSON types: NaN and infinity to None, NumPy scalars to numbers, paths to strings."""
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    if hasattr(value, "item") and getattr(value, "ndim", None) == 0:
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value if isinstance(value, (str, int, float, bool, type(None))) else str(value)
