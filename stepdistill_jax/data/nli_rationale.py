"""Parses a teacher's raw text about a premise and a hypothesis into rationale and label."""

import re

from stepdistill_jax.data import published_rules
from stepdistill_jax.data.rationale import (
    ANLI_NEXT,
    CHOICE_MARKER,
    ESNLI_MARKER,
    Parsed,
    folded,
    split,
    truncated,
)

LABELS = ("entailment", "neutral", "contradiction")  # written as 0, 1 and 2 in files
_NEXT_PAIR = re.compile(r"(?:^|\n)[^\S\n]*Premise:")  # at the start of a line
_HEDGES = re.compile(r"\b(?:not|or|nor|neither|cannot)\b|n't\b")


def parse_esnli(text: str) -> Parsed:
    r"""Reads `RATIONALE Answer: LABEL`; the label ends at the next `Premise`.

    Example: `parse_esnli("A dog is an animal.\nAnswer: entailment\n\nPremise: A cat")` has the rationale "A dog
    is an animal." and the answer "entailment".

    `answer` is the label that the paper's published code finds. `repaired` is the only label in the first line
    after the marker: `Entailment.` becomes `entailment`. It is "" if the line has no label, several labels or a
    word such as `not`, or if another premise comes before the marker.
    """
    before, marker, after = text.partition(ESNLI_MARKER)
    answer = published_rules.esnli(text)[1].rstrip()
    runs_on_early = _NEXT_PAIR.search(before)
    own = before[: runs_on_early.start()] if runs_on_early else before
    if runs_on_early or not marker:
        problems = ("runs_on",) if runs_on_early else ()
        if not own.strip():
            return Parsed(answer=answer, problems=(*problems, "empty"))
        problems += ("no_answer", *truncated(problems, own))
        return Parsed(answer=answer, problems=problems)
    answer_text, next_pair, _ = after.partition("Premise")
    problems = ("runs_on",) if next_pair else ()
    first, *more = answer_text.split(ESNLI_MARKER)
    if more:
        problems += ("several_answers",)
    if not own.strip():
        problems += ("no_rationale",)
    return _with_label(problems, own.strip(), answer, first, text)


def parse_anli(text: str) -> Parsed:
    """Reads `RATIONALE So the answer is LABEL.`; the text from the next `Premise:` on is ignored.

    Example: `parse_anli("He was born later. So the answer is contradiction.")` has the rationale "He was born
    later." and the answer "contradiction".

    Labels are repaired as in `parse_esnli`. `Parsed.answer` lacks the last character of the answer, as in the paper's
    published code, which expects a full stop there but does not check it.
    """
    problems, rationale, answer_text = split(text, CHOICE_MARKER, ANLI_NEXT)
    if answer_text is None:
        return Parsed(problems=problems)
    # the paper's published code finds no answer if the marker occurs more than once
    answer = "" if "several_answers" in problems else answer_text[:-1]
    return _with_label(problems, rationale, answer, answer_text, text)


def _with_label(
    problems: tuple[str, ...], rationale: str, answer: str, answer_text: str, text: str
) -> Parsed:
    """Returns the parsed teacher's text. Problems with the label are added to `problems`.

    Args:
        answer: the answer that the paper's published code finds in `text`.
        answer_text: the text after the first answer marker, such as `Answer:`, up to the next marker if there is
            one. `repaired` is read from it.
    """
    repaired = _one_label(answer_text)
    if answer not in LABELS and "several_answers" not in problems:
        problems += ("label_not_a_choice",)
    if not repaired:
        problems += truncated(problems, text)
    return Parsed(rationale=rationale, answer=answer, repaired=repaired, problems=problems)


def _one_label(answer_text: str) -> str:
    """Returns the label in an answer's first line, or "" unless that line names exactly one label."""
    line = folded(answer_text.strip().split("\n")[0])
    if line in LABELS:
        return line
    named = [label for label in LABELS if re.search(rf"\b{label}\b", line)]
    return named[0] if len(named) == 1 and not _HEDGES.search(line) else ""
