"""Removes an API key, in any usual encoding, from text that a server sent."""

import base64
import html
import re

HIDDEN = "***"
SHORTEST = 6  # characters; a shorter key is not a secret, and may be part of an ordinary word
_ALTERED = "\\%&\0"  # each encoding except plain, hex and base64 contains one of these


class Secret:
    r"""Replaces an API key in strings by ***, even in the usual encodings.

    Each character of the key may appear in any of these forms, also after backslashes (`\/`) or zero bytes:
    - as itself;
    - as an escape such as `\u002f` or `\x2f`;
    - percent-encoded, also repeatedly;
    - as an HTML entity.

    The complete key may also appear in hex or base64, alone or after other text (`Bearer KEY`).

    Example: `Secret("sk-a/b+c").hide(r"bad key sk-a\/b+c")` is "bad key ***".
    """

    def __init__(self, key: str):
        """Prepares the search for an API key.

        Args:
            key: the key, in printable ASCII. A key of fewer than 6 characters is not hidden.
        """
        self._literals: list[str] = []
        self._altered = None
        if len(key) < SHORTEST:
            return
        raw = key.encode()
        self._literals = [key, raw.hex(), raw.hex().upper()]
        # Base64 writes 3 bytes (24 bits) as 4 characters of 6 bits, so the key's encoding depends on
        # the number of bytes before it, modulo 3. We keep only the characters whose six bits all
        # belong to the key: from ceil(8 before / 6) to floor(8 (before + len) / 6).
        for before in range(3):
            whole = slice(-(-before * 8 // 6), (before + len(key)) * 8 // 6)
            for encode in (base64.b64encode, base64.urlsafe_b64encode):
                self._literals.append(encode(b"\0" * before + raw).decode()[whole])
        self._altered = re.compile("".join(map(_spellings, key)))

    def hide(self, text: str) -> str:
        """Returns `text` with the key replaced by ***."""
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
    # JSON may write `/` as `\/`, `repr` doubles backslashes, and UTF-16 has zero bytes. At most 8 of them, so
    # that a long run of them does not make the match slow.
    return rf"[\\\0]{{0,8}}(?:{'|'.join(ways)})"
