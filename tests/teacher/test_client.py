"""What goes wrong between us and a server, over real sockets."""

import base64
import email.utils
import gzip
import html
import http.server
import json
import re
import socket
import threading
import time
import tracemalloc
import urllib.parse

import pytest

from stepdistill_jax.commands.main import main
from stepdistill_jax.errors import InputError
from stepdistill_jax.teacher import annotate
from stepdistill_jax.teacher.client import ChatClient, retry_after
from stepdistill_jax.teacher.secret import Secret
from stepdistill_jax.teacher.settings import Settings
from stepdistill_jax.teacher.stub_server import Reply, StubServer

GOOD = Reply("Because. So the answer is yes.")
BROKEN = {
    "500": Reply(status=500, body=b'{"error": {"message": "inner"}}'),
    "503 in HTML": Reply(status=503, body=b"<html>", headers={"Content-Type": "text/html"}),
    "408": Reply(status=408, body=b"{}"),
    "broken JSON": Reply(body=b'{"choices": [{"mess'),
    "HTML instead of JSON": Reply(body=b"<html>hi</html>", headers={"Content-Type": "text/html"}),
    "no choices": Reply(body=b'{"choices": []}'),
    "a list": Reply(body=b"[]"),
    "an error with status 200": Reply(body=b'{"error": {"message": "overloaded"}}'),
    "cut in the body": Reply(GOOD.text, cut=20),
    "closed without a word": Reply(GOOD.text, cut=0),
    "half a surrogate": Reply(body=b'{"choices": [{"message": {"content": "\\ud800"}}]}'),
}


def questions(count):
    return [{"input": f"Is parcel {i} late?", "label": "yes"} for i in range(count)]


def once_in(n, bad):
    """Every n-th request is answered by `bad`."""
    count = iter(range(1, 1_000_000))
    return lambda _: bad if next(count) % n == 1 else GOOD


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_answer_is_asked_for_again_and_every_row_is_there(annotating, name):
    result, out = annotating(questions(6), once_in(3, BROKEN[name]), concurrency=2)
    assert result["with_rationale"] == len(out) == 6
    assert result["defects"] == {}
    assert annotating.server.requests == 6 + 3  # requests 1, 4 and 7 of 9


def test_a_slow_answer_is_given_up_and_asked_for_again(annotating):
    slow = Reply(GOOD.text, delay=5.0)
    start = time.monotonic()
    result, _ = annotating(questions(4), once_in(4, slow), timeout=0.3)
    assert result["with_rationale"] == 4
    assert time.monotonic() - start < 4


def test_a_row_that_the_server_never_answers_is_a_defect_and_the_others_go_on(annotating):
    def reply(request):
        poison = "parcel 3 " in request["messages"][0]["content"]
        return BROKEN["500"] if poison else GOOD

    result, out = annotating(questions(8), reply, attempts=3)
    assert result["defects"] == {"server_error": 1}
    assert annotating.server.requests == 7 + 3
    assert [("rationale" in row) for row in out] == [True] * 3 + [False] + [True] * 4
    assert "HTTP 500: inner" in annotating.defects[0]["text"]


def test_a_server_that_is_down_stops_the_run_before_all_rows_have_failed(annotating):
    result, out = annotating(questions(500), lambda _: BROKEN["500"], attempts=2, concurrency=4)
    assert "10 consecutive requests failed; the last: HTTP 500: inner" in result["stopped"]
    assert annotating.server.requests <= 2 * (10 + 4)
    assert out is None


def test_nobody_listening_on_this_machine_stops_the_run_at_once(annotating):
    source = annotating.write(questions(3))
    url = "http://localhost:9/v1"
    with pytest.raises(InputError, match=rf"`base_url` {url}.*start the server"):
        annotate(source, annotating.output, task="generic", model="m", base_url=url)


