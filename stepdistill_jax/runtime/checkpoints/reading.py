"""Computes digests of a step's files; with several processes, each process reads a share of them.

Files are divided by size, no matter which process wrote them: every process must see all files anyway,
to restore in another layout. Process 0 reads the files that their assigned process cannot read.
"""

import heapq
import pathlib
from collections.abc import Iterable, Mapping

from stepdistill_jax.runtime.channel import Channel
from stepdistill_jax.runtime.fingerprints import crc32, digest_each
from stepdistill_jax.runtime.on_processes import gather_from_all
from stepdistill_jax.runtime.stores import StoreError, store_errors


def digests(step_folder: pathlib.Path, names: Iterable[str]) -> dict[str, str]:
    """Returns the crc32 of each file by name; an OSError names the first unreadable file."""
    return {name: crc for name, (crc, _) in digest_each(_checksum, step_folder, names).items()}


def digests_by_all(
    step_folder: pathlib.Path, sizes: Mapping[str, int], channel: Channel
) -> dict[str, str]:
    """Returns, on all processes, the crc32 of each file by name; each process reads a share of the files.

    A file that its process could not read to the end is left out. With one process, all are left out.

    Args:
        step_folder: folder of a step.
        sizes: bytes of each file; the same in all processes.
        channel: channel of the calling thread.
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
    """Divides files into `count` lists of about equal size in bytes; the largest file is assigned first.

    `balanced_shares({"a": 3, "b": 5, "c": 2, "d": 4}, 2)` is [["b", "c"], ["d", "a"]].
    """
    parts: list[list[str]] = [[] for _ in range(count)]
    # A heap of (bytes so far, list number): each file goes to the list with the fewest bytes. Ties go
    # to the lower number and names are sorted, so that every process computes the same lists.
    least = [(0, number) for number in range(count)]
    for name in sorted(sizes, key=lambda name: (-sizes[name], name)):
        taken, number = least[0]
        parts[number].append(name)
        heapq.heapreplace(least, (taken + sizes[name], number))
    return parts


def _checksum(path: pathlib.Path) -> tuple[str, int]:
    """Returns the crc32 of a file, and its size in bytes."""
    with store_errors(path), path.open("rb") as f:
        return f"{crc32(f):08x}", f.tell()


def _checksum_if_seen(path: pathlib.Path) -> tuple[str, int]:
    """Returns `_checksum`, or a size of -1 if this host does not see the file (yet)."""
    try:
        return _checksum(path)
    except (OSError, StoreError):
        return "", -1
