"""`stepdistill train`: trains a config in a workdir, or resumes the run that is there."""

import argparse
import time
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
        required=True,
        metavar="DIR",
        help="folder of checkpoints, metrics and model, also gs://; an unfinished run in it is"
        " resumed",
    )
    add_data_arguments(parser)


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Reads the config and calls `training.train`; the last step's metrics."""
    began = time.monotonic()
    from stepdistill_jax.commands.gin_config import load_config
    from stepdistill_jax.models.cpu_speed import keep_pages
    from stepdistill_jax.runtime.distributed import join

    keep_pages()
    join()
    bindings = list(args.gin_bindings)
    if args.task_module:
        bindings.append(f"TASK_MODULE={args.task_module}")
    config, text = load_config(args.config, args.overrides, args.gin_files, bindings)
    require_seqio("train")
    from stepdistill_jax.runtime import compile_cache
    from stepdistill_jax.training import train

    compile_cache.enable(compile_cache.beside(args.workdir))
    return train(
        config, workdir=args.workdir, data_dir=args.data_dir, config_text=text, began=began
    )
