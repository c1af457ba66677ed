"""Runs a function on process 0 or on all processes of a job, and shares results and errors.

All processes must call these functions in the same order. Each thread other than the main thread must pass a
`Channel` of its own. If one process fails, all raise an error.
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
    """Another process failed. The message contains its index and its error."""


def on_all_processes(action: Callable[[], T], channel: Channel = MAIN) -> T:
    """Runs `action` on every process, and returns each process's own result.

    If `action` fails on any process, every process raises an error. If it fails on several, the error of the process
    with the lowest index counts.

    Raises:
        InputError: `action` raised an InputError. The message names the failed process.
        PeerFailed: `action` raised an error of another type. The failed process itself raises the original error.
    """
    result, error = _tried(action)
    _raise_first(_gather(_as_json(error), channel), error)
    return result  # pyright: ignore[reportReturnType]


def gather_from_all(action: Callable[[], T], channel: Channel = MAIN) -> list[T]:
    """Runs `action` on every process, and returns all results in process order on every process.

    The results must be JSON values.

    Raises:
        InputError, PeerFailed: as for `on_all_processes`.
    """
    result, error = _tried(action)
    results, errors = zip(*_gather([result, _as_json(error)], channel), strict=True)
    _raise_first(errors, error)
    return list(results)


def on_process_0(action: Callable[[], Any], channel: Channel = MAIN) -> Any:
    """Runs `action` on process 0, and returns its result, a JSON value, on all processes.

    Raises:
        InputError, PeerFailed: as for `on_all_processes`.
    """
    import jax

    result, error = _tried(action) if jax.process_index() == 0 else (None, None)
    result, failure = _gather([result, _as_json(error)], channel)[0]
    _raise_first([failure], error)
    return result


def require_same(value: Any, what: str) -> None:
    """Raises an InputError on all processes if `value` differs between them.

    Args:
        value: a JSON value.
        what: name of the value for the message, such as "input or model".
    """
    import jax

    if jax.process_count() == 1:
        return
    values = _gather(digest(value))
    others = [i for i, other in enumerate(values) if other != values[0]]
    if others:
        raise InputError(
            f"process {others[0]} has a different {what} than process 0; start all processes with the same"
            " arguments and files"
        )


@contextlib.contextmanager
def until_stopped(
    total: int, description: str, kept: Callable[[], int] = lambda: 0
) -> Iterator[Callable[[int], None]]:
    """Shows the progress of work in batches, and stops all processes after the same batch on a SIGTERM.

    Yields a function. All processes must call it after each batch, with the number of rows in the batch.

    Args:
        description: text of the progress bar.
        kept: returns the number of saved rows.

    Raises:
        SystemExit: the job has several processes, and one has received a SIGTERM. All exit with status 75.
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
    """Runs `action`, and returns (result, None) or (None, error).

    If the job has only one process, the error is raised instead.
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
    """Returns the JSON values of all processes, in process order."""
    return channel.combined(value, lambda values: values)
