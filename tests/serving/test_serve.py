"""`serve` with a real client: the answers of `predict`, and what is refused with which status."""

import asyncio
import contextlib
import gc
import json
import pathlib
import queue
import random
import socket
import threading
import time

import numpy as np
import pytest

from stepdistill_jax.data.vocabulary import UNK_ID, load_vocabulary
from stepdistill_jax.decoding.greedy import Decoded
from stepdistill_jax.errors import InputError
from stepdistill_jax.inference import DecodeOptions, engines, export, predict
from stepdistill_jax.inference.allowed_answers import allow
from stepdistill_jax.inference.prompting import prompting_for, rationale_prompting_for
from stepdistill_jax.runtime.signals import StopSignals
from stepdistill_jax.serving import run as serving_run
from stepdistill_jax.serving.answerer import Answerer

for extra in ("starlette", "uvicorn", "prometheus_client", "httpx"):
    pytest.importorskip(extra, reason="an extra that serve needs is not installed")

import httpx  # noqa: E402

from stepdistill_jax.serving import app, serve, server  # noqa: E402


class Echo:
    """An engine that answers with its prompt; a held one decodes a batch when `go` is called."""

    path, task_info, step, device, identity = pathlib.Path("echo"), None, None, "cpu", "echo"
    batch_size = 8

    def __init__(self, *, held=False, fails=lambda rows: None, score=-1.5):
        self.vocabulary = load_vocabulary("bytes")
        self.batches, self._held, self._fails, self._score = [], held, fails, score
        self._began, self._go = queue.Queue(), threading.Semaphore(0)

    def decode(self, rows, max_decode_len, on_progress=None):
        if rows[0][0] == UNK_ID:  # a warm-up
            return Decoded(list(rows), np.zeros(len(rows)), np.ones(len(rows), bool))
        self.batches.append([self.vocabulary.decode(row) for row in rows])
        self._began.put(None)
        if self._held:
            assert self._go.acquire(timeout=20)
        self._fails(self.batches[-1])
        scores = np.full(len(rows), self._score, np.float32)
        return Decoded([list(row) for row in rows], scores, np.ones(len(rows), bool))

    def begun(self):
        """Waits until it is at work on one batch more."""
        self._began.get(timeout=20)

    def go(self, batches=1):
        self._go.release(batches)


class Running:
    """A service on a free port, in a thread of its own."""

    def __init__(
        self,
        engine,
        *,
        max_wait_secs=0.001,
        max_queue=256,
        timeout_secs=20.0,
        allowed=None,
        explains=False,
    ):
        limits = app.Limits(max_wait_secs, max_queue, timeout_secs)
        explaining = rationale_prompting_for(engine) if explains else None
        answerer = Answerer(engine, prompting_for(engine), allowed, explaining)
        self.service = app.Service(answerer, limits)
        self._signals = StopSignals(None)
        listener = server.bind("127.0.0.1", 0)
        self.url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        self._thread = threading.Thread(
            target=server.run, args=(self.service, listener, 10.0, self._signals), daemon=True
        )
        self._thread.start()
        self.client = httpx.Client(base_url=self.url, timeout=240)
        wait_for(self._listens)

    def _listens(self):
        with contextlib.suppress(httpx.ConnectError):
            return self.client.get("/health").status_code == 200

    def ready(self):
        wait_for(lambda: self.client.get("/ready").status_code == 200, secs=240)
        return self

    def ask(self, body, path="/predict", **more):
        content = body if isinstance(body, bytes) else json.dumps(body)
        return self.client.post(path, content=content, **more)

    def in_thread(self, body, count=1, path="/predict"):
        """Asks without waiting; futures of the responses."""
        from concurrent.futures import ThreadPoolExecutor

        pool = ThreadPoolExecutor(count)
        return [pool.submit(self.ask, body, path) for _ in range(count)]

    def metric(self, name):
        """A value of /metrics; 0 where it has not been counted yet."""
        lines = [line.rpartition(" ") for line in self.client.get("/metrics").text.splitlines()]
        return next((float(value) for key, _, value in lines if key == name), 0.0)

    def stop(self):
        if self._signals.act:
            self._signals.act("the test")
        self._thread.join(20)
        assert not self._thread.is_alive()
        self.client.close()
        self.service.batcher.close()


