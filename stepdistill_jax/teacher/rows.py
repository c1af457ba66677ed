"""Questions for a teacher: the rows of a generic JSON-lines dataset, a label where there is one."""

import dataclasses
import os
from collections.abc import Iterator, Sequence
from typing import Any

from stepdistill_jax.data.corpora import fields
from stepdistill_jax.errors import InputError
from stepdistill_jax.runtime.files import read_jsonl


@dataclasses.dataclass(frozen=True)
class Row:
    """One question.

    Attributes:
        number: of the row, from 1.
        id: as text; the number where the row has none.
        input: as the student will read it.
        label: the gold answer; empty where it is not known.
        choices: the allowed answers; empty when the answer is free.
        weight: of the example's loss.
        rationales: what the row has already, as `rationales` of the generic format.
        rationale: of an exemplar, the one that is shown.
        llm_label: what a teacher said before, if the row has it.
    """

    number: int
    id: str
    input: str
    label: str = ""
    choices: tuple[str, ...] = ()
    weight: float = 1.0
    rationales: tuple[dict[str, str], ...] = ()
    rationale: str = ""
    llm_label: str = ""


def read_rows(path: os.PathLike | str, choices: Sequence[str] = ()) -> Iterator[Row]:
    """Each row of a JSON-lines file, one at a time.

    Args:
        path: rows {"input", "id"?, "label"?, "choices"?, "weight"?, "rationale"?, "rationales"?,
            "llm_label"?}.
        choices: of rows that have none of their own.

    Raises:
        InputError: a bad row; names file, line and field.
    """
    for number, (line, found) in enumerate(read_jsonl(path), 1):
        yield parse_row(found, number, f"{path}:{line}", choices)


def parse_row(row: dict[str, Any], number: int, where: str, choices: Sequence[str] = ()) -> Row:
    """The question of a JSON object; `where` is its `file:line`."""
    rationale = fields.optional_text(row, "rationale", where)
    rationales = _rationales(row, where)
    if rationale and rationale not in (r["text"] for r in rationales):
        rationales = ({"text": rationale}, *rationales)
    return Row(
        number,
        fields.optional_text(row, "id", where) or str(number),
        fields.text(row, "input", where, strip=False),
        fields.optional_text(row, "label", where),
        fields.texts(row, "choices", where) or tuple(choices),
        fields.weight(row, "weight", where),
        rationales,
        rationale,
        fields.optional_text(row, "llm_label", where),
    )


def _rationales(row: dict[str, Any], where: str) -> tuple[dict[str, str], ...]:
    values = row.get("rationales")
    if values is None:
        return ()
    if not isinstance(values, list) or not all(isinstance(value, dict) for value in values):
        raise InputError(f"{where}: the field 'rationales' must be a list of objects")
    found = []
    for i, value in enumerate(values):
        inside = f"{where}: in rationales[{i}]"
        texts = {"text": fields.text(value, "text", inside)}
        texts |= {name: fields.optional_text(value, name, inside) for name in ("source", "label")}
        found.append({name: text for name, text in texts.items() if text})
    return tuple(found)


def check_rows(
    path: os.PathLike | str, choices: Sequence[str], *, label_given: bool
) -> Iterator[Row]:
    """`read_rows`, and what would only be found after the answers were paid for.

    An id that stands twice is one that `prepare jsonl` refuses. Costs about 100 bytes a row.

    Raises:
        InputError: also for such an id, and for a row without a label where one is explained.
    """
    seen: set[int] = set()
    for row in read_rows(path, choices):
        if (key := hash(row.id)) in seen:
            raise InputError(
                f"{path}: row {row.number}: the id {row.id!r} stands twice; a missing id is the"
                " row's number"
            )
        seen.add(key)
        if label_given and not row.label:
            raise InputError(
                f"{path}: row {row.number} (id {row.id!r}) has no label: --label-given explains"
                " known labels; leave the row out, or the flag"
            )
        yield row
    if not seen:
        raise InputError(f"{path}: no rows in it")
