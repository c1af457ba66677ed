"""Questions for a teacher: rows of the generic format, with a label where there is one."""

import dataclasses
import os
from collections.abc import Iterator, Mapping, Sequence

from stepdistill_jax.data.example import Example
from stepdistill_jax.data.rows import UniqueIds, read_example, read_rows

ASKED = {"input": ""}  # needed of every row
LABEL_GIVEN = ASKED | {
    "label": "; `label_given` explains known labels: leave the row out, or the option"
}


def read_questions(
    path: os.PathLike | str,
    choices: Sequence[str] = (),
    *,
    needs: Mapping[str, str] = ASKED,
    ids: UniqueIds | None = None,
) -> Iterator[Example]:
    """Yields each row of a JSON-lines file, one at a time.

    Args:
        path: of the file.
        choices: of rows that have none of their own.
        needs: as for `read_example`.
        ids: refuses an id that stands twice, as `prepare jsonl` does.

    Raises:
        InputError: a bad row, or none; names file, line and field.
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
    """`read_questions`, and what would only be found after the answers were paid for.

    Raises:
        InputError: also for an id that stands twice, and for a row without a label where one is
            explained.
    """
    needs = LABEL_GIVEN if label_given else ASKED
    return read_questions(path, choices, needs=needs, ids=UniqueIds())
