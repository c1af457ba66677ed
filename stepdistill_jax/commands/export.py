"""`stepdistill export`: a trained model as a Hugging Face directory, or as StableHLO."""

import argparse
import pathlib
from typing import Any


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of `export`."""
    parser.add_argument(
        "workdir",
        metavar="WORKDIR",
        help="folder of a training run (with --format jax also a model directory)",
    )
    parser.add_argument(
        "model_dir", metavar="MODEL_DIR", type=pathlib.Path, help="new folder to write"
    )
    parser.add_argument(
        "--step",
        default="best",
        metavar="best|last|N",
        help="which checkpoint (default: best by validation)",
    )
    parser.add_argument(
        "--format",
        choices=("hf", "jax"),
        default="hf",
        help="hf (default): what transformers and CTranslate2 open; jax: the label decoder as StableHLO"
        " with its weights, for a process that has only jax",
    )


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Calls `inference.export` and says what is there."""
    from stepdistill_jax.inference import export

    result = export(args.workdir, args.model_dir, step=args.step, format=args.format)
    step = "" if result["step"] is None else f"step {result['step']}, "
    print(
        f"{args.model_dir}: {step}{result['parameters']:,} parameters; {', '.join(result['files'])}"
    )
    return result