@pytest.mark.parametrize("number", [socket.EAI_NONAME, socket.EAI_AGAIN], ids=["unknown", "later"])
def test_an_unknown_host_stops_the_run_at_once(annotating, monkeypatch, number):
    def no_host(*_, **__):
        raise socket.gaierror(number, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", no_host)
    source = annotating.write(questions(1))
    settings = {"model": "m", "base_url": "http://my-servr/v1", "attempts": 2, "backoff": 0.01}
    if number == socket.EAI_AGAIN:  # a name server that is down may come back
        result = annotate(source, annotating.output, task="generic", **settings)
        assert result["defects"] == {"server_error": 1}
        return
    with pytest.raises(InputError, match=r"`base_url` http://my-servr/v1: .*correct the address"):
        annotate(source, annotating.output, task="generic", **settings)


def test_a_server_of_this_machine_that_has_answered_may_restart(annotating):
    """It answers once and ends; nobody listens at the second question."""

    class Once(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.dumps({"choices": [{"message": {"content": GOOD.text}}]}).encode()
            self.send_response(200)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_):
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Once) as server:

        def serve():
            server.handle_request()
            server.server_close()

        thread = threading.Thread(target=serve)
        thread.start()
        url = f"http://127.0.0.1:{server.server_port}/v1"
        settings = {"model": "m", "base_url": url, "attempts": 2, "backoff": 0.01, "concurrency": 1}
        source = annotating.write(questions(2))
        result = annotate(source, annotating.output, task="generic", **settings)
        thread.join()
    assert (result["with_rationale"], result["defects"]) == (1, {"server_error": 1})


def test_each_silent_attempt_names_the_server_and_how_many_are_left(annotating, capsys):
    silent = BROKEN["closed without a word"]
    result, _ = annotating(questions(1), lambda _: silent, attempts=2)
    assert "rows got an answer" in result["stopped"]
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "waiting" in line]
    url = re.escape(annotating.server.url)
    assert re.fullmatch(rf"no answer from {url} \(.*\); waiting 0.01 s before attempt 2 of 2", line)


@pytest.mark.parametrize("status", [429, 503])
def test_retry_after_is_obeyed_by_all_requests(annotating, status):
    times, refused = [], []

    def reply(_):
        times.append(time.monotonic())
        if len(times) == 5:
            refused.append(times[-1])
            return Reply(status=status, body=b"{}", headers={"retry-after-ms": "500"})
        return Reply(GOOD.text, delay=0.01)

    result, _ = annotating(questions(30), reply, concurrency=4)
    assert result["with_rationale"] == 30
    (at,) = refused
    # requests under way at the refusal may still arrive; then none comes for half a second
    early = [t for t in times if at + 0.1 < t < at + 0.49]
    assert early == []
    assert len([t for t in times if t >= at + 0.49]) >= 20


def test_failures_with_answers_between_them_do_not_stop_the_run(annotating):
    """Twenty of forty questions fail, never ten in a row."""
    count = iter(range(1_000))
    reply = lambda _: BROKEN["500"] if next(count) % 2 else GOOD  # noqa: E731
    result, out = annotating(questions(40), reply, attempts=1, concurrency=1)
    assert (result["stopped"], result["defects"]) == (None, {"server_error": 20})
    assert len(out) == 40


@pytest.mark.parametrize("headers", [{}, {"retry-after-ms": "30"}], ids=["bare", "with a wait"])
def test_a_rate_limit_is_reported_once_with_its_wait(annotating, capsys, headers):
    refusal = Reply(status=429, body=b'{"error": {"message": "slow down"}}', headers=headers)
    result, _ = annotating(questions(40), once_in(3, refusal), backoff=0.03)
    assert result["with_rationale"] == 40
    lines = [line for line in capsys.readouterr().err.splitlines() if "429" in line]
    assert annotating.server.requests >= 50
    assert len(lines) == 1
    assert re.fullmatch(r"HTTP 429: slow down; waiting 0\.0\d s before .*", lines[0])


def test_a_long_wait_is_reported_once_however_many_requests_it_holds_back(capsys):
    """By a clock of its own: three requests meet one minute's limit, two the next minute's."""
    client = ChatClient(Settings(task="generic", model="m", base_url="http://127.0.0.1:9/v1"))
    for now in (100.0, 100.1, 102.0, 161.0, 161.5):
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(time, "monotonic", lambda now=now: now)
            client._report("HTTP 429: slow down", 60.0, "the next attempt")
    assert capsys.readouterr().err.count("waiting 60 s") == 2


def test_a_storm_of_refusals_loses_no_row(annotating):
    """A limit of 10 requests each 0.1 s, against 16 at once: far more refusals than `attempts`."""
    window = {"start": 0.0, "count": 0}
    refusals = []

    def reply(_):
        now = time.monotonic()
        if now - window["start"] > 0.1:
            window.update(start=now, count=0)
        window["count"] += 1
        if window["count"] > 10:
            refusals.append(now)
            return Reply(status=429, body=b"{}", headers={"retry-after-ms": "100"})
        return GOOD

    result, out = annotating(questions(200), reply, concurrency=16, attempts=2)
    assert result["with_rationale"] == len(out) == 200
    assert len(refusals) > 10
    assert annotating.server.requests == 200 + len(refusals)


