"""Reads CommonsenseQA: the paper's files with PaLM rationales, or an export without rationales."""

import dataclasses
import pathlib

from stepdistill_jax.data.corpora import paper_layout
from stepdistill_jax.data.defects import Defect
from stepdistill_jax.data.example import Example
from stepdistill_jax.data.rationale import LETTERS, parse_choice
from stepdistill_jax.data.reading import CheckedExample, Reading
from stepdistill_jax.data.rows import JsonRow, UniqueIds
from stepdistill_jax.errors import InputError

VERSION = 2


def question_with_choices(question: str, choices: tuple[str, ...]) -> str:
    """Returns the input: the question, `Answer Choices:`, and a line `(a) ...` for each choice."""
    lines = (f"({letter}) {choice}" for letter, choice in zip(LETTERS, choices, strict=False))
    return "\n".join([question, "Answer Choices:", *lines])


def read(source: pathlib.Path, *, teacher: bool = True) -> Reading:
    """Reads cqa_{train,valid,test}.json and llm/; see `paper_layout.read`.

    A row is {"id"?, "question", "choices": [...], "answer", "abstractive_explanation"?} or, in an export,
    {"id", "question", "choices": {"label": [...], "text": [...]}, "answerKey"}.

    In the answer `(b) bank`, `teacher_accuracy` judges `(b)`, and `teacher_accuracy_by_text` judges `bank`.
    """
    return paper_layout.read("cqa", VERSION, "text_match", source, teacher=teacher, to_row=_row)


def _row(
    row: JsonRow, completion: paper_layout.Completion, ids: UniqueIds
) -> CheckedExample | None:
    example_id = ids.of(row)
    if "answerKey" in row.fields and "answer" not in row.fields:
        row = _as_in_the_paper(row)
        if not row.fields["answer"]:
            return None
    label, choices = row.text("answer"), row.texts("choices")
    if len(choices) > len(LETTERS):
        raise InputError(
            f"{row.where}: the field 'choices' must have at most {len(LETTERS)} items, got {len(choices)}"
        )
    question = question_with_choices(row.text("question", strip=False), choices)
    defects: tuple[Defect, ...] = ()
    if len(set(choices)) < len(choices):
        defects += (Defect("repeated_choices", row.file, row.line, ", ".join(choices)),)
    if label not in choices:
        defects += (Defect("gold_not_a_choice", row.file, row.line, label),)
    # the published accuracies compare with the choices as the file has them, blanks included
    written = [str(choice) for choice in row.fields.get("choices") or ()]
    explanation = row.optional_text("abstractive_explanation")
    return paper_layout.judged(
        Example(example_id, question, label, choices=choices),
        completion,
        lambda text: parse_choice(text, written),
        right=lambda answer: answer.strip() == label,
        defects=defects,
        by_text=True,
        human=(explanation,) if explanation else (),
    )


def _as_in_the_paper(row: JsonRow) -> JsonRow:
    """Converts a row of Hugging Face's `commonsense_qa` to the paper's fields. A missing answer becomes ""."""
    if not isinstance(choices := row.fields.get("choices"), dict):
        raise InputError(
            f"{row.where}: in a row with 'answerKey', the field 'choices' must be an object with the lists"
            " 'label' and 'text'"
        )
    inside = JsonRow(choices, f"{row.where}: in choices")
    letters, texts = inside.texts("label"), inside.texts("text")
    key = row.optional_text("answerKey")
    if len(letters) != len(texts):
        raise InputError(f"{inside.where}: {len(letters)} labels, but {len(texts)} texts")
    if key and key not in letters:
        raise InputError(
            f"{row.where}: the field 'answerKey' is {key!r}, but the choices are"
            f" {', '.join(letters) or 'none'}"
        )
    answer = texts[letters.index(key)] if key else ""
    return dataclasses.replace(row, fields={**row.fields, "choices": list(texts), "answer": answer})
