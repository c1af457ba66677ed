"""Reads the fields that e-SNLI and ANLI share: premise, hypothesis and label."""

from stepdistill_jax.data.nli_rationale import LABELS
from stepdistill_jax.data.rows import JsonRow
from stepdistill_jax.errors import InputError

_GOLD = {name: label for i, label in enumerate(LABELS) for name in (label, label[0], str(i))}
_NO_GOLD = ("", "-", "-1")  # labels of SNLI rows on which the annotators did not agree


def question(row: JsonRow) -> str:
    """Returns the input: `premise: ... hypothesis: ...`.

    ANLI's own files and its TFDS export call the premise `context`.
    """
    premise = "context" if "context" in row.fields and "premise" not in row.fields else "premise"
    return f"premise: {row.text(premise)} hypothesis: {row.text('hypothesis')}"


def gold(row: JsonRow) -> str:
    """Returns the gold label as a word; "" if the row has none.

    The field `label` or `gold_label` has 0, 1, 2, the word (entailment, neutral, contradiction) or its first letter.

    Raises:
        InputError: the field is missing or has another value.
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
