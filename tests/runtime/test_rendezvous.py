"""Threads stand for the processes: the rendezvous knows nothing but sockets."""

import concurrent.futures
import hashlib
import socket
import sys
import threading
import time

import pytest

from stepdistill_jax.errors import InputError
from stepdistill_jax.runtime.rendezvous import ProcessesMissing, own_address, rendezvous


@pytest.fixture
def port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def outcomes(port, numbers, *, of, timeout_secs=1.5, counts=None, secrets=None):
    """What each process got: None, or its error."""

    def call(number):
        count = (counts or {}).get(number, of)
        secret = (secrets or {}).get(number)
        try:
            rendezvous(
                *("127.0.0.1", port),
                num_processes=count,
                process_id=number,
                timeout_secs=timeout_secs,
                secret=secret,
            )
        except Exception as error:
            return error
        return None

    with concurrent.futures.ThreadPoolExecutor() as pool:
        return list(pool.map(call, numbers))


def test_all_go_on_when_all_are_there_and_the_port_is_free_again(port):
    assert outcomes(port, [3, 1, 0, 2], of=4, timeout_secs=20) == [None] * 4
    assert outcomes(port, [0, 1, 2, 3], of=4, timeout_secs=20) == [None] * 4


def test_who_is_missing_is_named_in_every_process_that_came(port):
    for error in outcomes(port, [0, 1, 4], of=5):
        assert isinstance(error, ProcessesMissing)
        assert "after 1.5 s 2 of 5 processes are missing: index 2, 3 (counted from 0)" in str(error)


def test_a_missing_first_process_is_named_with_its_address(port):
    for error in outcomes(port, [1, 2], of=3, timeout_secs=0.8):
        assert isinstance(error, ProcessesMissing)
        assert "1 of 3 processes is missing: index 0" in str(error)
        assert f"127.0.0.1:{port}: Connection refused" in str(error)


@pytest.mark.parametrize(
    ("numbers", "counts", "said"),
    [
        ([0, 1, 1], {}, "two processes of the job have index 1"),
        ([0, 1], {1: 4}, "process 1 was started as one of 4, but process 0 as one of 3"),
    ],
    ids=["same number", "other count"],
)
def test_a_job_that_contradicts_itself_is_bad_input_everywhere(port, numbers, counts, said):
    for error in outcomes(port, numbers, of=3, timeout_secs=10, counts=counts):
        assert isinstance(error, InputError)
        assert said in str(error)


def greet(port, line, host="127.0.0.1"):
    """Connects as soon as somebody listens, and gives the connection after `line` was sent."""
    deadline = time.monotonic() + 20
    while True:
        try:
            connection = socket.create_connection((host, port), timeout=5)
        except ConnectionRefusedError:
            assert time.monotonic() < deadline
            time.sleep(0.02)
            continue
        connection.sendall(line)
        return connection


def token(secret):
    return hashlib.sha256(secret.encode()).hexdigest()


def test_one_that_came_and_died_is_missing(port):
    def visit():
        with greet(port, f"stepdistill-rendezvous {token('s')} 4 2\n".encode()):
            time.sleep(0.2)

    threading.Thread(target=visit, daemon=True).start()
    for error in outcomes(port, [0, 1], of=4, timeout_secs=2, secrets={0: "s", 1: "s"}):
        assert isinstance(error, ProcessesMissing)
        assert "missing: index 2, 3 (" in str(error)


STRANGERS = {
    "a web client": b"GET / HTTP/1.1\r\n\r\n",
    "no numbers": b"stepdistill-rendezvous\n",
    "without a token": b"stepdistill-rendezvous 3 1\n",
    "another token, number 1": b"stepdistill-rendezvous %s 3 1\n" % token("other").encode(),
    "another token, other count": b"stepdistill-rendezvous %s 9 5\n" % token("other").encode(),
    "the token of the address": b"stepdistill-rendezvous %s 3 1\n",
    "no end of line": b"stepdistill-rendezvous",
    "no text": bytes(range(128, 256)) + b"\n",
}


@pytest.mark.parametrize("line", STRANGERS.values(), ids=STRANGERS)
def test_a_stranger_neither_ends_a_job_nor_takes_a_place_in_it(port, line):
    if b"%s" in line:
        line %= token(f"127.0.0.1:{port}").encode()
    with concurrent.futures.ThreadPoolExecutor() as pool:
        secrets = dict.fromkeys(range(3), "of the job")
        first = pool.submit(outcomes, port, [0], of=3, timeout_secs=20, secrets=secrets)
        with greet(port, line) as stranger:
            # closed, with a word to who is of another job, before anybody else came
            assert stranger.recv(100) in (b"", b"stranger\n")
            assert not first.done()
        others = outcomes(port, [1, 2], of=3, timeout_secs=20, secrets=secrets)
        assert first.result() + others == [None] * 3


def test_a_process_with_another_token_names_the_reason_and_stays_missing(port):
    first, second = outcomes(port, [0, 1], of=2, timeout_secs=1.5, secrets={0: "a", 1: "b"})
    assert "missing: index 1 (" in str(first)
    assert "another job answers there, or this process has another STEPDISTILL_JOB_TOKEN" in str(
        second
    )


@pytest.mark.skipif(sys.platform != "linux", reason="127.0.0.2 is this machine on Linux alone")
def test_only_the_coordinators_address_is_listened_on(port):
    with concurrent.futures.ThreadPoolExecutor() as pool:
        first = pool.submit(outcomes, port, [0], of=2, timeout_secs=20)
        with greet(port, b""), pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.2", port), timeout=5)
        assert outcomes(port, [1], of=2, timeout_secs=20) + first.result() == [None, None]


@pytest.mark.parametrize(
    ("host", "resolved", "listens"),
    [
        ("10.0.0.7", ["10.0.0.7"], "10.0.0.7"),
        ("node7", ["fd00::7", "10.0.0.7"], "10.0.0.7"),
        ("node7", ["fd00::7"], "fd00::7"),
        ("localhost", ["::1", "127.0.0.1"], "127.0.0.1"),
        ("node7", ["127.0.1.1"], ""),
    ],
)
def test_a_name_stands_for_an_address(monkeypatch, host, resolved, listens):
    def getaddrinfo(*_, **__):
        families = [socket.AF_INET6 if ":" in a else socket.AF_INET for a in resolved]
        return [(f, 1, 6, "", (a, 8476)) for f, a in zip(families, resolved, strict=True)]

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    assert own_address(host, 8476, 0) == (listens, 8476)


def test_a_name_may_come_late_and_not_at_all(monkeypatch):
    answers = [
        OSError(-2, "Name or service not known"),
        [(socket.AF_INET, 1, 6, "", ("10.0.0.7", 1))],
    ]

    def getaddrinfo(*_, **__):
        answer = answers.pop(0)
        if isinstance(answer, OSError):
            raise answer
        return answer

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    assert own_address("node7", 8476, 20) == ("10.0.0.7", 8476)
    answers.append(OSError(-2, "Name or service not known"))
    with pytest.raises(InputError, match="host 'node7' is unknown here"):
        own_address("node7", 8476, -1)


def test_an_address_of_another_machine_is_bad_input():
    with pytest.raises(InputError, match=r"without the coordinator's address 192\.0\.2\.1; .*BIND"):
        rendezvous("192.0.2.1", 8476, num_processes=2, process_id=0, timeout_secs=1)


def test_a_port_that_another_has_is_bad_input():
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        (error,) = outcomes(taken.getsockname()[1], [0], of=2, timeout_secs=0.2)
    assert isinstance(error, InputError)
    assert "cannot be opened" in str(error)
