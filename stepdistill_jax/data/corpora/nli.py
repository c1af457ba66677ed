"""What e-SNLI and ANLI have in common: a premise, a hypothesis, and one of three labels."""

from typing import Any

from stepdistill_jax.data.corpora import fields
from stepdistill_jax.data.nli_rationale import LABELS
from stepdistill_jax.errors import InputError

_GOLD = {name: label for i, label in enumerate(LABELS) for name in (label, label[0], str(i))}
_NO_GOLD = ("", "-", "-1")  # SNLI's rows on which the annotators did not agree


def question(row: dict[str, Any], where: str) -> str:
    """The input: `premise: ... hypothesis: ...`.

    A premise is called `context` in ANLI's own files and in its TFDS export.
    """
    premise = "context" if "context" in row and "premise" not in row else "premise"
    return (
        f"premise: {fields.text(row, premise, where)}"
        f" hypothesis: {fields.text(row, 'hypothesis', where)}"
    )


def gold(row: dict[str, Any], where: str) -> str:
    """The gold label in words; empty where the row has none.

    It is 0, 1 or 2 (entailment, neutral, contradiction), a word, or its first letter, in the field
    `label`, or `gold_label` as TFDS calls it.

    Raises:
        InputError: another value, or no such field.
    """
    name = "gold_label" if "gold_label" in row and "label" not in row else "label"
    if name not in row:
        raise InputError(f"{where}: no field {name!r} (found: {fields.names_of(row)})")
    value = fields.optional_text(row, name, where)
    if value in _NO_GOLD:
        return ""
    if value not in _GOLD:
        raise InputError(
            f"{where}: the field {name!r} must be 0, 1, 2 or {', '.join(LABELS)}, got {value!r}"
        )
    return _GOLD[value]
