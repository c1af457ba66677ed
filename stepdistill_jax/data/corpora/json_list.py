"""Reads a JSON list of texts in pieces, so that memory does not grow with the file."""

import json
import pathlib
from collections.abc import Iterator
from typing import IO

from stepdistill_jax.errors import InputError
from stepdistill_jax.runtime.files import check_file

PIECE = 1 << 20  # characters to read at once
MAX_ITEM = 16 << 20  # characters; a longer text is not a completion
CUT = 64  # characters: an error this close to a piece's end may only mean that the item continues
_SPACE = " \t\r\n"


def read_texts(path: pathlib.Path) -> Iterator[str]:
    """Yields the texts of a JSON list.

    Raises:
        InputError: the file is missing, is not UTF-8 or is not a JSON list of texts. The message names the line
            or item.
    """
    check_file(path, "a JSON list of texts")
    try:
        with open(path, encoding="utf-8-sig") as f:
            for number, value in enumerate(_Items(f, path), 1):
                if not isinstance(value, str):
                    raise InputError(
                        f"{path}: item {number} must be text, got {type(value).__name__}"
                    )
                try:
                    value.encode()
                except UnicodeEncodeError:
                    raise InputError(
                        f"{path}: item {number} is not valid text (an unpaired surrogate)"
                    ) from None
                yield value
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 ({error.reason})") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from None


class _Items:
    """Iterates over a list's items.

    A text is never cut off. A number may be cut off where the buffer ends, but `read_texts` refuses all numbers.
    """

    def __init__(self, file: IO[str], path: pathlib.Path):
        self._file, self._path = file, path
        self._buffer, self._position, self._at_end = "", 0, False
        self._line = 1  # of the buffer's first character

    def __iter__(self) -> Iterator[object]:
        if (mark := self._next_character()) != "[":
            if not mark:
                raise self._broken("it is empty")
            raise InputError(f"{self._path}: expected a JSON list of texts")
        self._position += 1
        if self._next_character() == "]":
            self._position += 1
        else:
            while True:
                self._next_character()
                yield self._item()
                mark = self._next_character()
                if mark not in ("]", ","):
                    raise self._broken("expected a comma or the list's end")
                self._position += 1
                if mark == "]":
                    break
        if self._next_character():
            raise self._broken("there is text after the list's end")

    def _item(self) -> object:
        decode = json.JSONDecoder().raw_decode
        while True:
            try:
                value, self._position = decode(self._buffer, self._position)
                return value
            except json.JSONDecodeError as error:
                # the error for an unterminated text has the position of its start
                cut = "Unterminated" in error.msg or len(self._buffer) - error.pos < CUT
                if self._at_end or not cut:
                    self._position = error.pos
                    raise self._broken(error.msg) from None
            except (ValueError, RecursionError) as error:  # 5,000 digits, 10,000 brackets
                raise self._broken(str(error)) from None
            if len(self._buffer) - self._position > MAX_ITEM:
                raise self._broken(f"a text has more than {MAX_ITEM:,} characters")
            self._more()

    def _more(self) -> None:
        piece = self._file.read(max(PIECE, len(self._buffer) - self._position))
        self._line += self._buffer.count("\n", 0, self._position)
        self._buffer = self._buffer[self._position :] + piece
        self._position, self._at_end = 0, not piece

    def _next_character(self) -> str:
        while True:
            while self._position < len(self._buffer) and self._buffer[self._position] in _SPACE:
                self._position += 1
            if self._position < len(self._buffer) or self._at_end:
                return self._buffer[self._position : self._position + 1]
            self._more()

    def _broken(self, what: str) -> InputError:
        line = self._line + self._buffer.count("\n", 0, self._position)
        return InputError(f"{self._path}:{line}: broken JSON ({what})")
