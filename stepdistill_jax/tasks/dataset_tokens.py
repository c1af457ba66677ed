"""Loads the tokens of a dataset that `prepare` or `add_task` made, for all objectives of a run."""

import dataclasses
import os
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from stepdistill_jax.data.builder import VERSION
from stepdistill_jax.data.example import INPUT_PAIR
from stepdistill_jax.data.objectives import Objective
from stepdistill_jax.data.prepared import PreparedDataset
from stepdistill_jax.data.published_split import WHOLE
from stepdistill_jax.data.reading import UNLABELLED
from stepdistill_jax.data.vocabulary import Vocabulary, load_vocabulary
from stepdistill_jax.errors import InputError, nearest
from stepdistill_jax.tasks import registry
from stepdistill_jax.tasks.lookup import module_digest
from stepdistill_jax.tasks.plain_tokens import (
    check_one_rationale,
    check_published,
    check_split,
    files_of_task,
    with_rows,
)
from stepdistill_jax.tasks.prepared_rows import PreparedRows
from stepdistill_jax.tasks.prepared_tasks import spec_of
from stepdistill_jax.tasks.registry import TaskSpec
from stepdistill_jax.tasks.sources import describe
from stepdistill_jax.tasks.supervision import Supervision, check_rationales, most_rationales
from stepdistill_jax.tasks.task_data import TaskData
from stepdistill_jax.tasks.token_store import TokenStore
from stepdistill_jax.tasks.tokenizing import stored_tokens


def load_dataset(
    found: PreparedDataset | TaskSpec,
    split: str,
    objectives: Sequence[Objective],
    given: str | None,
    where: tuple[pathlib.Path, str | None],
    supervision: Supervision | None,
    share: tuple[float, int] = WHOLE,
) -> TaskData:
    """Returns the tokens of a split of a dataset. `load_task` explains the other arguments.

    Args:
        found: the dataset.
        given: a vocabulary that replaces the dataset's own; None means the dataset's own.
        where: the data folder and the task module (None means no module).
    """
    if isinstance(found, PreparedDataset):
        return _load_prepared(found, split, objectives, given, where[0], supervision, share)
    return _load_spec(found, split, objectives, given, *where, supervision)


def _load_prepared(
    found: PreparedDataset,
    split: str,
    objectives: Sequence[Objective],
    given: str | None,
    folder: pathlib.Path,
    supervision: Supervision | None,
    share: tuple[float, int],
) -> TaskData:
    task = found.name
    check_split(task, split, found.splits)
    found.check(f"{split}.jsonl")
    _check_fields(found, objectives)
    if supervision is not None and split == "train":
        supervision = supervision.for_objectives(objectives)
        check_published(found, supervision)
    vocabulary = os.fspath(found.spiece_model) if given is None else given
    parts = _parts_of(found, split, supervision)
    most = 1
    if supervision is not None and supervision.rationales != "first":
        most = max(most_rationales(found.file(part)) for part in parts)

    def prepared_task():
        found.check(VERSION)  # TFDS's files, which are read only to tokenise
        if found.paper_exact or PreparedRows.can_read(supervision):
            opened = load_vocabulary(vocabulary)
            return PreparedRows(found, split, objectives, opened, supervision, share)
        spec = spec_of(found, vocabulary, {split: "+".join(parts)})
        return registry.joint_task(spec, objectives, vocabulary, supervision, most)

    columns = registry.columns_of(objectives, most)
    if share[0] == 1.0 or split not in found.drawn:
        share = WHOLE  # the store must not depend on the seed
    # a share is added only if there is one, so that stores without a share keep their names
    key = [found.fingerprint, _key_of(supervision), parts, *([share] if share != WHOLE else [])]
    store, opened = _joint_store(
        prepared_task, task, split, objectives, columns, vocabulary, folder, key
    )
    if not store.num_examples:
        raise _no_labels(found, split, supervision)
    if supervision is not None and supervision.rationale_source is not None:
        explained = [
            rows["targets"].lengths > 0
            for column, rows in zip(columns, store.rows, strict=True)
            if column.reads_rationale
        ]
        if explained:
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
        share_is_drawn=found.paper_exact,
        metric=found.metric,
        labels=found.labels,
        input_pair=INPUT_PAIR in found.fields,
    )


