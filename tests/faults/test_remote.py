"""An object store that is slow, fails now and then, for good, or is gone: a proxy stands before it."""

import asyncio
import http.client
import http.server
import json
import os
import pathlib
import random
import socket
import struct
import subprocess
import sys
import threading
import time
import types
import urllib.error
import urllib.parse
import urllib.request

import pytest

import stepdistill_jax
from stepdistill_jax.commands.main import main

PACKAGE = pathlib.Path(stepdistill_jax.__file__).parent
pytestmark = pytest.mark.timeout(600)
SERVER = pathlib.Path(__file__).with_name("gcs_server.py")
SETTINGS = {
    "BATCH_SIZE": 8,
    "INPUT_LENGTH": 64,
    "TARGET_LENGTH": 64,
    "TRAIN_STEPS": 12,
    "EVAL_EVERY": 12,
    "CHECKPOINT_EVERY": 3,
    "LEARNING_RATE": 1e-3,
}
# TensorStore tries 32 times, a quarter of an hour, before it gives a request up; and the times of steps
CHILD = """
import sys, time
from orbax.checkpoint._src.path import gcs_utils
from stepdistill_jax.runtime.checkpoints.manager import Checkpoints
from stepdistill_jax.commands.main import main
from stepdistill_jax.training.supervisor import Supervisor
spec, note, seal = gcs_utils.get_kvstore_for_gcs, Supervisor.record, Checkpoints._seal
retries = {"gcs_request_retries": {"max_retries": 4}}
gcs_utils.get_kvstore_for_gcs = lambda path: spec(path) | retries
def say(what, number):
    print("at", what, number, time.monotonic(), file=sys.stderr, flush=True)
def noted(self, step, *args):
    say("step", step)
    note(self, step, *args)
def sealed(self, step, metrics):
    seal(self, step, metrics)
    say("sealed", step)
Supervisor.record, Checkpoints._seal = noted, sealed
sys.exit(main())
"""
LOOK = """
import hashlib, json, pathlib, sys
from stepdistill_jax.runtime.checkpoints.manager import saved_steps
from stepdistill_jax.inference import export
from stepdistill_jax.runtime.metrics import read_metrics
workdir, model_dir = sys.argv[1:]
export(workdir, model_dir, step="last")
weights = hashlib.sha256((pathlib.Path(model_dir) / "model.safetensors").read_bytes()).hexdigest()
lines = [{k: v for k, v in x.items() if not k.startswith("timing/")} for x in read_metrics(workdir)]
print(json.dumps([weights, lines, {s: m["validated"] for s, m in saved_steps(workdir).items()}]))
"""


class Proxy(http.server.ThreadingHTTPServer):
    """Hands requests on to `upstream`, but for what `fault(method, path)` has for them.

    That is None, seconds to wait, an HTTP status, or "reset" of the connection. `faults` counts them.
    """

    daemon_threads, request_queue_size = True, 128

    def __init__(self, upstream=None):
        super().__init__(("127.0.0.1", 0), Handler)
        self.upstream, self.faults = upstream, 0
        self.fault = lambda method, path: None
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}"


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def _answer(self):
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        fault = self.server.fault(self.command, urllib.parse.unquote(self.path))
        self.server.faults += fault is not None
        if fault == "reset":
            now = struct.pack("ii", 1, 0)
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, now)
            self.close_connection = True
            self.connection.close()
        elif isinstance(fault, int):
            names = {403: "AccessDenied", 404: "NoSuchBucket", 500: "InternalError"}
            name = names.get(fault, "SlowDown")
            text = f"<Error><Code>{name}</Code><Message>injected</Message></Error>".encode()
            self._send(fault, [("Content-Type", "application/xml")], text)
        else:
            time.sleep(fault or 0)
            self._hand_on(body)

    def _hand_on(self, body):
        upstream = http.client.HTTPConnection("127.0.0.1", self.server.upstream, timeout=60)
        headers = {k: v for k, v in self.headers.items() if k.lower() != "expect"}
        upstream.request(self.command, self.path, body, headers)
        response = upstream.getresponse()
        text = response.read()
        ours = ("connection", "transfer-encoding", "content-length")
        headers = [(k, v) for k, v in response.getheaders() if k.lower() not in ours]
        length = response.getheader("Content-Length") if self.command == "HEAD" else None
        self._send(response.status, headers, text, length)
        upstream.close()

    def _send(self, status, headers, text, length=None):
        self.send_response_only(status)
        for name, value in (*headers, ("Content-Length", length or str(len(text)))):
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(text)

    do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = do_PATCH = _answer


def environment(url):
    """Leads gcsfs and TensorStore's client to a URL."""
    return {
        "STORAGE_EMULATOR_HOST": url,
        "TENSORSTORE_GCS_HTTP_URL": url,
        "GOOGLE_AUTH_TOKEN_FOR_TESTING": "none",
        "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",  # asks for credentials of its own
        "XLA_FLAGS": os.environ["XLA_FLAGS_OF_ONE_DEVICE"],
    }


