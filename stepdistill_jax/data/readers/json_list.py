"""A JSON list of texts, read item by item: a file of any size takes the memory of one piece of it."""

import json
import pathlib
from collections.abc import Iterator

from stepdistill_jax.errors import InputError
from stepdistill_jax.files import read_json

PIECE = 1 << 20  # characters that are read at once
_SPACE = " \t\r\n"


def read_texts(path: pathlib.Path) -> Iterator[str]:
    """Yields the texts of a list.

    Raises:
        InputError: no such file, not UTF-8, not JSON, no list, or an item that is no text; names the
            file and the line or item.
    """
    try:
        with open(path, encoding="utf-8") as f:
            for number, value in enumerate(_items(f), 1):
                if not isinstance(value, str):
                    raise InputError(
                        f"{path}: item {number} must be text, got {type(value).__name__}"
                    )
                try:
                    value.encode()
                except UnicodeEncodeError:
                    raise InputError(
                        f"{path}: item {number} is no valid text (half a surrogate pair)"
                    ) from None
                yield value
    except (OSError, UnicodeDecodeError, _NotAList):
        # read once more as a whole, for a message that names the line
        if isinstance(read_json(path), list):
            raise InputError(f"{path}: a JSON list of texts that cannot be read") from None
        raise InputError(f"{path}: a JSON list of texts is wanted") from None


class _NotAList(ValueError):
    pass


def _items(file) -> Iterator[object]:
    """The items of a list; what is no text may come cut, and is refused anyway."""
    decode = json.JSONDecoder().raw_decode
    buffer, position, at_end = file.read(PIECE), 0, False

    def more() -> None:
        nonlocal buffer, position, at_end
        piece = file.read(max(PIECE, len(buffer) - position))
        buffer, position, at_end = buffer[position:] + piece, 0, not piece

    def next_character() -> str:
        nonlocal position
        while True:
            while position < len(buffer) and buffer[position] in _SPACE:
                position += 1
            if position < len(buffer) or at_end:
                return buffer[position : position + 1]
            more()

    if next_character() != "[":
        raise _NotAList
    position += 1
    if next_character() == "]":
        position += 1
    else:
        while True:
            next_character()
            while True:
                try:
                    value, position = decode(buffer, position)
                    break
                except (ValueError, RecursionError):  # cut by the end of the buffer, or broken
                    if at_end:
                        raise _NotAList from None
                    more()
            yield value
            mark = next_character()
            position += 1
            if mark == "]":
                break
            if mark != ",":
                raise _NotAList
    if next_character():
        raise _NotAList
