"""What processes say to each other beside their devices."""

import collections
import concurrent.futures
import itertools
import signal
import socket
import subprocess
import sys
import threading

import jax
import pytest

from stepdistill_jax.runtime import channel
from stepdistill_jax.runtime.channel import Channel

TALK = """
import sys, threading, time
import jax
me = int(sys.argv[2])
jax.distributed.initialize(sys.argv[1], 3, me)
from stepdistill_jax.runtime import channel
from stepdistill_jax.runtime.channel import Channel, Closed
from stepdistill_jax.runtime.on_processes import gather_from_all
first, second = Channel("talk"), Channel("talk")
channel.WAIT_SECS = 0.2
heard = [first.combined(10 * me + i, lambda values: [values, sum(values)]) for i in range(20)]
assert heard == [[[i, 10 + i, 20 + i], 30 + 3 * i] for i in range(20)], heard
if me == 2:
    time.sleep(1)  # longer than the others wait at a time
assert second.combined({"me": me}, lambda values: values) == [{"me": 0}, {"me": 1}, {"me": 2}]
found = []
thread = threading.Thread(target=lambda: found.append(gather_from_all(lambda: -me, second)))
thread.start()
assert gather_from_all(lambda: me) == [0, 1, 2]  # in the main thread at the same time
thread.join()
assert found == [[0, -1, -2]]
if me == 1:  # alone
    threading.Timer(0.5, first.close).start()
    try:
        first.combined(1, sum)
        raise AssertionError
    except Closed:
        pass
gather_from_all(lambda: None)
jax.distributed.shutdown()
"""


def test_a_process_on_its_own_hears_itself():
    assert Channel("alone").combined([3], lambda values: values) == [[3]]


class Store:
    """That of JAX's coordinator, for threads that stand for processes."""

    def __init__(self):
        self.held, self._changed = {}, threading.Condition()

    def key_value_set(self, key, value):
        with self._changed:
            assert key not in self.held
            self.held[key] = value
            self._changed.notify_all()

    def blocking_key_value_get(self, key, milliseconds):
        with self._changed:
            assert self._changed.wait_for(lambda: key in self.held, milliseconds / 1e3), key
            return self.held[key]

    def key_value_delete(self, key):
        with self._changed:
            folder = f"{key.rstrip('/')}/"
            self.held = {
                k: v for k, v in self.held.items() if k != key and not k.startswith(folder)
            }


def test_all_hear_the_same_and_a_channel_leaves_one_key(monkeypatch):
    count, rounds, store, process = 3, 5, Store(), threading.local()
    monkeypatch.setattr(channel, "_store", lambda: store)
    monkeypatch.setattr(jax, "process_count", lambda: count)
    monkeypatch.setattr(jax, "process_index", lambda: process.index)

    def opened(name):
        monkeypatch.setattr(channel, "_opened", collections.defaultdict(itertools.count))
        return Channel(name)

    def talk(index, channels):
        process.index = index
        return [
            one.combined(index + i, lambda values: {len(values): tuple(values)})
            for one in channels
            for i in range(rounds)
        ]

    ends = [[opened(name) for name in ("first", "second")] for _ in range(count)]
    with concurrent.futures.ThreadPoolExecutor(count) as pool:
        heard = list(pool.map(talk, range(count), ends))
    assert heard == [2 * [{"3": [i, i + 1, i + 2]} for i in range(rounds)]] * count
    assert len(store.held) == 2  # the last answer of each, which some process may yet read


# process VICTIM dies, and the other one waits for its word in a thread
LOSE = """
import os, signal, sys, threading
import jax
me = int(sys.argv[2])
jax.distributed.initialize(sys.argv[1], 2, me, heartbeat_timeout_seconds=10)
from stepdistill_jax.runtime.channel import Channel
talk = Channel("talk")
talk.combined(me, sum)
if me == int(sys.argv[3]):
    os.kill(os.getpid(), signal.SIGKILL)
thread = threading.Thread(target=lambda: talk.combined(me, sum))
thread.start()
thread.join()
"""


def run(script, count, *argv):
    """Exit codes and errors of a job's processes."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{s.getsockname()[1]}"
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", script, address, str(me), *argv],
            stderr=subprocess.PIPE,
            text=True,
        )
        for me in range(count)
    ]
    errors = [process.communicate(timeout=120)[1] for process in processes]
    return [process.returncode for process in processes], errors


@pytest.mark.slow  # three processes
def test_processes_hear_each_other_in_several_threads_and_one_may_stop_waiting():
    codes, errors = run(TALK, 3)
    assert codes == [0, 0, 0], errors


@pytest.mark.slow  # half a minute, of waiting
@pytest.mark.parametrize("victim", [0, 1])
def test_a_process_that_dies_ends_the_one_that_waits_for_its_word(victim):
    codes, errors = run(LOSE, 2, str(victim))
    assert codes[victim] == -signal.SIGKILL
    assert codes[1 - victim] == -signal.SIGABRT, errors