def wait_for(condition, secs=60.0):
    end = time.monotonic() + secs
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


@contextlib.contextmanager
def running(engine, **limits):
    found = Running(engine, **limits)
    try:
        yield found
    finally:
        if isinstance(engine, Echo):
            engine.go(1000)
        found.stop()


@pytest.fixture
def echo():
    """One that nothing holds, and its engine."""
    engine = Echo()
    with running(engine) as found:
        yield found.ready(), engine


@pytest.mark.parametrize("kind", ["jax", "ctranslate2"])
def test_answers_are_those_of_predict(
    kind, model_dir, questions, write_rows, read_rows_of, tmp_path, monkeypatch, compiled
):
    """50 rows at once, each by itself and in random order; then all in one request; all shapes are warm."""
    monkeypatch.setattr(engines, "device_mesh", lambda _: None)  # compiles in half the time
    path = model_dir
    if kind == "ctranslate2":
        pytest.importorskip("ctranslate2", reason="ctranslate2 is not installed")
        path = tmp_path / "converted"
        export(model_dir, path, format="ctranslate2")
    rows = [{**row, "id": row.get("id", f"row {i}")} for i, row in enumerate(questions[:48])]
    rows += [{"input": "", "id": "empty"}, {"input": "Ünïcode \U0001f600\nof two lines", "id": 7}]
    predict(path, write_rows(rows), tmp_path / "out.jsonl", batch_size=2)
    want = {row["id"]: row for row in read_rows_of(tmp_path / "out.jsonl")}
    assert len({row["label"] for row in want.values()}) > 5
    engine = engines.open_engine(path, DecodeOptions(batch_size=2))
    batches, decode = [], engine.decode

    def watched(rows, *args):
        batches.append(len(rows))
        return decode(rows, *args)

    monkeypatch.setattr(engine, "decode", watched)
    random.Random(0).shuffle(rows)

    async def ask_all(url):
        limits = httpx.Limits(max_connections=50)
        async with httpx.AsyncClient(base_url=url, limits=limits, timeout=60) as client:
            return await asyncio.gather(*(client.post("/predict", json=row) for row in rows))

    with running(engine, max_wait_secs=0.05) as found:
        found.ready()
        assert kind == "ctranslate2" or compiled
        batches.clear(), compiled.clear()
        alone = [response.json() for response in asyncio.run(ask_all(found.url))]
        assert max(batches) > 1 and sum(batches) == 50
        together = found.ask({"rows": rows}).json()["rows"]
        info = found.client.get("/info").json()
    assert compiled == []
    for answers in (alone, together):
        assert [answer["id"] for answer in answers] == [row["id"] for row in rows]
        for answer in answers:
            assert list(answer) == ["id", "label", "score"]
            assert answer["label"] == want[answer["id"]]["label"]
            assert answer["score"] == pytest.approx(want[answer["id"]]["score"], abs=1e-5)
            assert answer["score"] == round(answer["score"], 6)
    assert info["engine"] == kind and info["labels"] == ["smooth", "trouble"]
    assert info["model"] == path.name
    assert (info["task"], info["input_length"], info["max_decode_len"]) == ("roads", 40, 8)


