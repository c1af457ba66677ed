"""Trains arms on the built-in dataset from scratch and compares them, in about two minutes."""

import dataclasses
import os
import pathlib
import time
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from stepdistill_jax.data.example import Example
from stepdistill_jax.data.objectives import gives_rationale, resolve
from stepdistill_jax.data.prepare import ensure_prepared
from stepdistill_jax.data.text_metrics import majority_baseline
from stepdistill_jax.experiments.plots import learning_curves
from stepdistill_jax.formats.directory import read_model_files
from stepdistill_jax.inference import evaluate, load
from stepdistill_jax.inference.answer_files import PREDICTIONS, answers_name
from stepdistill_jax.inference.options import DecodeOptions
from stepdistill_jax.inference.prompting import RATIONALE
from stepdistill_jax.runtime.files import read_jsonl, write_json
from stepdistill_jax.runtime.metrics import read_metrics
from stepdistill_jax.runtime.overwriting import Made, check_folder
from stepdistill_jax.runtime.progress import log
from stepdistill_jax.runtime.stores import local_path
from stepdistill_jax.training.config import TrainConfig
from stepdistill_jax.training.loop import train
from stepdistill_jax.training.workdir import read_run

SUMMARY, PLOT = "demo.json", "demo.png"
MADE = Made("demo", b'{\n  "arms": [', ("arms", "majority_baseline", "plot", "rows"))
SHOWN_ROWS = 3


@dataclasses.dataclass(frozen=True)
class ArmResult:
    """One row of the demo's table.

    Attributes:
        labels: number of labelled training examples.
        seconds: training time, with compilation and validation; None if an earlier call trained the arm.
        test_accuracy: share of right labels.
        tokens_per_row: mean number of tokens of a decoded label.
    """

    arm: str
    labels: int
    steps: int
    seconds: float | None
    test_accuracy: float
    tokens_per_row: float


def demo(
    arms: Mapping[str, tuple[TrainConfig, str]],
    *,
    workdir: os.PathLike | str,
    data_dir: os.PathLike | str,
) -> dict[str, Any]:
    """Trains and evaluates each arm in `workdir`/ARM, and compares the arms.

    An arm that an earlier call trained is only evaluated.

    Args:
        arms: {name: (config, its gin text)}, all with the same task.
        workdir: also gets `demo.png` and `demo.json`.
        data_dir: folder of prepared datasets.

    Returns:
        `arms`: a dict of `ArmResult` for each arm.
        `majority_baseline`: accuracy of the commonest label.
        `plot`: path of `demo.png`.
        `rows`: some test rows with the step-by-step model's texts.
    """
    workdir = local_path(workdir, "`workdir`")
    check_folder(workdir, SUMMARY, MADE, [PLOT])
    task = next(iter(arms.values()))[0].task
    dataset = ensure_prepared(task, data_dir)
    examples = list(dataset.examples("test"))
    results, curves, shown = [], {}, []
    for name, (config, text) in arms.items():
        folder = workdir / name
        log(f"--- {name}")
        start = time.monotonic()
        trained = train(config, workdir=folder, data_dir=data_dir, config_text=text)
        # None if an earlier start had trained all steps: then `train` returns no rate
        seconds = time.monotonic() - start if trained["examples_per_second"] else None
        # `report` reads these answers, too
        tested = evaluate(folder, task=task, data_dir=data_dir)
        file = f"{answers_name(task, 'test', tested['step'], DecodeOptions())}.jsonl"
        results.append(
            ArmResult(
                name,
                read_run(folder)["examples"],
                config.train_steps,
                seconds,
                tested["accuracy"],
                _tokens_per_row(folder, folder / PREDICTIONS / file),
            )
        )
        curves[name] = read_metrics(folder)
        if gives_rationale(resolve(config.objectives)):
            shown = _rationales(folder, examples[:SHOWN_ROWS])
    baseline = majority_baseline([e.label for e in examples], dataset.metric)
    plot = workdir / PLOT
    summary = {
        "arms": [dataclasses.asdict(r) for r in results],
        "majority_baseline": baseline,
        "plot": str(plot),
        "rows": shown,
    }
    write_json(workdir / SUMMARY, summary)
    learning_curves(curves, plot, chance=baseline)
    return summary


def _tokens_per_row(folder: pathlib.Path, answers: pathlib.Path) -> float:
    """Returns the mean number of tokens of an answer's text, encoded again, and its end of sequence."""
    encode = read_model_files(folder).vocabulary.encode
    return float(np.mean([len(encode(row["label"])) + 1 for _, row in read_jsonl(answers)]))


def _rationales(folder: pathlib.Path, examples: Sequence[Example]) -> list[dict[str, str]]:
    """Returns each row's input and gold label with the model's label and rationale."""
    answers = load(folder).predict([e.input for e in examples], with_rationale=True)
    return [
        {"input": e.input, "gold": e.label, "label": a["label"], "rationale": a[RATIONALE]}
        for e, a in zip(examples, answers, strict=True)
    ]


def device_name() -> str:
    """Returns the number and kind of the devices in words."""
    return f"{jax.device_count()} x {jax.devices()[0].device_kind}"
