"""The one error that a user can mend, and the exit code of a run that only wants to be started again."""

import difflib
import re
from collections.abc import Iterable

_STEERING = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]"
)
EXIT_STOPPED = 75  # EX_TEMPFAIL: start the same command again to go on


class InputError(ValueError):
    """Bad usage, config or input: one line that says what is wrong, where, and what to do.

    Commands print it without a traceback and exit with 2.
    """


def printable(text: object, most: int = 2000) -> str:
    """`text` as one line of at most about `most` characters, fit for a terminal and any encoding.

    Control characters and halves of surrogate pairs are written as their escapes: a name in a file
    must not move a cursor. The middle of a long text is left out.
    """
    line = " ".join(str(text).split())
    if len(line) > most:
        line = f"{line[: most * 3 // 4]} [...] {line[-most // 4 :]}"
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in line)


def escaped(text: object) -> str:
    r"""Returns `text` with all that can steer a terminal escaped: ESC becomes `\x1b`.

    Keeps line ends and tabs. Escapes the other control characters, marks that turn the writing
    direction, Unicode's own line ends, and halves of surrogate pairs, which no encoding can write.
    """
    return _STEERING.sub(lambda match: match[0].encode("unicode_escape").decode(), str(text))


def nearest(name: str, known: Iterable[str]) -> str:
    """`; did you mean 'cqa'?` for the closest of `known`, or an empty string when none is close."""
    close = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {close[0]!r}?" if close else ""
