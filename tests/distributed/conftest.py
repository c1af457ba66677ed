"""Starts the processes of a job on this machine, over gloo; none outlives its module."""

import json
import os
import pathlib
import socket
import subprocess
import sys

import pytest

# joins, runs the file and leaves: an error must not wait at the exit barrier for its peers
DRIVER = """
import os, runpy, sys, traceback
path, address, count, me = sys.argv[1:5]
import jax
if int(count) > 1:
    jax.config.update("jax_enable_compilation_cache", False)  # as `stepdistill_jax.runtime.distributed.join`
    jax.distributed.initialize(address, int(count), int(me), heartbeat_timeout_seconds=30)
code, sys.argv = 0, [path, *sys.argv[5:]]
try:
    assert jax.process_count() == int(count)
    runpy.run_path(path, run_name="__main__")
except SystemExit as stop:
    code = stop.code
except BaseException:
    traceback.print_exc()
    sys.stderr.flush()
    os._exit(1)
if int(count) > 1:
    jax.distributed.shutdown()
os._exit(code)
"""


class Job:
    """`count` processes of `devices` virtual CPU devices each, that run a file of this folder."""

    def __init__(self, script, specification, *, count, devices=1):
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            address = f"127.0.0.1:{s.getsockname()[1]}"
        # compiles in 60% of the time; what is compared is compiled in the same way
        flags = (
            f"--xla_force_host_platform_device_count={devices} --xla_backend_optimization_level=0"
        )
        self.processes = [
            subprocess.Popen(
                [
                    *(sys.executable, "-c", DRIVER, str(pathlib.Path(__file__).with_name(script))),
                    *(address, str(count), str(process), json.dumps(specification)),
                ],
                stderr=subprocess.PIPE,
                text=True,
                env=os.environ | {"XLA_FLAGS": flags},
            )
            for process in range(count)
        ]

    def finish(self):
        """(exit codes, standard errors one after the other: last that of the one that failed first)."""
        errors = [p.communicate(timeout=280)[1] for p in self.processes]
        codes = [p.returncode for p in self.processes]
        # a process that lost its peer is ended by a signal
        return codes, "\n".join(sorted(errors, key=lambda text: codes[errors.index(text)]))


@pytest.fixture(scope="module")
def start():
    """`Job`, which is killed at the end of the module if it still runs."""
    jobs = []

    def started(*args, **kwargs):
        jobs.append(Job(*args, **kwargs))
        return jobs[-1]

    yield started
    for job in jobs:
        for process in job.processes:
            process.kill()
            process.wait()
