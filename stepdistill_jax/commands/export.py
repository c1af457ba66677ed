"""`stepdistill export`: writes a model in Hugging Face's layout, as StableHLO, or for CTranslate2."""

import argparse
import pathlib
from typing import Any

from stepdistill_jax.commands.arguments import add_step_argument
from stepdistill_jax.commands.terminal import say


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of `export`."""
    parser.add_argument(
        "workdir",
        metavar="WORKDIR",
        help="folder of a training run or, with --format jax or ctranslate2, a model directory",
    )
    parser.add_argument(
        "model_dir", metavar="MODEL_DIR", type=pathlib.Path, help="new folder to write"
    )
    add_step_argument(parser)
    parser.add_argument(
        "--format",
        choices=("hf", "jax", "ctranslate2"),
        default="hf",
        help="hf (default): a directory for transformers; jax: the label decoder as"
        " StableHLO with its weights, for a process that has only jax; ctranslate2: a"
        " directory for CTranslate2, which is faster on CPUs",
    )
    parser.add_argument(
        "--quantization",
        metavar="float32|int8",
        help="type of the weights, only for --format ctranslate2 (default: float32)",
    )


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Calls `inference.export` and prints what it wrote."""
    from stepdistill_jax.inference import export

    result = export(
        args.workdir,
        args.model_dir,
        step=args.step,
        format=args.format,
        quantization=args.quantization,
    )
    step = "" if result["step"] is None else f"step {result['step']}, "
    say(
        f"{args.model_dir}: {step}{result['parameters']:,} parameters; {', '.join(result['files'])}"
    )
    return result
