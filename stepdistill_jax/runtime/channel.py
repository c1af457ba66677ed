"""Exchanges small values between the processes of a job, through the key-value store of JAX's coordinator.

No device takes part, so a thread may exchange values during training steps.
"""

import collections
import itertools
import json
import time
from collections.abc import Callable
from typing import Any, TypeVar

T = TypeVar("T")
WAIT_SECS = 5.0  # time between two checks whether the channel was closed or a signal has arrived
LIMIT_SECS = 3600.0  # long, since a process may be reading hundreds of gigabytes; JAX notices a lost process sooner

_opened: dict[str, itertools.count] = collections.defaultdict(itertools.count)


class Closed(RuntimeError):
    """The channel was closed while a thread waited for the other processes."""


class Channel:
    """Connects the processes of a job.

    The n-th channel that a process opens under a name is connected to the n-th channel that every other
    process opens under that name.
    """

    def __init__(self, name: str):
        """Opens the channel without sending anything. `name` consists of letters."""
        self._name = f"stepdistill/{name}/{next(_opened[name])}"
        self._round, self._closed = 0, False

    def combined(self, value: Any, combine: Callable[[list[Any]], T]) -> T:
        """Collects one value from each process, and returns `combine([value_0, value_1, ...])` on every process.

        All processes must call this method equally often. In a process, only one thread at a time may call it.

        Args:
            value: JSON value.
            combine: called only on process 0; returns a JSON value and raises no error.

        Raises:
            Closed: another thread has called `close`.
            TimeoutError: a process is alive, but has sent nothing for an hour.
        """
        import jax

        if jax.process_count() == 1:
            return combine([value])
        me, folder = jax.process_index(), f"{self._name}/{self._round}"
        self._round += 1
        if me:
            _store().key_value_set(f"{folder}/{me}", json.dumps(value))
            return json.loads(self._read(f"{folder}/all"))
        others = [self._read(f"{folder}/{i}") for i in range(1, jax.process_count())]
        _store().key_value_delete(f"{folder}/")  # only process 0 reads the values
        # all processes have read the answer of the previous round, since they sent their values of this round
        if self._round > 1:
            _store().key_value_delete(f"{self._name}/{self._round - 2}/")
        text = json.dumps(combine([value, *map(json.loads, others)]))
        _store().key_value_set(f"{folder}/all", text)
        return json.loads(
            text
        )  # as on the other processes: tuples become lists, and keys become strings

    def close(self) -> None:
        """Closes the channel. A thread that waits in `combined` raises `Closed` within seconds."""
        self._closed = True

    def _read(self, key: str) -> str:
        import jax

        limit = time.monotonic() + LIMIT_SECS
        while not self._closed:
            try:
                return _store().blocking_key_value_get(key, int(WAIT_SECS * 1000))
            except jax.errors.JaxRuntimeError as error:
                if "DEADLINE_EXCEEDED" not in str(error):
                    raise
            if time.monotonic() > limit:
                raise TimeoutError(f"another process sent nothing for {LIMIT_SECS:.0f} s ({key})")
        raise Closed(self._name)


def _store() -> Any:
    from jax._src import distributed  # Orbax uses it, too

    return distributed.global_state.client
