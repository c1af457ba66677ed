"""Computes digests of a step's files. All processes share the work.

The files are divided so that each process reads about the same number of bytes. If a process cannot read one of
its files, process 0 reads that file later.
"""

import heapq
import pathlib
from collections.abc import Iterable, Mapping

from stepdistill_jax.runtime.channel import Channel
from stepdistill_jax.runtime.fingerprints import crc32, digest_each
from stepdistill_jax.runtime.on_processes import gather_from_all
from stepdistill_jax.runtime.stores import StoreError, store_errors


def digests(step_folder: pathlib.Path, names: Iterable[str]) -> dict[str, str]:
    """Returns {name of a file: its crc32}. Raises an OSError that names the unreadable file."""
    return {name: crc for name, (crc, _) in digest_each(_checksum, step_folder, names).items()}


def digests_by_all(
    step_folder: pathlib.Path, sizes: Mapping[str, int], channel: Channel
) -> dict[str, str]:
    """Returns {name of a file: its crc32} on all processes. All processes must call this function.

    Each file is read by one process, and left out of the result if this process cannot read it in full. In a job
    of a single process, no file is read and the result is {}.

    Args:
        sizes: {name of a file: bytes}, the same on all processes.
        channel: the channel of the calling thread.
    """
    import jax

    if jax.process_count() == 1:
        return {}
    own = balanced_shares(sizes, jax.process_count())[jax.process_index()]
    parts = gather_from_all(lambda: digest_each(_checksum_if_seen, step_folder, own), channel)
    # a host's view of a shared file system may lag: it may see only the beginning of a file
    return {
        name: crc for part in parts for name, (crc, size) in part.items() if size == sizes[name]
    }


def balanced_shares(sizes: Mapping[str, int], count: int) -> list[list[str]]:
    """Divides file names into `count` lists of about equal total size.

    `balanced_shares({"a": 3, "b": 5, "c": 2, "d": 4}, 2)` is [["b", "c"], ["d", "a"]].
    """
    parts: list[list[str]] = [[] for _ in range(count)]
    # The largest file comes first, and each goes to the list with the fewest bytes so far.
    # A heap of (bytes so far, index of the list). Ties go to the lower index, and names are sorted, so that
    # every process computes the same lists.
    least = [(0, number) for number in range(count)]
    for name in sorted(sizes, key=lambda name: (-sizes[name], name)):
        taken, number = least[0]
        parts[number].append(name)
        heapq.heapreplace(least, (taken + sizes[name], number))
    return parts


def _checksum(path: pathlib.Path) -> tuple[str, int]:
    """Returns the crc32 and the size in bytes of a file."""
    with store_errors(path), path.open("rb") as f:
        return f"{crc32(f):08x}", f.tell()


def _checksum_if_seen(path: pathlib.Path) -> tuple[str, int]:
    """Returns the result of `_checksum`, or ("", -1) if this host cannot read the file."""
    try:
        return _checksum(path)
    except (OSError, StoreError):
        return "", -1
