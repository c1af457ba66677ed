"""Registers prepared datasets as SeqIO tasks and mixtures, for SeqIO's tools and users' mixtures."""

import contextlib
import contextvars
import dataclasses
import functools
import json
import os
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

from stepdistill_jax.data.builder import VERSION, tensorflow
from stepdistill_jax.data.objectives import Objective, step_by_step
from stepdistill_jax.data.prepared import (
    PreparedDataset,
    data_folder,
    open_prepared,
    prepared_names,
)
from stepdistill_jax.data.vocabulary import load_vocabulary
from stepdistill_jax.errors import InputError
from stepdistill_jax.runtime.progress import log
from stepdistill_jax.tasks import registry
from stepdistill_jax.tasks.registry import Tag, TaskSpec
from stepdistill_jax.tasks.sources import forget_tfds

# data folder of the command that is importing a user's module; None at other times
_IMPORTING_FOR: contextvars.ContextVar[pathlib.Path | None] = contextvars.ContextVar(
    "_IMPORTING_FOR", default=None
)


@dataclasses.dataclass(frozen=True)
class Registration:
    """The SeqIO tasks and mixture that `register_prepared` registered for a dataset.

    Attributes:
        dataset: the dataset, as it was at the time of registration.
        vocabulary: path of a `spiece.model`, or `bytes`.
        tasks: {name of an objective: its `seqio.Task`}.
    """

    dataset: PreparedDataset
    vocabulary: str
    tasks: Mapping[str, Any]
    mixture: Any


_REGISTERED: dict[str, Registration] = {}  # by name of the dataset


def register_prepared(
    data_dir: os.PathLike | str | None = None, *, vocabulary: os.PathLike | str | None = None
) -> tuple[str, ...]:
    """Registers the SeqIO tasks NAME_label and NAME_rationale and the mixture NAME of each prepared dataset.

    Afterwards, `seqio.MixtureRegistry.add("both", ["cqa", "svamp"], default_rate=1.0)` mixes two datasets.
    A task has the splits in which at least one row has the task's target. The tasks of a changed dataset are
    replaced. `paper_exact` datasets are skipped, and so are datasets without a vocabulary.

    Args:
        data_dir: folder of prepared datasets. None means the default folder or, inside a `task_module`, the
            data folder of the command that imports it.
        vocabulary: path of a `spiece.model`, or `bytes`. It must be given if a mixture has several datasets with
            different vocabularies. None means each dataset's own vocabulary, which a dataset without a train split
            does not have.

    Returns:
        Names of the registered datasets.

    Raises:
        InputError: a name is taken by another task or mixture, or a dataset or the vocabulary is damaged.
    """
    tensorflow()
    folder = data_folder(_IMPORTING_FOR.get() if data_dir is None else data_dir)
    if vocabulary is not None:
        load_vocabulary(vocabulary)
    names = []
    for name in prepared_names(folder):
        dataset = open_prepared(name, folder)
        if dataset.paper_exact:
            log(
                f"{name}: not registered with SeqIO: SeqIO cannot make the token ids of `paper_exact` datasets"
            )
            continue
        if vocabulary is None and "train" not in dataset.splits:
            log(f"{name}: not registered with SeqIO: it has no train split, and so no vocabulary")
            continue
        _register(dataset, os.fspath(dataset.spiece_model if vocabulary is None else vocabulary))
        names.append(name)
    if not names:
        log(f"register_prepared: no prepared dataset to register in {folder}")
    return tuple(names)


def registered_dataset(name: str) -> PreparedDataset | None:
    """Returns the dataset whose registered mixture has this name, or None if there is none."""
    found = _REGISTERED.get(name)
    if found is None:
        return None
    import seqio

    mixtures = seqio.MixtureRegistry
    ours = name in mixtures.names() and mixtures.get(name) is found.mixture
    return found.dataset if ours else None


