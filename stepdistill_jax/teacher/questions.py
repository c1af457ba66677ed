"""Reads the questions for a teacher, which are rows of the generic format with or without a label."""

import dataclasses
import os
from collections.abc import Iterator, Mapping, Sequence

from stepdistill_jax.data.example import Example
from stepdistill_jax.data.rows import UniqueIds, read_example, read_rows

ASKED = {"input": ""}  # every row needs these fields
LABEL_GIVEN = ASKED | {
    "label": "; `label_given` needs a label in every row: leave out the row or the option"
}


def read_questions(
    path: os.PathLike | str,
    choices: Sequence[str] = (),
    *,
    needs: Mapping[str, str] = ASKED,
    ids: UniqueIds | None = None,
) -> Iterator[Example]:
    """Yields the rows of a JSON-lines file, one at a time.

    Args:
        choices: choices for rows without the field `choices`.
        needs: fields that every row must have; see `read_example`.
        ids: refuses duplicate ids; None allows them.

    Raises:
        InputError: a row is bad, or there are no rows. The message names the file, line and field.
    """
    for row in read_rows(path):
        found = read_example(row, needs=needs)
        if ids is not None:
            ids.add(found.id, row)
        if choices and not found.choices:
            found = dataclasses.replace(found, choices=tuple(choices))
        yield found


def check_questions(
    path: os.PathLike | str, choices: Sequence[str], *, label_given: bool
) -> Iterator[Example]:
    """Checks and yields each row of a file.

    Raises:
        InputError: as for `read_questions`; or an id is repeated, or `label_given` is true and a row has no label.
    """
    needs = LABEL_GIVEN if label_given else ASKED
    return read_questions(path, choices, needs=needs, ids=UniqueIds())