def free_port():
    with socket.socket() as s:
        s.bind(("localhost", 0))
        return s.getsockname()[1]


def serve():
    """(process, port) of a local server of the protocol, with the bucket `bucket`."""
    port = free_port()
    command = [sys.executable, str(SERVER), str(port)]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    server = subprocess.Popen(command, **quiet)
    deadline = time.monotonic() + 120
    while True:
        try:
            make = urllib.request.Request(f"http://localhost:{port}/bucket", method="PUT")
            urllib.request.urlopen(make, timeout=5)
            return server, port
        except urllib.error.HTTPError:
            return server, port  # the emulator has it
        except OSError:
            assert server.poll() is None and time.monotonic() < deadline, "no server"
            time.sleep(0.2)


@pytest.fixture
def store(tmp_path):
    """(workdir, proxy, run); `run(code, *args)` is a child that uses the store."""
    for module in ("gcsfs", "gcp_storage_emulator"):
        pytest.importorskip(module)
    server, port = serve()
    with Proxy(port) as proxy:
        yield "gs://bucket/run", proxy, runner(environment(proxy.url), tmp_path)
        proxy.shutdown()
    server.kill()
    server.wait()


def runner(env, folder):
    (folder / "cwd").mkdir()

    def run(code, *args, **more):
        inherited = {k: v for k, v in os.environ.items() if k != "EPATH_USE_TF"}
        return subprocess.run(
            [sys.executable, "-c", code, *map(str, args)],
            env=inherited | env | more,
            cwd=folder / "cwd",
            capture_output=True,
            text=True,
            timeout=400,
        )

    return run


def training(workdir, data_dir, **changes):
    """Arguments of `stepdistill train`."""
    argv = ["train", "demo_step_by_step", "--workdir", workdir, "--data-dir", data_dir]
    return argv + [x for n, v in (SETTINGS | changes).items() for x in ("--set", f"{n}={v}")]


def outcome(run, workdir, model_dir):
    """[digest of the last step's weights, metrics without times, kept steps]."""
    done = run(LOOK, workdir, model_dir)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, delivery_data_dir):
    """The outcome of the same run on a disk."""
    folder = tmp_path_factory.mktemp("disk")
    run = runner({"XLA_FLAGS": os.environ["XLA_FLAGS_OF_ONE_DEVICE"]}, folder)
    done = run(CHILD, *training(folder / "run", delivery_data_dir))
    assert done.returncode == 0, done.stderr
    return outcome(run, folder / "run", folder / "model")


def our_lines(stderr):
    """What `stepdistill` says at its end, and tracebacks of it; not the noise of native libraries."""
    ours = ("stepdistill:", f'  File "{PACKAGE}')
    return [line for line in stderr.splitlines() if line.startswith(ours)]


@pytest.mark.faults
def test_a_store_that_fails_now_and_then_changes_nothing(
    store, undisturbed, delivery_data_dir, tmp_path, record_fault
):
    """A tenth of all requests; each client tries again."""
    workdir, proxy, run = store
    draw, kinds = random.Random(0), (503, "reset", 2.0)
    proxy.fault = lambda *_: draw.choice(kinds) if draw.random() < 0.1 else None
    done = run(CHILD, *training(workdir, delivery_data_dir))
    same = done.returncode == 0 and outcome(run, workdir, tmp_path / "model") == undisturbed
    record_fault(
        "gs://: a request gets 503, a reset or 2 s of silence",
        tried=proxy.faults,
        survived=proxy.faults if same else 0,
        seen="tried again; the run and an export end bitwise as on a disk",
    )
    assert done.returncode == 0, done.stderr
    assert same and proxy.faults > 50


@pytest.mark.faults
def test_what_fails_for_good_ends_the_run_in_one_line_and_a_later_start_goes_on(
    store, undisturbed, delivery_data_dir, tmp_path, record_fault
):
    workdir, proxy, run = store
    lives, seconds = [], []

    def live(fault):
        proxy.fault, began = fault, time.monotonic()
        lives.append(run(CHILD, *training(workdir, delivery_data_dir)))
        seconds.append(time.monotonic() - began)
        return our_lines(lives[-1].stderr)

    def denied(method, path):
        return 403 if method == "POST" and "/checkpoints/6/params/" in path else None

    gone = threading.Event()

    def all_gone(method, path):
        if method == "POST" and "/checkpoints/9/" in path:
            gone.set()
        return "reset" if gone.is_set() else None

    def unreadable(method, path):
        return 500 if method == "GET" and "/checkpoints/6/manifest.json" in path else None

    first, second, third = live(denied), live(all_gone), live(unreadable)
    live(lambda *_: None)
    starts = [
        f"resumed {workdir} from step {step}" in lives[i].stderr for i, step in ((1, 3), (3, 6))
    ]
    ends = [done.returncode for done in lives]
    one_line = all(len(x) == 1 and workdir in x[0] for x in (first, second, third))
    same = ends[3] == 0 and outcome(run, workdir, tmp_path / "model") == undisturbed
    kept = all(starts) and same and "renamed to" not in lives[2].stderr
    for number, fault in enumerate(
        (
            "gs://: one object of a checkpoint may not be written",
            "gs://: the whole store is gone in the middle of a save",
            "gs://: the newest manifest cannot be read at a start",
        )
    ):
        record_fault(
            fault,
            tried=1,
            survived=int(kept and one_line and ends[number] == 1),
            seen=f"exit {ends[number]} in one line after {seconds[number]:.0f} s; the next start goes on"
            " from the last saved step, bitwise",
        )
    assert ends == [1, 1, 1, 0], [done.stderr for done in lives]
    assert one_line, (first, second, third)
    assert f"{workdir}/checkpoints/6: was not saved" in first[0] and "step 3 is saved" in first[0]
    assert kept, [done.stderr for done in lives]


