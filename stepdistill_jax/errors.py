"""The error that a user can fix, and the exit status of a run that only needs to be started again."""

import difflib
import re
from collections.abc import Iterable

_CONTROLS = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]"
)
EXIT_STOPPED = 75  # EX_TEMPFAIL: the same command, started again, continues


class InputError(ValueError):
    """Bad usage, config or input: one line that says what is wrong, where, and what to do.

    Commands print it without a traceback and exit with status 2.
    """


def printable(text: object, most: int = 2000) -> str:
    """Returns `text` as a line of at most about `most` characters, safe for any terminal and encoding.

    Control characters and halves of surrogate pairs are escaped: a name in a file must not move the
    cursor. The middle of a long text is left out.
    """
    line = " ".join(str(text).split())
    if len(line) > most:
        line = f"{line[: most * 3 // 4]} [...] {line[-most // 4 :]}"
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in line)


def escaped(text: object) -> str:
    r"""Returns `text` with everything escaped that can control a terminal: ESC becomes `\x1b`.

    Keeps line ends and tabs. Escapes other control characters, marks that change the writing
    direction, Unicode's own line ends, and halves of surrogate pairs, which no encoding can represent.
    """
    return _CONTROLS.sub(lambda match: match[0].encode("unicode_escape").decode(), str(text))


def nearest(name: str, known: Iterable[str]) -> str:
    """Returns `; did you mean 'cqa'?` for the closest of `known`, or an empty text if none is close."""
    close = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {close[0]!r}?" if close else ""
