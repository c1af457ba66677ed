"""Loads the tokens of plain SeqIO tasks: tasks that neither `add_task` nor `prepare` made."""

import os
import pathlib
from collections.abc import Sequence
from typing import Any

from stepdistill_jax.data.builder import tensorflow
from stepdistill_jax.data.objectives import Objective
from stepdistill_jax.data.prepared import PreparedDataset
from stepdistill_jax.data.vocabulary import BYTES, T5_FRAMING, Vocabulary, load_vocabulary
from stepdistill_jax.errors import InputError, nearest
from stepdistill_jax.runtime.files import atomic_write
from stepdistill_jax.runtime.fingerprints import digest
from stepdistill_jax.tasks.lookup import module_digest
from stepdistill_jax.tasks.plain_tasks import check_trainable
from stepdistill_jax.tasks.sources import describe, files_of, named_errors
from stepdistill_jax.tasks.supervision import Supervision
from stepdistill_jax.tasks.token_store import TokenStore
from stepdistill_jax.tasks.tokenizing import FOLDER, stored_tokens

# the objective of a plain SeqIO task, which trains on its own inputs and targets
PLAIN = (Objective("label", "{input}", "{label}"),)


def plain_store(
    task: Any, split: str, vocabulary: Vocabulary, folder: pathlib.Path, module: str | None
) -> TokenStore:
    """Returns the tokens of a plain SeqIO task."""
    store = stored_tokens(
        lambda: task,
        name=task.name,
        split=split,
        objectives=[PLAIN[0].name],
        prefixes=[""],
        key=[
            module_digest(module),
            describe([task.source, task._preprocessor_constructor_args]),
            [vocabulary.fingerprint, repr(task.output_features)],
            files_of_task(task, split),
            "row ids",  # distinguishes the store from older stores, which have no row ids
        ],
        data_dir=folder,
        compare=True,
    )
    return with_rows(store, task.name, split)


def common_vocabulary(
    name: str, tasks: Sequence[Any], given: str | None, folder: pathlib.Path
) -> Vocabulary:
    """Returns the vocabulary that all plain tasks share.

    Args:
        name: name of the task or mixture, for messages.
        given: the model's vocabulary, such as that of `init_from`; None means the tasks' own.
        folder: data folder. Remote vocabularies are copied into it.

    Raises:
        InputError: two vocabularies have different pieces, or a task is unsuitable for training.
    """
    files = [_vocabulary_file(task, folder) for task in tasks]
    first = opened = load_vocabulary(files[0])
    for other in [*files[1:], *([] if given is None else [given])]:
        opened = load_vocabulary(other)
        if not same_pieces(first, opened):
            raise InputError(
                f"task {name!r}: tokenised with {files[0]}, but"
                f" {'the model (`init_from`)' if other == given else 'another task of the mixture'}"
                f" uses {other}; give all tasks the same vocabulary (prepared datasets:"
                " register_prepared(vocabulary=...))"
            )
    # Equal pieces do not imply equal normalisers, so with T5's framing the task's own file is used.
    return opened if given is not None and opened.framing != T5_FRAMING else first


def _vocabulary_file(task: Any, folder: pathlib.Path) -> str:
    """Returns a plain task's vocabulary as an argument for `load_vocabulary`: the path of a file, or `bytes`."""
    import seqio

    check_trainable(task)
    inputs = task.output_features["inputs"].vocabulary
    if isinstance(inputs, seqio.ByteVocabulary):
        return BYTES
    path = inputs.sentencepiece_model_file
    if os.path.isfile(path):
        return path
    # a vocabulary on a remote file system (gs://...) is copied once, since a server reads local files
    tf = tensorflow()
    local = folder / FOLDER / "vocabularies" / f"{digest(path)[:16]}.model"
    if not local.is_file():
        try:
            with atomic_write(local, "wb") as f, tf.io.gfile.GFile(path, "rb") as remote:
                f.write(remote.read())
        except (tf.errors.OpError, OSError) as error:
            raise InputError(
                f"task {task.name!r}: its vocabulary {path} cannot be copied: {error}"
            ) from None
    return os.fspath(local)


def check_supervision(task: str, supervision: Supervision | None) -> None:
    check_one_rationale(task, supervision)
    if supervision is not None and supervision.label_source != "gold":
        raise InputError(
            f"task {task!r}: `label_source={supervision.label_source}` needs the fields label and"
            " llm_label, but a plain SeqIO task or mixture has only its targets; use add_task"
        )


def check_one_rationale(task: str, supervision: Supervision | None) -> None:
    if supervision is not None and supervision.needs_list:
        raise InputError(
            f"task {task!r}: `rationales={supervision.rationales}` with rationale_source="
            f"{supervision.rationale_source} needs the list 'rationales' of a prepared dataset"
            " (`stepdistill prepare jsonl` keeps it)"
        )


def check_published(dataset: PreparedDataset, supervision: Supervision) -> None:
    """Raises InputError if a `paper_exact` dataset is used with a supervision that the published code lacks."""
    if dataset.paper_exact and (supervision.needs_list or supervision.label_source == "agree"):
        raise InputError(
            f"dataset {dataset.name!r}: the paper's published code uses gold labels or teacher labels, and"
            " one teacher rationale per row; leave out `label_source=agree`, `rationales` and"
            " `rationale_source`, or prepare the dataset without `paper_exact`"
        )


def check_split(task: str, split: str, splits: Any) -> None:
    if split not in splits:
        raise InputError(
            f"task {task!r}: no split {split!r} (it has {', '.join(splits)}){nearest(split, splits)}"
        )


def with_rows(store: TokenStore, name: str, split: str) -> TokenStore:
    if not store.num_examples:
        raise InputError(
            f"task {name!r}: split {split!r} has no rows: its source is empty, its preprocessors drop"
            " all rows, or no row has the label that `label_source` selects"
        )
    return store


def files_of_task(task: Any, split: str) -> list[list[Any]]:
    """Returns the files of a task's source (see `files_of`). Error messages name the task."""
    with named_errors(task.name, task.source, split):
        return files_of(task.source, split)


def same_pieces(a: Vocabulary, b: Vocabulary) -> bool:
    """Returns whether two vocabularies have the same pieces, even if their files differ."""
    return a.fingerprint == b.fingerprint or (
        a.size == b.size and all(a.decode([i]) == b.decode([i]) for i in range(a.size))
    )
