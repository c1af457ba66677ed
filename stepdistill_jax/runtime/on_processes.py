"""Runs work on one process or on all, and shares results and errors; a single process sends nothing.

All processes must make these calls in the same order: in the main thread, or in another thread with its
own channel. An error of one process is raised in all, so they end together instead of waiting for a
process that has exited.
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
    """Another process failed; the message has its number and its error."""


def on_all_processes(action: Callable[[], T], channel: Channel = MAIN) -> T:
    """Runs `action` on every process; each returns its own result.

    Raises:
        InputError: a process raised an InputError; all processes raise it.
        PeerFailed: another process raised any other error; that process itself raises the original.

    If several processes fail, the error of the lowest-numbered one counts. The message names it.
    """
    result, error = _tried(action)
    _raise_first(_gather(_as_json(error), channel), error)
    return result  # pyright: ignore[reportReturnType]


def gather_from_all(action: Callable[[], T], channel: Channel = MAIN) -> list[T]:
    """Runs `action` on every process; returns all results (JSON), ordered by process, on every process.

    Raises:
        InputError, PeerFailed: as for `on_all_processes`.
    """
    result, error = _tried(action)
    results, errors = zip(*_gather([result, _as_json(error)], channel), strict=True)
    _raise_first(errors, error)
    return list(results)


def on_process_0(action: Callable[[], Any], channel: Channel = MAIN) -> Any:
    """Runs `action` on process 0 only; returns its result (JSON) on all processes.

    Raises:
        InputError, PeerFailed: as for `on_all_processes`.
    """
    import jax

    result, error = _tried(action) if jax.process_index() == 0 else (None, None)
    result, failure = _gather([result, _as_json(error)], channel)[0]
    _raise_first([failure], error)
    return result


def require_same(value: Any, what: str) -> None:
    """Raises an InputError on all processes if a JSON value differs between them.

    Args:
        value: this process's value.
        what: source of the value, for the message: "input and model".
    """
    import jax

    if jax.process_count() == 1:
        return
    values = _gather(digest(value))
    others = [i for i, other in enumerate(values) if other != values[0]]
    if others:
        raise InputError(
            f"process {others[0]} has a different {what} than process 0; give all processes the same files"
        )


@contextlib.contextmanager
def until_stopped(
    total: int, description: str, kept: Callable[[], int] = lambda: 0
) -> Iterator[Callable[[int], None]]:
    """Yields a function to call with each batch's number of rows: it shows progress and obeys signals.

    Args:
        total: number of rows.
        description: text of the progress bar, which process 0 shows.
        kept: function that returns the number of rows saved so far.

    Raises:
        SystemExit: with status 75, on all processes after the same batch, once one of them has
            received a SIGTERM.
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
    """Returns (result, None), or (None, error) if other processes must be notified of the error."""
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
    """Returns the JSON values of all processes, ordered by process."""
    return channel.combined(value, lambda values: values)
