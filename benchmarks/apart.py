"""Contenders in processes of their own: each with the threads, the allocator and the settings it likes best.

In one process libraries share glibc's heap, OpenMP's threads and the environment, so one of them is
timed under what another needs.
"""

import contextlib
import multiprocessing
import os
import traceback
from collections.abc import Callable, Mapping
from typing import Any

from stepdistill_jax.errors import InputError

# torch does most steps with this (docs/lab/training_speed.md): one heap, which keeps large blocks and is never given
# back. OpenMP keeps its default: threads spin briefly between two loops
TORCH = {
    "GLIBC_TUNABLES": "glibc.malloc.mmap_max=0:glibc.malloc.trim_threshold=4000000000:glibc.malloc.arena_max=1"
}
CLOSE_SECS = 30  # in which a process that is asked to end does so


class Apart:
    """A contender in a process of its own, which sleeps out of its turn.

    The process is started with the environment that it is given, on the cores of this one, and makes an
    object that has a method `contender`; leaving the `with` block ends it.

        with Apart(Peer, args, environment=TORCH) as peer:
            peer.call("loss")
            timing.alternate({"peer": peer.contender}, rounds=3)
    """

    def __init__(
        self, make: Callable[..., Any], *args: Any, environment: Mapping[str, str] | None = None
    ):
        """Returns once the object is made.

        Args:
            make: makes the object, of a module's top level.
            args: of it; they are pickled, as are the arguments and results of `call`.
            environment: variables that are added to this process's, or replace them.

        Raises:
            InputError: as `make`.
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
        with contextlib.suppress(BrokenPipeError):  # it has ended: so says its answer
            self._pipe.send((method, args))
        return self._answer()

    def contender(self, number: int) -> Callable[[], int]:
        """The object's own, for `timing.alternate`: prepares a round, and returns its work."""
        self.call("contender", number)
        return lambda: self.call("work")

    def _answer(self) -> Any:
        try:
            result, error = self._pipe.recv()
        except (EOFError, ConnectionResetError):
            self._process.join()
            code = self._process.exitcode
            killed = "; -9 is often the kernel's, short of memory" if code == -9 else ""
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
            if method == "contender":  # its work stays here and is called by that name
                result, work = None, made.contender(*args)
            else:
                result = work() if method == "work" else getattr(made, method)(*args)
            pipe.send((result, None))
    except (EOFError, BrokenPipeError):  # nobody listens any more
        return
    except InputError as refused:
        pipe.send((None, refused))
    except Exception as failed:
        traceback.print_exc()
        pipe.send((None, RuntimeError(f"{make.__name__}: {failed!r}")))