def _load_spec(
    found: TaskSpec,
    split: str,
    objectives: Sequence[Objective],
    given: str | None,
    folder: pathlib.Path,
    task_module: str | None,
    supervision: Supervision | None,
) -> TaskData:
    task = found.name
    check_split(task, split, found.source.splits)
    if supervision is not None and split == "train":
        supervision = supervision.for_objectives(objectives)
    vocabulary = found.vocabulary if given is None else given
    check_one_rationale(task, supervision)
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
        [*key, files_of_task(found, split)],
        compare=True,
    )
    with_rows(store, task, split)
    own = None
    if found.function is not None:
        own = registry.joint_task(found, objectives, vocabulary, supervision)
    return TaskData.of_store(task, split, objectives, store, opened, metric=found.metric, task=own)


def _no_labels(dataset: PreparedDataset, split: str, supervision: Supervision | None) -> InputError:
    """Returns the error for a split in which no row has the label that `supervision` selects."""
    source = "gold" if supervision is None else supervision.label_source
    count = sum(bool(example.llm_label) for example in dataset.examples(split))
    if source == "gold" and count:
        return InputError(
            f"dataset {dataset.name!r}: no row of {split} has a gold label, but {count} have `llm_label`: set"
            " `label_source=gold_else_llm`"
        )
    return InputError(
        f"dataset {dataset.name!r}: no row of {split} has the label that `label_source={source}` selects"
    )


def _check_fields(dataset: PreparedDataset, objectives: Sequence[Objective]) -> None:
    """Raises InputError if a template names an unknown field."""
    known = (*Objective.FIELDS, *dataset.fields)
    for objective in objectives:
        for field in objective.fields:
            if field not in known:
                raise InputError(
                    f"`objectives`: objective {objective.name} names the field {{{field}}}, but dataset"
                    f" {dataset.name!r} has {', '.join(known)}{nearest(field, known)}; `stepdistill"
                    f" prepare jsonl --fields {field}` keeps a field of your own rows"
                )


def _check_words(objective: Objective, vocabulary: Vocabulary) -> None:
    """Raises InputError if the vocabulary cannot encode the words that mark the label in an answer."""
    for words in objective.words if objective.writes_more else ():
        if (written := vocabulary.decode(vocabulary.encode(words))).split() != words.split():
            raise InputError(
                f"`objectives`: the words {words!r} in target_template of {objective.name} mark the"
                f" label, but the vocabulary {vocabulary.source} changes them to {written!r};"
                " choose different words"
            )


def _key_of(supervision: Supervision | None) -> Any:
    return None if supervision is None else dataclasses.asdict(supervision)


def _joint_store(
    make_task, name, split, objectives, columns, vocabulary, folder, key, compare=False
) -> tuple[TokenStore, Vocabulary]:
    """Returns the token store for all objectives, and the opened vocabulary."""
    opened = load_vocabulary(vocabulary)
    _check_words(objectives[0], opened)
    first, templates = objectives[0], [[o.input_template, o.target_template] for o in objectives]
    if any(o.read_beside_input for o in objectives) or (first.label_field and not first.is_plain):
        templates.append(
            ["labels and absent inputs by field"]
        )  # distinguishes them from older stores
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
    return store, opened


def _parts_of(
    dataset: PreparedDataset, split: str, supervision: Supervision | None
) -> tuple[str, ...]:
    """Returns the splits of the dataset to read for `split`.

    If the run uses the teacher's labels, `train` includes the dataset's unlabelled rows.
    """
    takes_teachers = supervision is not None and supervision.label_source != "gold"
    if split == "train" and takes_teachers and UNLABELLED in dataset.splits:
        return (split, UNLABELLED)
    return (split,)
