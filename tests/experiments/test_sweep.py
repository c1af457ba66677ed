"""A sweep trains each cell once, whatever happens in between, and its cells share what is compiled."""

import dataclasses
import importlib
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time

import jax
import pytest

from stepdistill_jax.errors import InputError
from stepdistill_jax.experiments.sweep import Cell
from stepdistill_jax.runtime.files import write_json
from stepdistill_jax.training import OptimizerConfig, TrainConfig

# the package's `sweep` is the function
module = importlib.import_module("stepdistill_jax.experiments.sweep")
pytestmark = pytest.mark.timeout(900)  # it compiles and trains
COMPILED = "/jax/core/compile/backend_compile_duration"


def cell(seed, arm="label_only", fraction=0.5, **grid):
    config = TrainConfig(
        task="delivery",
        objectives=arm,
        batch_size=8,
        input_length=60,
        target_length=36,
        train_steps=2,
        eval_every=2,
        checkpoint_every=2,
        dropout_rate=0.0,
        data_fraction=fraction,
        seed=seed,
    )
    return Cell(arm, fraction, seed, grid, config, "# text")


def states(folder):
    cells = json.loads((folder / "sweep.json").read_text())["cells"]
    return {name: entry["state"] for name, entry in cells.items()}


@pytest.fixture(scope="module")
def swept(tmp_path_factory, delivery_data_dir):
    """Four seeds: 2 fails once, 3 always. With what was trained, compiled, and left in memory."""
    folder = tmp_path_factory.mktemp("sweep")
    seen = {"trained": [], "compiled": [], "arrays": []}
    count = [0]

    def listen(event, *_, **__):
        count[0] += event == COMPILED

    def train(config, **kwargs):
        seen["trained"].append(config.seed)
        if config.seed == 3 or (config.seed == 2 and seen["trained"].count(2) == 1):
            raise OSError("no space\non device")
        return real(config, **kwargs)

    def evaluate(*args, **kwargs):
        result = real_evaluate(*args, **kwargs)
        seen["compiled"].append(count[0])
        seen["arrays"].append(len(jax.live_arrays()))
        return result

    real, real_evaluate = module.train, module.evaluate
    cells = [cell(seed) for seed in range(4)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "train", train)
        patch.setattr(module, "evaluate", evaluate)
        jax.monitoring.register_event_duration_secs_listener(listen)
        result = module.sweep(cells, workdir=folder, data_dir=delivery_data_dir, asked={"a": 1})
        before = list(seen["trained"])
        again = module.sweep(cells, workdir=folder, data_dir=delivery_data_dir, asked={"a": 1})
    return folder, result, again, before, seen


@pytest.mark.slow
def test_a_cell_that_fails_is_tried_again_behind_the_others_and_listed(swept):
    folder, result, _, before, _ = swept
    assert before == [0, 1, 2, 3, 2, 3]
    (failed,) = result["failed_cells"]
    assert failed["cell"] == "label_only 0.5 seed 3"
    assert failed["workdir"] == str(folder / "label_only/0.5/3")
    assert failed["error"] == "OSError: no space on device"
    assert (result["cells"], result["done"], result["skipped"]) == (4, 3, 0)
    assert states(folder) == {
        f"label_only/0.5/{seed}": "failed" if seed == 3 else "done" for seed in range(4)
    }


@pytest.mark.slow
def test_a_second_start_does_only_what_is_left(swept):
    folder, result, again, before, seen = swept
    assert seen["trained"][len(before) :] == [3, 3]
    assert again["skipped"] == 3 and again["failed_cells"] == result["failed_cells"]
    assert len(json.loads((folder / "sweep.json").read_text())["asked"]) == 1


@pytest.mark.slow
def test_seeds_compile_once_and_leave_nothing_in_memory(swept):
    seen = swept[-1]
    assert len(seen["compiled"]) == 3 and seen["compiled"][0] > 0
    assert seen["compiled"][1:] == seen["compiled"][:1] * 2
    assert len(set(seen["arrays"])) == 1


@pytest.mark.slow
def test_every_cell_is_a_workdir_with_its_evaluation(swept):
    workdir = swept[0] / "label_only/0.5/1"
    assert (workdir / "config.gin").read_text() == "# text"
    kept = json.loads((workdir / "evaluation/test.json").read_text())
    assert (kept["task"], kept["split"], kept["rows"]) == ("delivery", "test", 500)
    assert (workdir / f"predictions/delivery-test-{kept['step']}.jsonl").is_file()
    assert json.loads((workdir / "run.json").read_text())["examples"] == 750


@pytest.mark.slow
@pytest.mark.parametrize(
    ("cells", "options", "part"),
    [
        ([], {}, "no cells"),
        ([cell(0), cell(0)], {}, "would share"),
        ([cell(0)], {"split": "tset"}, "no such split"),
        (
            [Cell("label_only", 0.5, 1, {}, TrainConfig(task="delivery", train_steps=9))],
            {},
            "`train_steps` was 2, is 9",
        ),
    ],
)
def test_what_cannot_be_swept_is_said_before_anything_trains(
    swept, delivery_data_dir, monkeypatch, cells, options, part
):
    monkeypatch.setattr(module, "train", None)
    with pytest.raises(InputError, match=part):
        module.sweep(cells, workdir=swept[0], data_dir=delivery_data_dir, **options)


