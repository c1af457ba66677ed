"""Names and writes the files of answers in a workdir's folder `predictions/`."""

import json
import os
from collections.abc import Iterable, Mapping
from typing import Any

from stepdistill_jax.inference.options import DecodeOptions
from stepdistill_jax.runtime.files import atomic_write
from stepdistill_jax.runtime.stores import as_path

PREDICTIONS = "predictions"
WITH_RATIONALE = "-rationale"  # predictions/TASK-SPLIT-STEP-rationale.jsonl


def answers_name(
    task: str, split: str, step: int | None, options: DecodeOptions, with_rationale: bool = False
) -> str:
    """Returns the name of the file of answers, without `.jsonl`."""
    name = f"{task}-{split}-{step}"
    name += "" if options.num_beams == 1 else f"-beams{options.num_beams}"
    name += "" if options.length_penalty is None else f"-penalty{options.length_penalty}"
    name += "" if options.choices is None else "-choices"
    name += "" if options.quantization is None else f"-{options.quantization}"
    return name + (WITH_RATIONALE if with_rationale else "")


def write_answers(workdir: os.PathLike | str, name: str, rows: Iterable[Mapping[str, Any]]) -> None:
    """Writes the rows atomically to `predictions/NAME.jsonl` in a workdir, and replaces an older file.

    Raises:
        OSError: the file cannot be written. The message names the file.
    """
    with atomic_write(as_path(workdir) / PREDICTIONS / f"{name}.jsonl") as f:
        f.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
