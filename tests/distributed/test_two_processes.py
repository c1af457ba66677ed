"""`train` of two processes of one device each, over gloo, is `train` of one with two devices."""

import json
import os
import signal
import time

import numpy as np
import pytest

from stepdistill_jax.runtime.checkpoints.manager import saved_steps
from stepdistill_jax.runtime.metrics import read_metrics

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]  # half a minute to a minute each

SCRIPT = "train_run.py"
# the 500 rows of validation make no whole batches of 7, nor of the decoder's 8
SETTINGS = {
    "task": "delivery",
    "batch_size": 7,
    "input_length": 64,
    "target_length": 64,
    "train_steps": 3,
    "eval_every": 3,
    "checkpoint_every": 100,
    "learning_rate": 1e-3,
}


def specification(workdir, data_dir, **changes):
    return {
        "config": SETTINGS | changes,
        "workdir": str(workdir),
        "data_dir": str(data_dir),
        "device_count": 2,
    }


def summary(workdir, count, process):
    found = json.loads((workdir / f"summary_{count}_{process}.json").read_text())
    return {k: v for k, v in found.items() if k != "examples_per_second"}


def untimed(workdir):
    return [
        {k: v for k, v in line.items() if not k.startswith("timing/")}
        for line in read_metrics(workdir)
    ]


@pytest.mark.parametrize("layout", ["fsdp", "fsdp_tensor"])
def test_two_processes_have_the_losses_of_one(tmp_path, start, delivery_data_dir, layout):
    """`fsdp_tensor` makes both processes own the same rows, `fsdp` different ones."""
    runs, rows = {}, set()
    for count in (1, 2):
        workdir = tmp_path / str(count)
        workdir.mkdir()
        given = specification(workdir, delivery_data_dir, layout=layout)
        codes, errors = start(SCRIPT, given, count=count, devices=2 // count).finish()
        assert codes == [0] * count, errors
        runs[count] = untimed(workdir)
        rows.add(tuple(json.loads((workdir / "run.json").read_text())["row_lengths"]))
    assert len(rows) == 1
    for one, two in zip(runs[1], runs[2], strict=True):
        assert one.keys() == two.keys()
        for key in one:
            np.testing.assert_allclose(two[key], one[key], rtol=1e-5, atol=1e-7, err_msg=key)
    both = [summary(tmp_path / "2", 2, process) for process in range(2)]
    assert {"eval/validation/label_accuracy", "eval/validation/loss"} <= both[0].keys()
    assert both[0] == both[1]


OWN_METRICS = """
import jax
from stepdistill_jax.tasks import add_task


def rows(split):
    for i in range(13 if split == "train" else 9):
        yield {"input": f"turn {i}", "label": "left" if i % 3 else "right"}


def by_whom(targets, scores):
    return {"process": jax.process_index(), "score": scores.mean()}


add_task("turns", source=rows, splits=["train", "validation"], metric=by_whom)
"""


def test_one_process_computes_the_metrics_of_a_task_and_both_know_them(
    tmp_path, start, monkeypatch
):
    (tmp_path / "own_metrics.py").write_text(OWN_METRICS)
    path = os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])])
    monkeypatch.setenv("PYTHONPATH", path)
    own = {"task": "turns", "task_module": "own_metrics", "best_metric": "score"}
    given = specification(tmp_path / "run", tmp_path / "data", layout="fsdp", **own)
    codes, errors = start(SCRIPT, given, count=2, devices=1).finish()
    assert codes == [0, 0], errors
    both = [summary(tmp_path / "run", 2, process) for process in range(2)]
    assert both[0] == both[1]
    assert both[0]["eval/validation/process"] == 0 and both[0]["eval/validation/score"] < -1
    (saved,) = saved_steps(tmp_path / "run").values()
    assert saved["rank"][0] == both[0]["eval/validation/score"]
    kept = tmp_path / "run" / "predictions" / "turns-validation-last.jsonl"
    assert len(kept.read_text().splitlines()) == 9


def test_two_processes_start_from_a_workdir_as_one_does(tmp_path, start, delivery_data_dir):
    source, runs = tmp_path / "source", {}
    settings = {"train_steps": 1, "eval_every": 1, "layout": "fsdp"}
    given = {source: (1, settings)}
    rules = [
        ["decoder/layers/self_attention/(.*)", r"decoder/layers/encoder_decoder_attention/\1"],
        ["decoder/layers/mlp/.*", None],
    ]
    for count in (1, 2):
        changes = settings | {"init_from": str(source), "init_rules": rules}
        given[tmp_path / str(count)] = (count, changes)
    for workdir, (count, changes) in given.items():
        workdir.mkdir()
        job = specification(workdir, delivery_data_dir, **changes)
        codes, errors = start(SCRIPT, job, count=count, devices=2 // count).finish()
        assert codes == [0] * count, errors
        kept = json.loads((workdir / "run.json").read_text())
        runs[workdir.name] = untimed(workdir), kept.get("initialised"), kept["fingerprint"]
    (one, *same), (two, *as_two) = runs["1"], runs["2"]
    assert (
        same == as_two and same[0]["step"] == 1 and same[0]["renamed"] and same[0]["from_scratch"]
    )
    assert [line.keys() for line in one] == [line.keys() for line in two]
    for a, b in zip(one, two, strict=True):
        np.testing.assert_allclose([*a.values()], [*b.values()], rtol=1e-5)
    assert one[0]["loss"] != runs["source"][0][0]["loss"]


def test_a_workdir_each_is_refused_by_both_where_one_has_begun(tmp_path, start, delivery_data_dir):
    """Whether a run has begun is a question to both: what one alone asks would cross another's."""
    settings = {"train_steps": 1, "eval_every": 1, "layout": "fsdp"}
    as_well = settings | {"init_from": str(tmp_path / "source")}
    for name, changes, count in (
        ("source", settings, 1),
        ("0", as_well, 1),
        ("{process}", as_well, 2),
    ):
        job = specification(tmp_path / name, delivery_data_dir, **changes)
        codes, errors = start(SCRIPT, job, count=count, devices=2 // count).finish()
        assert codes == ([0] if count == 1 else [1, 1]), errors
    assert errors.count("this process does not see the files that process 0 wrote") == 2, errors


def test_a_signal_to_one_stops_both_and_one_alone_goes_on(tmp_path, start, delivery_data_dir):
    given = specification(
        tmp_path, delivery_data_dir, layout="fsdp", train_steps=200, eval_every=10**6
    )
    job = start(SCRIPT, given, count=2)
    first, second = job.processes
    deadline = time.monotonic() + 200
    while not (tmp_path / "metrics.jsonl").exists() or len(read_metrics(tmp_path)) < 3:
        assert time.monotonic() < deadline and first.poll() is None, job.finish()
        time.sleep(0.05)
    second.send_signal(signal.SIGTERM)
    codes, errors = job.finish()
    assert codes == [75, 75], errors
    step = max(saved_steps(tmp_path))
    assert step < 200
    assert errors.count(f"saved step {step};") == 2

    codes, errors = start(SCRIPT, given, count=1, devices=2).finish()
    assert codes == [0], errors
    assert f"resumed {tmp_path} from step {step}" in errors
    assert [x["step"] for x in read_metrics(tmp_path) if "loss" in x] == list(range(1, 201))
