"""Input rows of `predict`: those of a generic dataset, read one by one, a bad one named by its line."""

import dataclasses
import os
from collections.abc import Iterator
from typing import Any

from stepdistill_jax.data.readers import fields
from stepdistill_jax.errors import InputError
from stepdistill_jax.files import json_lines

OPTIONAL_TEXTS = ("label", "rationale", "llm_label")


@dataclasses.dataclass(frozen=True)
class Row:
    """One question.

    Attributes:
        id: as given (text or number), so that answers can be joined to questions by it; the row's
            number from 1, as text, where it has none.
        fields: texts of the row that a template may name; `input` is always there.
        choices: the allowed answers; empty when the answer is free.
    """

    id: str | int
    fields: dict[str, str]
    choices: tuple[str, ...] = ()

    @property
    def label(self) -> str:
        """The gold answer; empty where it is not known."""
        return self.fields.get("label", "")


def read_rows(path: os.PathLike | str) -> Iterator[Row | InputError]:
    """Each row of a JSON-lines file, or what is wrong with it; blank lines are skipped.

    Raises:
        InputError: the file cannot be read.
    """
    for number, (line, found) in enumerate(json_lines(path), 1):
        if isinstance(found, InputError):
            yield found
            continue
        try:
            yield parse_row(found, number, f"{path}:{line}")
        except InputError as error:
            yield error


def parse_row(row: dict[str, Any], number: int, where: str) -> Row:
    """The question of a JSON object; its texts are read as those of a dataset are.

    Args:
        row: the object.
        number: of the row, from 1.
        where: `file:line`.

    Raises:
        InputError: a field that is missing or of a wrong type.
    """
    texts = {"input": fields.text(row, "input", where, strip=False, blank=True)}
    texts |= {name: fields.optional_text(row, name, where) for name in OPTIONAL_TEXTS}
    has_id = fields.optional_text(row, "id", where) != ""
    return Row(
        row["id"] if has_id else str(number),
        {name: text for name, text in texts.items() if text or name == "input"},
        fields.texts(row, "choices", where),
    )


def count_rows(path: os.PathLike | str, on_error: str) -> int:
    """Number of good rows: a bad one in the middle is known before the first is decoded.

    Args:
        path: a JSON-lines file.
        on_error: `stop` or `skip`.

    Raises:
        InputError: the file cannot be read, or under `stop` the first bad row: file and line.
    """
    good = 0
    for row in read_rows(path):
        if isinstance(row, Row):
            good += 1
        elif on_error == "stop":
            raise InputError(f"{row} (--on-error skip goes on without such rows)")
    return good
