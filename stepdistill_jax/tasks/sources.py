"""Makes SeqIO sources from users' functions, and checks, describes and fingerprints sources."""

import contextlib
import functools
import itertools
import json
import math
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from stepdistill_jax.data.builder import tensorflow
from stepdistill_jax.data.objectives import Objective
from stepdistill_jax.data.rows import JsonRow
from stepdistill_jax.errors import InputError, nearest
from stepdistill_jax.runtime.fingerprints import sha256_of_rows

AT_ONCE = 32  # number of rows that are read from a function at a time

Rows = Callable[..., Iterable[Mapping[str, Any]]]


class RowsOfFunction:
    """A `dataset_fn` for `seqio.FunctionDataSource` that reads rows from a user's function."""

    def __init__(self, task: str, rows: Rows, more: Sequence[str] = ()):
        """Wraps the function `rows` of the task named `task`.

        `more` are the names of further fields that each row must have; their values may be empty.
        """
        self.task, self.rows, self.more = task, rows, tuple(more)
        # kept for `named_errors`, since TensorFlow hides the function's own error in a trace
        self.failure: Exception | None = None
        self.__name__ = getattr(rows, "__qualname__", type(rows).__name__)
        self.__module__ = getattr(rows, "__module__", __name__)

    @property
    def _names(self) -> tuple[str, ...]:
        return (*Objective.FIELDS, *self.more)

    def __call__(self, split: str, shuffle_files: bool, seed: int | None = None) -> Any:
        tf = tensorflow()
        signature = {name: tf.TensorSpec((None,), tf.string) for name in self._names}
        signature["weight"] = tf.TensorSpec((None,), tf.float32)
        return tf.data.Dataset.from_generator(
            functools.partial(self._several, split), output_signature=signature
        ).unbatch()

    def _several(self, split: str) -> Iterator[dict[str, list[Any]]]:
        """Yields up to `AT_ONCE` rows at a time, since each call from TensorFlow to Python has a fixed cost."""
        rows = self._checked(split)
        while several := list(itertools.islice(rows, AT_ONCE)):
            yield {name: [row[name] for row in several] for name in several[0]}

    def digest(self, split: str) -> dict[str, Any]:
        """Returns {"rows": count, "sha256": hex digest} of the function's rows.

        Does not read the rows through TensorFlow, since that would take far longer (see `rows_digest`).

        Raises:
            InputError: the user's function fails, or a row is malformed.
        """
        rows = (json.dumps(list(fields.values())).encode() for fields in self._checked(split))
        try:
            return sha256_of_rows(rows)
        except Exception as error:
            raise self.failure or error from None

    def _checked(self, split: str) -> Iterator[dict[str, Any]]:
        self.failure = None
        number = 0
        try:
            for number, row in enumerate(self.rows(split), 1):
                yield self._fields(row, f"task {self.task!r}, split {split!r}, row {number}")
        except InputError as error:
            self.failure = error
            raise
        except Exception as error:
            self.failure = InputError(
                f"task {self.task!r}, split {split!r}: {self.__name__} failed after row {number}"
                f" ({type(error).__name__}: {error})"
            )
            raise

    def _fields(self, row: Mapping[str, Any], where: str) -> dict[str, Any]:
        if not isinstance(row, Mapping):
            raise InputError(f"{where}: expected a dict, got {type(row).__name__}")
        fields: dict[str, Any] = {}
        for name in self._names:
            value = row.get(name)
            # a label of the teacher is enough for LABEL_SOURCE=llm
            required = name == "input" or (name == "label" and not row.get("llm_label"))
            if (required or name in self.more) and name not in row:
                raise InputError(
                    f"{where}: field {name!r} is missing; the row has"
                    f" {', '.join(map(str, row)) or 'no fields'}{nearest(name, map(str, row))}"
                )
            if not isinstance(value, str | None):
                raise InputError(
                    f"{where}: field {name!r} must be text, got {type(value).__name__}"
                )
            if required and not value:
                raise InputError(f"{where}: field {name!r} is empty")
            fields[name] = value or ""
        factor = row.get("weight")
        if isinstance(factor, np.generic):
            factor = factor.item()
        fields["weight"] = JsonRow({"weight": factor}, where).weight("weight")
        return fields


def rows_of_lists(lists: Mapping[str, Sequence[Mapping[str, Any]]]) -> Rows:
    """Returns a function that takes the name of a split and returns its rows, for `RowsOfFunction`."""
    kept = {split: tuple(rows) for split, rows in lists.items()}

    def rows(split: str) -> Sequence[Mapping[str, Any]]:
        return kept[split]

    rows.__qualname__ = "list of dicts"
    return rows


