"""Flags that several commands share, and what a command needs of the platform."""

import argparse
import dataclasses
import importlib.util
import pathlib
import platform
import sys
from typing import Any

from stepdistill_jax.errors import InputError, printable

GIN_PREFIX = "--gin."


class UsageExit(SystemExit):
    """The exit with 2 of bad usage; `message` is what was wrong with it."""

    def __init__(self, message: str):
        super().__init__(2)
        self.message = message


class Parser(argparse.ArgumentParser):
    """Bad usage is one line and exit 2; the usage text stays behind `--help`."""

    def error(self, message):
        text = f"{printable(message)}; see `{self.prog} --help`"
        self._print_message(f"{self.prog}: error: {text}\n", sys.stderr)
        raise UsageExit(text)


def add_common_arguments(parser: argparse.ArgumentParser) -> None:
    """`--json` and `--debug`, which every command has."""
    parser.add_argument(
        "--json",
        action="store_true",
        help="end standard output with one JSON object; on an error its keys are `error` and"
        " `exit_code`",
    )
    parser.add_argument(
        "--debug", action="store_true", help="show the whole traceback of any error"
    )


def add_data_arguments(parser: argparse.ArgumentParser) -> None:
    """`--data-dir` and `--module` of the commands that read datasets."""
    add_data_dir_argument(parser)
    parser.add_argument(
        "--module",
        dest="task_module",
        metavar="PKG.TASKS",
        help="Python module that registers your SeqIO tasks, imported first",
    )


def add_data_dir_argument(parser: argparse.ArgumentParser) -> None:
    """`--data-dir`."""
    parser.add_argument(
        "--data-dir",
        type=pathlib.Path,
        metavar="DIR",
        help="where prepared datasets lie (default: $STEPDISTILL_DATA_DIR, else the user's cache)",
    )


def add_step_argument(parser: argparse.ArgumentParser, default: str = "best") -> None:
    """`--step`."""
    parser.add_argument(
        "--step",
        default=default,
        metavar="best|last|N",
        help="which checkpoint of a workdir (default: best by validation)",
    )


def add_decode_arguments(parser: argparse.ArgumentParser, *, prompts: bool) -> None:
    """Flags of the fields of `DecodeOptions`, which has their defaults; read by `decode_options_of`.

    Args:
        parser: of a command that decodes.
        prompts: adds `--max-decode-len` and `--prefix`.
    """

    def add(flag: str, **settings: Any) -> None:
        parser.add_argument(flag, default=argparse.SUPPRESS, **settings)

    add_step_argument(parser, argparse.SUPPRESS)
    add(
        "--batch-size",
        type=int,
        metavar="N",
        help="rows at once, on all devices together (default: 64 for each that has rows of its own)",
    )
    add(
        "--layout",
        metavar="NAME",
        help="how all devices of all processes share the work: `data` (default) gives each the whole"
        " model and rows of its own; `tensor` or `fsdp` cuts a model that one cannot hold",
    )
    add(
        "--num-beams",
        type=int,
        metavar="N",
        help="answers pursued at once by beam search (default: 1, the likeliest token each time)",
    )
    add(
        "--length-penalty",
        type=float,
        metavar="X",
        help="with beams: a score is divided by length ** X (default: 1; above 0 favours long"
        " answers)",
    )
    add(
        "--choices",
        metavar="FILE|row|labels",
        help="score each allowed label instead of decoding, so that the answer is always one of them:"
        " a file of labels, each row's `choices`, or the task's labels",
    )
    add(
        "--choices-temperature",
        type=float,
        metavar="T",
        help="of the probabilities of choices (default: 1; `evaluate --choices` names a better one)",
    )
    add(
        "--engine",
        choices=("jax", "ctranslate2"),
        help="what decodes (default: ctranslate2 on a directory of `export --format ctranslate2`, else"
        " jax)",
    )
    add(
        "--quantization",
        choices=("int8",),
        help="jax: weights in memory as int8 with a scale for each output, a quarter of the bytes to read"
        " (default: float32); a CTranslate2 directory has that of its export",
    )
    if prompts:
        add(
            "--max-decode-len",
            type=int,
            metavar="N",
            help="most tokens of a label (default: what training found enough)",
        )
        add(
            "--prefix",
            metavar="TEXT",
            help="text before each input (default: the model's own; `predict: ` if it names none)",
        )


def decode_options_of(args: argparse.Namespace) -> dict[str, Any]:
    """The options of `add_decode_arguments` that a command line gives."""
    from stepdistill_jax.inference import DecodeOptions

    names = [field.name for field in dataclasses.fields(DecodeOptions)]
    return {name: value for name, value in vars(args).items() if name in names}


def add_config_arguments(
    parser: argparse.ArgumentParser,
    *,
    metavar: str = "CONFIG",
    help: str = "a config file, or the name of a shipped one such as demo_step_by_step",
) -> None:
    """CONFIG, `--set`, and T5X's `--gin_file` and `--gin.X=Y`.

    They end up as `args.config`, `args.overrides`, `args.gin_files` and `args.gin_bindings`, the
    arguments of `gin_config.load_config`.
    """
    parser.add_argument(
        "config",
        nargs="?",
        metavar=metavar,
        help=help,
    )
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        dest="overrides",
        metavar="NAME=VALUE",
        help="bind a macro (BATCH_SIZE=32) or a parameter in use (train.grace_secs=30); repeatable",
    )
    parser.add_argument(
        "--gin_file",
        action="append",
        default=[],
        dest="gin_files",
        metavar="FILE",
        help="one more config over CONFIG, as T5X users type it; --gin.NAME=VALUE works, too",
    )
    # `--gin.NAME=VALUE`, rewritten by `split_gin_flags`
    parser.add_argument(
        "--gin-binding",
        action="append",
        default=[],
        dest="gin_bindings",
        help=argparse.SUPPRESS,
    )


def split_gin_flags(argv: list[str]) -> list[str]:
    """Rewrites `--gin.NAME=VALUE`, whose NAME argparse cannot know, to `--gin-binding=NAME=VALUE`."""
    return [
        f"--gin-binding={argument.removeprefix(GIN_PREFIX)}"
        if argument.startswith(GIN_PREFIX)
        else argument
        for argument in argv
    ]


def require_seqio(command: str) -> None:
    """Refuses a command that builds datasets where SeqIO cannot be imported.

    Raises:
        InputError: names the missing distribution, and what works without it.
    """
    needed = {
        "tensorflow_text": "tensorflow-text",
        "seqio": "seqio",
        "tensorflow": "tensorflow",
        "tensorflow_datasets": "tensorflow-datasets",
    }
    missing = [name for module, name in needed.items() if importlib.util.find_spec(module) is None]
    if missing:
        raise InputError(
            f"{command} needs {missing[0]}, which is not installed for Python"
            f" {platform.python_version()} on {sys.platform} ({platform.machine()}): prepare and train"
            " where the package is installed with all its dependencies, on Linux or on macOS on Apple"
            " silicon (tensorflow-text has no wheels for others); predict, evaluate, export and serve"
            " work here"
        )
