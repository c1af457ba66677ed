"""Runs a SeqIO task once and keeps its tokens; opens them without TensorFlow afterwards."""

import itertools
import logging
import pathlib
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from stepdistill_jax.errors import InputError
from stepdistill_jax.files import digest
from stepdistill_jax.progress import progress
from stepdistill_jax.tasks.sources import named_errors
from stepdistill_jax.tasks.token_store import (
    FORMAT_VERSION,
    TokenExample,
    TokenStore,
    open_store,
    write_store,
)

logger = logging.getLogger(__name__)

FOLDER = "token_store"
COMPARED_ROWS = 32


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
    """The tokens of one split, from disk where they are there, else tokenised and kept.

    Args:
        make_task: gives the `seqio.Task`; called only if it must run.
        name: of the task, for the folder and messages.
        split: of the task.
        objectives: names of the store's objectives.
        prefixes: for each the prefix of its features (`PREFIXinputs`, `PREFIXtargets`).
        key: JSON-like, everything known beforehand that decides the tokens.
        data_dir: the store goes to `data_dir/token_store/`.
        compare: read the first rows again and compare them with the store; for sources whose
            content the key does not know.

    Raises:
        InputError: the task cannot be read, or a row has no inputs.
    """
    key = digest([FORMAT_VERSION, key, split, list(objectives)])
    folder = re.sub(r"[^\w.-]", "_", f"{name}-{split}") + f"-{key[:16]}"
    directory = data_dir / FOLDER / folder
    store = open_store(directory)
    if store is not None and compare:
        store = _still_the_same(store, make_task(), split, prefixes)
    if store is not None:
        return store
    task = make_task()
    total = task.source.num_input_examples(split)
    about = {"task": name, "split": split, "repeats": True}
    if compare:
        about["repeats"] = _repeats(task, split, prefixes)
    with progress(total, f"tokenising {name} {split}") as bar:

        def counted() -> Iterator[TokenExample]:
            for example in read_tokens(task, split, prefixes):
                yield example
                bar.update(1)

        return write_store(directory, objectives, counted(), about)


def read_tokens(task: Any, split: str, prefixes: Sequence[str]) -> Iterator[TokenExample]:
    """Runs a `seqio.Task` once, unshuffled and uncut.

    Raises:
        InputError: whatever SeqIO raises, with the task's name; or a row without inputs.
    """
    features = [(f"{p}inputs", f"{p}targets") for p in prefixes]
    with named_errors(task.name, task.source, split):
        dataset = task.get_dataset(
            None, split, shuffle=False, seed=_seed(task), num_epochs=1, try_in_mem_cache=False
        )
        decode = task.output_features[features[0][1]].vocabulary.decode
        for number, row in enumerate(dataset.as_numpy_iterator(), 1):
            ids = [(row[i].astype(np.int32), row[t].astype(np.int32)) for i, t in features]
            for (inputs, targets), (name, _) in zip(ids, features, strict=True):
                if len(targets) and not len(inputs):
                    raise InputError(
                        f"task {task.name!r}, split {split!r}, row {number}: {name!r} is empty;"
                        " an encoder needs at least one token"
                    )
            text = row.get(f"{features[0][1]}_pretokenized")
            if isinstance(text, bytes):
                text = text.decode()
            elif not isinstance(text, str):
                text = decode(ids[0][1].tolist())
            yield TokenExample(ids, float(row.get("weight", 1.0)), text)


def _seed(task: Any) -> int | None:
    # a fixed seed for preprocessors that draw; a function may not know the argument
    function = getattr(task.source, "_dataset_fn", None)
    return 0 if function is None else None


def _first_rows(task: Any, split: str, prefixes: Sequence[str]) -> list[list[list[int]]]:
    rows = itertools.islice(read_tokens(task, split, prefixes), COMPARED_ROWS)
    return [[list(map(int, ids)) for pair in example.rows for ids in pair] for example in rows]


def _repeats(task: Any, split: str, prefixes: Sequence[str]) -> bool:
    """Whether the source gives the same rows twice; says so where it does not."""
    if _first_rows(task, split, prefixes) == _first_rows(task, split, prefixes):
        return True
    logger.warning(
        "task %r, split %r: its source gives other rows each time it is read; the rows of this"
        " reading are kept and trained on",
        task.name,
        split,
    )
    return False


def _still_the_same(
    store: TokenStore, task: Any, split: str, prefixes: Sequence[str]
) -> TokenStore | None:
    """The store if the source still begins as it did, else None, with a warning."""
    if not store.about.get("repeats", True):
        logger.warning(
            "task %r, split %r: its source gives other rows each time it is read; training on the"
            " rows that were kept in %s",
            task.name,
            split,
            store.directory,
        )
        return store
    found = _first_rows(task, split, prefixes)
    kept = [
        [rows[feature][i].tolist() for rows in store.rows for feature in ("inputs", "targets")]
        for i in range(min(COMPARED_ROWS, store.num_examples))
    ]
    if found == kept:
        return store
    at = next((i for i, (a, b) in enumerate(zip(found, kept, strict=False)) if a != b), None)
    logger.warning(
        "task %r, split %r: its source gives other rows than when it was tokenised (first at row"
        " %d); it is tokenised anew, and a run on the old rows will refuse to resume",
        task.name,
        split,
        (min(len(found), len(kept)) if at is None else at) + 1,
    )
    return None
