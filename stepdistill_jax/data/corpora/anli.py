"""Round 1 of ANLI, in the paper's layout or as an export."""

import pathlib

from stepdistill_jax.data.corpora import fields, nli, paper_layout
from stepdistill_jax.data.example import Example
from stepdistill_jax.data.nli_rationale import parse_anli
from stepdistill_jax.data.reading import Reading, Row

VERSION = 1


def read(source: pathlib.Path, *, teacher: bool = True) -> Reading:
    """Reads anli1_{train,valid,test}.json and llm/; see `paper_layout.read`.

    A row is {"uid"?, "premise", "hypothesis", "label": 0, 1 or 2, "reason"?}; the reason is the
    explanation of the person who wrote the hypothesis.
    """
    return paper_layout.read(
        "anli", VERSION, "text_match", source, teacher=teacher, to_row=_row, prefix="anli1"
    )


def _row(record: paper_layout.Record, ids: fields.UniqueIds) -> Row | None:
    row, where = record.fields, record.where
    example_id = ids.add(fields.optional_text(row, "uid", where) or str(record.number), where)
    label = nli.gold(row, where)
    if not label:
        return None
    reason = fields.optional_text(row, "reason", where)
    return paper_layout.judged(
        Example(example_id, nli.question(row, where), label),
        record,
        None if record.teacher is None else parse_anli(record.teacher.text),
        right=lambda answer: answer == label,
        human=(reason,) if reason else (),
    )
