"""From a task's name to token stores: prepared datasets, `add_task`, and plain SeqIO tasks."""

import dataclasses
import os
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from stepdistill_jax.data.builder import VERSION, tensorflow
from stepdistill_jax.data.objectives import Objective, resolve
from stepdistill_jax.data.prepared import (
    PreparedDataset,
    data_folder,
)
from stepdistill_jax.data.reading import UNLABELLED
from stepdistill_jax.data.vocabulary import BYTES, Vocabulary, load_vocabulary
from stepdistill_jax.errors import InputError, nearest
from stepdistill_jax.runtime.files import atomic_write
from stepdistill_jax.runtime.fingerprints import digest
from stepdistill_jax.tasks import registry
from stepdistill_jax.tasks.lookup import find_task, has_split, module_digest, splits_of
from stepdistill_jax.tasks.plain_tasks import check_trainable
from stepdistill_jax.tasks.prepared_rows import PreparedRows
from stepdistill_jax.tasks.prepared_tasks import spec_of
from stepdistill_jax.tasks.registry import TaskSpec
from stepdistill_jax.tasks.sources import describe, files_of, named_errors
from stepdistill_jax.tasks.supervision import Supervision, check_rationales, most_rationales
from stepdistill_jax.tasks.task_data import Part, TaskData
from stepdistill_jax.tasks.token_store import TokenStore
from stepdistill_jax.tasks.tokenizing import FOLDER, stored_tokens

__all__ = ["has_split", "load_task", "splits_of"]

# what a plain SeqIO task trains: its own inputs and targets, as they are
PLAIN = (Objective("label", "{input}", "{label}"),)


def load_task(
    task: str,
    *,
    split: str,
    objectives: str | Sequence[Objective] = "step_by_step",
    vocabulary: os.PathLike | str | None = None,
    data_dir: os.PathLike | str | None = None,
    task_module: str | None = None,
    supervision: Supervision | None = None,
) -> TaskData:
    """The tokens of a task's split; tokenised on first use, memory-mapped from then on.

    A prepared dataset is a task by its name. A plain SeqIO task or mixture is one objective,
    `label`, on its own inputs and targets.

    Args:
        task: a prepared dataset, a task of `add_task`, or a SeqIO task or mixture.
        split: e.g. `train`.
        objectives: an arm's name or objectives; a plain SeqIO task has no use for them.
        vocabulary: path of a `spiece.model`, or `bytes`; None is the task's own.
        data_dir: of prepared datasets and token stores; None is the default one.
        task_module: module that registers the task; imported first.
        supervision: which label and rationales are taken; None takes each row as it is, those
            without a label, too.

    Raises:
        InputError: an unknown task or split, a task that cannot be read, a plain task whose
            vocabulary is not the one asked for, or a supervision that its rows do not offer.
    """
    folder = data_folder(data_dir)
    found = find_task(task, data_dir=folder, task_module=task_module)
    if isinstance(found, PreparedDataset):
        _check_split(task, split, found.splits)
        found.check(f"{split}.jsonl")
        objectives = resolve(objectives)
        _check_fields(found, objectives)
        if supervision is not None and split == "train":
            supervision = supervision.for_objectives(objectives)
        vocabulary = os.fspath(found.spiece_model if vocabulary is None else vocabulary)
        parts = _parts_of(found, split, supervision)
        most = 1
        if supervision is not None and supervision.rationales != "first":
            most = max(most_rationales(found.file(part)) for part in parts)

        def prepared_task():
            found.check(VERSION)  # TFDS's files, before they are read for the one time
            if PreparedRows.can_read(supervision):
                labelled = supervision is not None
                return PreparedRows(found, split, objectives, load_vocabulary(vocabulary), labelled)
            spec = spec_of(found, vocabulary, {split: "+".join(parts)})
            return registry.joint_task(spec, objectives, vocabulary, supervision, most)

        columns = registry.columns_of(objectives, most)
        key = [found.fingerprint, _key_of(supervision), parts]
        store, opened = _joint_store(
            prepared_task, task, split, objectives, columns, vocabulary, folder, key
        )
        explained = [
            rows["targets"].lengths > 0
            for column, rows in zip(columns, store.rows, strict=True)
            if column.reads_rationale
        ]
        if supervision is not None and explained:
            count = int(np.any(explained, axis=0).sum())
            check_rationales(task, found.file(split), supervision, count, store.num_examples)
        return TaskData.of_store(
            task,
            split,
            objectives,
            store,
            opened,
            most_rationales=most,
            sample_rationales=supervision is not None and supervision.rationales == "sample",
            metric=found.metric,
            labels=found.labels,
        )
    if isinstance(found, TaskSpec):
        _check_split(task, split, found.source.splits)
        objectives = resolve(objectives)
        if supervision is not None and split == "train":
            supervision = supervision.for_objectives(objectives)
        vocabulary = os.fspath(found.vocabulary if vocabulary is None else vocabulary)
        _one_rationale(task, supervision)
        key = [module_digest(task_module), describe([found.source, found.preprocessors])]
        key.append(_key_of(supervision))
        store, opened = _joint_store(
            lambda: registry.joint_task(found, objectives, vocabulary, supervision),
            task,
            split,
            objectives,
            registry.columns_of(objectives),
            vocabulary,
            folder,
            [*key, _files(found, split)],
            compare=True,
        )
        return TaskData.of_store(task, split, objectives, store, opened, metric=found.metric)
    _one_rationale(task, supervision)
    if supervision is not None and supervision.label_source != "gold":
        raise InputError(
            f"task {task!r}: `label_source={supervision.label_source}` needs the fields label and"
            " llm_label; a plain SeqIO task or mixture brings targets of its own (add_task has them)"
        )
    return _load_plain(found, split, vocabulary, folder, task_module)


