"""`stepdistill export`: a workdir's model as a Hugging Face directory."""

import argparse
import pathlib
from typing import Any


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of `export`."""
    parser.add_argument(
        "workdir", metavar="WORKDIR", type=pathlib.Path, help="folder of a training run"
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


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Calls `inference.export` and says what is there."""
    from stepdistill_jax.inference import export

    result = export(args.workdir, args.model_dir, step=args.step)
    print(
        f"{args.model_dir}: step {result['step']}, {result['parameters']:,} parameters;"
        f" {', '.join(result['files'])}"
    )
    return result
