"""Work of one process or of all, and what they tell each other; with one process nothing is sent.

Every process must make these calls in the same order. An error that only one of them meets is raised
in all: they end together, instead of waiting for one that has left.
"""

import contextlib
import json
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

from stepdistill_jax.errors import EXIT_STOPPED, InputError
from stepdistill_jax.runtime.fingerprints import digest
from stepdistill_jax.runtime.progress import log, progress
from stepdistill_jax.runtime.signals import agreed

T = TypeVar("T")
_BLOCK = 1024  # bytes; messages are filled up to few sizes, so few programs compile


class PeerFailed(RuntimeError):
    """Another process failed; the message has its number and its error."""


def on_all_processes(action: Callable[[], T]) -> T:
    """`action()` on every process, each with its own result.

    Raises:
        InputError: on all processes, if the first one that failed met one; else what it met (the
            others have a `PeerFailed`). The message names the process.
    """
    import jax

    if jax.process_count() == 1:
        return action()
    result, error = None, None
    try:
        result = action()
    except Exception as e:
        error = e
    _raise_first(_gather(_as_json(error)), error)
    return result  # pyright: ignore[reportReturnType]


def on_process_0(action: Callable[[], Any]) -> Any:
    """`action()` on process 0 alone; its result, a JSON value, on all.

    Raises:
        InputError, PeerFailed: as `on_all_processes`.
    """
    import jax

    if jax.process_count() == 1:
        return action()
    result, error = None, None
    if jax.process_index() == 0:
        try:
            result = action()
        except Exception as e:
            error = e
    result, failure = _gather([result, _as_json(error)])[0]
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


def _as_json(error: Exception | None) -> list[Any] | None:
    if error is None:
        return None
    if isinstance(error, InputError):
        return [True, str(error)]
    return [False, f"{type(error).__name__}: {error}"]


def _raise_first(errors: list[Any], own: Exception | None) -> None:
    import jax

    # one error decides for all, so that all go on or unwind in the same way
    for process, error in enumerate(errors):
        if error is not None:
            is_input, message = error
            if process == jax.process_index() and own is not None and not is_input:
                raise own  # with its traceback
            raise (InputError if is_input else PeerFailed)(f"process {process}: {message}")


def _gather(value: Any) -> list[Any]:
    """The JSON value of each process, by process."""
    import numpy as np
    from jax.experimental import multihost_utils

    text = np.frombuffer(json.dumps(value).encode(), np.uint8)
    sizes = multihost_utils.process_allgather(np.int32(text.size))
    padded = np.zeros(-(-int(sizes.max()) // _BLOCK) * _BLOCK, np.uint8)
    padded[: text.size] = text
    texts = multihost_utils.process_allgather(padded)
    return [json.loads(t[:n].tobytes()) for t, n in zip(texts, sizes, strict=True)]
