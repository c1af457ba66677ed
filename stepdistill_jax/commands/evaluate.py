"""`stepdistill evaluate`: computes a model's accuracy on a split of a dataset."""

import argparse
from typing import Any

from stepdistill_jax.commands.arguments import (
    add_data_arguments,
    add_decode_arguments,
    decode_options_of,
)
from stepdistill_jax.commands.predict import join_and_cache, stopped_by_signals
from stepdistill_jax.commands.terminal import say


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of `evaluate`."""
    parser.add_argument("path", metavar="WORKDIR_OR_MODEL", help="model to evaluate")
    parser.add_argument(
        "--task",
        required=True,
        metavar="NAME",
        help="prepared dataset, the model's own task, or a task that --module registers",
    )
    parser.add_argument("--split", default="test", help="split of the dataset (default: test)")
    add_decode_arguments(parser, prompts=False)
    parser.add_argument(
        "--with-rationale",
        action="store_true",
        help="also decode the rationales, and compare them with the dataset's rationales and with the"
        " model's own labels",
    )
    parser.add_argument(
        "--output", metavar="F.json", help="JSON file to which the result is also written"
    )
    add_data_arguments(parser)


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Calls `inference.evaluate`, and prints its summary on process 0."""
    join_and_cache(args.path)
    from stepdistill_jax.inference import evaluate, rationale_quality
    from stepdistill_jax.inference.accuracy import in_words
    from stepdistill_jax.runtime.distributed import is_process_0

    with stopped_by_signals():
        result = evaluate(
            args.path,
            task=args.task,
            split=args.split,
            output=args.output,
            with_rationale=args.with_rationale,
            data_dir=args.data_dir,
            task_module=args.task_module,
            **decode_options_of(args),
        )
    if is_process_0():
        for name, of_task in result.get("tasks", {args.task: result}).items():
            step = "" if of_task["step"] is None else f" step {of_task['step']}"
            say(f"{args.path}{step} on {name}/{args.split}: {in_words(of_task)}")
            if args.with_rationale:
                say(rationale_quality.in_words(of_task["rationale"]))
    return result
