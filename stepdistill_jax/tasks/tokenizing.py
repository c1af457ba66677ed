"""Tokenises a task once and stores the tokens, which later runs open without TensorFlow."""

import dataclasses
import functools
import inspect
import itertools
import logging
import math
import pathlib
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from stepdistill_jax.data.builder import tensorflow
from stepdistill_jax.errors import InputError
from stepdistill_jax.runtime.fingerprints import digest, hash64
from stepdistill_jax.runtime.folders import sole_writer
from stepdistill_jax.runtime.progress import progress
from stepdistill_jax.tasks.prepared_rows import PreparedRows
from stepdistill_jax.tasks.preprocessors import LABEL_TEXT
from stepdistill_jax.tasks.sources import files_of, named_errors, rows_digest
from stepdistill_jax.tasks.token_store import (
    FORMAT_VERSION,
    TokenExample,
    TokenStore,
    is_same,
    open_store,
    own_tag,
    write_store,
)

logger = logging.getLogger(__name__)

FOLDER = "token_store"
ID = "id"  # rows of several tasks are paired if their values of this feature are equal
COMPARED_ROWS = 32  # first rows that each start tokenises again to compare them
MAX_ID = 10**7  # more than ten times the size of any vocabulary


def stored_tokens(
    make_task: Callable[[], Any],
    *,
    name: str,
    split: str,
    objectives: Sequence[str],
    prefixes: Sequence[str],
    key: Any,
    data_dir: pathlib.Path,
    compare: bool,
) -> TokenStore:
    """Returns a split's tokens from disk, after tokenising the split if necessary.

    One process tokenises the split, while others wait.

    Args:
        make_task: returns the `seqio.Task` or the `PreparedRows`. It is called only if the rows must be read.
        name: name of the task, for the folder and messages.
        prefixes: prefix of each objective's features `PREFIXinputs` and `PREFIXtargets`.
        key: JSON-like value that must differ if the tokens differ. If `compare` is true, a change of only the
            rows need not change the key.
        data_dir: the store is a folder in `data_dir/token_store/`.
        compare: whether to tokenise the split again if the source's rows have changed. Each call then
            tokenises the first 32 rows. If the source does not read files, each call also reads all rows.

    Raises:
        InputError: the task cannot be read, its rows differ between two readings, a row has targets but no inputs,
            or a row's weight is not above 0.
    """
    key = digest([FORMAT_VERSION, key, split, list(objectives)])
    folder = re.sub(r"[^\w.-]", "_", f"{name}-{split}") + f"-{key[:16]}"
    directory = data_dir / FOLDER / folder
    found = open_store(directory)
    if found is not None and not compare:
        return found
    task = make_task()
    reading = Reading(task, split, prefixes)
    if found is not None and reading.is_kept_in(found):
        return found
    with sole_writer(directory, own_tag(), wait=True):
        theirs = open_store(directory)  # written by a process that held the lock before
        if (
            theirs is not None
            and (found is None or not is_same(theirs, found))
            and (not compare or reading.is_kept_in(theirs))
        ):
            return theirs
        about: dict[str, Any] = {"task": name, "split": split}
        if compare:
            # reads the source before tokenising, so that the next start notices a change in between
            about["source"] = reading.digest
            reading.check_repeats()
        if isinstance(task, PreparedRows):
            total, examples = len(task), iter(task)
        else:
            total = task.source.num_input_examples(split)
            examples = read_tokens(task, split, prefixes)
        with progress(total, f"tokenising {name} {split}") as bar:

            def counted() -> Iterator[TokenExample]:
                for example in examples:
                    yield example
                    bar.update(1)

            return write_store(directory, objectives, counted(), about)


@dataclasses.dataclass(frozen=True)
class Reading:
    """The rows that a split of a `seqio.Task` has now, for comparison with a store."""

    task: Any
    split: str
    prefixes: Sequence[str]

    @functools.cached_property
    def digest(self) -> dict[str, Any] | None:
        """Digest of the source's rows (`rows_digest`), or None if the source's files identify the rows (`files_of`)."""
        return self.digest_again()

    def digest_again(self) -> dict[str, Any] | None:
        with named_errors(self.task.name, self.task.source, self.split):
            if files_of(self.task.source, self.split):
                return None
            return rows_digest(self.task.source, self.split, _seed(self.task))

    def first_rows(self) -> list[list[list[int]]]:
        rows = itertools.islice(read_tokens(self.task, self.split, self.prefixes), COMPARED_ROWS)
        found = []
        for example in rows:
            found.append([list(map(int, ids)) for pair in example.rows for ids in pair])
            if example.row_id is not None:
                found[-1].append([hash64(example.row_id)])
        return found

    @functools.cached_property
    def _repeats(self) -> bool:
        return self.first_rows() == self.first_rows() and self.digest == self.digest_again()

    def check_repeats(self) -> None:
        """Checks that the rows are the same when they are read twice.

        With random rows, a resumed run would train on different rows.

        Raises:
            InputError: two readings give different source rows, or different tokens for the first rows.
        """
        if self._repeats:
            return
        raise InputError(
            f"task {self.task.name!r}: the rows of split {self.split!r} differ between two"
            " readings. Write the rows to a file once, or seed whatever is random: wrap a preprocessor"
            " in `seqio.map_over_dataset(num_seeds=1)`, or use the argument `seed` that the source's"
            " function receives"
        )

    def is_kept_in(self, store: TokenStore) -> bool:
        """Returns whether a store has the rows that the source gives now, and logs a warning otherwise.

        Raises:
            InputError: two readings differ (see `check_repeats`).
        """
        first = self.first_rows()
        kept = [
            [rows[feature][i].tolist() for rows in store.rows for feature in ("inputs", "targets")]
            + ([] if store.row_ids is None else [[int(store.row_ids[i])]])
            for i in range(min(COMPARED_ROWS, store.num_examples))
        ]
        source = store.about.get("source")
        if source == self.digest and first == kept:
            return True
        self.check_repeats()
        where = f"they differ after row {COMPARED_ROWS}"
        if first != kept:
            pairs = enumerate(zip(first, kept, strict=False), 1)
            shorter = min(len(first), len(kept))
            where = f"they first differ at row {next((i for i, (a, b) in pairs if a != b), shorter + 1)}"
        if source and self.digest and source["rows"] != self.digest["rows"]:
            where += f"; the source now has {self.digest['rows']} rows instead of {source['rows']}"
        self._warn(
            "the source no longer gives the rows that were tokenised (%s); the split is tokenised"
            " again, and a run on the old rows will refuse to resume",
            where,
        )
        return False

    def _warn(self, text: str, *values: Any) -> None:
        logger.warning("task %r, split %r: " + text, self.task.name, self.split, *values)