@pytest.mark.parametrize("choices", ["row", ["smooth", "trouble", "slow pace"]])
def test_choices_are_scored_as_predict_scores_them(
    choices, model_dir, questions, write_rows, read_rows_of, tmp_path, monkeypatch
):
    monkeypatch.setattr(engines, "device_mesh", lambda _: None)
    of_row = [["smooth", "trouble"], ["yes", "no", "fast"]]
    rows = [{**row, "id": i, "choices": of_row[i % 2]} for i, row in enumerate(questions[:8])]
    predict(model_dir, write_rows(rows), tmp_path / "out.jsonl", batch_size=2, choices=choices)
    engine = engines.open_engine(model_dir, DecodeOptions(batch_size=2))
    allowed = allow(DecodeOptions(choices=choices), prompting_for(engine), engine)
    with running(engine, allowed=allowed, timeout_secs=200) as found:
        found.ready()
        if choices != "row":
            own = found.ask({"rows": [{"input": "a"}, rows[0]]})
            assert own.status_code == 400
            assert own.json()["error"].startswith(
                "row 2: this server has fixed labels; leave the field `choices` out"
            )
            rows = [{name: row[name] for name in row if name != "choices"} for row in rows]
        for got, want in zip(
            found.ask({"rows": rows}).json()["rows"],
            read_rows_of(tmp_path / "out.jsonl"),
            strict=True,
        ):
            assert list(got) == list(want) and got["label"] == want["label"]
            assert list(got["choices"]) == list(want["choices"])
            assert got["choices"] == pytest.approx(want["choices"], abs=1e-5)
            assert got["score"] == pytest.approx(want["score"], abs=1e-5)
        response = found.ask({"rows": [rows[0], {"input": "a"}]})
        many = found.ask({"input": "a", "choices": [f"number {i}" for i in range(300)]})
    if choices == "row":
        assert (response.status_code, many.status_code) == (400, 400)
        assert response.json()["error"].startswith("row 2: the field 'choices' is missing")
        assert many.json() == {"error": "row 1: there are more than 256 choices"}
    else:
        assert (response.status_code, many.status_code) == (200, 400)


def test_a_row_alone_and_a_list_of_rows(echo):
    service, _ = echo
    response = service.ask({"input": "köln\n"})
    assert response.status_code == 200
    assert response.headers["content-type"] == "application/json"
    assert response.json() == {"id": "1", "label": "predict: köln\n", "score": -1.5}
    rows = [{"input": "a"}, {"input": "b", "id": 9}, {"input": "a", "id": "x", "label": "y"}]
    assert service.ask({"rows": rows}).json() == {
        "rows": [
            {"id": "1", "label": "predict: a", "score": -1.5},
            {"id": 9, "label": "predict: b", "score": -1.5},
            {"id": "x", "label": "predict: a", "score": -1.5},
        ]
    }
    assert service.ask({"rows": []}).json() == {"rows": []}
    assert service.metric("stepdistill_rows_total") == 4


@pytest.mark.parametrize(
    ("body", "part"),
    [
        (b'{"input": ', "broken JSON"),
        (b'{"input": "\xff"}', "not UTF-8"),
        (b"", "broken JSON"),
        (b'["a"]', "expected a JSON object, got list"),
        (b'{"input": "a", "input": "b"}', "duplicate key"),
        (b'{"input": "\\ud800"}', "row 1: the field 'input' contains half of a surrogate pair"),
        ({"question": "a"}, "row 1: no field 'input' (found: question)"),
        ({"input": 1.5}, "row 1: the field 'input' must be text (or an integer), got a number"),
        ({"input": None}, "row 1: the field 'input' is empty"),
        ({"input": "a", "choices": "b"}, "row 1: the field 'choices' must be a list, got text"),
        ({"rows": [{"input": "a"}, {}]}, "row 2: no field 'input' (found: none)"),
        ({"rows": [{"input": "a"}, "b"]}, "row 2: expected a JSON object, got str"),
        ({"rows": {"input": "a"}}, 'expected one row {"input": ...} or {"rows": [...]}'),
        ({"rows": [], "input": "a"}, 'expected one row {"input": ...} or {"rows": [...]}'),
        (b"[" * 100_000, "unreadable JSON"),
    ],
)
def test_what_cannot_be_asked_is_one_line_and_400(echo, body, part):
    service, engine = echo
    response = service.ask(body)
    assert response.status_code == 400
    assert list(response.json()) == ["error"]
    assert part in response.json()["error"] and "\n" not in response.json()["error"]
    assert engine.batches == []
    assert service.metric('stepdistill_requests_total{status="400"}') == 1


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["jax", "ctranslate2"])
def test_rationales_are_those_of_predict(
    kind, model_dir, questions, write_rows, read_rows_of, tmp_path, monkeypatch, compiled
):
    monkeypatch.setattr(engines, "device_mesh", lambda _: None)
    path = model_dir
    if kind == "ctranslate2":
        pytest.importorskip("ctranslate2", reason="ctranslate2 is not installed")
        path = tmp_path / "converted"
        export(model_dir, path, format="ctranslate2")
    rows = [{**row, "id": i} for i, row in enumerate(questions[:6])]
    predict(path, write_rows(rows), tmp_path / "out.jsonl", batch_size=2, with_rationale=True)
    want = read_rows_of(tmp_path / "out.jsonl")
    assert len({row["rationale"] for row in want}) > 2
    engine = engines.open_engine(path, DecodeOptions(batch_size=2))
    with running(engine, explains=True, timeout_secs=200) as found:
        assert found.ready().client.get("/info").json()["rationale"] is True
        compiled.clear()
        for row, wanted in zip(rows, want, strict=True):
            answer = found.ask(row, "/explain").json()
            assert answer == {"id": row["id"], "rationale": wanted["rationale"]}
    assert compiled == []


