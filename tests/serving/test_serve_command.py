"""`stepdistill serve` as a process of its own: what it imports, how it stops, and what it loses: nothing."""

import asyncio
import collections
import concurrent.futures
import contextlib
import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import threading
import time

import pytest

from stepdistill_jax.commands.main import main
from stepdistill_jax.inference import predict

for extra in ("starlette", "uvicorn", "prometheus_client", "httpx"):
    pytest.importorskip(extra, reason="an extra that serve needs is not installed")

import httpx  # noqa: E402

# the command, with a word at the end about what it has imported
COMMAND = """
import sys
from stepdistill_jax.commands.main import main
code = main(sys.argv[1:])
heavy = ("tensorflow", "seqio", "tensorflow_datasets", "torch", "transformers", "gin", "optax", "grain")
print([m for m in (*heavy, "stepdistill_jax.training") if m in sys.modules])
sys.exit(code)
"""
# the command, with an engine that takes as many seconds for a batch as the path says
SLOW = """
import pathlib, sys, time
import numpy as np
import stepdistill_jax.serving.run as run
from stepdistill_jax.commands.main import main
from stepdistill_jax.decoding.greedy import Decoded
from stepdistill_jax.data.vocabulary import load_vocabulary

class Slow:
    task_info = step = None
    device, batch_size, vocabulary = "cpu", 8, load_vocabulary("bytes")

    def __init__(self, path, *_, **__):
        self.path = pathlib.Path(path)

    def decode(self, rows, max_decode_len, on_progress=None):
        if self.path.name == "warm-up" or rows[0][0] != 2:  # ids of a warm-up are unknown ones
            time.sleep(float(self.path.parent.name))
        return Decoded(list(rows), np.zeros(len(rows)), np.ones(len(rows), bool))

run.open_engine = Slow
sys.exit(main(sys.argv[1:]))
"""
ENVIRONMENT = os.environ | {
    "XLA_FLAGS": os.environ["XLA_FLAGS_OF_ONE_DEVICE"],
    "JAX_PLATFORMS": "cpu",
}


