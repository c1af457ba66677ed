"""The digests of a step's files; of several processes each reads a share of them.

The files are dealt out by size, whoever wrote them: every process sees all of them, as a restore in
another layout also needs. What one cannot read is left to process 0, which speaks for the step.
"""

import heapq
import pathlib
from collections.abc import Iterable, Mapping

from stepdistill_jax.runtime.channel import Channel
from stepdistill_jax.runtime.fingerprints import crc32, of_each
from stepdistill_jax.runtime.on_processes import of_all_processes
from stepdistill_jax.runtime.stores import StoreError, asked


def digests(step_folder: pathlib.Path, names: Iterable[str]) -> dict[str, str]:
    """Returns the crc32 of files by name; OSError names the first that cannot be read."""
    return of_each(_checksum, step_folder, names)


def digests_by_all(
    step_folder: pathlib.Path, sizes: Mapping[str, int], channel: Channel
) -> dict[str, str]:
    """Returns the crc32 of files by name, on all processes, which read a part each.

    Files that nobody whose part they were could read are left out; with one process all are.

    Args:
        step_folder: of a step.
        sizes: bytes of each file; the same in all processes.
        channel: of the calling thread.
    """
    import jax

    if jax.process_count() == 1:
        return {}
    own = dealt_out(sizes, jax.process_count())[jax.process_index()]
    parts = of_all_processes(lambda: of_each(_checksum_if_seen, step_folder, own), channel)
    return {name: crc for part in parts for name, crc in part.items() if crc}


def dealt_out(sizes: Mapping[str, int], count: int) -> list[list[str]]:
    """Returns `count` lists of names, of about as many bytes each: the largest file comes first.

    `dealt_out({"a": 3, "b": 5, "c": 2, "d": 4}, 2)` is [["b", "c"], ["d", "a"]].
    """
    parts: list[list[str]] = [[] for _ in range(count)]
    least = [(0, number) for number in range(count)]
    for name in sorted(sizes, key=lambda name: (-sizes[name], name)):
        taken, number = least[0]
        parts[number].append(name)
        heapq.heapreplace(least, (taken + sizes[name], number))
    return parts


def _checksum(path: pathlib.Path) -> str:
    with asked(path), path.open("rb") as f:
        return f"{crc32(f):08x}"


def _checksum_if_seen(path: pathlib.Path) -> str:
    """Empty where this host does not see the file (yet)."""
    try:
        return _checksum(path)
    except (OSError, StoreError):
        return ""