@pytest.mark.parametrize(
    ("status", "body", "says"),
    [
        (401, b'{"error": {"message": "Incorrect API key"}}', r"401: Incorrect .*\$OPENAI_API_KEY"),
        (404, b'{"error": {"message": "no model stub"}}', "model stub: HTTP 404: no model stub"),
        (400, b'{"error": {"message": "temperature must be 1"}}', "`temperature=default`"),
        (400, b'{"error": {"message": "max_tokens too large"}}', "`max_tokens`"),
        (
            429,
            b'{"error": {"message": "You ran out", "code": "insufficient_quota"}}',
            "You ran out",
        ),
    ],
)
def test_a_refused_request_stops_at_once_with_the_servers_message(annotating, status, body, says):
    with pytest.raises(InputError, match=says) as error:
        annotating(questions(300), lambda _: Reply(status=status, body=body), concurrency=4)
    assert annotating.server.requests == 1
    assert "\n" not in str(error.value)


def test_what_was_answered_before_a_refusal_is_kept(annotating):
    def reply(_):
        return GOOD if annotating.server.requests <= 50 else Reply(status=402, body=b"{}")

    with pytest.raises(InputError, match="HTTP 402"):
        annotating(questions(100), reply, concurrency=4)
    annotating(questions(100))
    assert annotating.server.requests == 50


def test_the_key_is_sent_and_stands_in_no_file_no_output_and_no_error(annotating, key, capfd):
    """A server that repeats the key wherever it can: in an answer, in errors, in broken bodies."""
    echo = Reply(f"Your key is {key}. So the answer is yes.")
    _, out = annotating(questions(3), lambda _: echo)
    assert f"authorization: bearer {key}" in annotating.server.last_head.lower()
    assert out[0]["rationale"] == "Your key is ***."
    said = f'{{"error": {{"message": "bad key {key}"}}}}'.encode()
    results = []
    for body, status in ((said, 500), (said, 200), (f"<{key}>".encode(), 200)):
        broken = Reply(status=status, body=body)
        result, _ = annotating(questions(2), lambda _, r=broken: r, attempts=2, temperature=0.2)
        results.append(repr(result))
        assert "rows got an answer" in result["stopped"]
    defects = (annotating.folder / "out.defects.jsonl.partial").read_text()
    assert "***" in defects
    source = str(annotating.write(questions(4)))
    argv = ["annotate", source, str(annotating.output), "--task", "generic", "--model", "m"]
    with StubServer(lambda _: Reply(status=401, body=said)).serve() as server:
        assert main([*argv, "--base-url", server.url, "--debug", "--json"]) == 2
    stdout, stderr = capfd.readouterr()
    assert "HTTP 401: bad key ***" in stderr
    written = [p.read_bytes() for p in annotating.folder.rglob("*") if p.is_file()]
    assert len(written) >= 3
    assert not any(key.encode() in text for text in written)
    assert not any(key in text for text in (*results, stdout, stderr))


KEY = "sk-Aa/9+b\\c&d"  # characters that encodings write otherwise
ENCODED = {
    "JSON": json.dumps(KEY)[1:-1],
    "JSON with escaped slashes": json.dumps(KEY)[1:-1].replace("/", "\\/"),
    "JSON with every character as u00XX": "".join(f"\\u{ord(c):04x}" for c in KEY),
    "JSON in JSON": json.dumps(json.dumps(KEY))[3:-3],
    "upper-case escapes": "".join(f"\\u{ord(c):04X}" for c in KEY),
    "a URL": urllib.parse.quote(KEY, safe=""),
    "a URL in lower case, twice": re.sub(
        "%..", lambda m: m[0].lower().replace("%", "%25"), urllib.parse.quote(KEY, safe="")
    ),
    "HTML": html.escape(KEY),
    "HTML in numbers": "".join(f"&#{ord(c)};" for c in KEY),
    "HTML in hexadecimal numbers": "".join(f"&#x{ord(c):X};" for c in KEY),
    "hex": KEY.encode().hex(),
    "UTF-16": KEY.encode("utf-16-le").decode("latin-1"),
    "base64": base64.b64encode(KEY.encode()).decode(),
    "base64 of a header": base64.b64encode(f"Bearer {KEY}".encode()).decode(),
    "base64 of a user and the key": base64.b64encode(f"me:{KEY}:".encode()).decode(),
    "base64 for URLs": base64.urlsafe_b64encode(f"a{KEY}".encode()).decode(),
}