@pytest.mark.slow
def test_a_cell_trained_further_is_evaluated_again(tmp_path, delivery_data_dir, monkeypatch):
    """Also where the sweep ends between the two: the answers of the shorter run are not the longer's."""

    def of_steps(steps):
        short = cell(0)
        constant = OptimizerConfig(schedule="constant")
        config = dataclasses.replace(short.config, train_steps=steps, optimizer=constant)
        return [dataclasses.replace(short, config=config)]

    def swept(cells):
        return module.sweep(cells, workdir=tmp_path, data_dir=delivery_data_dir, retries=0)

    def evaluate(*args, **kwargs):
        raise OSError("no space")

    path = tmp_path / "label_only/0.5/0/evaluation/test.json"
    assert swept(of_steps(2))["done"] == 1
    with monkeypatch.context() as patch:
        patch.setattr(module, "evaluate", evaluate)
        assert swept(of_steps(4))["done"] == 0
    assert json.loads(path.read_text())["train_steps"] == 2
    assert swept(of_steps(4))["skipped"] == 0
    assert json.loads(path.read_text())["train_steps"] == 4
    assert swept(of_steps(4))["skipped"] == 1


@pytest.mark.slow
@pytest.mark.parametrize("further", [False, True], ids=["as_it_was", "trained_further"])
def test_an_evaluation_of_an_older_version_is_of_the_run_as_it_then_was(
    swept, tmp_path, delivery_data_dir, monkeypatch, further
):
    """It says nothing of the run's steps, nor do the lives of that version."""
    workdir = tmp_path / "label_only/0.5/0"
    shutil.copytree(swept[0] / "label_only/0.5/0", workdir)

    def change(name, edit):
        content = json.loads((workdir / name).read_text())
        edit(content)
        write_json(workdir / name, content)

    def edit_lives(described):
        (life,) = described["lives"]
        older = {name: value for name, value in life.items() if name != "train_steps"}
        described["lives"] = [older, life] if further else [older]

    change("run.json", edit_lives)
    change("evaluation/test.json", lambda kept: kept.pop("train_steps"))
    evaluated = []
    monkeypatch.setattr(module, "evaluate", lambda *_, **__: evaluated.append(1) or {"step": 2})
    done = module.sweep([cell(0)], workdir=tmp_path, data_dir=delivery_data_dir)
    assert (done["done"], done["skipped"], len(evaluated)) == (1, not further, further)


@pytest.mark.slow
def test_a_run_is_no_sweeps_folder(swept, delivery_data_dir):
    workdir = swept[0] / "label_only/0.5/0"
    with pytest.raises(InputError, match="expected a folder of runs, but this is"):
        module.sweep([cell(0)], workdir=workdir, data_dir=delivery_data_dir)


def test_values_of_a_grid_make_folders_without_slashes():
    made = cell(3, arm="step_by_step", LEARNING_RATE="0.001", INIT_FROM="/models/t5 base")
    assert made.path == "step_by_step/LEARNING_RATE=0.001,INIT_FROM=-models-t5-base/0.5/3"
    assert made.name == "step_by_step 0.5 seed 3 LEARNING_RATE=0.001 INIT_FROM=/models/t5 base"


SWEEP = """sweep demo_label_only --arms label_only,step_by_step --seeds 0,1 --with-rationale
 --set BATCH_SIZE=8 --set TRAIN_STEPS=6 --set EVAL_EVERY=3 --set CHECKPOINT_EVERY=3"""


def results(folder) -> dict[str, object]:
    """What must not depend on kills: answers, and metrics but for times."""
    found: dict[str, object] = {}
    for path in sorted(folder.rglob("*.jsonl")):
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        found[str(path.relative_to(folder))] = [
            {k: v for k, v in line.items() if not k.startswith("timing/")} for line in lines
        ]
    return found


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_sweep_that_is_killed_goes_on_to_the_same_bits(tmp_path, delivery_data_dir):
    def start(folder):
        command = [sys.executable, "-m", "stepdistill_jax", *SWEEP.split(), "--json"]
        command += ["--workdir", str(folder), "--data-dir", str(delivery_data_dir)]
        return subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env=os.environ | {"XLA_FLAGS": os.environ["XLA_FLAGS_OF_ONE_DEVICE"]},
        )

    def finish(folder):
        process = start(folder)
        out, _ = process.communicate(timeout=600)
        assert process.returncode == 0
        return json.loads(out.splitlines()[-1])

    calm, killed = tmp_path / "calm", tmp_path / "killed"
    assert finish(calm)["done"] == 4
    # in a run, and between a run's end and its evaluation's
    for wanted in ("label_only/1.0/1/checkpoints/3", "step_by_step/1.0/0/predictions"):
        process = start(killed)
        while not (killed / wanted).exists():
            assert process.poll() is None
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert "running" in states(killed).values()
    done = finish(killed)
    assert (done["done"], done["failed_cells"]) == (4, []) and done["skipped"] >= 2
    assert results(killed) == results(calm)
    before = {p: p.stat().st_mtime_ns for p in killed.rglob("*") if p.is_file()}
    assert finish(killed)["skipped"] == 4
    changed = {p for p, at in before.items() if p.stat().st_mtime_ns != at}
    assert {pathlib.Path(p).name for p in changed} <= {"sweep.json"}