def test_a_batch_of_labels_goes_between_two_rationales():
    engine = Echo(held=True)
    with running(engine, explains=True) as found:
        first = found.ready().in_thread({"input": "one"}, path="/explain")
        engine.begun()
        second = found.in_thread({"input": "two", "id": 2}, path="/explain")
        wait_for(lambda: found.service.open == 2)
        batcher, working = found.service.batcher, found.service.batcher._working
        label = found.in_thread({"input": "three"})
        wait_for(lambda: batcher._working is not working)  # the batch stands in line
        engine.go(3)
        assert first[0].result().json() == {"id": "1", "rationale": "explain: one"}
        assert second[0].result().json() == {"id": 2, "rationale": "explain: two"}
        assert label[0].result().json()["label"] == "predict: three"
    assert engine.batches == [["explain: one"], ["predict: three"], ["explain: two"]]
    assert found.service.answered == 1  # labels are what is counted


@pytest.mark.parametrize(
    ("body", "status", "part"),
    [
        ({"rows": [{"input": "a"}]}, 400, "a single row"),
        ({"question": "a"}, 400, "row 1: no field 'input'"),
        (b"{", 400, "broken JSON"),
        (b"[]" * 2**20, 413, "at most"),
    ],
)
def test_a_rationale_that_cannot_be_asked_for_is_one_line(explaining, body, status, part):
    response = explaining.ask(body, "/explain")
    assert response.status_code == status and part in response.json()["error"]
    assert explaining.client.get("/explain").status_code == 405


@pytest.fixture(scope="module")
def explaining():
    with running(Echo(), explains=True) as found:
        yield found.ready()


def test_a_model_without_rationales_says_so(echo):
    service, _ = echo
    response = service.ask({"input": "a"}, "/explain")
    assert response.status_code == 404 and "no rationale" not in response.text
    assert response.json() == {
        "error": "this model was not trained to write a rationale apart from the label"
    }
    assert service.client.get("/info").json()["rationale"] is False


def test_the_wrong_path_or_method_is_json_too(echo):
    service, _ = echo
    assert service.client.get("/predict").status_code == 405
    assert service.client.get("/predict").json() == {"error": "Method Not Allowed"}
    assert service.client.get("/etc/passwd").status_code == 404
    assert service.client.post("/health").status_code == 405


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize("size", [app.MAX_BODY_BYTES + 1, 8 * app.MAX_BODY_BYTES])
def test_a_body_that_is_too_large_is_413_and_the_next_is_answered(echo, size, streamed):
    service, engine = echo
    body = b'{"input": "' + b"a" * (size - 13) + b'"}'
    content = (body[i : i + 65536] for i in range(0, size, 65536)) if streamed else body
    response = service.client.post("/predict", content=content)
    assert response.status_code == 413 and str(app.MAX_BODY_BYTES) in response.json()["error"]
    assert service.ask({"input": "a"}).status_code == 200
    largest = {"input": "a" * (app.MAX_BODY_BYTES - 20)}
    assert service.ask(largest).status_code == 200
    assert len(engine.batches) == 2


