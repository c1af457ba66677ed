"""A msgpack file that Flax wrote, walked without reading its arrays.

`flax.serialization.msgpack_restore` wants the whole file as bytes and copies each array out of them.
Here an array is a view of the mapped file. The layout is flax/serialization.py's: extension type 1 (and 3, a
scalar) holds a msgpack of (shape, dtype name, bytes); an array above 1 GiB is a map with
`__msgpack_chunked_array__`, its shape, and its flat chunks.
"""

import math
import os
import struct
from typing import Any

import ml_dtypes
import numpy as np

from stepdistill_jax.errors import InputError
from stepdistill_jax.formats.tensors import map_file

_CHUNKED = "__msgpack_chunked_array__"
_DEEPEST, _MOST = 32, 1_000_000  # a T5X state with an optimizer: 10 deep, 20,000 values
_NAMES = [
    "float16",
    "float32",
    "float64",
    "bool",
    "int8",
    "int16",
    "int32",
    "int64",
    "uint8",
    "uint16",
    "uint32",
    "uint64",
]
_DTYPES = {name: np.dtype(name) for name in _NAMES} | {"bfloat16": np.dtype(ml_dtypes.bfloat16)}
# first byte -> struct of the number that follows
_NUMBERS = dict(
    zip(
        range(0xCA, 0xD4),
        (">f", ">d", *[">B", ">H", ">I", ">Q", ">b", ">h", ">i", ">q"]),
        strict=True,
    )
)
# first byte -> kind, struct of the length
_LENGTHS = {
    **{0xC4 + i: ("bin", code) for i, code in enumerate((">B", ">H", ">I"))},
    **{0xC7 + i: ("ext", code) for i, code in enumerate((">B", ">H", ">I"))},
    **{0xD9 + i: ("str", code) for i, code in enumerate((">B", ">H", ">I"))},
    **{0xDC + i: ("array", code) for i, code in enumerate((">H", ">I"))},
    **{0xDE + i: ("map", code) for i, code in enumerate((">H", ">I"))},
}


def read_tree(path: os.PathLike | str) -> dict[str, Any]:
    """The nested maps of a file; arrays are numpy views of it, or `ChunkedArray`.

    Raises:
        InputError: a file that is cut, or is not what Flax writes; one line with its name.
    """
    walker = _Walker(memoryview(map_file(path)))
    try:
        tree = walker.value(0)
        if walker.at != len(walker.data):
            raise _BrokenError(f"{len(walker.data) - walker.at} bytes too many at the end")
        if not isinstance(tree, dict):
            raise _BrokenError("a map is wanted")
    except _BrokenError as error:
        raise InputError(f"{path}: not a whole msgpack file of Flax ({error})") from None
    return tree


class _BrokenError(Exception):
    pass


class _Walker:
    def __init__(self, data: memoryview):
        self.data, self.at, self.count = data, 0, 0

    def take(self, size: int) -> memoryview:
        if size > len(self.data) - self.at:
            raise _BrokenError(
                f"{size} bytes are wanted at {self.at}, the file has {len(self.data)}"
            )
        self.at += size
        return self.data[self.at - size : self.at]

    def number(self, code: str) -> Any:
        return struct.unpack(code, self.take(struct.calcsize(code)))[0]

    def value(self, depth: int) -> Any:
        self.count += 1
        if depth > _DEEPEST or self.count > _MOST:
            raise _BrokenError(f"more than {_DEEPEST} levels or {_MOST} values at byte {self.at}")
        first = self.number(">B")
        if first <= 0x7F:
            return first
        if first >= 0xE0:
            return first - 0x100
        if first in (0xC0, 0xC2, 0xC3):
            return {0xC0: None, 0xC2: False, 0xC3: True}[first]
        if first in _NUMBERS:
            return self.number(_NUMBERS[first])
        if first <= 0x8F:
            kind, size = "map", first & 0x0F
        elif first <= 0x9F:
            kind, size = "array", first & 0x0F
        elif first <= 0xBF:
            kind, size = "str", first & 0x1F
        elif 0xD4 <= first <= 0xD8:
            kind, size = "ext", 1 << (first - 0xD4)
        elif first in _LENGTHS:
            kind, code = _LENGTHS[first]
            size = self.number(code)
        else:
            raise _BrokenError(f"byte {first:#x} at {self.at - 1}")
        return getattr(self, kind)(size, depth)

    def bin(self, size: int, depth: int) -> memoryview:
        return self.take(size)

    def str(self, size: int, depth: int) -> str:
        try:
            return bytes(self.take(size)).decode()
        except UnicodeDecodeError:
            raise _BrokenError(f"a text that is not UTF-8 before byte {self.at}") from None

    def array(self, size: int, depth: int) -> list:
        return [self.value(depth + 1) for _ in range(size)]

    def map(self, size: int, depth: int) -> Any:
        items: dict[str, Any] = {}
        for _ in range(size):
            key = self.value(depth + 1)
            if not isinstance(key, str) or key in items:
                raise _BrokenError(f"a key that is no text, or twice there, before byte {self.at}")
            items[key] = self.value(depth + 1)
        return ChunkedArray(items) if _CHUNKED in items else items

    def ext(self, size: int, depth: int) -> Any:
        kind = self.number(">b")
        payload = self.take(size)
        if kind not in (1, 3):  # 2 is a complex number, which no T5 has
            return None
        inner = _Walker(payload)
        shape, name, data = _three(inner.value(depth + 1))
        dtype = _DTYPES.get(name if isinstance(name, str) else "")
        if dtype is None:
            raise _BrokenError(f"an array of the type {str(name)[:20]!r}")
        if not _is_shape(shape) or math.prod(shape) * dtype.itemsize != len(data):
            raise _BrokenError(f"an array whose shape does not fit its {len(data)} bytes")
        try:
            return np.frombuffer(data, dtype).reshape(shape)
        except ValueError as error:  # 2**60 x 0
            raise _BrokenError(str(error)) from None


