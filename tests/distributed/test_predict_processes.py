"""`predict` and `evaluate` of two processes over gloo: the file of one, and one end for both."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from stepdistill_jax.data.objectives import step_by_step
from stepdistill_jax.data.vocabulary import load_vocabulary
from stepdistill_jax.formats.directory import TaskInfo, write_model_files
from stepdistill_jax.models.encoder_decoder import init_params
from stepdistill_jax.models.t5 import T5Config
from stepdistill_jax.runtime.checkpoints.manager import Checkpoints
from stepdistill_jax.runtime.locks import open_locked

pytestmark = pytest.mark.slow  # ten to thirty seconds each

# what a process is told beside its command line: rows of a window, the window in which it kills
# itself, bytes that a file of it may have
CHILD = """
import importlib, json, os, resource, signal, sys
settings, arguments = json.loads(sys.argv[1]), sys.argv[2:]
from stepdistill_jax.commands.main import main
module = importlib.import_module("stepdistill_jax.inference.predict")
engines = importlib.import_module("stepdistill_jax.inference.engines")
module.WINDOW_ROWS, module.WINDOW_BATCHES = settings.get("window", 4096), 0
decode_window, load_model, windows = module.decode_window, engines.load_model, []
def decode(*args):
    windows.append(1)
    if len(windows) == settings.get("kill_in"):
        os.kill(os.getpid(), signal.SIGKILL)
    if limit := settings.get("file_bytes"):
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    return decode_window(*args)
def load(*args, **options):
    import jax
    model = load_model(*args, **options)
    held = [x.addressable_shards[0].data.size for x in jax.tree.leaves(model.params)]
    print(f"held {sum(held)} of {sum(x.size for x in jax.tree.leaves(model.params))}", file=sys.stderr)
    return model
module.decode_window, engines.load_model = decode, load
sys.exit(main(arguments))
"""
NOBODY = "/proc/nobody/writes/here"


def run_processes(commands, settings=({}, {}), during=None, devices=1):
    """(exit codes, standard outputs, standard errors) of one process per command."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    flags = f"--xla_force_host_platform_device_count={devices}"
    pair = []
    for i, (command, setting) in enumerate(zip(commands, settings, strict=False)):
        env = os.environ | {"XLA_FLAGS": flags}
        if len(commands) > 1:
            env |= {
                "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}",
                "JAX_NUM_PROCESSES": str(len(commands)),
                "JAX_PROCESS_ID": str(i),
            }
        line = [sys.executable, "-c", CHILD, json.dumps(setting), *map(str, command)]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        pair.append(subprocess.Popen(line, text=True, env=env, **pipes))
    if during:
        during(pair)
    outputs = [p.communicate(timeout=200) for p in pair]
    codes = [p.returncode for p in pair]
    printed = [without_gloo(out) for out, _ in outputs]
    return codes, printed, [err for _, err in outputs]


def without_gloo(printed):
    """Lines but those of gloo, whose threads write theirs piece by piece into each other's."""
    words = "Rank|is connected to|peer ranks.|Expected number of connected peer ranks is :"
    pieces = re.compile(rf"\[Gloo\]|{words}|[\d\s]")
    return "".join(line for line in printed.splitlines(True) if pieces.sub("", line))


def save_model(folder, logits_scale):
    """A random model whose answers have all lengths; at step 2, saved from a cut over 8 devices."""
    config = T5Config(
        vocab_size=384,
        emb_dim=32,
        num_heads=4,
        head_dim=8,
        mlp_dim=48,
        num_encoder_layers=2,
        num_decoder_layers=2,
    )
    params = jax.jit(init_params, static_argnums=0)(config, jax.random.key(0))
    params["logits_dense"]["kernel"] = (
        params["logits_dense"]["kernel"].at[:, 1].multiply(logits_scale)
    )
    info = TaskInfo("roads", step_by_step(), 64, 24, 8)
    write_model_files(folder, config, load_vocabulary("bytes"), info)
    checkpoints = Checkpoints(folder)
    metrics = {"step": 2, "validated": True, "label_accuracy": 0.5, "label_loss": 1.0}
    checkpoints.save(2, params, {"step": np.int32(2)}, metrics)
    checkpoints.close()
    return folder


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("run"), 3)


