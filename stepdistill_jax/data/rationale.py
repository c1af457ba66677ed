"""Parses a teacher's raw text into rationale and answer, and names each kind of failure."""

import dataclasses
import re
from collections.abc import Sequence

from stepdistill_jax.data import arithmetic
from stepdistill_jax.data.written_sums import wrong_sums

NEXT_QUESTION = "Q:"  # starts an invented question in a few-shot completion
CHOICE_MARKER = "So the answer is"
EQUATION_MARKER = "The answer is"
ESNLI_MARKER = "Answer:"
ANLI_NEXT = "Premise:"  # starts an invented pair in a completion for ANLI
LETTERS = "abcdefghijklmnopqrstuvwxyz"

# not IGNORECASE, with which [a-z] matches the long s and the dotless i
_LETTER = re.compile(r"\(([a-zA-Z])\)\s*([^\n]*)")
_SENTENCE_END = re.compile(r"[.!?\u2026][\"'\u201d\u2019)\]]*\s*$")


@dataclasses.dataclass(frozen=True)
class Parsed:
    """The parts of a teacher's text; "" if a part is missing.

    Attributes:
        answer: the answer that the paper's published code finds; for a question with choices, the choice that the
            letter names.
        answer_text: for a question with choices, the text after the letter.
        repaired: the answer that this package finds, even in some texts that break the format.
        problems: keys of `defects.KINDS`.
        wrong_sums: equations in the rationale whose two sides differ.
    """

    rationale: str = ""
    answer: str = ""
    answer_text: str = ""
    repaired: str = ""
    problems: tuple[str, ...] = ()
    wrong_sums: tuple[str, ...] = ()


def parse_choice(text: str, choices: Sequence[str]) -> Parsed:
    """Reads `RATIONALE So the answer is (x) CHOICE.`; the text from the next `Q:` on is ignored.

    Example: `parse_choice("Beavers build. So the answer is (b) wood.", ("zoo", "wood"))` has the rationale
    "Beavers build." and the answer "wood".

    `answer` is the choice that the letter names. For `repaired`, the text after the letter is compared with the
    choices, ignoring case and a full stop. If the text is a different choice, `repaired` is that choice. Otherwise
    it is the letter's choice: `(a) lake or (d) pond` gives choice (a).

    Args:
        choices: the choices with the letters a, b, ..., in this order.
    """
    problems, rationale, answer = split(text, CHOICE_MARKER)
    if answer is None:
        return Parsed(problems=problems)
    letter = _LETTER.search(answer)
    by_letter = ""
    if letter is None:
        problems += ("no_letter",)
        # the repair compares the whole answer with the choices
        answer_text = _without_stop(answer)
    else:
        answer_text = _without_stop(letter[2])
        position = LETTERS.index(letter[1].lower())
        if position < len(choices):
            by_letter = choices[position]
        else:
            problems += ("letter_not_a_choice",)
    if answer_text not in choices:
        problems += ("label_not_a_choice",)
    elif by_letter and by_letter != answer_text:
        problems += ("label_disagrees_with_letter",)
    by_text = [c for c in choices if folded(c) == folded(answer_text)]
    if not by_text:
        problems += truncated(problems, text)
    return Parsed(
        rationale=rationale,
        # the paper's published code finds no answer if the marker occurs more than once
        answer="" if "several_answers" in problems else by_letter,
        answer_text="" if "several_answers" in problems or letter is None else answer_text,
        repaired=by_letter if by_letter in by_text or not by_text else by_text[0],
        problems=problems,
    )


def parse_equation(text: str) -> Parsed:
    """Reads `RATIONALE The answer is (EQUATION).`; the text from the next `Q:` on is ignored.

    Example: `parse_equation("Half of 84. The answer is (84 / 2).")` has the rationale "Half of 84." and the
    answer "(84 / 2)".

    `repaired` is all text after `The answer is` on that line if it can be evaluated, such as `84 / 2`. Otherwise
    it is the equation in parentheses if that can be evaluated, else "".
    """
    problems, rationale, answer = split(text, EQUATION_MARKER)
    if answer is None:
        return Parsed(problems=problems)
    equation = in_parentheses(answer)
    whole = _without_stop(answer.split("\n")[0])
    if not equation:
        problems += ("no_parentheses",)
    elif arithmetic.evaluate(equation) is None:
        problems += ("no_value",)
    repaired = next((e for e in (whole, equation) if arithmetic.evaluate(e) is not None), "")
    if equation and repaired not in ("", equation):
        problems += ("equation_goes_on",)
    if wrong := wrong_sums(rationale):
        problems += ("arithmetic_wrong",)
    if not repaired:
        problems += truncated(problems, text)
    return Parsed(
        rationale=rationale,
        answer="" if "several_answers" in problems else equation,
        repaired=repaired,
        problems=problems,
        wrong_sums=tuple(wrong),
    )


def split(
    text: str, marker: str, next_question: str = NEXT_QUESTION
) -> tuple[tuple[str, ...], str, str | None]:
    """Splits a text at the marker before the answer, and ignores everything from `next_question` on.

    Returns:
        The problems of the text, as keys of `defects.KINDS`.
        The rationale.
        The answer: the text from the first marker to the second marker or the end; None without a marker.
    """
    own, found, _ = text.partition(next_question)
    problems = ("runs_on",) if found else ()
    if not own.strip():
        return (*problems, "empty"), "", None
    rationale, *answers = own.split(marker)
    if not answers:
        return (*problems, "no_answer", *truncated(problems, own)), "", None
    if len(answers) > 1:
        problems += ("several_answers",)
    if not rationale.strip():
        problems += ("no_rationale",)
    return problems, rationale.strip(), answers[0].strip()


def truncated(problems: Sequence[str], text: str) -> tuple[str, ...]:
    """Returns ("truncated",) if a text does not end like a sentence, else ().

    Call this function only for a text without a usable answer. A text with the problem `runs_on` is never
    truncated: the teacher finished it and went on to invent another question.
    """
    if "runs_on" in problems or _SENTENCE_END.search(text[-100:]):
        return ()
    return ("truncated",)


def in_parentheses(text: str) -> str:
    r"""Returns the text from the first `(` to the last `)` of the first line with such a pair, or "".

    Equals the first match of the regular expression `\(.*\)`, which can take quadratic time.
    """
    for line in text.split("\n"):
        first, last = line.find("("), line.rfind(")")
        if 0 <= first < last:
            return line[first : last + 1]
    return ""


def _without_stop(text: str) -> str:
    return text.strip().removesuffix(".").rstrip()


def folded(text: str) -> str:
    """Returns `text` case-folded, with single spaces and without a final full stop."""
    return " ".join(_without_stop(text).casefold().split())