def test_more_rows_than_the_queue_ever_takes_are_413():
    with running(Echo(), max_queue=5) as found:
        rows = [{"input": "a"}] * 6
        assert found.ready().ask({"rows": rows}).status_code == 413
        assert "at most 5 rows" in found.ask({"rows": rows}).json()["error"]
        assert len(found.ask({"rows": rows[:5]}).json()["rows"]) == 5


def test_a_full_queue_is_503_with_a_time_to_come_again():
    engine = Echo(held=True)
    with running(engine, max_queue=10) as found:
        first = found.ready().in_thread({"input": "first"})
        engine.begun()
        others = found.in_thread({"rows": [{"input": "a"}] * 3}, 3)  # one of them is the full 10
        wait_for(lambda: found.service.batcher.rows == 10)
        assert found.metric("stepdistill_queue_rows") == 10
        response = found.ask({"input": "too many"})
        assert response.status_code == 503 and int(response.headers["retry-after"]) >= 1
        assert "try again later" in response.json()["error"]
        assert found.client.get("/health").status_code == 200
        assert found.client.get("/ready").status_code == 200
        engine.go(10)
        assert [f.result().status_code for f in first + others] == [200] * 4
        assert found.ask({"input": "later"}).status_code == 200
        assert found.metric('stepdistill_requests_total{status="503"}') == 1
    assert not any("predict: too many" in batch for batch in engine.batches)


def test_what_takes_too_long_is_504_and_leaves_the_queue(caplog):
    engine = Echo(held=True)
    with running(engine, timeout_secs=0.5) as found:
        (first,) = found.ready().in_thread({"input": "a"})
        engine.begun()
        (second,) = found.in_thread({"rows": [{"input": "b"}, {"input": "c"}]})
        for response in (first.result(), second.result()):
            assert response.status_code == 504
            assert response.json() == {"error": "no answer within 0.5 s"}
        wait_for(lambda: found.service.batcher.rows == 0)
        engine.go(2)
        assert found.ask({"input": "d"}).status_code == 200
    gc.collect()
    assert engine.batches == [["predict: a"], ["predict: d"]] and not caplog.records


def test_a_client_that_leaves_takes_its_rows_along():
    engine = Echo(held=True)
    with running(engine) as found:
        found.ready()
        (first,) = found.in_thread({"input": "first"})
        engine.begun()
        with pytest.raises(httpx.ReadTimeout):
            found.ask({"rows": [{"input": "gone"}] * 3}, timeout=0.3)
        wait_for(lambda: found.service.batcher.rows == 1)
        wait_for(lambda: found.metric('stepdistill_requests_total{status="499"}') == 1)
        engine.go(2)
        assert first.result().status_code == 200
        assert found.ask({"input": "next"}).status_code == 200
    assert engine.batches == [["predict: first"], ["predict: next"]]


def test_a_client_that_leaves_in_the_middle_of_its_body_is_no_error(echo, capfd):
    service, _ = echo
    with connected(service) as half:
        half.sendall(b"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{")
        wait_for(lambda: service.service.open == 1)
    wait_for(lambda: service.service.open == 0)
    assert service.ask({"input": "a"}).status_code == 200
    assert "Traceback" not in capfd.readouterr().err


@contextlib.contextmanager
def connected(service):
    host, port = service.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=20) as client:
        yield client


def until_closed(client):
    """Everything that the server still sends, up to the end of the connection."""
    found = b""
    with contextlib.suppress(ConnectionResetError):  # unread bytes of ours make it a reset
        while part := client.recv(65536):
            found += part
    return found