def write_rows(path, count):
    rng = np.random.default_rng(0)
    with open(path, "w") as f:
        for i in range(count):
            text = "".join(rng.choice(list("abcdefgh "), rng.integers(1, 70)))
            f.write(json.dumps({"input": text, "id": i, "label": "ab"[i % 2]}) + "\n")
    return path


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def assert_same_answers(got, want):
    assert [row | {"score": 0} for row in got] == [row | {"score": 0} for row in want]
    np.testing.assert_allclose(
        [row["score"] for row in got], [row["score"] for row in want], rtol=0, atol=1e-5
    )


@pytest.fixture(scope="module")
def whole(workdir, tmp_path_factory):
    """(input, answers) of 37 rows, decoded by one process on one device."""
    folder = tmp_path_factory.mktemp("whole")
    source, out = write_rows(folder / "in.jsonl", 37), folder / "out.jsonl"
    codes, _, errors = run_processes([("predict", workdir, source, out)])
    assert codes == [0], errors
    answers = read(out)
    assert len({row["label"] for row in answers}) > 10, "the test needs answers that differ"
    return source, answers


@pytest.mark.parametrize(
    "layout, devices, flags, held",
    [
        ("data", 1, ("--batch-size", "8"), 1.0),  # 37 rows: the last batch has 5
        ("data", 4, (), 1.0),
        ("fsdp", 1, ("--batch-size", "7"), 0.6),
        ("fsdp_tensor", 2, ("--batch-size", "16"), 0.4),
        ("tensor", 1, ("--with-rationale",), 0.6),
    ],
)
def test_two_processes_write_the_answers_of_one(
    workdir, whole, tmp_path, layout, devices, flags, held
):
    """Process 1 is given an output that nobody can write."""
    source, want = whole
    outputs = (tmp_path / "out.jsonl", NOBODY)
    commands = [
        ("predict", workdir, source, output, "--layout", layout, "--json", *flags)
        for output in outputs
    ]
    codes, printed, errors = run_processes(commands, devices=devices)
    assert codes == [0, 0], errors
    answers = read(outputs[0])
    assert all(("rationale" in row) == ("--with-rationale" in flags) for row in answers)
    answers = [{k: v for k, v in row.items() if k != "rationale"} for row in answers]
    assert_same_answers(answers, want)
    summary = json.loads(printed[0].splitlines()[-1])
    assert summary["rows"] == 37 and 0 <= summary["accuracy"] <= 1
    assert printed[1] == ""
    assert "37/37" in errors[0] and "37/37" not in errors[1]
    for i, error in enumerate(errors):
        assert f"process {i + 1}/2, {devices} of {2 * devices} devices" in error
        part, total = error.split("held ")[1].split("\n")[0].split(" of ")
        assert int(part) <= held * int(total)
        assert held < 1 or part == total
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out.jsonl"]


def test_one_row_for_two_processes_of_two_devices(workdir, tmp_path):
    source = write_rows(tmp_path / "in.jsonl", 1)
    one, two = tmp_path / "one.jsonl", tmp_path / "two.jsonl"
    assert run_processes([("predict", workdir, source, one)])[0] == [0]
    command = ("predict", workdir, source, two)
    codes, _, errors = run_processes([command, command], devices=2)
    assert codes == [0, 0], errors
    assert_same_answers(read(two), read(one))


def test_evaluate_keeps_the_answers_and_the_result_once(workdir, tmp_path):
    folder = tmp_path / "data" / "roads"
    (folder / "1.0.0").mkdir(parents=True)
    described = {"fingerprint": "f", "metric": "text_match", "splits": {"test": 21}, "labels": []}
    (folder / "dataset.json").write_text(json.dumps(described))
    write_rows(folder / "test.jsonl", 21)
    flags = ("--task", "roads", "--data-dir", folder.parent, "--num-beams", "3", "--json")
    results = []
    for processes in (1, 2):
        outputs = [tmp_path / f"{processes}.json", NOBODY][:processes]
        commands = [("evaluate", workdir, *flags, "--output", output) for output in outputs]
        codes, printed, errors = run_processes(commands)
        assert codes == [0] * processes, errors
        results.append(json.loads(printed[0].splitlines()[-1]))
        assert json.loads((tmp_path / f"{processes}.json").read_text()) == results[-1]
        kept = workdir / "predictions" / "roads-test-2-beams3.jsonl"
        results[-1].update(rows_per_second=0, answers=[row["label"] for row in read(kept)])
        kept.unlink()
    assert results[0] == results[1]


