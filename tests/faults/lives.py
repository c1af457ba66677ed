"""Forks lives of `stepdistill` commands from a process that has imported all and touched no device.

Reads a line of JSON from standard input for each life: `argv`, `stderr` and `trace` (files to write),
`die` (`{"at": PLACE, "call": N, "after_secs": S}`, or null) and `config` (of `train_alone`, or null). Writes the pid of the life on a line
when it has begun, and its exit code on another one when it has ended; an empty line then lets go of
the pid. Importing takes seconds, a fork does not; what is killed is a process of its own all the same.
"""

import functools
import importlib
import json
import os
import signal
import sys
import threading
import traceback

from jax._src import xla_bridge

from stepdistill_jax.commands.main import main
from stepdistill_jax.runtime.checkpoints.manager import Checkpoints
from stepdistill_jax.tasks import tokenizing
from stepdistill_jax.training import loop, run
from stepdistill_jax.training.validation import Validator

FOR_DATA = ("seqio", "tensorflow_datasets")  # preparing and tokenising


class Trace:
    """Where a life is, kept in a file that a SIGKILL leaves as it is."""

    def __init__(self, path, die):
        self._file, self._die = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC), die or {}
        self._lock, self._active, self.calls = threading.Lock(), ["start-up"], {}
        self._write()

    def _write(self):
        text = json.dumps({"active": self._active, "calls": self.calls})
        os.pwrite(self._file, text.ljust(1000).encode(), 0)

    def enter(self, place):
        with self._lock:
            self._active.append(place)
            self.calls[place] = number = self.calls.get(place, 0) + 1
            self._write()
        if self._die.get("at") == place and self._die["call"] == number:
            if not self._die["after_secs"]:
                os.kill(os.getpid(), signal.SIGKILL)
            threading.Timer(self._die["after_secs"], os.kill, (os.getpid(), signal.SIGKILL)).start()

    def leave(self, place):
        with self._lock:
            self._active.remove(place)
            self._write()

    def around(self, owner, name, place):
        """Wraps a function; a rename is entered once more when it is done."""
        function = getattr(owner, name)

        @functools.wraps(function)
        def traced(*args, **kwargs):
            self.enter(place)
            try:
                result = function(*args, **kwargs)
                if place == "rename":
                    self.enter("renamed")
                    self.leave("renamed")
                return result
            finally:
                self.leave(place)

        setattr(owner, name, traced)


def trace_training(trace):
    """Marks what `train` is doing."""
    for name in ("replace", "rename"):
        trace.around(os, name, "rename")
    trace.around(os, "fsync", "sync")
    trace.around(tokenizing, "write_store", "tokenising")
    trace.around(Checkpoints, "restore", "restore")
    trace.around(Validator, "compute", "evaluation")
    save, seal, make = Checkpoints.save, Checkpoints._seal, loop.jit_train_step

    def saving(*args):
        trace.enter("save")  # until it is sealed, in the background
        save(*args)

    def sealing(*args):
        trace.enter("seal")
        seal(*args)
        trace.leave("seal")
        trace.leave("save")

    def made(*args, **kwargs):
        step = make(*args, **kwargs)

        def traced(*state_and_batch):
            if not trace.calls.get("step"):
                trace.leave("start-up")
            else:
                trace.leave("step")
            trace.enter("step")  # until the next one: the devices are asked, not waited for
            return step(*state_and_batch)

        return traced

    Checkpoints.save, Checkpoints._seal, loop.jit_train_step = saving, sealing, made


def train_alone(config, workdir, data_dir):
    """A run that takes little time: of a program that other tests have compiled, not validated."""
    run.has_split = lambda *_, **__: False
    loop.train(loop.TrainConfig(**config), workdir=workdir, data_dir=data_dir)
    return 0


def live(argv, stderr, trace, die, config):
    """The child's whole life; never returns."""
    code = 99
    try:
        for number in (1, 2):
            os.dup2(os.open(stderr, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
        trace_training(Trace(trace, die))
        code = train_alone(config, *argv) if config else main(argv)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def serve():
    """Order after order, until standard input ends."""
    for line in sys.stdin:
        pid = os.fork()
        if not pid:
            live(**json.loads(line))
        print(pid, flush=True)
        # it stays a zombie while its killer has its pid
        ended = os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
        killed = ended.si_code != os.CLD_EXITED
        print(-ended.si_status if killed else ended.si_status, flush=True)
        sys.stdin.readline()
        os.waitpid(pid, 0)


if __name__ == "__main__":
    # imported only where they are needed; a life finds them there
    for name in ("tensorboardX.record_writer", *(FOR_DATA if "--data" in sys.argv else ())):
        importlib.import_module(name)
    assert not xla_bridge.backends_are_initialized()  # its threads would not be in a fork
    serve()
