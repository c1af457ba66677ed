"""The one way in which commands stop, in real processes; each command: test_stops, test_serve_command, ..."""

import signal
import subprocess
import sys

import pytest

# `how` the first signal is taken, and `where` it comes: in Python, or in C, where no handler runs
CHILD = """
import hashlib, signal, sys, threading, time
from stepdistill_jax.runtime.signals import StopSignals, leave
how, where = sys.argv[1:]
def ends(name):
    leave(name, "stopped between two runs")
def works(stop):
    ready = lambda: print("ready", flush=True)
    if where == "in Python":
        ready()
    else:
        threading.Timer(0.5, ready).start()  # by then the main thread is in C
        hashlib.pbkdf2_hmac("sha256", b"a minute", b"of C", 100_000_000)
    while not stop.agreed():
        time.sleep(0.01)
    print("the step ended", flush=True)
codes = {signal.SIGTERM: 75, signal.SIGINT: 130}
if how == "nested":
    with StopSignals(ends) as outer:
        with StopSignals(None) as inner:
            pass
        works(outer)
else:
    act, limit = {"ends": (ends, 0), "noted": (None, 0), "limited": (ends, 0.3)}[how]
    with StopSignals(act, codes=codes, limit_secs=limit) as stop:
        works(stop)
"""
TERM, INT = signal.SIGTERM, signal.SIGINT
ENDS = "stopped between two runs; start again"


@pytest.mark.parametrize(
    ("how", "where", "signals", "code", "said"),
    [
        ("ends", "in Python", [TERM], 75, f"SIGTERM: {ENDS}"),
        ("noted", "in Python", [INT], 0, ""),
        ("nested", "in Python", [TERM], 75, f"SIGTERM: {ENDS}"),
        ("limited", "in C", [TERM], 75, "s after the signal, without a save"),
        ("limited", "in C", [INT], 130, "s after the signal, without a save"),
        ("noted", "in C", [TERM, INT], 128, ": second signal"),
        ("ends", "in C", [INT, TERM], 128, ": second signal"),
    ],
)
def test_the_first_signal_stops_the_work_and_a_second_one_the_process(
    how, where, signals, code, said
):
    command = [sys.executable, "-c", CHILD, how, where]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, text=True, **pipes) as child:
        assert child.stdout.readline() == "ready\n"
        for number in signals:
            child.send_signal(number)
        printed, errors = child.communicate(timeout=60)
    if code == 128:  # either of the two may be delivered first
        assert child.returncode - code in signals, errors
    else:
        assert child.returncode == code, errors
    assert said in errors
    assert printed == ("the step ended\n" if code == 0 else "")
