"""Work of one process or of all, and what they tell each other; with one process nothing is sent.

Every process must make these calls in the same order, in the main thread or, with a channel of its
own, in another one. An error that only one of them meets is raised in all: they end together, instead
of waiting for one that has left.
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
MAIN = Channel("main")  # of the main thread


class PeerFailed(RuntimeError):
    """Another process failed; the message has its number and its error."""


def on_all_processes(action: Callable[[], T], channel: Channel = MAIN) -> T:
    """`action()` on every process, each with its own result.

    Raises:
        InputError: on all processes, if the first one that failed met one; else what it met (the
            others have a `PeerFailed`). The message names the process.
    """
    result, error = _tried(action)
    _raise_first(_gather(_as_json(error), channel), error)
    return result  # pyright: ignore[reportReturnType]


def gather_from_all(action: Callable[[], T], channel: Channel = MAIN) -> list[T]:
    """`action()` on every process; the result of each, a JSON value, by process, on all.

    Raises:
        InputError, PeerFailed: as `on_all_processes`.
    """
    result, error = _tried(action)
    results, errors = zip(*_gather([result, _as_json(error)], channel), strict=True)
    _raise_first(errors, error)
    return list(results)


def on_process_0(action: Callable[[], Any], channel: Channel = MAIN) -> Any:
    """`action()` on process 0 alone; its result, a JSON value, on all.

    Raises:
        InputError, PeerFailed: as `on_all_processes`.
    """
    import jax

    result, error = _tried(action) if jax.process_index() == 0 else (None, None)
    result, failure = _gather([result, _as_json(error)], channel)[0]
    _raise_first([failure], error)
    return result


def require_same(value: Any, what: str) -> None:
    """Refuses, on all processes, a JSON value that is not the same on each.

    Args:
        value: of this process.
        what: what it tells about, for the message: "input and model".
    """
    import jax

    if jax.process_count() == 1:
        return
    values = _gather(digest(value))
    others = [i for i, other in enumerate(values) if other != values[0]]
    if others:
        raise InputError(
            f"process {others[0]} has another {what} than process 0; give all processes the same files"
        )


@contextlib.contextmanager
def until_stopped(
    total: int, description: str, kept: Callable[[], int] = lambda: 0
) -> Iterator[Callable[[int], None]]:
    """Yields what is called with the rows of each batch: it shows the progress, and leaves after a signal.

    Args:
        total: rows.
        description: of the bar, which process 0 shows.
        kept: how many rows are safe when it is called.

    Raises:
        SystemExit: 75, on all processes after the same batch, once one of them got a SIGTERM.
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
                    log(f"stopped by a signal: {kept()} rows are kept; start again")
                raise SystemExit(EXIT_STOPPED)

        yield update


def _tried(action: Callable[[], T]) -> tuple[T | None, Exception | None]:
    """Returns the result or, where other processes wait to hear of it, the error."""
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

    # one error decides for all, so that all go on or unwind in the same way
    for process, error in enumerate(errors):
        if error is not None:
            is_input, message = error
            if process == jax.process_index() and own is not None and not is_input:
                raise own  # with its traceback
            raise (InputError if is_input else PeerFailed)(f"process {process}: {message}")


def _gather(value: Any, channel: Channel = MAIN) -> list[Any]:
    """The JSON value of each process, by process."""
    return channel.combined(value, lambda values: values)
