"""Runs made up of files: what a sweep leaves behind, without training."""

import json

import numpy as np
import pytest

from stepdistill_jax.data.prepared import open_prepared
from stepdistill_jax.training import TrainConfig

STEP = 40
OTHER = {"smooth": "trouble", "trouble": "smooth"}


@pytest.fixture(scope="module")
def delivery(delivery_data_dir):
    return open_prepared("delivery", delivery_data_dir)


@pytest.fixture(scope="module")
def make_run(delivery):
    """Writes a workdir whose answers on test are right in the rows `right` says; gives its answers."""
    examples = list(delivery.examples("test"))

    def make(
        workdir,
        arm,
        fraction,
        seed,
        right,
        *,
        always=None,
        rationale=None,
        figures=None,
        **settings,
    ):
        config = TrainConfig(
            task="delivery",
            objectives=arm,
            data_fraction=fraction,
            seed=seed,
            batch_size=8,
            train_steps=STEP,
            **settings,
        )
        (workdir / "predictions").mkdir(parents=True)
        (workdir / "evaluation").mkdir()
        described = {
            "config": config.to_json(),
            "examples": int(1500 * fraction),
            "parameters": 172864,
        }
        (workdir / "run.json").write_text(json.dumps(described))
        answers = [
            always or (e.label if ok else OTHER[e.label])
            for e, ok in zip(examples, right, strict=True)
        ]
        rows = [
            {"id": e.id, "label": a, "score": -0.1} for e, a in zip(examples, answers, strict=True)
        ]
        file = workdir / "predictions" / f"delivery-test-{STEP}.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        if rationale:
            explained = "".join(json.dumps(row | {"rationale": rationale}) + "\n" for row in rows)
            file.with_name(f"{file.stem}-rationale.jsonl").write_text(explained)
        kept = {"step": STEP, "dataset": delivery.fingerprint, "majority_baseline": 0.5}
        kept |= {"with_rationale": bool(rationale), "rationale": figures}
        (workdir / "evaluation" / "test.json").write_text(json.dumps(kept))
        lines = [
            {
                "step": step,
                "loss/label": 1 / step,
                "timing/examples_per_second": 16.0,  # half a second a step
                "timing/tflops_per_second": 2.0,
            }
            for step in range(1, STEP + 1)
        ]
        validated = {"label_accuracy": 0.5}
        validated |= {"accuracy/rationale": 0.75} if figures else {}
        lines.append({"step": STEP, **{f"eval/validation/{k}": v for k, v in validated.items()}})
        (workdir / "metrics.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
        return answers

    return make


@pytest.fixture(scope="module")
def make_sweep(make_run, delivery):
    """Writes a sweep's folder: `arms` is {(arm, fraction): accuracy of each seed}."""
    rows = delivery.splits["test"]

    def make(folder, arms, *, collapsed=(), **options):
        cells, rng = {}, np.random.default_rng(0)
        for (arm, fraction), accuracies in arms.items():
            for seed, accuracy in enumerate(accuracies):
                path = f"{arm}/{fraction!r}/{seed}"
                right = rng.permutation(rows) < round(rows * accuracy)
                always = "smooth" if (arm, fraction, seed) in collapsed else None
                make_run(folder / path, arm, fraction, seed, right, always=always, **options)
                cells[path] = {"arm": arm, "fraction": fraction, "seed": seed, "grid": {}}
        (folder / "sweep.json").write_text(json.dumps({"asked": [], "cells": cells}))
        return folder

    return make