def _three(value: Any) -> tuple[Any, Any, memoryview]:
    if not (isinstance(value, list) and len(value) == 3 and isinstance(value[2], memoryview)):
        raise _BrokenError("an array that is not shape, type and bytes")
    return value[0], value[1], value[2]


def _is_shape(value: Any) -> bool:
    return isinstance(value, list) and all(type(n) is int and n >= 0 for n in value)


def _listed(value: Any) -> list:
    # flax writes a tuple as a map from "0", "1", ...
    if not isinstance(value, dict) or set(value) != {str(i) for i in range(len(value))}:
        raise _BrokenError("a chunked array without shape or chunks")
    return [value[str(i)] for i in range(len(value))]


class ChunkedArray:
    """An array that Flax cut into flat chunks; a slice copies what it asks for and no more."""

    def __init__(self, items: dict[str, Any]):
        shape, self._chunks = _listed(items.get("shape")), _listed(items.get("chunks"))
        flat = all(isinstance(c, np.ndarray) and c.ndim == 1 for c in self._chunks)
        if not _is_shape(shape) or len(shape) not in (1, 2) or not self._chunks or not flat:
            raise _BrokenError("a chunked array that is no vector or matrix of flat chunks")
        self.shape, self.dtype = tuple(shape), self._chunks[0].dtype
        same = all(c.dtype == self.dtype for c in self._chunks)
        if not same or sum(c.size for c in self._chunks) != math.prod(shape):
            raise _BrokenError("a chunked array whose chunks do not fit its shape")

    def __getitem__(self, index: tuple[slice, ...]) -> np.ndarray:
        rows = range(*index[0].indices(self.shape[0]))
        width = math.prod(self.shape[1:])
        columns = index[1] if len(self.shape) == 2 else slice(None)
        out = np.empty((len(rows), len(range(*columns.indices(width)))), self.dtype)
        start = 0  # of the chunk, in the flat array
        for chunk in self._chunks:
            end = start + chunk.size
            # whole rows of this chunk as a view, then the row that the next chunk goes on with
            first = max(rows.start, -(-start // width))
            last = min(rows.stop, end // width)
            if first < last:
                view = chunk[first * width - start : last * width - start].reshape(-1, width)
                out[first - rows.start : last - rows.start] = view[:, columns]
            if end % width and rows.start <= end // width < rows.stop:
                out[end // width - rows.start] = self._row(end // width)[columns]
            start = end
        return out if len(self.shape) == 2 else out[:, 0]

    def _row(self, row: int) -> np.ndarray:
        width, start, parts = math.prod(self.shape[1:]), 0, []
        for chunk in self._chunks:
            low, high = row * width - start, (row + 1) * width - start
            parts.append(chunk[max(low, 0) : max(high, 0)])
            start += chunk.size
        return np.concatenate(parts)
