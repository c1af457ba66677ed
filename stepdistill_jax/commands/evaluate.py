"""`stepdistill evaluate`: accuracy of a model on a split of a dataset."""

import argparse
import pathlib
from typing import Any

from stepdistill_jax.commands.arguments import add_data_arguments
from stepdistill_jax.commands.predict import add_model_arguments


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of `evaluate`."""
    parser.add_argument(
        "path", metavar="WORKDIR_OR_MODEL", type=pathlib.Path, help="what to evaluate"
    )
    parser.add_argument(
        "--task", required=True, metavar="NAME", help="a prepared dataset, or a task of --module"
    )
    parser.add_argument("--split", default="test", help="of the dataset (default: test)")
    add_model_arguments(parser)
    parser.add_argument(
        "--output", type=pathlib.Path, metavar="F.json", help="also write the result to a file"
    )
    add_data_arguments(parser)


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Calls `inference.evaluate` and prints its summary."""
    from stepdistill_jax.inference.tally import in_words

    result = _evaluate_module(args) if args.module else _evaluate_prepared(args)
    step = "" if result["step"] is None else f" step {result['step']}"
    print(f"{args.path}{step} on {args.task}/{args.split}: {in_words(result)}")
    return result


def _evaluate_prepared(args: argparse.Namespace) -> dict[str, Any]:
    from stepdistill_jax.inference import evaluate

    return evaluate(
        args.path,
        task=args.task,
        split=args.split,
        step=args.step,
        output=args.output,
        data_dir=args.data_dir,
        batch_size=args.batch_size,
    )


def _evaluate_module(args: argparse.Namespace) -> dict[str, Any]:
    """A task of the user's own module: only SeqIO can read it, so TensorFlow is imported here."""
    from stepdistill_jax.files import write_json
    from stepdistill_jax.formats.directory import SPIECE, read_model_files
    from stepdistill_jax.inference.evaluate import evaluate_tokens
    from stepdistill_jax.objectives import label_only
    from stepdistill_jax.tasks.load import load_task
    from stepdistill_jax.text.vocabulary import BYTES

    info = read_model_files(args.path).task_info
    spiece = args.path / SPIECE
    data = load_task(
        args.task,
        split=args.split,
        objectives=info.objectives[:1] if info else label_only(),
        vocabulary=spiece if spiece.is_file() else BYTES,
        data_dir=args.data_dir,
        task_module=args.module,
    )
    inputs, labels = [], []
    for store in data.stores:
        inputs += [store.rows[0]["inputs"][i].tolist() for i in range(store.num_examples)]
        labels += store.label_texts
    result = evaluate_tokens(
        args.path,
        inputs,
        labels,
        metric=data.metric,
        allowed=data.labels,
        step=args.step,
        batch_size=args.batch_size,
    )
    result = {"task": args.task, "split": args.split} | result
    if args.output is not None:
        write_json(args.output, result)
    return result
