"""Writes few-shot prompts.

Each task of the paper has its own jinja template and exemplars; other rows use a generic template.
"""

import dataclasses
import os
import pathlib
from collections.abc import Sequence
from typing import Any

from stepdistill_jax.data.example import Example
from stepdistill_jax.data.rationale import LETTERS
from stepdistill_jax.errors import InputError, how_to_install
from stepdistill_jax.runtime.checks import one_of
from stepdistill_jax.teacher.questions import ASKED, read_questions

TEMPLATES = pathlib.Path(__file__).parent / "templates"
GENERIC = "generic"
TASKS = ("cqa", "svamp", "esnli", "anli", GENERIC)
EXEMPLAR = ASKED | dict.fromkeys(
    ("rationale", "label"), "; an exemplar (`exemplars`) shows a complete answer"
)
CHARACTERS_PER_TOKEN = 4  # for English text; used for estimates before the first answer


@dataclasses.dataclass(frozen=True)
class Prompter:
    """Writes the teacher's prompt for a row.

    Attributes:
        task: one of `TASKS`.
        exemplars: rows with answers, shown before the row's question.
        instructions: text that replaces the template's instructions. "" keeps the template's instructions.
        label_given: whether the prompt contains the gold label and asks only for a rationale.
    """

    task: str
    exemplars: tuple[Example, ...]
    instructions: str
    label_given: bool
    _template: Any

    def prompt(self, row: Example) -> str:
        """Returns the complete text that the teacher reads, as one user message.

        Raises:
            InputError: the row has more choices than there are letters.
        """
        text = self._template.render(
            instructions=self.instructions,
            exemplars=[self._shown(exemplar) for exemplar in self.exemplars],
            row=self._shown(row),
            label_given=self.label_given,
        )
        return text.strip()

    def _shown(self, row: Example) -> dict[str, Any]:
        if self.task == "cqa" and len(row.choices) > len(LETTERS):
            raise InputError(
                f"row {row.id!r}: expected at most {len(LETTERS)} choices, one per letter, got"
                f" {len(row.choices)}; `task={GENERIC}` needs no letters"
            )
        return {
            "question": with_choices(row, lettered=self.task == "cqa"),
            "answer": self._answer(row),
            "rationale": row.rationale,
            "choices": row.choices,
        }

    def _answer(self, row: Example) -> str:
        if self.task == "cqa" and row.label in row.choices:
            return f"({LETTERS[row.choices.index(row.label)]}) {row.label}"
        return row.label

    @property
    def answer_tokens(self) -> int:
        """Estimated token count of an answer: the mean over the exemplars, or 60 if there are none."""
        if not self.exemplars:
            return 60
        lengths = [len(e.rationale) + len(self._answer(e)) + 20 for e in self.exemplars]
        return estimate_tokens(sum(lengths) // len(lengths))


def estimate_tokens(characters: int) -> int:
    """Returns the estimated token count of a text: a quarter of its `characters`, rounded up.

    Example: `estimate_tokens(10)` is 3.
    """
    return -(-characters // CHARACTERS_PER_TOKEN)


def with_choices(row: Example, *, lettered: bool) -> str:
    """Returns the row's input, followed by its list of choices unless the input already has a lettered list.

    A `lettered` list has lines such as `(a) ...`, as in the paper's CQA files.
    """
    by_letter = [f"({x}) {choice}" for x, choice in zip(LETTERS, row.choices, strict=False)]
    if not row.choices or "\n".join(by_letter) in row.input:
        return row.input
    if lettered:
        return "\n".join([row.input, "Answer Choices:", *by_letter])
    return "\n".join([row.input, "Choices:", *(f"- {choice}" for choice in row.choices)])


def load_prompter(
    task: str,
    *,
    exemplars: os.PathLike | str | None = None,
    instructions: str = "",
    choices: Sequence[str] = (),
    label_given: bool = False,
) -> Prompter:
    """Loads the template and the exemplars of a task.

    Args:
        exemplars: JSON-lines file that replaces the task's own exemplars. Fields: `input`, `rationale`, `label`,
            and optionally `choices`.
        instructions, label_given: see `Prompter`.
        choices: choices for exemplars without the field `choices`.

    Raises:
        InputError: the task is unknown, a library is missing, or exemplars cannot be used.
    """
    one_of("task", task, TASKS)
    try:
        import jinja2
    except ImportError:
        raise InputError(
            f"annotate needs jinja2, which is not installed; {how_to_install('teacher')}"
        ) from None
    environment = jinja2.Environment(  # noqa: S701  (plain text, not HTML)
        loader=jinja2.FileSystemLoader(TEMPLATES),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    own = TEMPLATES / f"{task}.jsonl"
    path = exemplars or (own if own.exists() else None)
    rows = tuple(read_questions(path, choices, needs=EXEMPLAR)) if path else ()
    template = environment.get_template(f"{task}.jinja")
    return Prompter(task, rows, instructions, label_given, template)
