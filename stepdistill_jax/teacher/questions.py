"""Reads questions for a teacher: rows of the generic format, with or without a label."""

import dataclasses
import os
from collections.abc import Iterator, Mapping, Sequence

from stepdistill_jax.data.example import Example
from stepdistill_jax.data.rows import UniqueIds, read_example, read_rows

ASKED = {"input": ""}  # every row needs these fields
LABEL_GIVEN = ASKED | {
    "label": "; `label_given` explains known labels: leave out the row or the option"
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
        path: path of the file.
        choices: choices of rows without their own.
        needs: see `read_example`.
        ids: if given, refuses duplicate ids, as `prepare jsonl` does.

    Raises:
        InputError: a row is bad, or there are no rows; names file, line and field.
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
    """Yields the rows of `read_questions`, after checks that must precede the first paid answer.

    Raises:
        InputError: see `read_questions`; also if an id is repeated, or, with `label_given`, a row has no
            label.
    """
    needs = LABEL_GIVEN if label_given else ASKED
    return read_questions(path, choices, needs=needs, ids=UniqueIds())
