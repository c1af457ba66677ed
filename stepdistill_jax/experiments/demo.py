"""Trains arms on the built-in dataset from scratch and compares them, in about two minutes."""

import dataclasses
import os
import time
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from stepdistill_jax.data.prepare import ensure_prepared
from stepdistill_jax.data.prepared import PreparedDataset
from stepdistill_jax.data.text_metrics import majority_baseline
from stepdistill_jax.decoding.greedy import LabelDecoder
from stepdistill_jax.experiments.plots import learning_curves
from stepdistill_jax.formats.directory import TaskInfo, read_task_info
from stepdistill_jax.inference.accuracy import AccuracyCounts
from stepdistill_jax.inference.model import LoadedModel, load_model
from stepdistill_jax.inference.prompting import encode_input
from stepdistill_jax.runtime.files import write_json
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
    """Trains each arm in `workdir`/ARM, decodes the test labels, and compares the arms.

    An arm that an earlier call trained is only decoded.

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
    results, curves, shown = [], {}, []
    for name, (config, text) in arms.items():
        folder = workdir / name
        log(f"--- {name}")
        start = time.monotonic()
        trained = train(config, workdir=folder, data_dir=data_dir, config_text=text)
        # None if an earlier start had trained all steps: then `train` returns no rate
        seconds = time.monotonic() - start if trained["examples_per_second"] else None
        model = load_model(folder)
        info = read_task_info(folder)
        result, predictions = _test(model, info, dataset)
        results.append(
            ArmResult(name, read_run(folder)["examples"], config.train_steps, seconds, **result)
        )
        curves[name] = read_metrics(folder)
        shown = _rationales(model, info, dataset, predictions) or shown
    labels = [e.label for e in dataset.examples("test")]
    baseline = majority_baseline(labels, dataset.metric)
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


def _decode(model: LoadedModel, info: TaskInfo, objective: int, texts: list[str], length: int):
    """Returns the decoded text and the number of decoded tokens for each input.

    `objective` is an index, and `length` is the largest number of tokens to decode.
    """
    chosen = info.objectives[objective]
    rows = [
        encode_input(model.vocabulary, chosen.input_template.format(input=text), info.input_length)[
            0
        ]
        for text in texts
    ]
    prefix = model.vocabulary.encode(chosen.decoder_prefix) if chosen.decoder_prefix else ()
    decoder = LabelDecoder(model.config, max_decode_len=length, decoder_prefix=prefix)
    decoded = decoder(model.params, rows)
    return [model.vocabulary.decode(ids) for ids in decoded.ids], [len(i) for i in decoded.ids]


def _test(
    model: LoadedModel, info: TaskInfo, dataset: PreparedDataset
) -> tuple[dict[str, float], list[str]]:
    examples = list(dataset.examples("test"))
    texts = [e.input for e in examples]
    predictions, counts = _decode(model, info, 0, texts, info.max_decode_len)
    accuracy = AccuracyCounts(dataset.metric)
    for prediction, example in zip(predictions, examples, strict=True):
        accuracy.add(prediction, example.label)
    right = accuracy.summary()["accuracy"]
    return {"test_accuracy": right, "tokens_per_row": float(np.mean(counts))}, predictions


def _rationales(
    model: LoadedModel, info: TaskInfo, dataset: PreparedDataset, predictions: list[str]
) -> list[dict[str, str]]:
    """Returns the first test rows with the model's labels and rationales, or [] if the model writes no rationales."""
    names = [o.name for o in info.objectives]
    if "rationale" not in names:
        return []
    examples = list(dataset.examples("test"))[:SHOWN_ROWS]
    texts, _ = _decode(
        model, info, names.index("rationale"), [e.input for e in examples], info.target_length
    )
    return [
        {"input": e.input, "gold": e.label, "label": label, "rationale": rationale}
        for e, label, rationale in zip(examples, predictions[:SHOWN_ROWS], texts, strict=True)
    ]


def device_name() -> str:
    """Returns the number and kind of the devices in words."""
    return f"{jax.device_count()} x {jax.devices()[0].device_kind}"
