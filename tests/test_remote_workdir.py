"""A workdir in an object store, by the real clients against a local server of its protocol."""

import functools
import json
import os
import pathlib
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

SETTINGS = {
    "task": "delivery",
    "batch_size": 8,
    "input_length": 64,
    "target_length": 64,
    "train_steps": 6,
    "eval_every": 3,
    "checkpoint_every": 2,
    "learning_rate": 1e-3,
}
# kills itself while a step is computed: the save of the step before is then still being uploaded
TRAIN = """
import json, os, signal, sys
from stepdistill_jax.training import TrainConfig, loop, train
settings, workdir, data_dir, kill_at = json.loads(sys.argv[1]), *sys.argv[2:]
step_fn_of = loop.jit_train_step
def jit_train_step(*args, **kwargs):
    step_fn = step_fn_of(*args, **kwargs)
    def step(state, batch):
        if int(state.step) + 1 == int(kill_at):
            os.kill(os.getpid(), signal.SIGKILL)
        return step_fn(state, batch)
    return step
loop.jit_train_step = jit_train_step
train(TrainConfig(**settings), workdir=workdir, data_dir=data_dir)
"""
USE = """
import json, sys
from stepdistill_jax.runtime.checkpoints.manager import saved_steps
from stepdistill_jax.inference import evaluate, export, load_model
from stepdistill_jax.inference.model import params_fingerprint
from stepdistill_jax.runtime.metrics import read_metrics
workdir, data_dir, model_dir = sys.argv[1:]
evaluated = evaluate(workdir, task="delivery", split="test", data_dir=data_dir)
export(workdir, model_dir)
assert not {"tensorflow", "seqio"} & sys.modules.keys()
from stepdistill_jax.training import TrainConfig
from stepdistill_jax.training.run import assemble
config = TrainConfig(task="delivery", batch_size=8, input_length=64, target_length=64, init_from=workdir)
started = assemble(config, model_dir + "_next", data_dir).initial_state()
assert params_fingerprint(started.params) == params_fingerprint(load_model(model_dir).params)
print(json.dumps([evaluated, read_metrics(workdir), saved_steps(workdir)]))
"""

GCS = pathlib.Path(__file__).parent / "faults" / "gcs_server.py"


def child(code, *args, env, cwd):
    inherited = {k: v for k, v in os.environ.items() if k != "EPATH_USE_TF"}
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, args)],
        capture_output=True,
        text=True,
        timeout=280,
        env=inherited | {"XLA_FLAGS": os.environ["XLA_FLAGS_OF_ONE_DEVICE"]} | env,
        cwd=cwd,
    )


def use(workdir, data_dir, model_dir, *, env, cwd):
    done = child(USE, workdir, data_dir, model_dir, env=env, cwd=cwd)
    assert done.returncode == 0, done.stderr
    evaluated, metrics, steps = json.loads(done.stdout.splitlines()[-1])
    del evaluated["rows_per_second"]
    lines = [{k: v for k, v in x.items() if not k.startswith("timing/")} for x in metrics]
    return evaluated, lines, steps


def free_port():
    with socket.socket() as s:
        s.bind(("localhost", 0))
        return s.getsockname()[1]


def wait_for(process, url):
    deadline = time.monotonic() + 60
    while True:
        try:
            return urllib.request.urlopen(url, timeout=5)
        except urllib.error.HTTPError:
            return None  # it answers
        except OSError:
            assert process.poll() is None and time.monotonic() < deadline, "no server"
            time.sleep(0.2)


@pytest.fixture
def gs(tmp_path):
    """(URL of a bucket, environment that leads there): gcsfs and TensorStore's driver, no TLS."""
    pytest.importorskip("gcsfs", reason="gcsfs is not installed: no gs:// to try")
    pytest.importorskip("gcp_storage_emulator", reason="gcp-storage-emulator is not installed")
    host = f"http://localhost:{(port := free_port())}"
    server = subprocess.Popen(
        [sys.executable, GCS, str(port)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        cwd=tmp_path,
    )
    wait_for(server, host)
    yield (
        "gs://bucket",
        {
            "STORAGE_EMULATOR_HOST": host,
            "TENSORSTORE_GCS_HTTP_URL": host,
            "GOOGLE_AUTH_TOKEN_FOR_TESTING": "none",
            "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",  # asks for credentials of its own
        },
    )
    server.kill()


@pytest.fixture(scope="module")
def on_disk(tmp_path_factory, delivery_data_dir):
    """The same run, never killed, in a local workdir; and its export."""
    folder = tmp_path_factory.mktemp("on_disk")
    done = child(
        TRAIN, json.dumps(SETTINGS), folder / "run", delivery_data_dir, 0, env={}, cwd=folder
    )
    assert done.returncode == 0, done.stderr
    used = use(folder / "run", delivery_data_dir, folder / "model", env={}, cwd=folder)
    return used, folder / "model"


def test_a_killed_run_in_a_store_ends_as_one_on_disk(gs, on_disk, delivery_data_dir, tmp_path):
    bucket, env = gs
    workdir, model, cwd = f"{bucket}/runs/a", tmp_path / "model", tmp_path / "cwd"
    cwd.mkdir()
    train = functools.partial(
        child, TRAIN, json.dumps(SETTINGS), workdir, delivery_data_dir, env=env, cwd=cwd
    )
    killed = train(5)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    resumed = train(0)
    assert resumed.returncode == 0, resumed.stderr
    assert f"resumed {workdir} from step " in resumed.stderr
    used = use(workdir, delivery_data_dir, model, env=env, cwd=cwd)
    assert used == on_disk[0]
    for name in ("model.safetensors", "spiece.model", "tokenizer.json"):
        assert (model / name).read_bytes() == (on_disk[1] / name).read_bytes()
    assert not list(cwd.iterdir())  # no folder named `gs:`
    shutil.rmtree(model)
