"""Defines the error for mistakes that a user can correct, helpers for messages, and an exit status."""

import difflib
import re
from collections.abc import Iterable

_CONTROLS = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]"
)
EXIT_STOPPED = 75  # EX_TEMPFAIL: the same command, started again, continues


class InputError(ValueError):
    """Bad usage, a bad config or bad input.

    The message is one line that says what is wrong, where, and what to do. Commands print it without a
    traceback, and exit with status 2.
    """


def printable(text: object, most: int = 2000) -> str:
    """Returns `text` as one line that is safe for any terminal and encoding.

    Control characters and halves of surrogate pairs are escaped. A text of more than `most` characters loses
    its middle.
    """
    line = " ".join(str(text).split())
    if len(line) > most:
        line = f"{line[: most * 3 // 4]} [...] {line[-most // 4 :]}"
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in line)


def escaped(text: object) -> str:
    r"""Returns `text` with terminal control characters escaped: ESC becomes `\x1b`.

    Newlines (`\n`) and tabs stay. Unicode's line separators, marks of writing direction, and halves of
    surrogate pairs are escaped, too.
    """
    return _CONTROLS.sub(lambda match: match[0].encode("unicode_escape").decode(), str(text))


def nearest(name: str, known: Iterable[str]) -> str:
    """Returns a hint such as `; did you mean 'cqa'?`, or "" if no known name is similar."""
    close = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {close[0]!r}?" if close else ""


def how_to_install(extra: str) -> str:
    """Returns the end of a message: how to install an extra of this package in its tested versions."""
    return f"run pip install -c constraints.txt -e '.[{extra}]' in the source folder of stepdistill_jax"
