"""The one error that a user can mend, and the exit code of a run that only wants to be started again."""

import difflib
from collections.abc import Iterable

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


def nearest(name: str, known: Iterable[str]) -> str:
    """`; did you mean 'cqa'?` for the closest of `known`, or an empty string when none is close."""
    close = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {close[0]!r}?" if close else ""
