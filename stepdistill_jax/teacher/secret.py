"""A key, hidden in foreign text however a server wrote it there."""

import base64
import html
import re

HIDDEN = "***"
SHORTEST = 6  # characters; a shorter key is no secret, and its text might be any word
_ALTERED = "\\%&\0"  # one of them stands in each spelling of a text but its own, hex and base64


class Secret:
    r"""Hides a key in any usual encoding of a text.

    Each character may stand as itself, behind backslashes (JSON writes `/` as `\/`, `repr` doubles
    backslashes), as `\u002f` or `\x2f`, percent-encoded (twice, too), as an HTML entity, or with
    zero bytes before it (UTF-16). The whole key may be in hex or base64, on its own or after
    something else (`Bearer KEY`).

    Example: `Secret("sk-a/b+c").hide(r"bad key sk-a\/b+c")` is "bad key ***".
    """

    def __init__(self, key: str):
        """Prepares the spellings of `key`, printable ASCII; one that is too short is not hidden."""
        self._literals: list[str] = []
        self._altered = None
        if len(key) < SHORTEST:
            return
        raw = key.encode()
        self._literals = [key, raw.hex(), raw.hex().upper()]
        for before in range(3):  # base64 writes three bytes as four characters
            # characters of which all six bits are the key's
            whole = slice(-(-before * 8 // 6), (before + len(key)) * 8 // 6)
            for encode in (base64.b64encode, base64.urlsafe_b64encode):
                self._literals.append(encode(b"\0" * before + raw).decode()[whole])
        self._altered = re.compile("".join(map(_spellings, key)))

    def hide(self, text: str) -> str:
        """Returns `text` with *** in place of the key."""
        for literal in self._literals:
            text = text.replace(literal, HIDDEN)
        if self._altered is not None and any(c in text for c in _ALTERED):
            text = self._altered.sub(HIDDEN, text)
        return text


def _spellings(c: str) -> str:
    code = f"(?i:{ord(c):02x})"
    ways = [
        re.escape(c),
        rf"(?<=\\)(?:u00|x){code}",
        f"%(?:25)*{code}",
        f"&#(?:0*{ord(c)}|[xX]0*{code});",
    ]
    if (entity := html.escape(c)) != c:
        ways.append(re.escape(entity))
    # few before it, so that a long run of backslashes takes no time
    return rf"[\\\0]{{0,8}}(?:{'|'.join(ways)})"
