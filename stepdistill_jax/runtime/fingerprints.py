"""The digests of files, folders, values and texts. Users' files hold them: no value may change."""

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
    """Hex digest of bytes, or of a text's UTF-8."""
    return hashlib.sha256(data.encode() if isinstance(data, str) else data).hexdigest()


def digest(value: Any) -> str:
    """Hex digest of a JSON-like value; the order of keys does not matter."""
    return sha256_of(json.dumps(value, sort_keys=True, ensure_ascii=False))


def sha256(path: os.PathLike | str) -> str:
    """Hex digest of a file's bytes."""
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def digest_each(
    of_file: Callable[[pathlib.Path], T], folder: pathlib.Path, names: Iterable[str]
) -> dict[str, T]:
    """A digest of a folder's files by name; several are read at once."""
    names = list(names)
    with concurrent.futures.ThreadPoolExecutor(_READERS) as pool:
        found = pool.map(lambda name: of_file(folder / name), names)
        return dict(zip(names, found, strict=True))


def sha256_of_rows(rows: Iterable[bytes]) -> dict[str, Any]:
    """Returns `rows`, their number, and `sha256`, the hex digest of all of them in a row."""
    count, state = 0, hashlib.sha256()
    for row in rows:
        state.update(row)
        count += 1
    return {"rows": count, "sha256": state.hexdigest()}


def sampled_digest(folder: pathlib.Path) -> str:
    """Hex digest of the names and sizes of all files below a folder, and of pieces spread over each.

    Reads at most 4 MiB of a file: it tells two trainings of a model apart without reading either.
    What does not count: a README.md, and what lies hidden (downloads leave their dates there).
    """
    found = []
    for path in sorted(p for p in folder.rglob("*") if p.is_file() and p.name != "README.md"):
        name = path.relative_to(folder)
        if any(part.startswith(".") for part in name.parts):
            continue
        found.append([name.as_posix(), path.stat().st_size, sampled_sha256(path)])
    return digest(found)


def sampled_sha256(path: pathlib.Path) -> str:
    """Hex digest of pieces spread evenly over a file: 4 MiB of a larger one, all of a smaller one."""
    size, pieces = path.stat().st_size, hashlib.sha256()
    with open(path, "rb") as f:
        for start in range(0, size, max(4096, -(-size // 1024))):
            f.seek(start)
            pieces.update(f.read(4096))
    return pieces.hexdigest()


def hash64(text: str) -> int:
    """A hash of 64 bits, the same in every process; of a million texts two share one in 3e7 cases."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


def crc32(file: IO[bytes], size: int = sys.maxsize) -> int:
    """Checksum of the first `size` bytes of an open file: it sees every flip of up to 32 bits in a row."""
    crc = 0
    while block := file.read(min(size, _BLOCK)):
        crc, size = zlib.crc32(block, crc), size - len(block)
    return crc
