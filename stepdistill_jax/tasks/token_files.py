"""Writes the files of a token store, with at most `AT_ONCE` examples in memory."""

import contextlib
import itertools
import json
import pathlib
from collections.abc import Iterable, Sequence
from typing import IO, TYPE_CHECKING

import numpy as np

from stepdistill_jax.runtime.fingerprints import hash64

if TYPE_CHECKING:
    from stepdistill_jax.tasks.token_store import TokenExample

FEATURES = ("inputs", "targets")
ROW_IDS = "row_ids"
AT_ONCE = 1024  # number of examples in memory


def file_name(objective: int, feature: str, what: str) -> str:
    """Returns the name of a feature's file. `what` is `ids` or `offsets`; `objective` is an index from 0."""
    return f"{objective + 1}-{feature}.{what}"


def write_files(
    folder: pathlib.Path, num_objectives: int, examples: Iterable["TokenExample"]
) -> tuple[int, dict[str, int]]:
    """Writes examples to disk.

    Returns:
        (number of examples, {name of a file of ids: largest id in it}).
    """
    examples, count = iter(examples), 0
    with contextlib.ExitStack() as stack:

        def new_file(name: str) -> IO[bytes]:
            return stack.enter_context(open(folder / name, "wb"))

        columns = {
            (ids := file_name(i, feature, "ids")): _Column(
                i, side, new_file(ids), new_file(file_name(i, feature, "offsets"))
            )
            for i in range(num_objectives)
            for side, feature in enumerate(FEATURES)
        }
        weights, labels = new_file("weights"), new_file("labels.jsonl")
        while several := list(itertools.islice(examples, AT_ONCE)):
            for column in columns.values():
                column.write(several)
            weights.write(np.array([e.weight for e in several], np.float32).tobytes())
            for example in several:
                labels.write(json.dumps(example.label_text, ensure_ascii=False).encode() + b"\n")
            if hashes := [hash64(e.row_id) for e in several if e.row_id is not None]:
                with open(folder / ROW_IDS, "ab") as f:  # not opened if the rows have no ids
                    f.write(np.array(hashes, np.uint64).tobytes())
            count += len(several)
    return count, {name: column.max_id for name, column in columns.items()}


class _Column:
    """Writes the two files `ids` and `offsets` for one feature of one objective."""

    def __init__(self, objective: int, side: int, ids: IO[bytes], offsets: IO[bytes]):
        self._objective, self._side, self._ids, self._offsets = objective, side, ids, offsets
        self._end = self.max_id = 0
        offsets.write(np.int64(0).tobytes())

    def write(self, examples: Sequence["TokenExample"]) -> None:
        # rows of 3, 0 and 2 ids after an end of 10 append the offsets 13, 13, 15
        rows = [np.asarray(e.rows[self._objective][self._side], np.int32) for e in examples]
        ids, ends = np.concatenate(rows), self._end + np.cumsum([len(row) for row in rows])
        self._ids.write(ids.tobytes())
        self._offsets.write(ends.astype(np.int64).tobytes())
        self._end, self.max_id = int(ends[-1]), max(self.max_id, int(ids.max(initial=0)))
