"""SVAMP with PaLM rationales, in the paper's layout; answers are equations, compared by value."""

import pathlib

from stepdistill_jax.data.example import Defect, Example
from stepdistill_jax.data.rationale import parse_equation
from stepdistill_jax.data.readers import fields, paper_layout
from stepdistill_jax.data.reading import Reading, Row, defect
from stepdistill_jax.text import arithmetic
from stepdistill_jax.text.metrics import value_match

VERSION = 1


def read(source: pathlib.Path, *, teacher: bool = True) -> Reading:
    """Reads svamp_{train,valid,test}.json and llm/; see `paper_layout.read`. An id is the row's number."""
    return paper_layout.read(
        "svamp", VERSION, "value_match", source, teacher=teacher, to_rows=_rows
    )


def _rows(records: list[paper_layout.Record]) -> list[Row]:
    return [_row(record) for record in records]


def _row(record: paper_layout.Record) -> Row:
    row, where = record.fields, record.where
    label = fields.text(row, "label", where)
    question = fields.text(row, "input", where, strip=False)
    defects: list[Defect] = []
    if arithmetic.evaluate(label) is None:
        defects.append(defect("gold_has_no_value", record.file, record.row, label))
    if record.teacher is None:
        return Row(Example(str(record.number), question, label), tuple(defects))
    said = record.teacher
    parsed = parse_equation(said.text)
    defects += [defect(kind, said.file, said.row, said.text) for kind in parsed.problems]
    right = {
        "teacher_accuracy": value_match(parsed.answer, label),
        "teacher_accuracy_repaired": value_match(parsed.repaired, label),
    }
    example = Example(
        str(record.number), question, label, parsed.rationale, llm_label=parsed.repaired
    )
    return Row(example, tuple(defects), right)