@pytest.mark.parametrize(("line", "status"), [(b"POST /predict", b"413"), (b"GET /health", b"200")])
def test_a_body_without_end_is_answered_and_read_no_further(echo, monkeypatch, line, status):
    monkeypatch.setattr(app, "MOST_READ_BYTES", 2 * app.MAX_BODY_BYTES)
    chunk = b"%x\r\n%s\r\n" % (2**16, b"a" * 2**16)
    with connected(echo[0]) as client:
        client.sendall(line + b" HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n")
        sent, most = 0, 2**26  # the system holds some of it, but not so much
        with contextlib.suppress(ConnectionError):
            while sent < most:
                sent += client.send(chunk)
        assert app.MAX_BODY_BYTES < sent < most
        answer = until_closed(client)
    assert answer.startswith(b"HTTP/1.1 " + status) and b"connection: close" in answer
    assert echo[0].ask({"input": "a"}).status_code == 200


@pytest.mark.parametrize(("line", "status"), [(b"POST /predict", b"504"), (b"PUT /none", b"404")])
def test_a_body_that_drips_is_ended_with_its_connection(line, status):
    with running(Echo(), timeout_secs=0.2) as found, connected(found.ready()) as client:
        client.sendall(line + b" HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n")
        answer = []
        reader = threading.Thread(target=lambda: answer.append(until_closed(client)))
        reader.start()
        for _ in range(1000):
            reader.join(0.02)
            if not reader.is_alive():
                break
            with contextlib.suppress(ConnectionError):
                client.sendall(b"1\r\na\r\n")
        assert answer, "the connection is still open"
    assert answer[0].startswith(b"HTTP/1.1 " + status) and b"connection: close" in answer[0]


