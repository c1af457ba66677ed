"""The whole road by its commands, each in a process of its own, as a user walks it."""

import json
import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest

from stepdistill_jax.training.writers import read_metrics


def stepdistill(*args, cwd, code=0):
    """Runs a command; returns (the JSON object of its last line, standard error)."""
    done = subprocess.run(
        [sys.executable, "-m", "stepdistill_jax", *map(str, args)],
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=600,
        env=os.environ | {"XLA_FLAGS": ""},  # one device, as on a laptop
    )
    assert done.returncode == code, done.stderr
    return json.loads(done.stdout.splitlines()[-1]) if code == 0 else None, done.stderr


def mean_loss(lines, objective, steps):
    key = f"loss/{objective}"
    return np.mean([x[key] for x in lines if x["step"] in steps and key in x])


def walk(tmp_path, data_dir, task, config, *settings, steps, test_rows):
    """inspect -> train -> evaluate -> predict -> export -> predict; returns the evaluation."""
    data = ("--data-dir", data_dir, "--json")
    inspected, _ = stepdistill("inspect", config, "--rows", 1, *data, cwd=tmp_path)
    assert inspected
    trained, _ = stepdistill(
        "train", config, "--workdir", "run", "--set", f"TRAIN_STEPS={steps}", *settings, *data,
        cwd=tmp_path,
    )  # fmt: skip
    assert trained["step"] == steps
    lines = read_metrics(tmp_path / "run")
    first, last = range(1, 11), range(steps - 9, steps + 1)
    for objective in ("label", "rationale"):
        assert mean_loss(lines, objective, last) < 0.9 * mean_loss(lines, objective, first)

    evaluated, _ = stepdistill(
        "evaluate", "run", "--task", task, "--split", "test", "--output", "test.json", *data,
        cwd=tmp_path,
    )  # fmt: skip
    assert json.loads((tmp_path / "test.json").read_text())["accuracy"] == evaluated["accuracy"]
    assert evaluated["rows"] == test_rows
    source = pathlib.Path(data_dir) / task / "test.jsonl"
    predicted, _ = stepdistill("predict", "run", source, "out.jsonl", "--json", cwd=tmp_path)
    for key in ("rows", "accuracy", "majority_baseline", "invalid_labels", "unfinished"):
        assert predicted[key] == evaluated[key], key
    rows = [json.loads(x) for x in (tmp_path / "out.jsonl").read_text().splitlines()]
    asked = [json.loads(x) for x in source.read_text().splitlines()]
    assert [r["id"] for r in rows] == [r["id"] for r in asked]
    assert all({"id", "label", "score"} == r.keys() and r["score"] <= 0 for r in rows)

    stepdistill("export", "run", "model", "--json", cwd=tmp_path)
    stepdistill("predict", "model", source, "exported.jsonl", "--json", cwd=tmp_path)
    assert (tmp_path / "exported.jsonl").read_bytes() == (tmp_path / "out.jsonl").read_bytes()
    transformers_agrees(tmp_path / "model", asked[:8], rows[:8], evaluated)
    return evaluated


def transformers_agrees(model_dir, asked, rows, evaluated):
    """torch opens the exported directory and decodes the same labels."""
    torch = pytest.importorskip("torch")
    import transformers

    info = json.loads((model_dir / "stepdistill.json").read_text())
    tokenizer = transformers.AutoTokenizer.from_pretrained(model_dir)
    model = transformers.T5ForConditionalGeneration.from_pretrained(model_dir).eval()
    prompts = [info["objectives"][0]["input_template"].format(input=r["input"]) for r in asked]
    inputs = tokenizer(prompts, return_tensors="pt", padding=True)
    with torch.no_grad():
        ids = model.generate(
            **inputs,
            max_new_tokens=info["max_decode_len"],
            do_sample=False,
            num_beams=1,
            use_cache=False,  # its cache wants encoder and decoder of one depth
        )
    texts = tokenizer.batch_decode(ids, skip_special_tokens=True)
    assert [t.strip() for t in texts] == [r["label"] for r in rows]


def test_the_road_on_the_embedded_dataset(tmp_path, delivery_data_dir):
    walk(
        tmp_path, delivery_data_dir, "delivery", "demo_step_by_step", steps=120, test_rows=500,
    )  # fmt: skip


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    "name,test_rows,accuracies",
    [
        ("cqa", 1221, {"teacher_accuracy": 0.7928, "teacher_accuracy_by_text": 0.7723}),
        ("svamp", 200, {"teacher_accuracy": 0.74}),
    ],
)
def test_the_road_on_real_data(tmp_path, paper_data, name, test_rows, accuracies):
    prepared, _ = stepdistill(
        "prepare", name, "--source", paper_data / name, "--data-dir", "data", "--json",
        cwd=tmp_path,
    )  # fmt: skip
    for key, value in accuracies.items():
        assert round(prepared["splits"]["test"][key], 4) == value
    walk(tmp_path, tmp_path / "data", name, f"{name}_cpu_tiny", steps=200, test_rows=test_rows)


@pytest.fixture(scope="module")
def other_run(tmp_path_factory, delivery_data_dir):
    """A workdir after one step."""
    folder = tmp_path_factory.mktemp("other")
    stepdistill(
        "train", "demo_label_only", "--workdir", "run", "--set", "TRAIN_STEPS=1",
        "--data-dir", delivery_data_dir, "--json", cwd=folder,
    )  # fmt: skip
    return folder / "run"


@pytest.mark.parametrize(
    "args,named",
    [
        (("train", "demo_step_by_step", "--workdir", "w", "--set", "BATCH_SISE=8"), "BATCH_SIZE"),
        (("train", "no_such.gin", "--workdir", "w"), "no_such.gin"),
        (("train", "demo_step_by_step", "--workdir", "w", "--set", "TASK=delivry"), "delivery"),
        (("prepare", "jsonl", "--source", "broken.jsonl", "--name", "mine"), "broken.jsonl:7"),
        (("predict", "nowhere", "good.jsonl", "out.jsonl"), "nowhere"),
        (("predict", "RUN", "broken.jsonl", "out.jsonl"), "broken.jsonl:7"),
        (("evaluate", "nowhere", "--task", "delivery"), "nowhere"),
        (("train", "demo_label_only", "--workdir", "RUN", "--set", "TRAIN_STEPS=2"), "TRAIN_STEPS"),
    ],
    ids=[
        "typo",
        "missing_file",
        "task",
        "broken_json",
        "no_model",
        "broken_input",
        "no_run",
        "other_config",
    ],
)
def test_bad_input_is_named_in_one_line(tmp_path, delivery_data_dir, other_run, args, named):
    good = json.dumps({"input": "a", "label": "b", "rationale": "c"}) + "\n"
    (tmp_path / "good.jsonl").write_text(good)
    (tmp_path / "broken.jsonl").write_text(good * 6 + '{"input": "a", \n' + good)
    args = [other_run if a == "RUN" else a for a in args]
    data = () if args[0] == "predict" else ("--data-dir", delivery_data_dir)
    _, errors = stepdistill(*args, *data, cwd=tmp_path, code=2)
    (line,) = [x for x in errors.splitlines() if x.startswith("stepdistill")]
    assert named in line
    assert "Traceback" not in errors
    assert not (tmp_path / "out.jsonl").exists()
