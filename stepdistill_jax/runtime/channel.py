"""What the processes of a job tell each other through the store of JAX's coordinator.

No device takes part, so a thread may talk beside the steps.
"""

import collections
import itertools
import json
import time
from collections.abc import Callable
from typing import Any, TypeVar

T = TypeVar("T")
WAIT_SECS = 5.0  # between two looks whether the channel is closed, or Python has a signal
LIMIT_SECS = 3600.0  # others may read hundreds of gigabytes; a lost peer ends us sooner

_opened: dict[str, itertools.count] = collections.defaultdict(itertools.count)


class Closed(RuntimeError):
    """The channel was closed while one of its threads waited for the other processes."""


class Channel:
    """Every process opens its channels of one name in the same order.

    The n-th of one process talks to the n-th of the others. All call `combined` equally often, from
    one thread at a time.
    """

    def __init__(self, name: str):
        """Sends nothing; `name` is of letters."""
        self._name = f"stepdistill/{name}/{next(_opened[name])}"
        self._round, self._closed = 0, False

    def combined(self, value: Any, combine: Callable[[list[Any]], T]) -> T:
        """Returns what process 0 makes of the values of all processes, in all of them.

        Args:
            value: what this process says; JSON.
            combine: from the values, by process, to JSON. It must not fail.

        Raises:
            Closed: by `close`, in another thread.
            TimeoutError: another process, which is alive, has said nothing for an hour.
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
        _store().key_value_delete(f"{folder}/")  # no one else reads what they said
        if self._round > 1:  # whoever has spoken since has read the answer before
            _store().key_value_delete(f"{self._name}/{self._round - 2}/")
        text = json.dumps(combine([value, *map(json.loads, others)]))
        _store().key_value_set(f"{folder}/all", text)
        return json.loads(text)  # what the others get: tuples are lists, keys are texts

    def close(self) -> None:
        """Ends the waiting of another thread within seconds."""
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
                raise TimeoutError(f"no word from another process for {LIMIT_SECS:.0f} s ({key})")
        raise Closed(self._name)


def _store() -> Any:
    from jax._src import distributed  # what Orbax asks, too

    return distributed.global_state.client