@contextlib.contextmanager
def importing_for(data_dir: pathlib.Path | None) -> Iterator[None]:
    """A context that sets the default `data_dir` of `register_prepared` while a user's module is imported."""
    token = _IMPORTING_FOR.set(data_dir)
    try:
        yield
    finally:
        _IMPORTING_FOR.reset(token)


def spec_of(
    dataset: PreparedDataset,
    vocabulary: str,
    splits: Mapping[str, str],
    objectives: tuple[Objective, ...] = (),
) -> TaskSpec:
    """Returns a prepared dataset as a `TaskSpec`. `splits` is {name of a split: its name in TFDS}."""
    source = _source_class()(
        f"{dataset.name}:{VERSION}",
        tfds_data_dir=os.fspath(dataset.directory.parent),
        splits=dict(splits),
    )
    return TaskSpec(dataset.name, source, (), objectives, vocabulary, dataset.metric)


@functools.cache
def _source_class() -> Any:
    """Returns a TFDS source class that never shuffles files.

    TFDS refuses to shuffle the files of ordered datasets. SeqIO's own buffer still shuffles the rows.
    """
    tensorflow()
    import seqio

    class PreparedDataSource(seqio.TfdsDataSource):
        def get_dataset(self, split=None, shuffle=True, seed=None, shard_info=None, **unused):
            return super().get_dataset(split, shuffle=False, seed=seed, shard_info=shard_info)

    return PreparedDataSource


def _register(dataset: PreparedDataset, vocabulary: str) -> None:
    import seqio

    name = dataset.name
    before = _REGISTERED.get(name)
    if before is not None and registered_dataset(name) is not None:
        if (before.dataset, before.vocabulary) == (dataset, vocabulary):
            return
        _remove(before)
    objectives, splits_of = step_by_step(), {}
    for objective in objectives:
        splits_of[objective] = [s for s in dataset.splits if _has_target(dataset, s, objective)]
    present = [o for o in objectives if splits_of[o]]
    if not present:
        log(f"{name}: not registered with SeqIO: no row has a label or a rationale")
        return
    taken = registry.registered_names()
    for one in (*(f"{name}_{o.name}" for o in present), name):
        if one in taken:
            raise InputError(
                f"register_prepared: dataset {name!r} in {dataset.directory.parent}: SeqIO already has a"
                f" task or mixture {one!r}; rename that one, or prepare the dataset under another name"
                " (`stepdistill prepare ... --name`)"
            )
    forget_tfds(f"{name}:{VERSION}", os.fspath(dataset.directory.parent))
    tasks = {}
    for objective in present:
        splits = {split: split for split in splits_of[objective]}
        arguments = registry.task_arguments(
            spec_of(dataset, vocabulary, splits, objectives), objective
        )
        full_name = f"{name}_{objective.name}"
        tasks[objective.name] = seqio.TaskRegistry.add(full_name, **arguments)
        registry.TAGS[full_name] = Tag(name, objective.name)
    mixture = registry.add_mixture(name, [task.name for task in tasks.values()])
    _REGISTERED[name] = Registration(dataset, vocabulary, tasks, mixture)


def _remove(registration: Registration) -> None:
    """Removes a dataset's mixture and tasks from SeqIO's registries.

    A task that was registered later under the same name stays.
    """
    import seqio

    del _REGISTERED[registration.dataset.name]
    seqio.MixtureRegistry.remove(registration.mixture.name)
    for task in registration.tasks.values():
        if task.name in seqio.TaskRegistry.names() and seqio.TaskRegistry.get(task.name) is task:
            seqio.TaskRegistry.remove(task.name)
            del registry.TAGS[task.name]


def _has_target(dataset: PreparedDataset, split: str, objective: Objective) -> bool:
    """Returns whether any row of the split has a target.

    If none has, the task would be empty, and SeqIO would end a mixture as soon as it draws from this task.
    """
    (field,) = objective.needed
    # only lines that contain the field's name are parsed
    named = f'"{field}":'
    with open(dataset.directory / f"{split}.jsonl", encoding="utf-8") as rows:
        return any(json.loads(row).get(field) for row in rows if named in row)
