"""Few-shot prompts: a jinja template and exemplars for each of the paper's tasks, and one for any task."""

import dataclasses
import os
import pathlib
from collections.abc import Sequence
from typing import Any

from stepdistill_jax.data.example import Example
from stepdistill_jax.data.rationale import LETTERS
from stepdistill_jax.errors import InputError
from stepdistill_jax.runtime.checks import one_of
from stepdistill_jax.teacher.questions import ASKED, read_questions

TEMPLATES = pathlib.Path(__file__).parent / "templates"
GENERIC = "generic"
TASKS = ("cqa", "svamp", "esnli", "anli", GENERIC)
EXEMPLAR = ASKED | dict.fromkeys(
    ("rationale", "label"), "; an exemplar (`exemplars`) shows a whole answer"
)
CHARACTERS_PER_TOKEN = 4  # of English text; what estimates before the first answer go by


@dataclasses.dataclass(frozen=True)
class Prompter:
    """Writes the prompt of a row.

    Attributes:
        task: one of TASKS.
        exemplars: rows with their rationale and label, shown before the question.
        instructions: replaces the template's own; empty keeps them.
        label_given: whether the gold label is shown and its rationale asked for.
    """

    task: str
    exemplars: tuple[Example, ...]
    instructions: str
    label_given: bool
    _template: Any

    def prompt(self, row: Example) -> str:
        """The whole text that the teacher reads, as one message of the user.

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
                f"row {row.id!r}: {len(row.choices)} choices, the letters end at"
                f" {len(LETTERS)}; `task={GENERIC}` needs none"
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
        """Tokens of an answer as long as the exemplars' (estimated); 60 where there are none."""
        if not self.exemplars:
            return 60
        lengths = [len(e.rationale) + len(self._answer(e)) + 20 for e in self.exemplars]
        return estimate_tokens(sum(lengths) // len(lengths))


def estimate_tokens(characters: int) -> int:
    """Tokens of so many characters, at CHARACTERS_PER_TOKEN: `estimate_tokens(10)` is 3."""
    return -(-characters // CHARACTERS_PER_TOKEN)


def with_choices(row: Example, *, lettered: bool) -> str:
    """The input, and the choices below it unless it lists them itself.

    With letters as the paper's CQA files have them: `Answer Choices:` and a line `(a) ...` for each.
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
    """The template of a task with its exemplars.

    Args:
        task: one of TASKS.
        exemplars: JSON lines {"input", "rationale", "label", "choices"?} instead of the task's own.
        instructions: text instead of the template's.
        choices: of exemplars that have none of their own.
        label_given: see `Prompter`.

    Raises:
        InputError: an unknown task, a missing library, or exemplars that cannot be used.
    """
    one_of("task", task, TASKS)
    try:
        import jinja2
    except ImportError:
        raise InputError(
            "annotate needs jinja2, which is not installed: pip install 'stepdistill-jax[teacher]'"
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