def _one_rationale(task: str, supervision: Supervision | None) -> None:
    if supervision is not None and supervision.needs_list:
        raise InputError(
            f"task {task!r}: `rationales={supervision.rationales}` with rationale_source="
            f"{supervision.rationale_source} needs the list 'rationales' of a prepared dataset"
            " (`stepdistill prepare jsonl` keeps it)"
        )


def _check_fields(dataset: PreparedDataset, objectives: Sequence[Objective]) -> None:
    """Raises InputError where a template names a field that the dataset does not keep."""
    known = (*Objective.FIELDS, *dataset.fields)
    for objective in objectives:
        for field in objective.fields:
            if field not in known:
                raise InputError(
                    f"`objectives`: objective {objective.name} names the field {{{field}}}, and dataset"
                    f" {dataset.name!r} has {', '.join(known)}{nearest(field, known)}; `stepdistill"
                    f" prepare jsonl --fields {field}` keeps one of your own rows"
                )


def _check_words(objective: Objective, vocabulary: Vocabulary) -> None:
    """Raises InputError where the words that a label is parsed by do not survive the vocabulary."""
    for words in objective.words if objective.writes_more else ():
        if (written := vocabulary.decode(vocabulary.encode(words))).split() != words.split():
            raise InputError(
                f"`objectives`: the words {words!r} in target_template of {objective.name} tell where"
                f" the label is, and the vocabulary {vocabulary.source} can only write {written!r};"
                " choose others"
            )


def _key_of(supervision: Supervision | None) -> Any:
    return None if supervision is None else dataclasses.asdict(supervision)


def _joint_store(
    make_task, name, split, objectives, columns, vocabulary, folder, key, compare=False
) -> tuple[TokenStore, Vocabulary]:
    """The store of all objectives of a prepared dataset or an `add_task` task."""
    opened = load_vocabulary(vocabulary)
    _check_words(objectives[0], opened)
    first, templates = objectives[0], [[o.input_template, o.target_template] for o in objectives]
    if any(o.read_beside_input for o in objectives) or (first.label_field and not first.is_plain):
        templates.append(["labels and absent inputs by field"])  # unlike stores of older versions
    store = stored_tokens(
        make_task,
        name=name,
        split=split,
        objectives=[c.name for c in columns],
        prefixes=[f"{c.name}_" for c in columns],
        key=[key, templates, opened.fingerprint],
        data_dir=folder,
        compare=compare,
    )
    return _with_rows(store, name, split), opened


def _with_rows(store: TokenStore, name: str, split: str) -> TokenStore:
    if not store.num_examples:
        raise InputError(
            f"task {name!r}: split {split!r} has no rows: its source is empty, or all are left out, by"
            " preprocessors or for want of the label that `label_source` asks for"
        )
    return store


