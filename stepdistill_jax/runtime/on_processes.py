"""Runs a function on process 0 or on all processes of a job, and shares its results and errors among them.

All processes must call these functions in the same order. A thread other than the main thread must pass a
channel of its own. If one process fails, all processes raise an error. So all end together, and none waits for
a process that has exited. If there is only one process, nothing is sent.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

from stepdistill_jax.errors import EXIT_STOPPED, InputError
from stepdistill_jax.runtime.channel import Channel
from stepdistill_jax.runtime.fingerprints import digest
from stepdistill_jax.runtime.progress import log, progress
from stepdistill_jax.runtime.signals import agreed

T = TypeVar("T")
MAIN = Channel("main")  # channel of the main thread


class PeerFailed(RuntimeError):
    """Another process failed. The message contains the index of that process and its error."""


def on_all_processes(action: Callable[[], T], channel: Channel = MAIN) -> T:
    """Runs `action` on every process. On each process, returns the result of that process.

    If several processes fail, all processes raise the error of the failed process with the lowest index. The
    message contains this index.

    Raises:
        InputError: a process raised an InputError, so all processes raise it.
        PeerFailed: another process raised an error of another type. The process that failed raises its
            original error.
    """
    result, error = _tried(action)
    _raise_first(_gather(_as_json(error), channel), error)
    return result  # pyright: ignore[reportReturnType]


def gather_from_all(action: Callable[[], T], channel: Channel = MAIN) -> list[T]:
    """Runs `action` on every process. On all processes, returns the list of all results, in process order.

    The results must be JSON values.

    Raises:
        InputError, PeerFailed: as for `on_all_processes`.
    """
    result, error = _tried(action)
    results, errors = zip(*_gather([result, _as_json(error)], channel), strict=True)
    _raise_first(errors, error)
    return list(results)


def on_process_0(action: Callable[[], Any], channel: Channel = MAIN) -> Any:
    """Runs `action` on process 0 only. On all processes, returns the result, which must be a JSON value.

    Raises:
        InputError, PeerFailed: as for `on_all_processes`.
    """
    import jax

    result, error = _tried(action) if jax.process_index() == 0 else (None, None)
    result, failure = _gather([result, _as_json(error)], channel)[0]
    _raise_first([failure], error)
    return result


def require_same(value: Any, what: str) -> None:
    """Raises an InputError on all processes if `value` is not the same on all of them.

    Args:
        value: a JSON value.
        what: what the value describes, for the message, such as "input and model".
    """
    import jax

    if jax.process_count() == 1:
        return
    values = _gather(digest(value))
    others = [i for i, other in enumerate(values) if other != values[0]]
    if others:
        raise InputError(
            f"process {others[0]} has a different {what} than process 0; give all processes the same ones"
        )


@contextlib.contextmanager
def until_stopped(
    total: int, description: str, kept: Callable[[], int] = lambda: 0
) -> Iterator[Callable[[int], None]]:
    """A context for work in batches. It shows progress, and on a SIGTERM stops all processes after the same batch.

    The context yields a function, which the caller must call after each batch with the batch's number of
    rows.

    Args:
        total: number of rows.
        description: text of the progress bar, which process 0 shows.
        kept: function that returns the number of rows saved so far.

    Raises:
        SystemExit: the job has several processes, and one of them has received a SIGTERM. All processes exit
            with status 75.
    """
    import jax

    with contextlib.ExitStack() as stack:
        bar = (
            stack.enter_context(progress(total, description, done=kept()))
            if jax.process_index() == 0
            else None
        )

        def update(rows: int) -> None:
            if bar:
                bar.update(rows)
            if jax.process_count() > 1 and agreed():
                if jax.process_index() == 0:
                    log(f"stopped by a signal: {kept()} rows are saved; start again to continue")
                raise SystemExit(EXIT_STOPPED)

        yield update


def _tried(action: Callable[[], T]) -> tuple[T | None, Exception | None]:
    """Runs `action` and returns (result, None), or (None, error) if it fails.

    If there is only one process, the error is raised, since no other process must be informed.
    """
    import jax

    if jax.process_count() == 1:
        return action(), None
    try:
        return action(), None
    except Exception as error:
        return None, error


def _as_json(error: Exception | None) -> list[Any] | None:
    if error is None:
        return None
    if isinstance(error, InputError):
        return [True, str(error)]
    return [False, f"{type(error).__name__}: {error}"]


def _raise_first(errors: Sequence[Any], own: Exception | None) -> None:
    import jax

    # the first error counts for all processes, so that all continue or unwind in the same way
    for process, error in enumerate(errors):
        if error is not None:
            is_input, message = error
            if process == jax.process_index() and own is not None and not is_input:
                raise own  # it has the traceback
            raise (InputError if is_input else PeerFailed)(f"process {process}: {message}")


def _gather(value: Any, channel: Channel = MAIN) -> list[Any]:
    """Returns a list of the JSON values of all processes, in process order."""
    return channel.combined(value, lambda values: values)