@contextlib.contextmanager
def named_errors(task: str, source: Any, split: str) -> Iterator[None]:
    """A context that turns errors of SeqIO and TensorFlow into InputErrors of one line with the task's name."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        failure = getattr(getattr(source, "_dataset_fn", None), "failure", None)
        if failure is not None:
            raise failure from error
        text = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
        text = re.sub(
            r"\{\{function_node .*?\}\} *| *\[Op:.*$", "", text
        )  # TensorFlow's graph names
        raise InputError(
            f"task {task!r}, split {split!r}, {describe_source(source)}:"
            f" {type(error).__name__}: {text}"
        ) from error


def check_source(task: str, source: Any) -> None:
    """Checks that a source has splits, and that its TFDS dataset is on disk.

    Raises:
        InputError: there are no splits, or the source reads a TFDS dataset that is not on disk.
    """
    tensorflow()
    import seqio

    # SeqIO would start to download a missing TFDS dataset
    if isinstance(source, seqio.TfdsDataSource):
        _check_downloaded(task, source.tfds_dataset)
    if not tuple(source.splits):
        raise InputError(
            f"task {task!r}: {describe_source(source)} has no splits; set `splits`, for example to ['train']"
        )


def _check_downloaded(task: str, loader: Any) -> None:
    """Raises InputError if the TFDS dataset of a `seqio.LazyTfdsLoader` is not on disk."""
    import tensorflow_datasets as tfds
    from tensorflow_datasets.core.constants import get_default_data_dir

    for split in loader.tfds_splits or (None,):
        name, folder = loader.get_split_params(split)
        where = folder or get_default_data_dir()
        command, why = f"run `tfds build {name} --data_dir {where}`", ""
        try:
            if loader._get_builder(split).is_prepared():
                continue
        except tfds.core.DatasetNotFoundError:
            why = ", and TFDS has no code for it"
            command = (
                f"check its name and version, or run `tfds build SCRIPT --data_dir {where}` with your"
                " script"
            )
        except Exception as error:
            text = re.sub(r'^Failed to construct .*?}": ', "", " ".join(str(error).split()))
            why, command = f" ({text[:200]})", "check its name, version and folder"
        forget_tfds(name, folder)  # so that this process finds the dataset after it is built
        raise InputError(
            f"task {task!r}: TFDS dataset {name} is not downloaded in {where}{why}; {command}"
        )


def forget_tfds(name: str | None, folder: str | None) -> None:
    """Removes a TFDS dataset from SeqIO's cache, so that SeqIO reads its files again."""
    import seqio

    seqio.LazyTfdsLoader._MEMOIZED_BUILDERS.pop((name, folder), None)


def raised_at(error: BaseException) -> str:
    """Returns ` at FILE:LINE`, the place that raised the error, for a message."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return f" at {trace.tb_frame.f_code.co_filename}:{trace.tb_lineno}" if trace else ""


def describe_source(source: Any) -> str:
    """Returns a description of a source for messages, without memory addresses."""
    function = getattr(source, "_dataset_fn", None)
    if function is not None:
        name = getattr(function, "__qualname__", getattr(function, "__name__", repr(function)))
        return f"source {getattr(function, '__module__', '')}.{name}"
    return "source " + re.sub(r" at 0x[0-9a-f]+", "", str(source))


def describe(thing: Any) -> Any:
    """Returns a JSON-like description of a source or preprocessor, equal in every process."""
    if isinstance(thing, (list, tuple)):
        return [describe(part) for part in thing]
    if hasattr(thing, "func"):  # functools.partial
        return [
            describe(thing.func),
            describe(thing.args),
            describe(sorted(thing.keywords.items())),
        ]
    if name := getattr(thing, "__qualname__", None):
        return f"{thing.__module__}.{name}"
    return re.sub(r" at 0x[0-9a-f]+", "", str(thing))


def files_of(source: Any, split: str) -> list[list[Any]]:
    """Returns [name, size, modification time] of each file that a source reads.

    For a TFDS source, a first entry [text] shows which TFDS slice each split reads. The list is empty if the
    source does not read files, or if the size or time of a file is unknown.

    Raises:
        InputError: a TFDS split has no rows.
    """
    tf = tensorflow()
    import seqio

    if isinstance(source, seqio.TfdsDataSource):
        found: list[list[Any]] = [[repr(getattr(source.tfds_dataset, "_split_map", None))]]
        if math.isinf(source.num_input_examples(split) or 0):  # SeqIO's number for no rows
            raise InputError(
                f"split {split!r} of {describe_source(source)} has no rows; choose another slice"
            )
    elif isinstance(source, seqio.FileDataSource):
        found = []
    else:
        return []
    names = [os.fspath(name) for name in source.list_shards(split)]
    try:
        for name in names:
            if os.path.exists(name):
                stat = os.stat(name)
                found.append([name, stat.st_size, stat.st_mtime_ns])
            else:  # on a remote file system; TensorFlow's time is in whole seconds
                stat = tf.io.gfile.stat(name)
                found.append([name, stat.length, stat.mtime_nsec])
    except (OSError, tf.errors.OpError):
        return []
    return found if names else []


def rows_digest(source: Any, split: str, seed: int | None) -> dict[str, Any]:
    """Returns {"rows": count, "sha256": hex digest} of a source's rows before any preprocessor runs.

    The complete source is read.
    """
    # 100,000 rows on one CPU core: 0.5 s for a function given to `add_task`, without the function's own time;
    # otherwise 4 s from TensorFlow, and 25 s through `tf.data.Dataset.from_generator`
    function = getattr(source, "_dataset_fn", None)
    if isinstance(function, RowsOfFunction):
        return function.digest(split)
    tf = tensorflow()

    def as_bytes(*row: Any) -> Any:
        parts = [tf.io.serialize_tensor(part) for part in tf.nest.flatten(row, True)]
        return tf.io.serialize_tensor(tf.stack(parts))

    dataset = source.get_dataset(split=split, shuffle=False, seed=seed)
    dataset = dataset.map(as_bytes, num_parallel_calls=tf.data.AUTOTUNE).batch(1024)
    rows = itertools.chain.from_iterable(dataset.as_numpy_iterator())
    # the length before each row makes the boundaries between rows count, too
    return sha256_of_rows(len(row).to_bytes(8, "little") + row for row in rows)
