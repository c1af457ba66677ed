"""What a teacher's answer says: its rationale and label, or by what name it is of no use."""

import dataclasses
import re

from stepdistill_jax.data.defects import KINDS as PARSER_KINDS
from stepdistill_jax.data.example import Example
from stepdistill_jax.data.nli_rationale import parse_anli, parse_esnli
from stepdistill_jax.data.rationale import CHOICE_MARKER, parse_choice, parse_equation
from stepdistill_jax.data.text_metrics import metric_fn, normalize

# what can be wrong with an answer: the names of `prepare`, and those that only a server knows of
KINDS = PARSER_KINDS | {
    "empty": "no text in the answer",
    "truncated": "cut by the token limit before its end (finish_reason length)",
    "filtered": "held back by the server's content filter",
    "no_answer": "does not end as it was asked to, so no label can be read",
    "no_rationale": "a label with no reason before it",
    "label_not_the_given_one": "explains another label than the one it was given",
    "server_error": "no answer after all attempts",
}
_PARSERS = {"svamp": parse_equation, "esnli": parse_esnli, "anli": parse_anli}
_THINKING = re.compile(r"\A.*</think>", re.DOTALL)
_OPENING = re.compile(r"\A\s*(?:A|Explanation):\s*")


@dataclasses.dataclass(frozen=True)
class Answer:
    """One answer of a teacher, as it came.

    Attributes:
        text: raw.
        finish_reason: `stop`, `length`, ... as the server says it.
        prompt_tokens, completion_tokens: as the server counts them (estimated where it does not).
        time: when it came, UTC, ISO 8601.
        parameters: of the request, without model and messages.
    """

    text: str
    finish_reason: str = "stop"
    prompt_tokens: int = 0
    completion_tokens: int = 0
    time: str = ""
    parameters: dict = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Reading:
    """What an answer says; `usable` only with both a rationale and a label.

    Attributes:
        rationale, label: empty where they cannot be read.
        problems: names of KINDS.
        usable: whether it is complete and could be read.
    """

    rationale: str = ""
    label: str = ""
    problems: tuple[str, ...] = ()
    usable: bool = False


def metric_name(task: str) -> str:
    """How labels of a task are compared: SVAMP's are equations, compared by value."""
    return "value_match" if task == "svamp" else "text_match"


def read_answer(task: str, answer: Answer, row: Example, *, label_given: bool = False) -> Reading:
    """Reads an answer by the rules of its task.

    Example: under `anli` the text "Rome is in Italy. So the answer is entailment." has the
    rationale "Rome is in Italy." and the label "entailment".

    Args:
        task: one of `prompts.TASKS`.
        answer: what the teacher said; reasoning up to `</think>` is left out.
        row: the question.
        label_given: the teacher was told the label: an answer that ends in another is of no use.
    """
    text = _OPENING.sub("", _THINKING.sub("", answer.text))
    rationale, label, problems = _parse(task, text, row)
    problems = tuple(problems)
    # an answer that was whole before it ran on into another question is not hurt by the cut
    if answer.finish_reason == "length" and "runs_on" not in problems:
        return Reading(problems=("truncated",))
    if answer.finish_reason == "content_filter":
        return Reading(problems=("filtered",))
    if label_given and label and not metric_fn(metric_name(task))(label, row.label):
        problems += ("label_not_the_given_one",)
        label = ""
    return Reading(rationale, label, problems, bool(rationale and label))


def _parse(task: str, text: str, row: Example) -> tuple[str, str, tuple[str, ...]]:
    """(rationale, label, problems); either text is empty where it cannot be read."""
    if task in _PARSERS:
        parsed = _PARSERS[task](text)
        return parsed.rationale, parsed.repaired, parsed.problems
    if task == "cqa" or row.choices:
        parsed = parse_choice(text, row.choices)
        # the generic prompt asks for no letter
        problems = [p for p in parsed.problems if task == "cqa" or p != "no_letter"]
        return parsed.rationale, parsed.repaired, tuple(problems)
    return _parse_free(text)


def _parse_free(text: str) -> tuple[str, str, tuple[str, ...]]:
    own, *more = re.split(r"^[^\S\n]*Q:", text, maxsplit=1, flags=re.MULTILINE)
    problems: tuple[str, ...] = ("runs_on",) if more else ()
    if not own.strip():
        return "", "", (*problems, "empty")
    rationale, *answers = own.split(CHOICE_MARKER)
    label = answers[0].strip().split("\n")[0].strip() if answers else ""
    if not label:
        return "", "", (*problems, "no_answer")
    if len(answers) > 1:
        problems += ("several_answers",)
    if not rationale.strip():
        problems += ("no_rationale",)
    return rationale.strip(), normalize(label).removesuffix(".").rstrip(), problems
