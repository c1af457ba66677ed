"""What e-SNLI and ANLI have in common: a premise, a hypothesis, and one of three labels."""

from stepdistill_jax.data.nli_rationale import LABELS
from stepdistill_jax.data.rows import JsonRow
from stepdistill_jax.errors import InputError

_GOLD = {name: label for i, label in enumerate(LABELS) for name in (label, label[0], str(i))}
_NO_GOLD = ("", "-", "-1")  # SNLI's rows on which the annotators did not agree


def question(row: JsonRow) -> str:
    """The input: `premise: ... hypothesis: ...`.

    A premise is called `context` in ANLI's own files and in its TFDS export.
    """
    premise = "context" if "context" in row.fields and "premise" not in row.fields else "premise"
    return f"premise: {row.text(premise)} hypothesis: {row.text('hypothesis')}"


def gold(row: JsonRow) -> str:
    """The gold label in words; empty where the row has none.

    It is 0, 1 or 2 (entailment, neutral, contradiction), a word, or its first letter, in the field
    `label`, or `gold_label` as TFDS calls it.

    Raises:
        InputError: another value, or no such field.
    """
    name = "gold_label" if "gold_label" in row.fields and "label" not in row.fields else "label"
    if name not in row.fields:
        raise InputError(f"{row.where}: no field {name!r} (found: {row.names})")
    value = row.optional_text(name)
    if value in _NO_GOLD:
        return ""
    if value not in _GOLD:
        raise InputError(
            f"{row.where}: the field {name!r} must be 0, 1, 2 or {', '.join(LABELS)}, got {value!r}"
        )
    return _GOLD[value]