@pytest.mark.parametrize("name", ENCODED)
def test_the_key_is_hidden_in_every_encoding(name):
    text = ENCODED[name]
    hidden = Secret(KEY).hide(f"<{text}>")
    before, after = hidden.split("***")
    # base64 leaves what stands around the key, and bits of its first and last byte
    around = len(base64.b64encode(b"Bearer ")) + 2 if "base64" in name else 0
    assert len(before) + len(after) <= len("<>\0") + around
    assert not any(text[at : at + 8] in hidden for at in range(around, len(text) - 8))


def test_every_encoding_of_the_key_is_hidden_in_answers_errors_and_broken_bodies(
    annotating, monkeypatch, capfd
):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    texts = " , ".join(ENCODED.values())
    error = {"error": {"message": texts}}
    for reply in (
        Reply(body=ENCODED["JSON with escaped slashes"].encode()),
        Reply(body=json.dumps(error).encode()),
        Reply(status=500, body=json.dumps(error).encode()),
        Reply(f"Because {texts}. So the answer is yes."),
    ):
        annotating(questions(1), lambda _, r=reply: r, attempts=1, choices=())
        files = [p for p in annotating.folder.iterdir() if p.name != "in.jsonl"]
        written = b"".join(p.read_bytes() for p in files).decode("utf-8", "replace")
        written += "".join(capfd.readouterr())
        assert "***" in written
        for text in ENCODED.values():
            for form in (text, json.dumps(text)[1:-1], repr(text)[1:-1]):
                assert form not in written
        for path in files:
            path.unlink()


@pytest.mark.parametrize("text", ["sk-Aa/9+b", "\\", "%25", "&#0", "sk-", "\0"], ids=ascii)
def test_text_without_the_key_stays_as_it_is(text):
    assert Secret(KEY).hide(text * 20_000) == text * 20_000


def test_a_key_that_might_be_any_word_is_not_hidden():
    assert Secret("none").hide("there is none") == "there is none"


@pytest.mark.parametrize("bad", ["sk-schlüssel", "sk-a\nb", "sk-\u200babc", "sk-\x7f"], ids=ascii)
def test_a_key_that_no_header_holds_is_refused_in_one_line(annotating, monkeypatch, capfd, bad):
    monkeypatch.setenv("MY_KEY", bad)
    source = str(annotating.write(questions(2)))
    argv = ["annotate", source, str(annotating.output), "--task", "generic", "--model", "m"]
    with StubServer().serve() as server:
        assert main([*argv, "--base-url", server.url, "--api-key-env", "MY_KEY"]) == 2
    assert server.requests == 0
    out, err = capfd.readouterr()
    (line,) = [line for line in err.splitlines() if "error" in line]
    assert line.startswith("stepdistill: error: $MY_KEY contains a character")
    assert "Traceback" not in err
    assert not any(part in out + err for part in (bad, ascii(bad)[1:-1]))


def test_a_key_that_straddles_the_cut_of_a_message_leaves_no_part_of_it(annotating, key):
    body = ("x" * 70 + key).encode()  # cut after 80
    annotating(questions(1), lambda _: Reply(body=body), attempts=1)
    for name in ("out.defects.jsonl.partial", "out.jsonl.partial"):
        written = (annotating.folder / name).read_text()
        assert "x***" in written
        assert key[:6] not in written


def test_a_refusals_message_hides_the_key_before_it_is_cut(annotating, key):
    body = json.dumps({"error": {"message": "x" * 290 + key}}).encode()
    with pytest.raises(InputError, match=r"x\*\*\*") as error:
        annotating(questions(1), lambda _: Reply(status=400, body=body))
    assert key[:6] not in str(error.value)


def test_refusals_for_the_rate_are_no_failures_of_the_server(annotating):
    replies = iter([*[Reply(status=429, body=b"{}")] * 8, BROKEN["503 in HTML"], GOOD])
    result, _ = annotating(questions(1), lambda _: next(replies), attempts=2, backoff=0.001)
    assert (result["with_rationale"], annotating.server.requests) == (1, 10)


