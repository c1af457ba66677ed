"""Parses a teacher's text exactly as the paper's published code does.

Each function returns (rationale, label). A missing part is " " or "", as in the published code.
"""

import re

from stepdistill_jax.data.rationale import (
    ANLI_NEXT,
    CHOICE_MARKER,
    EQUATION_MARKER,
    ESNLI_MARKER,
    NEXT_QUESTION,
    in_parentheses,
)

BLANK = " "


def cqa(text: str, *, neox: bool = False) -> tuple[str, str]:
    """Reads `RATIONALE So the answer is (x) CHOICE.`; the label is the text after the letter.

    Args:
        neox: whether GPT-NeoX wrote the text, not PaLM.

    Raises:
        ValueError: `So the answer is` does not occur exactly once in a text by PaLM.
    """
    own = _own(text, NEXT_QUESTION, neox)
    if neox and own.count(CHOICE_MARKER) != 1:
        return BLANK, BLANK
    rationale, answer = own.split(CHOICE_MARKER)
    pieces = re.split(r"\(.\)", answer)
    label = pieces[1].strip() if len(pieces) > 1 else ""
    return rationale.rstrip(), label.removesuffix(".") if label else BLANK


def svamp(text: str, *, neox: bool = False) -> tuple[str, str]:
    """Reads `RATIONALE The answer is (EQUATION).`; a text with two answers counts as having none."""
    own = _own(text, NEXT_QUESTION, neox)
    if own.count(EQUATION_MARKER) != 1:
        return BLANK, BLANK
    rationale, answer = own.split(EQUATION_MARKER)
    return rationale.rstrip(), in_parentheses(answer) or BLANK


def esnli(text: str, *, neox: bool = False) -> tuple[str, str]:
    """Reads `RATIONALE Answer: LABEL`.

    The label is the text from the first `Answer: ` to the next `Premise` or `Answer: `. It can belong to a further
    question that the teacher invented.
    """
    rationale = _own(text, ESNLI_MARKER, neox)
    answers = text.split(f"{ESNLI_MARKER} ")
    label = answers[1].split("Premise")[0].rstrip() if len(answers) > 1 else BLANK
    return rationale, label


def anli(text: str, *, neox: bool = False) -> tuple[str, str]:
    """Reads `RATIONALE So the answer is LABEL.`; the answer's last character is always dropped."""
    own = _own(text, ANLI_NEXT, neox)
    for marker in (CHOICE_MARKER, *([EQUATION_MARKER] if neox else [])):
        if own.count(marker) == 1:
            rationale, answer = own.split(marker)
            return rationale.rstrip(), answer.lstrip()[:-1]
    return "", ""


def _own(text: str, end: str, neox: bool) -> str:
    own = text.split(end)[0].rstrip()
    return own.lstrip() if neox else own