def unshuffled(task: Any, split: str) -> Any:
    """Returns a split of a `seqio.Task` as a `tf.data.Dataset`, in source order and not truncated."""
    return task.get_dataset(
        None, split, shuffle=False, seed=_seed(task), num_epochs=1, try_in_mem_cache=False
    )


def read_tokens(task: Any, split: str, prefixes: Sequence[str]) -> Iterator[TokenExample]:
    """Yields the tokens of a `seqio.Task`'s rows, not shuffled and not truncated.

    Raises:
        InputError: SeqIO raises an error, a row has targets but no inputs, or a row's weight is not a finite
            number above 0.
    """
    features = [(f"{p}inputs", f"{p}targets") for p in prefixes]
    with named_errors(task.name, task.source, split):
        dataset = unshuffled(task, split)
        decode = task.output_features[features[0][1]].vocabulary.decode
        label_text = f"{features[0][1]}_pretokenized"
        names = [*itertools.chain.from_iterable(features), "weight", label_text, LABEL_TEXT, ID]
        for number, row in enumerate(_rows(dataset, names), 1):
            where = f"task {task.name!r}, split {split!r}, row {number}"
            ids = [(_ids(row, i, where), _ids(row, t, where)) for i, t in features]
            for (inputs, targets), (name, _) in zip(ids, features, strict=True):
                if len(targets) and not len(inputs):
                    raise InputError(
                        f"{where}: {name!r} is empty; an encoder needs at least one token"
                    )
            weight = float(row.get("weight", 1.0))
            if not (weight > 0 and math.isfinite(weight)):
                raise InputError(f"{where}: the field 'weight' must be above 0, got {weight}")
            text = row.get(LABEL_TEXT, row.get(label_text))
            if isinstance(text, bytes):
                text = text.decode()
            elif not isinstance(text, str):
                text = decode(ids[0][1].tolist())
            yield TokenExample(ids, weight, text, _row_id(row.get(ID)))


def _rows(dataset: Any, names: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Yields a dataset's rows as dicts of NumPy arrays.

    A row has the features in `names`, except those that the dataset lacks. It may have other features as well.
    """
    # padded batches are faster than single rows; the padding is removed at the end
    spec, tf = dataset.element_spec, tensorflow()
    names = [name for name in names if name in spec]
    plain = all(isinstance(spec[n], tf.TensorSpec) and spec[n].shape.rank in (0, 1) for n in names)
    if not (names and plain):
        yield from dataset.as_numpy_iterator()
        return
    vectors = [name for name in names if spec[name].shape.rank == 1]

    @tf.autograph.experimental.do_not_convert
    def with_lengths(row: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        return {n: row[n] for n in names}, {n: tf.size(row[n]) for n in vectors}

    shapes = {n: [None] if n in vectors else [] for n in names}, {n: [] for n in vectors}
    batches = dataset.map(with_lengths).padded_batch(COMPARED_ROWS, padded_shapes=shapes)
    for columns, lengths in batches.prefetch(2).as_numpy_iterator():
        for i in range(len(columns[names[0]])):
            yield {
                name: column[i, : lengths[name][i]] if name in lengths else column[i]
                for name, column in columns.items()
            }


def _ids(row: Any, feature: str, where: str) -> np.ndarray:
    """Returns a feature's ids, [length] int32, after checking their shape, dtype and range."""
    ids = np.asarray(row[feature])
    if ids.ndim != 1 or not np.issubdtype(ids.dtype, np.integer):
        raise InputError(f"{where}: {feature!r} must be ids [length], got {ids.dtype} {ids.shape}")
    if len(ids) and not 0 <= ids.min() <= ids.max() <= MAX_ID:
        raise InputError(
            f"{where}: {feature!r} has ids from {ids.min()} to {ids.max()}, which are out of range"
        )
    return ids.astype(np.int32)


def _row_id(value: Any) -> str | None:
    """Returns a row's id as a string, or None if the id is neither a string nor a whole number."""
    if isinstance(value, bytes):
        return value.decode(errors="replace")
    if isinstance(value, str):
        return value
    kind = getattr(value, "dtype", None)
    whole = kind is not None and np.issubdtype(kind, np.integer) and np.ndim(value) == 0
    return str(int(value)) if whole else None


def _seed(task: Any) -> int | None:
    """Returns the random seed for reading a task, or None if the task's source takes no seed."""
    function = getattr(task.source, "_dataset_fn", None)
    if function is None or "seed" in inspect.signature(function).parameters:
        return 0
    return None
