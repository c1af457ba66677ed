"""`stepdistill train`: trains a config in a workdir, or goes on with what was begun there."""

import argparse
import pathlib
from typing import Any

from stepdistill_jax.commands.arguments import (
    add_config_arguments,
    add_data_arguments,
    require_seqio,
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of `train`."""
    add_config_arguments(parser)
    parser.add_argument(
        "--workdir",
        type=pathlib.Path,
        required=True,
        metavar="DIR",
        help="folder of checkpoints, metrics and model; an unfinished run there is gone on with",
    )
    add_data_arguments(parser)


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Reads the config and calls `training.train`; the last step's metrics."""
    from stepdistill_jax.commands.gin_config import load_config

    bindings = list(args.gin_bindings)
    if args.module:
        bindings.append(f"TASK_MODULE={args.module}")
    config, text = load_config(args.config, args.overrides, args.gin_files, bindings)
    require_seqio("train")
    from stepdistill_jax.training import train

    return train(config, workdir=args.workdir, data_dir=args.data_dir, config_text=text)