class Process:
    """A server process.

    Attributes:
        url: where it listens.
        log: lines of its standard error so far.
    """

    def __init__(self, code, *argv):
        self._process = subprocess.Popen(
            [sys.executable, "-c", code, "serve", *map(str, argv), "--port", "0", "--json"],
            env=ENVIRONMENT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.log = []
        threading.Thread(target=self._read, daemon=True).start()
        self.url = self.wait_for_line(r"serving at (http://\S+);")[1]

    def _read(self):
        for line in self._process.stderr:
            self.log.append(line)

    def wait_for_line(self, pattern, secs=240):
        end = time.monotonic() + secs
        while True:
            if found := re.search(pattern, "".join(self.log)):
                return found
            assert self._process.poll() is None and time.monotonic() < end, self.log
            time.sleep(0.02)

    def signal(self, number=signal.SIGTERM):
        self._process.send_signal(number)

    def end(self):
        """Exit code, and the lines of standard output."""
        out, _ = self._process.communicate(timeout=60)
        return self._process.returncode, out.splitlines()

    def kill(self):
        with contextlib.suppress(OSError):
            self._process.kill()
        self._process.wait()


@pytest.fixture
def started():
    processes = []

    def start(*args):
        processes.append(Process(*args))
        return processes[-1]

    yield start
    for process in processes:
        process.kill()


@pytest.mark.slow
def test_a_stop_under_load_loses_no_request_that_was_accepted(started, model_dir):
    server = started(COMMAND, model_dir, "--batch-size", "2", "--max-decode-len", "4")
    server.wait_for_line("ready after")
    counts = collections.Counter()
    warm = asyncio.Event()

    async def client(http):
        while True:
            try:
                response = await http.post("/predict", json={"input": "with rain"})
            except httpx.ConnectError:
                counts["refused"] += 1
                return
            except (httpx.ReadError, httpx.WriteError, httpx.RemoteProtocolError):
                # an idle connection was closed while the next request was on its way
                counts["closed"] += 1
                return
            counts[response.status_code] += 1
            if counts[200] > 200:
                warm.set()

    async def load():
        limits = httpx.Limits(max_connections=64, max_keepalive_connections=64)
        async with httpx.AsyncClient(base_url=server.url, limits=limits, timeout=60) as http:
            clients = [asyncio.create_task(client(http)) for _ in range(64)]
            await warm.wait()
            server.signal()
            await asyncio.gather(*clients)

    asyncio.run(load())
    code, out = server.end()
    *_, result, imported = out
    assert code == 0
    assert json.loads(result) == {"rows": counts[200], "unanswered": 0, "stopped": False}
    assert counts[200] > 200
    assert set(counts) <= {200, "refused", "closed"}  # nobody was told that it failed
    assert any("SIGTERM: " in line and "in progress" in line for line in server.log)
    assert imported == "[]"


def ask(server, pool, count=1):
    return [
        pool.submit(httpx.post, f"{server.url}/predict", json={"input": "a"}, timeout=60)
        for _ in range(count)
    ]


def wait_until_open(server, count):
    end = time.monotonic() + 60
    while True:
        found = re.search(
            r"^stepdistill_queue_rows (.*)$", httpx.get(f"{server.url}/metrics").text, re.M
        )
        if float(found[1]) == count:
            return
        assert time.monotonic() < end
        time.sleep(0.02)


@pytest.mark.slow
def test_what_the_grace_time_is_too_short_for_is_said_and_exit_1(started, tmp_path):
    server = started(SLOW, tmp_path / "3.0" / "x", "--grace-secs", "0.2")
    server.wait_for_line("ready after")
    with concurrent.futures.ThreadPoolExecutor(3) as pool:
        requests = ask(server, pool, 3)
        wait_until_open(server, 3)
        server.signal()
        for request in requests:
            with contextlib.suppress(httpx.TransportError):
                assert request.result().status_code == 503
                assert request.result().headers["connection"] == "close"
    code, out = server.end()
    assert code == 1
    assert json.loads(out[-1]) == {"rows": 0, "unanswered": 3, "stopped": True}
    assert "Traceback" not in "".join(server.log)


def test_a_second_signal_ends_it_at_once(started, tmp_path):
    server = started(SLOW, tmp_path / "1000" / "x")
    server.wait_for_line("ready after")
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        (request,) = ask(server, pool)
        wait_until_open(server, 1)
        server.signal()
        server.wait_for_line("SIGTERM: 1 requests are in progress")
        server.signal()
        assert server.end()[0] == 128 + signal.SIGTERM
        with pytest.raises(httpx.TransportError):
            request.result()


@pytest.mark.slow
def test_control_c_is_a_stop_like_the_other(started, tmp_path):
    server = started(SLOW, tmp_path / "0.5" / "x")
    server.wait_for_line("ready after")
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        (request,) = ask(server, pool)
        wait_until_open(server, 1)
        server.signal(signal.SIGINT)
        assert request.result().status_code == 200
    assert server.end()[0] == 0


@pytest.mark.slow
def test_a_stop_while_it_warms_up_waits_for_no_compilation(started, tmp_path):
    server = started(SLOW, tmp_path / "1000" / "warm-up")
    assert httpx.get(f"{server.url}/ready").status_code == 503
    server.signal()
    code, out = server.end()
    assert code == 0
    assert json.loads(out[-1])["stopped"] is False


@pytest.mark.slow
def test_many_clients_of_all_kinds(started, model_dir, write_rows, read_rows_of, tmp_path):
    """Rows of all lengths, bad ones, clients that leave: answers are `predict`'s, memory is bounded."""
    server = started(COMMAND, model_dir, "--batch-size", "4", "--max-queue", "40")
    server.wait_for_line("ready after")
    wrong, statuses = [], collections.Counter()
    texts = [
        " ".join(["rain", "bridge", "truck", "sun"][i % 4] for i in range(n)) for n in range(1, 50)
    ]
    predict(model_dir, write_rows([{"input": text} for text in texts]), tmp_path / "out.jsonl")
    want = dict(zip(texts, read_rows_of(tmp_path / "out.jsonl"), strict=True))

    async def answer(http, row):
        """As a client asks that comes again when the queue is full."""
        while True:
            response = await http.post("/predict", json=row)
            statuses[response.status_code] += 1
            if response.status_code != 503:
                return response
            await asyncio.sleep(0.05)

    async def client(http, number):
        for turn in range(10):
            text = texts[(number * 7 + turn * 11) % len(texts)]
            if turn == 3:
                response = await http.post("/predict", json={"question": text})
                wrong.extend([] if response.status_code == 400 else [response.status_code])
            elif turn == 7:
                with contextlib.suppress(httpx.TimeoutException):
                    await http.post("/predict", json={"input": text}, timeout=0.002)
            else:
                response = await answer(http, {"input": text, "id": turn})
                if response.status_code == 200:
                    got = response.json()
                    score = pytest.approx(want[text]["score"], abs=1e-5)
                    if got != {"id": turn, "label": want[text]["label"], "score": score}:
                        wrong.append((text, got, want[text]))

    def resident():
        status = pathlib.Path(f"/proc/{server._process.pid}/status").read_text()
        return int(re.search(r"VmRSS:\s+(\d+) kB", status)[1]) / 1024

    async def load():
        limits = httpx.Limits(max_connections=64)
        async with httpx.AsyncClient(base_url=server.url, limits=limits, timeout=60) as http:
            for _ in range(3):
                await asyncio.gather(*(client(http, number) for number in range(64)))
                sizes.append(resident())

    sizes = []
    asyncio.run(load())
    assert wrong == []
    assert statuses[200] == 3 * 64 * 8 and statuses[503] > 0 and set(statuses) == {200, 503}
    assert sizes[-1] < sizes[0] + 50, sizes
    wait_until_open(server, 0)
    server.signal()
    assert server.end()[0] == 0


def test_without_the_extra_one_line_says_what_to_install(model_dir, capsys, monkeypatch):
    for name in ("server", "app", "metrics"):
        monkeypatch.delitem(sys.modules, f"stepdistill_jax.serving.{name}", raising=False)
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    import stepdistill_jax.serving as serving

    for name in ("server", "app"):
        monkeypatch.delattr(serving, name, raising=False)
    assert main(["serve", str(model_dir)]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1
    assert "uvicorn" in err and "run pip install -c constraints.txt -e '.[serve]'" in err


def test_bad_usage_is_one_line_and_exit_2(model_dir, tmp_path, capsys):
    for argv, part in (
        ([tmp_path / "none", "--port", "0"], "none: no such folder"),
        ([model_dir, "--port", "70000"], "--port must be a whole number from 0 to 65535"),
        ([model_dir, "--port", "0", "--step", "4"], "--step 4"),
        ([model_dir, "--port", "0", "--engine", "ctranslate2"], "--engine ctranslate2"),
    ):
        assert main(["serve", *map(str, argv)]) == 2
        out, err = capsys.readouterr()
        assert out == "" and err.count("\n") == 1 and part in err, err
