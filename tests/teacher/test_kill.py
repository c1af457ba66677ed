"""A process that is ended in the middle of its rows, and the same command once more."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from stepdistill_jax.teacher.stub_server import Reply, StubServer, by_rule

AT_ONCE = 16


def slow(request):
    reply = by_rule(request)
    return Reply(reply.text, delay=0.01)


@pytest.fixture
def command(tmp_path, count):
    rows = [{"input": f"Is parcel {i} late?", "label": "yes"} for i in range(count)]
    source = tmp_path / "in.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    output = tmp_path / "out.jsonl"

    def start(server):
        argv = ["annotate", source, output, "--task", "generic", "--choices", "yes,no", "--json"]
        argv += ["--model", "m", "--base-url", server.url, "--concurrency", str(AT_ONCE)]
        return subprocess.Popen(
            [sys.executable, "-m", "stepdistill_jax", *map(str, argv)],
            env=os.environ | {"OPENAI_API_KEY": "sk-test"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    return start, output


def end_in_the_middle(process, server, number, count):
    deadline = time.monotonic() + 60
    while server.requests < 0.4 * count:
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.002)
    process.send_signal(number)
    process.communicate(timeout=60)
    assert server.requests < count  # or nothing was tested
    return process.returncode


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "code", "count"),
    [
        (signal.SIGKILL, -signal.SIGKILL, 2000),
        (signal.SIGTERM, 75, 200),
    ],
    ids=["9", "15"],
)
def test_a_killed_run_goes_on_without_paying_twice(command, number, code, count):
    start, output = command
    with StubServer(slow).serve() as server:
        assert end_in_the_middle(start(server), server, number, count) == code
        assert not output.exists()
        second = start(server)
        stdout, stderr = second.communicate(timeout=120)
        assert second.returncode == 0, stderr
        asked = server.requests
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    assert [row["id"] for row in rows] == [str(i) for i in range(1, count + 1)]
    assert all(row["rationale"] for row in rows)
    assert count <= asked <= count + AT_ONCE
    result = json.loads(stdout.splitlines()[-1])
    assert (result["rows"], result["with_rationale"]) == (count, count)
    assert result["to_ask"] == result["requests"] < 0.7 * count
