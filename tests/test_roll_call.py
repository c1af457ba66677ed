"""Threads stand for the processes: the roll call knows nothing but sockets."""

import concurrent.futures
import socket
import threading
import time

import pytest

from stepdistill_jax.errors import InputError
from stepdistill_jax.roll_call import ProcessesMissing, roll_call


@pytest.fixture
def port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def outcomes(port, numbers, *, of, timeout_secs=1.5, counts=None):
    """What each process got: None, or its error."""

    def call(number):
        count = (counts or {}).get(number, of)
        try:
            roll_call(
                "127.0.0.1", port, num_processes=count, process_id=number, timeout_secs=timeout_secs
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
        assert "after 1.5 s 2 of 5 processes are missing: number 2, 3 (counted from 0)" in str(
            error
        )


def test_a_missing_first_process_is_named_with_its_address(port):
    for error in outcomes(port, [1, 2], of=3, timeout_secs=0.8):
        assert isinstance(error, ProcessesMissing)
        assert "1 of 3 processes is missing: number 0" in str(error)
        assert f"127.0.0.1:{port}: Connection refused" in str(error)


@pytest.mark.parametrize(
    ("numbers", "counts", "said"),
    [
        ([0, 1, 1], {}, "two processes of the job are number 1"),
        ([0, 1], {1: 4}, "process 1 was started as one of 4, process 0 as one of 3"),
    ],
    ids=["same number", "other count"],
)
def test_a_job_that_contradicts_itself_is_bad_input_everywhere(port, numbers, counts, said):
    for error in outcomes(port, numbers, of=3, timeout_secs=10, counts=counts):
        assert isinstance(error, InputError)
        assert said in str(error)


def test_one_that_came_and_died_is_missing_and_a_stranger_is_no_process(port):
    def visit():
        for greeting in (
            b"stepdistill-roll-call 4 2\n",
            b"GET / HTTP/1.1\r\n\r\n",
            b"stepdistill-roll-call\n",
            b"stepdistill-roll-call a b\n",
            b"no end of line",
        ):
            while True:
                try:
                    with socket.create_connection(("127.0.0.1", port), timeout=5) as connection:
                        connection.sendall(greeting)
                        time.sleep(0.2)
                    break
                except ConnectionRefusedError:
                    time.sleep(0.02)

    threading.Thread(target=visit, daemon=True).start()
    for error in outcomes(port, [0, 1], of=4, timeout_secs=2):
        assert isinstance(error, ProcessesMissing)
        assert "missing: number 2, 3 (" in str(error)


def test_a_port_that_another_has_is_bad_input():
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        (error,) = outcomes(taken.getsockname()[1], [0], of=2, timeout_secs=0.2)
    assert isinstance(error, InputError)
    assert "cannot be opened" in str(error)
