"""Defines the flags that several commands share, and checks that SeqIO can be imported."""

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
    """Exit with status 2 after bad usage. `message` says what is wrong."""

    def __init__(self, message: str):
        super().__init__(2)
        self.message = message


class Parser(argparse.ArgumentParser):
    """Parser that reports bad usage in one line, and exits with status 2."""

    def error(self, message):
        text = f"{printable(message)}; see `{self.prog} --help`"
        self._print_message(f"{self.prog}: error: {text}\n", sys.stderr)
        raise UsageExit(text)


def add_common_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds `--json` and `--debug`, which every command has."""
    parser.add_argument(
        "--json",
        action="store_true",
        help="print a JSON object as the last line of standard output; after an error, its"
        " keys are `error` and `exit_code`",
    )
    parser.add_argument("--debug", action="store_true", help="show the full traceback of any error")


def add_map_argument(parser: argparse.ArgumentParser, help: str) -> None:
    """Adds `--map`."""
    parser.add_argument("--map", dest="field_map", metavar="input=question,...", help=help)


def parse_map(text: str | None) -> dict[str, str]:
    """Returns the field names of `--map`: {"input": "question", ...} for `input=question,...`.

    Raises:
        InputError: a pair is incomplete, or a field is mapped twice.
    """
    field_map: dict[str, str] = {}
    for part in filter(None, (text or "").split(",")):
        ours, equals, theirs = (piece.strip() for piece in part.partition("="))
        if not (ours and equals and theirs):
            raise InputError(f"--map: expected input=question,label=answer, got {part!r}")
        if ours in field_map:
            raise InputError(f"--map: the field {ours!r} is mapped twice")
        field_map[ours] = theirs
    return field_map


def add_data_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds `--data-dir` and `--module`, for commands that read datasets."""
    add_data_dir_argument(parser)
    parser.add_argument(
        "--module",
        dest="task_module",
        metavar="PKG.TASKS",
        help="Python module that registers your SeqIO tasks; it is imported first",
    )


def add_data_dir_argument(parser: argparse.ArgumentParser) -> None:
    """Adds `--data-dir`."""
    parser.add_argument(
        "--data-dir",
        type=pathlib.Path,
        metavar="DIR",
        help="folder of prepared datasets (default: $STEPDISTILL_DATA_DIR, else the user's cache)",
    )


def add_step_argument(parser: argparse.ArgumentParser, default: str = "best") -> None:
    """Adds `--step`."""
    parser.add_argument(
        "--step",
        default=default,
        metavar="best|last|N",
        help="checkpoint of a workdir: best on the validation split, last, or a step"
        " number (default: best)",
    )


def add_decode_arguments(parser: argparse.ArgumentParser, *, prompts: bool) -> None:
    """Adds a flag for each field of `DecodeOptions`.

    Args:
        prompts: whether to add `--max-decode-len` and `--prefix`, too.
    """

    def add(flag: str, **settings: Any) -> None:
        parser.add_argument(flag, default=argparse.SUPPRESS, **settings)

    add_step_argument(parser, argparse.SUPPRESS)
    add(
        "--batch-size",
        type=int,
        metavar="N",
        help="number of rows per batch, on all devices together (default: 64 times the number of devices"
        " over which rows are split)",
    )
    add(
        "--layout",
        metavar="NAME",
        help="how the devices share the work: with `data` (default), each device has the complete model"
        " and decodes its share of the rows; `tensor` and `fsdp` split a model that is too large for one device",
    )
    add(
        "--num-beams",
        type=int,
        metavar="N",
        help="number of beams of beam search (default: 1, greedy decoding)",
    )
    add(
        "--length-penalty",
        type=float,
        metavar="X",
        help="with beams: divide scores by length ** X (default: 1; above 0 favours long answers)",
    )
    add(
        "--choices",
        metavar="FILE|row|labels",
        help="answer with the likeliest allowed label instead of decoding: FILE lists the"
        " allowed labels, `row` means each row's `choices`, `labels` means the task's labels",
    )
    add(
        "--choices-temperature",
        type=float,
        metavar="T",
        help="temperature of the choices' probabilities (default: 1; `evaluate --choices` suggests a better"
        " one)",
    )
    add(
        "--engine",
        choices=("jax", "ctranslate2"),
        help="library that decodes (default: ctranslate2 for a directory that `export --format ctranslate2`"
        " wrote, else jax)",
    )
    add(
        "--quantization",
        choices=("int8",),
        help="for the engine jax only: keep weights in memory as int8, in a quarter of the"
        " space (default: float32); `export --quantization` sets the type for ctranslate2",
    )
    if prompts:
        add(
            "--max-decode-len",
            type=int,
            metavar="N",
            help="largest number of tokens in a label (default: the number found in training)",
        )
        add(
            "--prefix",
            metavar="TEXT",
            help="text before each input (default: the model's own prefix, else `predict: `)",
        )


def decode_options_of(args: argparse.Namespace) -> dict[str, Any]:
    """Returns {field of `DecodeOptions`: value} for the flags that the user sets."""
    from stepdistill_jax.inference import DecodeOptions

    names = [field.name for field in dataclasses.fields(DecodeOptions)]
    return {name: value for name, value in vars(args).items() if name in names}


def add_config_arguments(
    parser: argparse.ArgumentParser,
    *,
    metavar: str = "CONFIG",
    help: str = "a config file, or the name of a shipped one such as demo_step_by_step",
) -> None:
    """Adds CONFIG, `--set`, and T5X's `--gin_file` and `--gin.X=Y`.

    The parsed values are the arguments of `gin_config.load_config`, with the same names.
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
        help="set a macro (BATCH_SIZE=32) or a parameter that the config uses"
        " (train.grace_secs=30); may be given several times",
    )
    parser.add_argument(
        "--gin_file",
        action="append",
        default=[],
        dest="gin_files",
        metavar="FILE",
        help="config file that overrides CONFIG; may be given several times; to set a single"
        " value, use --gin.NAME=VALUE, as in T5X",
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
    """Replaces each `--gin.NAME=VALUE` by `--gin-binding=NAME=VALUE`, since argparse needs fixed names."""
    return [
        f"--gin-binding={argument.removeprefix(GIN_PREFIX)}"
        if argument.startswith(GIN_PREFIX)
        else argument
        for argument in argv
    ]


def require_seqio(command: str) -> None:
    """Checks that SeqIO and its dependencies are installed.

    Raises:
        InputError: a distribution is missing.
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
            f" {platform.python_version()} on {sys.platform} ({platform.machine()}): install all dependencies,"
            " on Linux or on macOS with Apple silicon (tensorflow-text has no wheels for other systems);"
            " predict, evaluate, export and serve work without them"
        )
