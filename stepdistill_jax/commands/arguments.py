"""Flags that several commands share, and what a command needs of the platform."""

import argparse
import importlib.util
import pathlib
import platform
import sys

from stepdistill_jax.errors import InputError, printable

GIN_PREFIX = "--gin."


class Parser(argparse.ArgumentParser):
    """Bad usage is one line and exit 2; the usage text stays behind `--help`."""

    def error(self, message):
        self.exit(2, f"{self.prog}: error: {printable(message)}; see `{self.prog} --help`\n")


def add_common_arguments(parser: argparse.ArgumentParser) -> None:
    """`--json` and `--debug`, which every command has."""
    parser.add_argument(
        "--json", action="store_true", help="end standard output with one JSON object"
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
            f" {platform.python_version()} on {sys.platform} ({platform.machine()}):"
            " tensorflow-text has wheels for Linux and for macOS on Apple silicon only, so prepare"
            " and train there; predict, evaluate and export work here"
        )