def _parts_of(
    dataset: PreparedDataset, split: str, supervision: Supervision | None
) -> tuple[str, ...]:
    """The prepared splits that make up one: rows without a gold label add to train, if asked for."""
    takes_teachers = supervision is not None and supervision.label_source != "gold"
    if split == "train" and takes_teachers and UNLABELLED in dataset.splits:
        return (split, UNLABELLED)
    return (split,)


def _load_plain(
    found: Any, split: str, vocabulary: os.PathLike | str | None, folder: pathlib.Path, module
) -> TaskData:
    """A SeqIO task or mixture of other people's making, as it is."""
    import seqio

    tasks = seqio.get_subtasks(found)
    splits = dict.fromkeys(s for task in tasks for s in task.splits)
    _check_split(found.name, split, splits)
    tasks = [task for task in tasks if split in task.splits]  # as SeqIO's own mixture does
    files = [_vocabulary_file(task, folder) for task in tasks]
    opened = load_vocabulary(files[0])
    others = list(files[1:]) + ([] if vocabulary is None else [os.fspath(vocabulary)])
    for other in others:
        if not _equal(opened, load_vocabulary(other)):
            raise InputError(
                f"task {found.name!r}: tokenised with {files[0]}, but"
                f" {'`init_from` brings' if other == os.fspath(vocabulary or '') else 'another of its tasks has'}"
                f" {other}; a model has one vocabulary"
            )
    stores = tuple(
        _with_rows(
            stored_tokens(
                lambda task=task: task,
                name=task.name,
                split=split,
                objectives=[PLAIN[0].name],
                prefixes=[""],
                key=[
                    module_digest(module),
                    describe([task.source, task._preprocessor_constructor_args]),
                    [opened.fingerprint, repr(task.output_features)],
                    _files(task, split),
                ],
                data_dir=folder,
                compare=True,
            ),
            task.name,
            split,
        )
        for task in tasks
    )
    rates = (1.0,)
    if isinstance(found, seqio.Mixture):
        with named_errors(found.name, found.name, split):
            rates = tuple(float(found.get_rate(task)) for task in tasks)
    parts = tuple(
        Part(task.name, store, registry.columns_of(PLAIN), rate)
        for task, store, rate in zip(tasks, stores, rates, strict=True)
    )
    return TaskData(found.name, split, PLAIN, parts, opened)


def _files(task: Any, split: str) -> list[list[Any]]:
    """`files_of` a task's source; what it raises gets the task's name."""
    with named_errors(task.name, task.source, split):
        return files_of(task.source, split)


def _vocabulary_file(task: Any, folder: pathlib.Path) -> str:
    """A plain task's vocabulary as `load_vocabulary` takes it.

    Raises:
        InputError: a task that an encoder-decoder cannot be trained on (`check_trainable`).
    """
    import seqio

    check_trainable(task)
    inputs = task.output_features["inputs"].vocabulary
    if isinstance(inputs, seqio.ByteVocabulary):
        return BYTES
    path = inputs.sentencepiece_model_file
    if os.path.isfile(path):
        return path
    # on a remote file system (gs://...): copied once, the tokenizer of a server reads plain files
    tf = tensorflow()
    local = folder / FOLDER / "vocabularies" / f"{digest(path)[:16]}.model"
    if not local.is_file():
        try:
            with atomic_write(local, "wb") as f, tf.io.gfile.GFile(path, "rb") as remote:
                f.write(remote.read())
        except (tf.errors.OpError, OSError) as error:
            raise InputError(f"task {task.name!r}: vocabulary {path}: {error}") from None
    return os.fspath(local)


def _equal(a: Vocabulary, b: Vocabulary) -> bool:
    """Whether two vocabularies have the same pieces; the files of one model may differ."""
    return a.fingerprint == b.fingerprint or (
        a.size == b.size and all(a.decode([i]) == b.decode([i]) for i in range(a.size))
    )


def _check_split(task: str, split: str, splits: Any) -> None:
    if split not in splits:
        raise InputError(
            f"task {task!r}: no split {split!r} (it has {', '.join(splits)}){nearest(split, splits)}"
        )
