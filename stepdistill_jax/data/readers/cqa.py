"""CommonsenseQA with PaLM rationales, in the paper's layout."""

import pathlib

from stepdistill_jax.data.example import Defect, Example
from stepdistill_jax.data.rationale import LETTERS, parse_choice
from stepdistill_jax.data.readers import fields, paper_layout
from stepdistill_jax.data.reading import Reading, Row, defect

VERSION = 1


def question_with_choices(question: str, choices: tuple[str, ...]) -> str:
    """The input: the question, `Answer Choices:`, and a line `(a) ...` for each choice."""
    lines = (f"({letter}) {choice}" for letter, choice in zip(LETTERS, choices, strict=False))
    return "\n".join([question, "Answer Choices:", *lines])


def read(source: pathlib.Path, *, teacher: bool = True) -> Reading:
    """Reads cqa_{train,valid,test}.json and llm/; see `paper_layout.read`.

    `teacher_accuracy` goes by the letter, `teacher_accuracy_by_text` by the text after it.
    """
    return paper_layout.read("cqa", VERSION, "text_match", source, teacher=teacher, to_rows=_rows)


def _rows(records: list[paper_layout.Record]) -> list[Row]:
    ids = fields.UniqueIds()
    return [_row(record, ids) for record in records]


def _row(record: paper_layout.Record, ids: fields.UniqueIds) -> Row:
    row, where = record.fields, record.where
    example_id = ids.add(fields.optional_text(row, "id", where) or str(record.number), where)
    label = fields.text(row, "answer", where)
    choices = fields.texts(row, "choices", where)
    question = question_with_choices(fields.text(row, "question", where, strip=False), choices)
    defects: list[Defect] = []
    if len(set(choices)) < len(choices):
        defects.append(defect("repeated_choices", record.file, record.row, ", ".join(choices)))
    if label not in choices:
        defects.append(defect("gold_not_a_choice", record.file, record.row, label))
    if record.teacher is None:
        return Row(Example(example_id, question, label, choices=choices), tuple(defects))
    said = record.teacher
    # the published figures compare with the choices as they stand in the file, blanks included
    parsed = parse_choice(said.text, row.get("choices") or ())
    defects += [defect(kind, said.file, said.row, said.text) for kind in parsed.problems]
    right = {
        "teacher_accuracy": parsed.answer.strip() == label,
        "teacher_accuracy_by_text": parsed.answer_text == label,
        "teacher_accuracy_repaired": parsed.repaired.strip() == label,
    }
    example = Example(
        example_id, question, label, parsed.rationale, (), parsed.repaired.strip(), choices=choices
    )
    return Row(example, tuple(defects), right)