def test_content_in_parts_is_their_text(annotating):
    parts = [
        {"type": "text", "text": "Because. So the "},
        {"type": "text", "text": "answer is no."},
    ]
    body = json.dumps({"choices": [{"message": {"content": parts}}]}).encode()
    _, out = annotating(questions(1), lambda _: Reply(body=body), attempts=1)
    assert (out[0]["rationale"], out[0]["llm_label"]) == ("Because.", "no")


def test_what_unusable_answers_cost_counts_towards_the_cap(annotating):
    usage = {"prompt_tokens": 500, "completion_tokens": 500}
    body = {"choices": [{"message": {"content": 7}}], "usage": usage}
    reply = Reply(body=json.dumps(body).encode())
    caps = {"max_tokens": 500, "max_tokens_total": 3000, "concurrency": 1}
    result, _ = annotating(questions(20), lambda _: reply, **caps)
    assert "`max_tokens_total=3000`" in result["stopped"]
    assert 2 <= annotating.server.requests <= 3
    used = result["prompt_tokens"] + result["completion_tokens"]
    assert used == 1000 * annotating.server.requests


@pytest.mark.parametrize("reply", [Reply(GOOD.text, delay=5.0), Reply(GOOD.text, cut=20)])
def test_an_attempt_that_was_given_up_counts_all_that_was_reserved(annotating, reply):
    caps = {"max_tokens": 500, "max_tokens_total": 1800, "concurrency": 1, "timeout": 0.2}
    result, _ = annotating(questions(20), lambda _: reply, **caps)
    assert "`max_tokens_total=1800`" in result["stopped"]
    assert annotating.server.requests == 3
    assert result["completion_tokens"] == 1500


def test_a_missing_key_is_named_by_its_variable(annotating, monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY")
    source = annotating.write(questions(1))
    with pytest.raises(InputError, match=r"\$MY_KEY is not set"):
        annotate(source, annotating.output, task="generic", model="m", api_key_env="MY_KEY")


def test_a_server_of_ones_own_needs_no_key(annotating, monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY")
    result, _ = annotating(questions(1), lambda _: GOOD)
    assert result["with_rationale"] == 1


def test_retry_after_is_seconds_milliseconds_or_a_date():
    date = email.utils.formatdate(time.time() + 30, usegmt=True)
    assert retry_after({"retry-after": "2.5"}) == 2.5
    assert retry_after({"retry-after-ms": "250", "retry-after": "9"}) == 0.25
    assert retry_after({"retry-after": date}) == pytest.approx(30, abs=2)
    assert retry_after({"retry-after": "soon"}) is None
    assert retry_after({}) is None


# ---- servers without end


def test_the_timeout_covers_a_whole_request_that_drips(annotating):
    """Each byte comes in time; the answer never does."""
    drip = Reply(GOOD.text, drip=0.1)
    result, _ = annotating(questions(4), once_in(100, drip), timeout=0.3)
    assert result["with_rationale"] == 4
    assert annotating.server.requests == 5


ZEROS = b"0" * 2**20
BOMB = {"Content-Encoding": "gzip"}
TOO_LONG = {
    "an endless answer": (Reply(body=ZEROS, endless=True), "longer than 4 MiB"),
    "an endless error": (Reply(status=500, body=ZEROS, endless=True), "longer than 4 MiB"),
    "a long answer": (Reply("x" * 5 * 2**20), "longer than 4 MiB"),
    "a gzip bomb": (Reply(body=gzip.compress(ZEROS * 64, 1), headers=BOMB), r"compressed \(gzip\)"),
}


@pytest.mark.parametrize("name", TOO_LONG)
def test_the_size_of_a_response_is_bounded_in_memory(annotating, name):
    reply, says = TOO_LONG[name]
    tracemalloc.start()
    _, out = annotating(questions(1), lambda _: reply, attempts=2, timeout=20)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert out is None
    (defect,) = annotating.defects_so_far
    assert re.search(says, defect["text"])
    assert annotating.server.requests == 2
    assert peak < 40 * 2**20  # the stub's own copies of 5 MiB included


def test_an_answer_within_the_bound_is_read_whole(annotating):
    long = "x" * 3 * 2**20
    _, out = annotating(questions(1), lambda _: Reply(f"{long}. So the answer is yes."))
    assert out[0]["rationale"] == f"{long}."