def test_a_refusal_waits_for_a_body_that_ends_and_leaves_the_connection_open(echo):
    with connected(echo[0]) as client:
        client.sendall(b"POST /none HTTP/1.1\r\nHost: x\r\nContent-Length: 3\r\n\r\na")
        client.sendall(b"bcGET /health HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        first, second = until_closed(client).split(b"HTTP/1.1 ")[1:]
    assert first.startswith(b"404 ") and b"connection: close" not in first
    assert second.startswith(b"200 ")


@pytest.mark.parametrize("part", [2**20, 4096], ids=["at once", "in parts"])
@pytest.mark.parametrize("place", ["target", "one header", "many headers"])
def test_a_head_has_at_most_16_kib(echo, place, part):
    def head(query, headers):
        return f"GET /health{query} HTTP/1.1\r\nHost:x\r\nConnection:close\r\n{headers}\r\n"

    refused = {"400", "431"}  # 400 while it is not whole yet
    for size, statuses in ((2**14, {"200"}), (2**14 + 1, refused), (2**17, refused)):
        filled = size - len(head("", ""))
        if place == "target":
            sent = head("?" + "q" * (filled - 1), "")
        elif place == "one header":
            sent = head("", "a:" + "b" * (filled - 4) + "\r\n")
        else:
            few = filled % 5 + 5
            sent = head("", "a:b\r\n" * ((filled - few) // 5) + "a:" + "b" * (few - 4) + "\r\n")
        assert len(sent) == size
        with connected(echo[0]) as client, contextlib.suppress(ConnectionError):
            for start in range(0, size, part):
                client.sendall(sent[start : start + part].encode())
            got = until_closed(client)
            assert got[9:12].decode() in statuses and b"connection: close" in got.lower()


def test_a_large_body_is_read_in_small_parts(echo, monkeypatch):
    """So nobody waits until a quarter of a megabyte of tiny chunks has been parsed."""
    sizes, received = [], server._Protocol.data_received

    def watched(self, data):
        sizes.append(len(data))
        received(self, data)

    monkeypatch.setattr(server._Protocol, "data_received", watched)
    assert echo[0].ask({"input": "a" * 2**18}).status_code == 200
    assert sum(sizes) > 2**18 and max(sizes) <= 4096


def test_an_answer_does_not_wait_for_an_acknowledgement():
    """asyncio sets TCP_NODELAY where the socket's protocol says TCP."""
    with server.bind("127.0.0.1", 0) as listener:
        assert listener.proto == socket.IPPROTO_TCP


def test_a_failure_is_500_without_its_traceback_and_the_log_has_it(capfd):
    def fails(prompts):
        if "predict: bad" in prompts:
            raise RuntimeError("secret of the engine")

    with running(Echo(fails=fails)) as found:
        response = found.ready().ask({"input": "bad"})
        assert response.status_code == 500
        assert response.json() == {"error": "the server failed; its log has the error"}
        assert found.ask({"input": "good"}).status_code == 200
    err = capfd.readouterr().err
    assert "secret of the engine" in err and "Traceback" in err


def test_a_row_that_gives_nan_is_500_and_said_in_the_log(capfd):
    with running(Echo(score=np.nan)) as found:
        assert found.ready().ask({"input": "a"}).status_code == 500
    assert "the model gives NaN" in capfd.readouterr().err


def test_what_an_engine_cannot_ask_is_400_of_that_request_alone():
    def fails(prompts):
        if "predict: " in prompts:
            raise InputError(f"{engine.path}: no answer to an empty prompt")

    engine = Echo(held=True, fails=fails)
    with running(engine) as found:
        (first,) = found.ready().in_thread({"input": "first"})
        engine.begun()
        (bad,) = found.in_thread({"rows": [{"input": "a"}, {"input": ""}]})
        (good,) = found.in_thread({"input": "good"})
        wait_for(lambda: found.service.batcher.rows == 4)
        engine.go(10)
        assert bad.result().status_code == 400
        assert bad.result().json() == {"error": "row 2: no answer to an empty prompt"}
        assert [f.result().status_code for f in (first, good)] == [200, 200]


def test_before_it_is_warm_it_lives_but_is_not_ready():
    engine, warm = Echo(), threading.Event()
    decode = engine.decode

    def slow_at_first(*args):
        assert warm.wait(20)
        return decode(*args)

    engine.decode = slow_at_first
    with running(engine) as found:
        assert found.client.get("/health").json() == {"status": "ok"}
        assert found.client.get("/ready").status_code == 503
        assert found.client.get("/ready").json() == {"status": "warming up"}
        assert found.metric("stepdistill_ready") == 0
        response = found.ask({"input": "a"})
        assert response.status_code == 503 and int(response.headers["retry-after"]) >= 1
        warm.set()
        assert found.ready().ask({"input": "a"}).status_code == 200
        assert found.metric("stepdistill_ready") == 1


@pytest.mark.parametrize("score", [np.nan, None])
def test_a_warm_up_that_fails_ends_the_server(score, model_dir, monkeypatch):
    """Weights that give NaN, and an engine that fails: no process stays that can answer nothing."""

    def decode(rows, *_):
        assert score is not None
        return Decoded(list(rows), np.full(len(rows), score), np.ones(len(rows), bool))

    engine = Echo()
    engine.decode = decode
    monkeypatch.setattr(serving_run, "open_engine", lambda *_, **__: engine)
    error = AssertionError if score is None else InputError
    with pytest.raises(error) as raised:
        serve(model_dir, port=0)
    assert score is None or str(raised.value).startswith("echo: the model gives NaN")


def test_a_loop_that_fails_ends_the_server():
    """Nothing does; should it, requests must not wait for their timeouts on a server that says `ready`."""
    with running(Echo()) as found:
        found.ready()
        found.service.batcher._on_batch = lambda *_: 1 / 0
        assert found.ask({"input": "a"}).status_code == 503
        found._thread.join(20)
        assert not found._thread.is_alive()
    assert isinstance(found.service.failure, ZeroDivisionError)


def test_metrics_are_those_of_prometheus(echo):
    from prometheus_client.parser import text_string_to_metric_families

    service, _ = echo
    service.ask({"rows": [{"input": "a"}] * 5})
    service.ask({"input": "a"})
    response = service.client.get("/metrics")
    assert response.headers["content-type"].startswith("text/plain; version=")
    families = {f.name: f for f in text_string_to_metric_families(response.text)}
    samples = {(s.name, *s.labels.items()): s.value for f in families.values() for s in f.samples}
    assert samples["stepdistill_requests_total", ("status", "200")] == 2
    assert samples["stepdistill_rows_total",] == 6
    assert samples["stepdistill_batch_rows_sum",] == 6
    assert samples["stepdistill_batch_rows_count",] == samples["stepdistill_batch_seconds_count",]
    assert samples["stepdistill_request_seconds_count",] == 2
    assert 0 < samples["stepdistill_request_seconds_sum",] < 60
    assert samples["stepdistill_queue_rows",] == 0
    assert samples["stepdistill_ready",] == 1


def test_two_services_in_one_process_do_not_share_their_counts(echo):
    first, _ = echo
    first.ask({"input": "a"})
    with running(Echo()) as second:
        assert second.ready().metric("stepdistill_rows_total") == 0
        assert first.metric("stepdistill_rows_total") == 1


def test_64_clients_at_once_each_get_their_own_answers(echo):
    service, engine = echo

    async def ask_all():
        limits = httpx.Limits(max_connections=64)
        async with httpx.AsyncClient(base_url=service.url, limits=limits, timeout=60) as client:

            async def one(number):
                found = []
                for turn in range(3):
                    text = f"client {number}, turn {turn} " + "x" * (number * turn)
                    response = await client.post("/predict", json={"input": text})
                    found.append(response.json()["label"] == f"predict: {text}")
                return all(found)

            return await asyncio.gather(*map(one, range(64)))

    assert all(asyncio.run(ask_all()))
    sizes = list(map(len, engine.batches))
    assert sum(sizes) == 192 and 1 < max(sizes) <= 8


def test_a_stop_answers_what_is_under_way_and_takes_nothing_more():
    engine = Echo(held=True)
    found = Running(engine).ready()
    waiting = found.in_thread({"rows": [{"input": "a"}] * 20}, 3)
    engine.begun()
    wait_for(lambda: found.service.batcher.rows == 60)
    found._signals.act("the test")
    assert found.service.state == "stopping"

    def refused():
        try:
            httpx.get(f"{found.url}/health", timeout=5)
        except httpx.TransportError:
            return True

    wait_for(refused)
    engine.go(100)
    assert [len(f.result().json()["rows"]) for f in waiting] == [20] * 3
    assert [f.result().headers["connection"] for f in waiting] == ["close"] * 3
    found.stop()
    assert (found.service.answered, found.service.unanswered, found.service.open) == (60, 0, 0)


@pytest.mark.parametrize(
    ("options", "part"),
    [
        ({"port": 70_000}, "`port` must be a whole number from 0 to 65535, not 70000"),
        (
            {"host": "no.such.host.invalid"},
            "`host` no.such.host.invalid `port` 8000: cannot listen",
        ),
        ({"max_queue": 0}, "`max_queue` must be a whole number of at least 1, not 0"),
        ({"max_wait_ms": -1.0}, "`max_wait_ms` must be a number of at least 0"),
        ({"timeout_secs": float("nan")}, "`timeout_secs`"),
        ({"grace_secs": -1.0}, "`grace_secs`"),
        ({"port": 0, "num_beams": 0}, "`num_beams`"),
        ({"port": 0, "max_decode_len": 0}, "`max_decode_len`"),
        ({"port": 0, "choices": "none.txt"}, "`choices` none.txt: there is no such file"),
        ({"choices_temperature": 2.0}, "`choices_temperature`"),
        ({"port": 0, "step": "4"}, "`step` 4"),
    ],
)
def test_bad_options_are_said_before_it_listens(model_dir, options, part):
    with pytest.raises(InputError, match=part.replace("(", r"\(")):
        serve(model_dir, **options)


def test_a_port_that_is_taken_is_said_before_the_model_is_read(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        with pytest.raises(
            InputError, match=f"port {port} on 127.0.0.1 is in use; .* `port` .0 means any"
        ):
            serve(tmp_path / "no model", port=port)
    with pytest.raises(InputError, match="no such folder"):
        serve(tmp_path / "no model", port=0)
