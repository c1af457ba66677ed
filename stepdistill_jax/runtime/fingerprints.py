"""Computes digests of files, folders, values and strings.

Users' files contain these digests, so all versions must compute the same digest for the same input.
"""

import concurrent.futures
import hashlib
import json
import os
import pathlib
import sys
import zlib
from collections.abc import Callable, Iterable
from typing import IO, Any, TypeVar

T = TypeVar("T")
_BLOCK, _READERS = 1 << 20, 4


def sha256_of(data: bytes | str) -> str:
    """Returns the SHA-256 hex digest of bytes, or of a string in UTF-8."""
    return hashlib.sha256(data.encode() if isinstance(data, str) else data).hexdigest()


def digest(value: Any) -> str:
    """Returns the hex digest of a JSON-like value. The order of a dict's keys does not matter."""
    return sha256_of(json.dumps(value, sort_keys=True, ensure_ascii=False))


def sha256(path: os.PathLike | str) -> str:
    """Returns the SHA-256 hex digest of a file."""
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def digest_each(
    of_file: Callable[[pathlib.Path], T], folder: pathlib.Path, names: Iterable[str]
) -> dict[str, T]:
    """Returns {name: `of_file(folder / name)`}, and reads several files at once."""
    names = list(names)
    with concurrent.futures.ThreadPoolExecutor(_READERS) as pool:
        found = pool.map(lambda name: of_file(folder / name), names)
        return dict(zip(names, found, strict=True))


def sha256_of_rows(rows: Iterable[bytes]) -> dict[str, Any]:
    """Returns {"rows": count of rows, "sha256": hex digest of the concatenated rows}."""
    count, state = 0, hashlib.sha256()
    for row in rows:
        state.update(row)
        count += 1
    return {"rows": count, "sha256": state.hexdigest()}


def sampled_digest(folder: pathlib.Path) -> str:
    """Returns a hex digest of all files below a folder: names, sizes, and at most 4 MiB of each file.

    README.md and hidden files are ignored, since downloads store dates in hidden files.
    """
    found = []
    for path in sorted(p for p in folder.rglob("*") if p.is_file() and p.name != "README.md"):
        name = path.relative_to(folder)
        if any(part.startswith(".") for part in name.parts):
            continue
        found.append([name.as_posix(), path.stat().st_size, sampled_sha256(path)])
    return digest(found)


def sampled_sha256(path: pathlib.Path) -> str:
    """Returns a hex digest of a file. Reads at most 4 MiB, in evenly spread pieces."""
    size, pieces = path.stat().st_size, hashlib.sha256()
    # 4 KiB at each start; the stride ceil(size / 1024) gives at most 1024 starts
    with open(path, "rb") as f:
        for start in range(0, size, max(4096, -(-size // 1024))):
            f.seek(start)
            pieces.update(f.read(4096))
    return pieces.hexdigest()


def hash64(text: str) -> int:
    """Returns a 64-bit hash of a string, the same in every process.

    Among a million strings, the probability of a collision is 3e-8.
    """
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


def crc32(file: IO[bytes], size: int = sys.maxsize) -> int:
    """Returns the CRC-32 of the first `size` bytes of an open file.

    A CRC-32 detects every error within 32 adjacent bits.
    """
    crc = 0
    while block := file.read(min(size, _BLOCK)):
        crc, size = zlib.crc32(block, crc), size - len(block)
    return crc
