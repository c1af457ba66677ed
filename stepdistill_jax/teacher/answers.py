"""Reads the rationale and label in a teacher's answer, and names the defects of an answer."""

import dataclasses
import re

from stepdistill_jax.data.defects import KINDS as PARSER_KINDS
from stepdistill_jax.data.example import Example
from stepdistill_jax.data.nli_rationale import parse_anli, parse_esnli
from stepdistill_jax.data.rationale import CHOICE_MARKER, parse_choice, parse_equation
from stepdistill_jax.data.text_metrics import metric_fn, normalize

# the defects of `prepare`, and defects that only a server's answer can have
KINDS = PARSER_KINDS | {
    "empty": "no text in the answer",
    "truncated": "truncated at the token limit (finish_reason length)",
    "filtered": "removed by the server's content filter",
    "no_answer": "does not end in the requested form, so no label can be read",
    "no_rationale": "a label without a reason before it",
    "label_not_the_given_one": "explains a label other than the given one",
    "server_error": "no answer after all attempts",
}
_PARSERS = {"svamp": parse_equation, "esnli": parse_esnli, "anli": parse_anli}
_THINKING = re.compile(r"\A.*</think>", re.DOTALL)
_OPENING = re.compile(r"\A\s*(?:A|Explanation):\s*")


@dataclasses.dataclass(frozen=True)
class Answer:
    """An answer of a teacher, before its rationale and label are read.

    Attributes:
        finish_reason: the server's reason: `stop`, `length`, ...
        prompt_tokens, completion_tokens: the server's counts, or estimates if it reports none.
        time: time of arrival, UTC, ISO 8601.
        parameters: fields of the request other than the model and the messages.
    """

    text: str
    finish_reason: str = "stop"
    prompt_tokens: int = 0
    completion_tokens: int = 0
    time: str = ""
    parameters: dict = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Reading:
    """The rationale and label that were read from an answer; "" if they cannot be read.

    Attributes:
        problems: the answer's defects, keys of `KINDS`.
        usable: whether both were read.
    """

    rationale: str = ""
    label: str = ""
    problems: tuple[str, ...] = ()
    usable: bool = False


def metric_name(task: str) -> str:
    """Returns the name of the metric that compares a task's labels.

    The labels of SVAMP are equations, which are compared by their values.
    """
    return "value_match" if task == "svamp" else "text_match"


def read_answer(task: str, answer: Answer, row: Example, *, label_given: bool = False) -> Reading:
    """Reads the rationale and label of an answer by the rules of its task.

    Example: for the task `anli`, the answer "Rome is in Italy. So the answer is entailment." has the rationale
    "Rome is in Italy." and the label "entailment".

    Args:
        task: one of `prompts.TASKS`.
        answer: its text up to `</think>` is ignored.
        label_given: whether the prompt contained the gold label. If so, any other label is unusable.
    """
    text = _OPENING.sub("", _THINKING.sub("", answer.text))
    rationale, label, problems = _parse(task, text, row)
    # the finish reason tells whether an answer is truncated; the parsers guess it from the text
    problems = tuple(p for p in problems if p != "truncated")
    # an answer that was complete before it ran on into another question may be truncated there
    if answer.finish_reason == "length" and "runs_on" not in problems:
        return Reading(problems=("truncated",))
    if answer.finish_reason == "content_filter":
        return Reading(problems=("filtered",))
    if label_given and label and not metric_fn(metric_name(task))(label, row.label):
        problems += ("label_not_the_given_one",)
        label = ""
    return Reading(rationale, label, problems, bool(rationale and label))


def _parse(task: str, text: str, row: Example) -> tuple[str, str, tuple[str, ...]]:
    """Returns (rationale, label, problems). The rationale or label is empty if it cannot be read."""
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
