"""Reads e-SNLI from the paper's files or from a Hugging Face or TFDS export, with all its explanations."""

import pathlib

from stepdistill_jax.data.corpora import nli, paper_layout
from stepdistill_jax.data.example import Example
from stepdistill_jax.data.nli_rationale import parse_esnli
from stepdistill_jax.data.reading import CheckedExample, Reading
from stepdistill_jax.data.rows import JsonRow, UniqueIds

VERSION = 1
EXPLANATIONS = ("explanation_1", "explanation_2", "explanation_3")


def read(source: pathlib.Path, *, teacher: bool = True) -> Reading:
    """Reads esnli_{train,valid,test}.json and llm/; see `paper_layout.read`.

    A row is {"premise", "hypothesis", "label": 0, 1 or 2, "explanation_1"?, ..., "explanation_3"?}. The id of a
    row is its 1-based index in the file.
    """
    return paper_layout.read("esnli", VERSION, "text_match", source, teacher=teacher, to_row=_row)


def _row(row: JsonRow, completion: paper_layout.Completion, _: UniqueIds) -> CheckedExample | None:
    label = nli.gold(row)
    if not label:
        return None
    explanations = map(row.optional_text, EXPLANATIONS)
    return paper_layout.judged(
        Example(str(row.number), nli.question(row), label),
        completion,
        parse_esnli,
        right=lambda answer: answer == label,
        human=tuple(text for text in explanations if text),
    )
