"""`stepdistill train`: trains a model in a workdir, or resumes the run in the workdir."""

import argparse
import os
import shlex
import time
from typing import TYPE_CHECKING, Any

from stepdistill_jax.commands.arguments import (
    add_config_arguments,
    add_data_arguments,
    require_seqio,
)
from stepdistill_jax.commands.terminal import say
from stepdistill_jax.errors import InputError

if TYPE_CHECKING:
    from stepdistill_jax.training.config import TrainConfig


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of `train`."""
    add_config_arguments(parser)
    parser.add_argument(
        "--workdir",
        required=True,
        metavar="DIR",
        help="folder for checkpoints, metrics and model, local or on gs://; an unfinished"
        " run is resumed",
    )
    add_data_arguments(parser)


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Reads the config, calls `training.train`, prints a summary, and returns the result."""
    began = time.monotonic()
    from stepdistill_jax.commands.gin_config import load_config
    from stepdistill_jax.models.cpu_speed import keep_pages
    from stepdistill_jax.runtime.distributed import is_process_0, join

    keep_pages()
    join()
    refuse_dataset(args.config, args.data_dir)
    bindings = list(args.gin_bindings)
    if args.task_module:
        bindings.append(f"TASK_MODULE={args.task_module}")
    config, text = load_config(args.config, args.overrides, args.gin_files, bindings)
    require_seqio("train")
    from stepdistill_jax.runtime import compile_cache
    from stepdistill_jax.training import train

    compile_cache.enable(compile_cache.folder_for(args.workdir))
    result = train(
        config, workdir=args.workdir, data_dir=args.data_dir, config_text=text, began=began
    )
    if is_process_0():
        say(in_words(result, config, args.workdir))
        say(f"next: {shlex.join(_next_command(config, args))}")
    return result


def refuse_dataset(config: str | None, data_dir: str | None) -> None:
    """Checks that `config` is not the name of a prepared dataset.

    Raises:
        InputError: `config` names a prepared dataset.
    """
    from stepdistill_jax.commands.shipped import find_shipped
    from stepdistill_jax.data.prepared import NAME, data_folder, is_prepared

    if not config or not NAME.fullmatch(config) or os.path.isfile(config) or find_shipped(config):
        return
    if is_prepared(config, data_folder(data_dir)):
        raise InputError(
            f"{config!r} is a prepared dataset, not a config: run `stepdistill train demo_step_by_step"
            f" --set TASK={config}`, or use the config `finetune` for a pretrained T5"
        )


def in_words(result: dict[str, Any], config: "TrainConfig", workdir: str) -> str:
    """Returns the result of a run as a line of text.

    Example: `runs/cqa: best step 300 of 400, validation accuracy 0.452 (baseline that always gives the commonest label: 0.211)`.
    """
    best = f"{workdir}: best step {result['best_step']} of {config.train_steps}"
    if "majority_baseline" not in result:
        return f"{best}, the last one, since {config.task} has no validation split"
    chosen = "" if config.best_metric is None else f" by {config.best_metric}"
    accuracy, baseline = result["eval/validation/label_accuracy"], result["majority_baseline"]
    line = f"{best}{chosen}, validation accuracy {accuracy:.4g}"
    line += f" (baseline that always gives the commonest label: {baseline:.4g})"
    if accuracy <= baseline:
        line += "; not above the baseline yet: a larger TRAIN_STEPS may help"
    return line


def _next_command(config: "TrainConfig", args: argparse.Namespace) -> list[str]:
    """Returns the command to suggest next: `evaluate` if the task has a test split, else `export`."""
    from stepdistill_jax.tasks.load import has_split

    where = {"data_dir": args.data_dir, "task_module": config.task_module}
    if not has_split(config.task, "test", **where):
        return ["stepdistill", "export", args.workdir, "my_model"]
    command = ["stepdistill", "evaluate", args.workdir, "--task", config.task, "--split", "test"]
    return command if args.data_dir is None else [*command, "--data-dir", str(args.data_dir)]