@pytest.mark.faults
def test_a_slow_store_holds_up_saves_and_no_steps(store, delivery_data_dir, tmp_path, record_fault):
    """Half a second a request: an upload outlives many steps, and the next save waits for it."""
    workdir, proxy, run = store
    proxy.fault = lambda method, path: 0.5 if "checkpoints" in path else None
    given = {"TRAIN_STEPS": 80, "EVAL_EVERY": 1000, "CHECKPOINT_EVERY": 40}
    watchdog = ["--set", "train.watchdog_min_secs=10.0"]  # a step; a save has twelve times as much
    done = run(CHILD, *training(workdir, delivery_data_dir, **given), *watchdog)
    assert done.returncode == 0, done.stderr
    at = {
        tuple(x.split()[1:3]): float(x.split()[3])
        for x in done.stderr.splitlines()
        if x[:3] == "at "
    }
    before = at["step", "39"] - at["step", "5"]
    during = at["step", "79"] - at["step", "45"]
    upload = at["sealed", "40"] - at["step", "40"]
    record_fault(
        "gs://: each request of a checkpoint takes 0.5 s longer",
        tried=1,
        survived=int(during < 3 * before + 1 and upload > during and "stuck" not in done.stderr),
        seen=f"34 steps take {before:.1f} s before and {during:.1f} s during an upload of {upload:.0f} s",
    )
    assert upload > during and during < 3 * before + 1
    assert "stuck" not in done.stderr


# --- before anything is read: no server, the proxy alone answers


@pytest.fixture
def clients(monkeypatch, tmp_path):
    """`ask(url)`: this process's own clients, that ask there, and only once."""
    pytest.importorskip("gcsfs")
    import fsspec
    from etils.epath import backend, gpath

    def forget():
        backend.fsspec_backend._get_filesystem.cache_clear()
        gpath._is_tf_installed.cache_clear()
        fsspec.get_filesystem_class("gcs").clear_instance_cache()

    def ask(url):
        for name, value in environment(url).items():
            monkeypatch.setenv(name, value)

    monkeypatch.setenv("EPATH_USE_TF", "false")
    # gcsfs waits half a minute in all between its tries
    no_wait = types.SimpleNamespace(sleep=lambda _: asyncio.sleep(0))
    monkeypatch.setattr("gcsfs.retry.asyncio", no_wait)
    monkeypatch.chdir(tmp_path)
    forget()
    yield ask
    forget()


COMMANDS = {
    "train": ["demo_label_only", "--workdir", "RUN", "--data-dir", "DATA"],
    "checkpoints": ["RUN"],
    "evaluate": ["RUN", "--task", "delivery", "--data-dir", "DATA"],
    "predict": ["RUN", "in.jsonl", "out.jsonl"],
    "export": ["RUN", "model"],
}
WRONG = {"denied": 403, "no bucket": 404, "unavailable": 503, "unreachable": None}


@pytest.mark.parametrize("wrong", WRONG)
def test_a_store_that_does_not_answer_is_one_line(
    clients, capfd, delivery_data_dir, record_fault, wrong
):
    run, ended = "gs://bucket/runs/a", {}
    pathlib.Path("in.jsonl").write_text('{"input": "a"}\n')
    with Proxy() as proxy:
        proxy.fault = lambda *_: WRONG[wrong]
        clients(f"http://127.0.0.1:{free_port()}" if wrong == "unreachable" else proxy.url)
        for command, argv in COMMANDS.items():
            filled = [{"RUN": run, "DATA": str(delivery_data_dir)}.get(x, x) for x in argv]
            capfd.readouterr()
            code = main([command, *filled])
            ended[command] = code, our_lines(capfd.readouterr().err)
        proxy.shutdown()
    sound = {c: code in (1, 2) and len(x) == 1 and run in x[0] for c, (code, x) in ended.items()}
    # where there was no answer, nothing is known of a workdir
    guessed = [x for _, x in ended.values() if "not a workdir" in str(x) and wrong != "no bucket"]
    record_fault(
        f"gs://: {wrong}, at the start of {', '.join(COMMANDS)}",
        tried=len(ended),
        survived=sum(sound.values()) - len(guessed),
        seen="one line with the URL, exit 1 or 2",
    )
    assert all(sound.values()) and not guessed, ended
    assert {p.name for p in pathlib.Path().iterdir()} == {"in.jsonl"}