def test_a_killed_run_goes_on_with_another_number_of_processes(workdir, whole, tmp_path):
    """One process is killed in its fourth window; two go on, and only the first sees `.partial`."""
    source, want = whole
    out = tmp_path / "out.jsonl"
    command = ("predict", workdir, source, out)
    codes, _, _ = run_processes([command], [{"window": 8, "kill_in": 4}])
    assert codes == [-signal.SIGKILL]
    assert len(read(tmp_path / "out.jsonl.partial")) == 24
    commands = [command, ("predict", workdir, source, NOBODY)]
    codes, printed, errors = run_processes(commands, [{"window": 8}] * 2, devices=2)
    assert codes == [0, 0], errors
    assert "24 rows that are done" in errors[0] and "rows that are done" not in errors[1]
    assert_same_answers(read(out), want)
    assert printed[0].startswith(f"{out}: 37 rows  accuracy")


@pytest.mark.parametrize("processes", [1, 2])
def test_a_signal_to_one_stops_all_and_loses_nothing(workdir, tmp_path, processes):
    source = write_rows(tmp_path / "in.jsonl", 8_000)
    out, sidecar = tmp_path / "out.jsonl", tmp_path / "out.jsonl.partial.json"
    command = ("predict", workdir, source, out, "--batch-size", "64")

    def during(pair):
        deadline = time.monotonic() + 100
        while not sidecar.exists():  # written after the first window
            assert time.monotonic() < deadline and pair[0].poll() is None
            time.sleep(0.05)
        pair[-1].send_signal(signal.SIGTERM)

    settings = [{"window": 64}] * 2
    codes, printed, errors = run_processes([command] * processes, settings, during)
    assert codes == [75] * processes, errors
    assert not any(printed) and not out.exists()
    kept = json.loads(sidecar.read_text())["rows"]
    assert 0 < kept < 8_000
    if processes > 1:
        assert f"stopped by a signal: {kept} rows are saved" in errors[0]
    codes, _, errors = run_processes([("predict", workdir, source, out, "--batch-size", "512")])
    assert codes == [0], errors
    assert f"{kept} rows that are done" in errors[0]
    assert [row["id"] for row in read(out)] == list(range(8_000))


FAULTS = {
    "no input on the second": (2, "process 1: .*none.jsonl: no such file"),
    "another input on the second": (2, "process 1 has a different input or model than process 0"),
    "another model on the second": (2, "process 1 has a different model than process 0"),
    "no model on the second": (2, "process 1: .*none: no such folder"),
    "output of another run": (2, "process 0: .*another run is writing it"),
    "disk full": (1, "process 0: OSError.*File too large"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_what_one_process_meets_ends_both(workdir, whole, tmp_path, fault):
    source, out = whole[0], tmp_path / "out.jsonl"
    first = ["predict", workdir, source, out]
    second, settings, held = list(first), [{"window": 8}, {"window": 8}], None
    if fault == "no input on the second":
        second[2] = tmp_path / "none.jsonl"
    if fault == "another input on the second":
        second[2] = write_rows(tmp_path / "in.jsonl", 36)
    if fault == "another model on the second":  # in a matrix alone, of which each holds its part
        second[1] = save_model(tmp_path / "other", 2)
        first, second = [*first, "--layout", "fsdp"], [*second, "--layout", "fsdp"]
    if fault == "no model on the second":
        second[1] = tmp_path / "none"
    if fault == "output of another run":
        held = open_locked(tmp_path / "out.jsonl.partial")
    if fault == "disk full":
        settings[0]["file_bytes"] = 900  # of about 1,700
    start = time.monotonic()
    codes, printed, errors = run_processes([first, second], settings)
    code, message = FAULTS[fault]
    assert codes == [code, code], errors
    assert time.monotonic() - start < 60
    assert printed == ["", ""] and not out.exists()
    other = errors[0 if "second" in fault else 1]
    assert re.search(message, other), other
    if held:
        held.close()
    if fault == "disk full":  # what was whole before is kept
        assert run_processes([first])[0] == [0]
        assert_same_answers(read(out), whole[1])
