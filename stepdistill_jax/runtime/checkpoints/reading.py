"""The digests of a step's files; of several processes each reads a share of them.

The files are dealt out by size, whoever wrote them: every process sees all of them, as a restore in
another layout also needs. What one cannot read is left to process 0, which speaks for the step.
"""

import heapq
import pathlib
from collections.abc import Iterable, Mapping

from stepdistill_jax.runtime.channel import Channel
from stepdistill_jax.runtime.fingerprints import crc32, digest_each
from stepdistill_jax.runtime.on_processes import gather_from_all
from stepdistill_jax.runtime.stores import StoreError, store_errors


def digests(step_folder: pathlib.Path, names: Iterable[str]) -> dict[str, str]:
    """Returns the crc32 of files by name; OSError names the first that cannot be read."""
    return {name: crc for name, (crc, _) in digest_each(_checksum, step_folder, names).items()}


def digests_by_all(
    step_folder: pathlib.Path, sizes: Mapping[str, int], channel: Channel
) -> dict[str, str]:
    """Returns the crc32 of files by name, on all processes, which read a part each.

    Left out are files that the process whose part they were could not read, or not to their end; with
    one process all are.

    Args:
        step_folder: of a step.
        sizes: bytes of each file; the same in all processes.
        channel: of the calling thread.
    """
    import jax

    if jax.process_count() == 1:
        return {}
    own = balanced_shares(sizes, jax.process_count())[jax.process_index()]
    parts = gather_from_all(lambda: digest_each(_checksum_if_seen, step_folder, own), channel)
    # a host's view of a shared file system may lag: what it sees of a file may be its beginning
    return {
        name: crc for part in parts for name, (crc, size) in part.items() if size == sizes[name]
    }


def balanced_shares(sizes: Mapping[str, int], count: int) -> list[list[str]]:
    """Returns `count` lists of names, of about as many bytes each: the largest file comes first.

    `balanced_shares({"a": 3, "b": 5, "c": 2, "d": 4}, 2)` is [["b", "c"], ["d", "a"]].
    """
    parts: list[list[str]] = [[] for _ in range(count)]
    least = [(0, number) for number in range(count)]
    for name in sorted(sizes, key=lambda name: (-sizes[name], name)):
        taken, number = least[0]
        parts[number].append(name)
        heapq.heapreplace(least, (taken + sizes[name], number))
    return parts


def _checksum(path: pathlib.Path) -> tuple[str, int]:
    """The crc32 of a file's bytes, and their number."""
    with store_errors(path), path.open("rb") as f:
        return f"{crc32(f):08x}", f.tell()


def _checksum_if_seen(path: pathlib.Path) -> tuple[str, int]:
    """As `_checksum`; the number is -1 where this host does not see the file (yet)."""
    try:
        return _checksum(path)
    except (OSError, StoreError):
        return "", -1
