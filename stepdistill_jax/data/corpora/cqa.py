"""CommonsenseQA with PaLM rationales, in the paper's layout or as an export without them."""

import pathlib

from stepdistill_jax.data.corpora import fields, paper_layout
from stepdistill_jax.data.example import Defect, Example
from stepdistill_jax.data.rationale import LETTERS, parse_choice
from stepdistill_jax.data.reading import Reading, Row, defect
from stepdistill_jax.errors import InputError

VERSION = 2


def question_with_choices(question: str, choices: tuple[str, ...]) -> str:
    """The input: the question, `Answer Choices:`, and a line `(a) ...` for each choice."""
    lines = (f"({letter}) {choice}" for letter, choice in zip(LETTERS, choices, strict=False))
    return "\n".join([question, "Answer Choices:", *lines])


def read(source: pathlib.Path, *, teacher: bool = True) -> Reading:
    """Reads cqa_{train,valid,test}.json and llm/; see `paper_layout.read`.

    A row is {"id"?, "question", "choices": [...], "answer", "abstractive_explanation"?}, or an
    export's {"id", "question", "choices": {"label": [...], "text": [...]}, "answerKey"}. The
    explanation is CoS-E's, by people.

    `teacher_accuracy` goes by the letter, `teacher_accuracy_by_text` by the text after it.
    """
    return paper_layout.read("cqa", VERSION, "text_match", source, teacher=teacher, to_row=_row)


def _row(record: paper_layout.Record, ids: fields.UniqueIds) -> Row | None:
    row, where = record.fields, record.where
    example_id = ids.add(fields.optional_text(row, "id", where) or str(record.number), where)
    if "answerKey" in row and "answer" not in row:
        row = _as_in_the_paper(row, where)
        if not row["answer"]:
            return None
    label = fields.text(row, "answer", where)
    choices = fields.texts(row, "choices", where)
    if len(choices) > len(LETTERS):
        raise InputError(
            f"{where}: the field 'choices' has {len(choices)} of them, the letters end at"
            f" {len(LETTERS)}"
        )
    question = question_with_choices(fields.text(row, "question", where, strip=False), choices)
    defects: tuple[Defect, ...] = ()
    if len(set(choices)) < len(choices):
        text = ", ".join(choices)
        defects += (defect("repeated_choices", record.file, record.row, text),)
    if label not in choices:
        defects += (defect("gold_not_a_choice", record.file, record.row, label),)
    parsed = None
    if record.teacher is not None:
        # the published figures compare with the choices as they stand in the file, blanks included
        parsed = parse_choice(record.teacher.text, [str(c) for c in row.get("choices") or ()])
    explanation = fields.optional_text(row, "abstractive_explanation", where)
    return paper_layout.judged(
        Example(example_id, question, label, choices=choices),
        record,
        parsed,
        right=lambda answer: answer.strip() == label,
        defects=defects,
        by_text=True,
        human=(explanation,) if explanation else (),
    )


def _as_in_the_paper(row: dict, where: str) -> dict:
    """A row of Hugging Face's `commonsense_qa` with the paper's fields; no answer is an empty one."""
    choices = row.get("choices")
    if not isinstance(choices, dict):
        raise InputError(
            f"{where}: beside 'answerKey' the field 'choices' must be an object with label and text"
        )
    inside = f"{where}: in choices"
    letters, texts = (fields.texts(choices, name, inside) for name in ("label", "text"))
    key = fields.optional_text(row, "answerKey", where)
    if len(letters) != len(texts):
        raise InputError(f"{inside}: {len(letters)} labels, but {len(texts)} texts")
    if key and key not in letters:
        raise InputError(
            f"{where}: the field 'answerKey' is {key!r}, the choices are"
            f" {', '.join(letters) or 'none'}"
        )
    answer = texts[letters.index(key)] if key else ""
    return {**row, "choices": list(texts), "answer": answer}
