"""Runs each contender in its own process, with the threads, allocator and settings that suit it best.

In one process, libraries share glibc's heap, OpenMP's threads and the environment, so each would be timed
under settings of another.
"""

import contextlib
import multiprocessing
import os
import traceback
from collections.abc import Callable, Mapping
from typing import Any

from stepdistill_jax.errors import InputError

# torch is fastest with these settings (docs/lab/training_speed.md): one heap that keeps large blocks and is
# never returned to the system. OpenMP keeps its default: threads spin briefly between two loops.
TORCH = {
    "GLIBC_TUNABLES": "glibc.malloc.mmap_max=0:glibc.malloc.trim_threshold=4000000000:glibc.malloc.arena_max=1"
}
CLOSE_SECS = 30  # time for a process to end


class Apart:
    """Runs a contender in its own process, which sleeps between its turns.

    The process runs on the same cores as this one, with the given environment, and makes an object that has
    a method `contender`. It ends when the `with` block is left.

        with Apart(Peer, args, environment=TORCH) as peer:
            peer.call("loss")
            timing.alternate({"peer": peer.contender}, rounds=3)
    """

    def __init__(
        self, make: Callable[..., Any], *args: Any, environment: Mapping[str, str] | None = None
    ):
        """Starts the process and waits for the object.

        Args:
            make: function that makes the object; it must be at the top level of a module.
            args: arguments of `make`; they are pickled, like the arguments and results of `call`.
            environment: variables that are added to this process's environment, or replace its own.

        Raises:
            InputError: `make` raised it.
            RuntimeError: `make` failed; its traceback is on standard error.
        """
        self.environment, self._name = dict(environment or {}), make.__name__
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, make, args), daemon=True)
        before = dict(os.environ)
        os.environ.update(self.environment)
        try:
            self._process.start()
        finally:
            os.environ.clear()
            os.environ.update(before)
        theirs.close()
        self._answer()

    def __enter__(self) -> "Apart":
        return self

    def __exit__(self, *_: Any) -> None:
        self._pipe.close()
        self._process.join(CLOSE_SECS)
        self._process.kill()
        self._process.join()

    def call(self, method: str, *args: Any) -> Any:
        """Calls a method of the object and returns its result."""
        with contextlib.suppress(BrokenPipeError):  # the process has ended, which `_answer` reports
            self._pipe.send((method, args))
        return self._answer()

    def contender(self, number: int) -> Callable[[], int]:
        """Calls the object's `contender`, which prepares a round; returns the round's work."""
        self.call("contender", number)
        return lambda: self.call("work")

    def _answer(self) -> Any:
        try:
            result, error = self._pipe.recv()
        except (EOFError, ConnectionResetError):
            self._process.join()
            code = self._process.exitcode
            killed = "; -9 often means that memory ran out" if code == -9 else ""
            raise RuntimeError(f"the process of {self._name} ended with {code}{killed}") from None
        if error is not None:
            raise error
        return result


def _serve(pipe: Any, make: Callable[..., Any], args: tuple) -> None:
    """Makes the object and calls its methods until the pipe is closed."""
    try:
        made, work = make(*args), None
        pipe.send((None, None))
        while True:
            method, args = pipe.recv()
            if method == "contender":  # the returned function stays here, and is called as `work`
                result, work = None, made.contender(*args)
            else:
                result = work() if method == "work" else getattr(made, method)(*args)
            pipe.send((result, None))
    except (EOFError, BrokenPipeError):  # the other side is gone
        return
    except InputError as refused:
        pipe.send((None, refused))
    except Exception as failed:
        traceback.print_exc()
        pipe.send((None, RuntimeError(f"{make.__name__}: {failed!r}")))
