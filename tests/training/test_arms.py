"""A model that writes its reasons first, from rows to an exported directory."""

import json

import pytest

from stepdistill_jax.data.prepare import prepare
from stepdistill_jax.inference import evaluate, export, predict
from stepdistill_jax.runtime.metrics import read_metrics
from stepdistill_jax.training import TrainConfig, train
from stepdistill_jax.training.config import OptimizerConfig

ROWS = [
    {"input": f"{thing} ?", "label": label, "rationale": f"it has {reason} near"}
    for thing, label, reason in (
        ("sea", "wet", "water"),
        ("sand", "dry", "dust"),
        ("rain", "wet", "water"),
        ("rock", "dry", "stone"),
    )
]


@pytest.mark.slow
def test_single_task_is_judged_by_its_labels_all_the_way(tmp_path):
    for split in ("train", "validation", "test"):
        text = "".join(json.dumps(row) + "\n" for row in ROWS)
        (tmp_path / f"{split}.jsonl").write_text(text)
    prepare("jsonl", source=tmp_path, new_name="wetness", data_dir=tmp_path)
    config = TrainConfig(
        task="wetness",
        objectives="single_task",
        batch_size=4,
        input_length=32,
        target_length=96,
        train_steps=120,
        eval_every=60,
        learning_rate=5e-3,
        dropout_rate=0.0,
        optimizer=OptimizerConfig(warmup_steps=10),
    )
    workdir = tmp_path / "run"
    train(config, workdir=workdir, data_dir=tmp_path)
    last = [line for line in read_metrics(workdir) if "eval/validation/unparsed" in line][-1]
    assert last["eval/validation/label_accuracy"] == 1.0
    assert last["eval/validation/unparsed"] == 0.0
    result = evaluate(workdir, task="wetness", data_dir=tmp_path)
    assert (result["accuracy"], result["unparsed"], result["unfinished"]) == (1.0, 0, 0)
    export(workdir, tmp_path / "model")
    assert (
        "The label follows the last 'so the answer is'"
        in (tmp_path / "model/README.md").read_text()
    )
    predict(tmp_path / "model", tmp_path / "test.jsonl", tmp_path / "out.jsonl")
    rows = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [(r["label"], r["rationale"]) for r in rows] == [
        (r["label"], r["rationale"]) for r in ROWS
    ]
