"""Reads round 1 of ANLI, in the paper's layout or as an export."""

import pathlib

from stepdistill_jax.data.corpora import nli, paper_layout
from stepdistill_jax.data.example import Example
from stepdistill_jax.data.nli_rationale import parse_anli
from stepdistill_jax.data.reading import CheckedExample, Reading
from stepdistill_jax.data.rows import JsonRow, UniqueIds

VERSION = 1


def read(source: pathlib.Path, *, teacher: bool = True) -> Reading:
    """Reads anli1_{train,valid,test}.json and llm/; see `paper_layout.read`.

    A row is {"uid"?, "premise", "hypothesis", "label": 0, 1 or 2, "reason"?}. The author of the hypothesis
    wrote the reason.
    """
    return paper_layout.read(
        "anli", VERSION, "text_match", source, teacher=teacher, to_row=_row, prefix="anli1"
    )


def _row(
    row: JsonRow, completion: paper_layout.Completion, ids: UniqueIds
) -> CheckedExample | None:
    example_id, label = ids.of(row, "uid"), nli.gold(row)
    if not label:
        return None
    reason = row.optional_text("reason")
    return paper_layout.judged(
        Example(example_id, nli.question(row), label),
        completion,
        parse_anli,
        right=lambda answer: answer == label,
        human=(reason,) if reason else (),
    )
