"""Loads a task by name: a prepared dataset, a dataset of `add_task`, or a plain SeqIO task or mixture."""

import dataclasses
import os
import pathlib
from collections.abc import Sequence
from typing import Any

from stepdistill_jax.data.joint_vocabulary import joint_vocabulary
from stepdistill_jax.data.objectives import Objective, resolve
from stepdistill_jax.data.prepared import (
    PreparedDataset,
    data_folder,
)
from stepdistill_jax.data.published_split import WHOLE
from stepdistill_jax.data.vocabulary import Vocabulary, load_vocabulary
from stepdistill_jax.errors import InputError
from stepdistill_jax.tasks import registry
from stepdistill_jax.tasks.dataset_tokens import load_dataset
from stepdistill_jax.tasks.lookup import find_task, has_split, splits_of
from stepdistill_jax.tasks.mixtures import SINGLE, Group, TaskObjectives, groups_of, is_mixture
from stepdistill_jax.tasks.pairing import paired, why_not
from stepdistill_jax.tasks.plain_tokens import (
    PLAIN,
    check_split,
    check_supervision,
    common_vocabulary,
    plain_store,
    same_pieces,
)
from stepdistill_jax.tasks.registry import Column, TaskSpec
from stepdistill_jax.tasks.supervision import Supervision
from stepdistill_jax.tasks.task_data import Part, TaskData
from stepdistill_jax.tasks.tokenizing import FOLDER

__all__ = ["has_split", "load_task", "splits_of"]


def load_task(
    task: str,
    *,
    split: str,
    objectives: str | Sequence[Objective] = "step_by_step",
    vocabulary: os.PathLike | str | None = None,
    data_dir: os.PathLike | str | None = None,
    task_module: str | None = None,
    supervision: Supervision | None = None,
    task_objectives: TaskObjectives = None,
    share: tuple[float, int] = WHOLE,
) -> TaskData:
    """Returns the tokens of a task's split. The first call tokenises the split and stores the tokens.

    A plain task is a SeqIO task that neither `prepare` nor `add_task` made. It keeps its own inputs and targets.
    Outside a mixture, its objective is `label`. In a mixture, `task_objectives` sets its objective. Any other task
    of a mixture keeps the objective with which it was registered, unless `task_objectives` is `single`.

    Args:
        task: name of a dataset of `prepare` or `add_task`, or of a SeqIO task or mixture.
        objectives: name of an arm, or a list of objectives. A plain task in a mixture uses only the names and weights.
        vocabulary: path of a `spiece.model`, or `bytes`; None means the task's own.
        data_dir: folder of prepared datasets and token stores; None means the default folder.
        task_module: module that registers the task.
        supervision: None keeps every row, even one without a label.
        task_objectives: {name of a plain task: name of its objective}, or the string `single`, which gives all
            tasks the same objective.
        share: (share of the rows, the run's seed). Only `paper_exact` datasets use it, for train and
            validation.

    Raises:
        InputError: the task or split cannot be read, a task of a mixture has no known objective, vocabularies
            differ, or the rows lack fields that `supervision` needs.
    """
    folder = data_folder(data_dir)
    found = find_task(task, data_dir=folder, task_module=task_module)
    objectives = resolve(objectives)
    given = None if vocabulary is None else os.fspath(vocabulary)
    if task_objectives is not None and (
        isinstance(found, PreparedDataset | TaskSpec) or not is_mixture(found)
    ):
        raise InputError(
            f"`task_objectives`: this is only for mixtures of tasks without objectives, and {task} is not such a"
            " mixture; leave `task_objectives` out"
        )
    if isinstance(found, PreparedDataset | TaskSpec):
        where = (folder, task_module)
        return load_dataset(found, split, objectives, given, where, supervision, share)
    if is_mixture(found):
        load = _MixtureLoader(found, split, objectives, folder, task_module, supervision)
        return load(given, task_objectives)
    check_split(task, split, found.splits)
    check_supervision(found.name, supervision)
    opened = common_vocabulary(task, [found], given, folder)
    store = plain_store(found, split, opened, folder, task_module)
    return TaskData.of_store(task, split, PLAIN, store, opened, task=found, own_inputs=True)


@dataclasses.dataclass(frozen=True)
class _MixtureLoader:
    """Loads a SeqIO mixture.

    Tasks whose rows may belong to the same examples form a `mixtures.Group`. Each group becomes one or more
    `Part`s.
    """

    mixture: Any
    split: str
    objectives: tuple[Objective, ...]
    folder: pathlib.Path
    task_module: str | None
    supervision: Supervision | None

    def __call__(self, given: str | None, task_objectives: TaskObjectives) -> TaskData:
        """Returns the data of the mixture. `given` is the vocabulary of `init_from`; None means the tasks' own."""
        name = self.mixture.name
        single = task_objectives == SINGLE
        names = [PLAIN[0].name] if single else [o.name for o in self.objectives]
        groups = groups_of(self.mixture, names, task_objectives)
        own = [task for group in groups if group.dataset is None for task in group.tasks]
        if own:
            check_supervision(name, self.supervision)
        objectives = self.objectives
        if len(own) == sum(len(group.tasks) for group in groups):
            objectives = PLAIN if single else tuple(map(_as_it_is, range(len(names)), objectives))
        vocabulary = self._vocabulary(groups, own, given)
        parts = [p for group in groups for p in self._parts_of(group, objectives, vocabulary)]
        if (
            self.split != "train"
        ):  # a validation split often lacks rationales, so such parts are left out
            parts = [part for part in parts if part.has_targets]
        if not parts:
            splits = dict.fromkeys(s for t in self.mixture.tasks for s in t.splits)
            check_split(name, self.split, splits)
            raise InputError(f"mixture {name!r}: no row of split {self.split!r} has a target")
        # an objective without any task would have loss 0 in the complete run
        fed = {column.objective for part in parts for column in part.columns}
        for number, objective in enumerate(objectives, 1):
            if number not in fed and self.split == "train":
                raise InputError(
                    f"mixture {name!r}: no task has the objective {objective.name}, which `objectives`"
                    f" lists (the tasks have {', '.join(sorted({names[i - 1] for i in fed}))});"
                    " add such a task, or leave the objective out of `objectives`"
                )
        sample = self.supervision is not None and self.supervision.rationales == "sample"
        return TaskData(name, self.split, objectives, tuple(parts), vocabulary, sample)

    def _vocabulary(
        self, groups: Sequence[Group], own: Sequence[Any], given: str | None
    ) -> Vocabulary:
        """Returns the vocabulary of the mixture: the first of these that exists.

        1. the vocabulary that the plain tasks share
        2. `given`
        3. a vocabulary trained on the prepared datasets
        4. the vocabulary that the tasks made by `add_task` share
        """
        if own:
            return common_vocabulary(self.mixture.name, own, given, self.folder)
        if given is not None:
            return load_vocabulary(given)
        names = dict.fromkeys(str(group.dataset) for group in groups)
        found = [self._dataset(name) for name in names]
        prepared = [d for d in found if isinstance(d, PreparedDataset)]
        if not prepared:
            files = dict.fromkeys(spec.vocabulary for spec in found)
            opened = [load_vocabulary(file) for file in files]
            for file, other in zip(files, opened, strict=True):
                if not same_pieces(opened[0], other):
                    raise InputError(
                        f"mixture {self.mixture.name!r}: its tasks have different vocabularies,"
                        f" {' and '.join([next(iter(files)), file])}; pass one vocabulary to every add_task"
                    )
            return opened[0]
        return load_vocabulary(joint_vocabulary(prepared, self.folder / FOLDER))

    def _dataset(self, name: str) -> Any:
        return find_task(name, data_dir=self.folder, task_module=self.task_module)

    def _parts_of(
        self, group: Group, objectives: tuple[Objective, ...], vocabulary: Vocabulary
    ) -> list[Part]:
        """Returns a `Part` for the tasks of a group together, or one for each task if their rows cannot be paired.

        Returns [] if no task of the group has the split.
        """
        having = [self.split in task.splits for task in group.tasks]
        if self.split == "train" and not all(having):
            lacking = group.tasks[having.index(False)]
            raise InputError(
                f"mixture {self.mixture.name!r}: task {lacking.name!r} has no split 'train' (it has"
                f" {', '.join(lacking.splits)}); leave it out of the mixture"
            )
        if not any(having):
            return []
        if group.dataset is not None:
            return [self._part_of_dataset(group, objectives, vocabulary)]
        numbers = {o.name: i for i, o in enumerate(objectives, 1)}
        order = (
            sorted(  # the label's task first, since paired examples take the first store's labels
                (numbers[objective], i)
                for i, (objective, has) in enumerate(zip(group.objectives, having, strict=True))
                if has
            )
        )
        tasks = [group.tasks[i] for _, i in order]
        columns = [
            Column(number, 0, objectives[number - 1].name, number > 1) for number, _ in order
        ]
        stores = [
            plain_store(task, self.split, vocabulary, self.folder, self.task_module)
            for task in tasks
        ]
        own = {"rate": group.rate, "own_inputs": True}
        names = [task.name for task in tasks]
        reason = why_not(stores, names) if len(stores) > 1 else group.alone
        if reason is not None:
            each = zip(tasks, stores, columns, strict=True)
            return [
                Part(task.name, store, (column,), task=task, **own, drawn=reason)
                for task, store, column in each
            ]
        drawn = f"{' and '.join(names)} paired by id"
        return [Part(group.name, paired(stores), tuple(columns), task=tasks[0], **own, drawn=drawn)]

    def _part_of_dataset(
        self, group: Group, objectives: tuple[Objective, ...], vocabulary: Vocabulary
    ) -> Part:
        """Returns the `Part` of a dataset.

        If the mixture leaves out tasks of the dataset, the part lacks their objectives.
        """
        tagged = {name for name, tag in registry.TAGS.items() if tag.dataset == group.dataset}
        chosen = list(range(len(objectives)))
        if {task.name for task in group.tasks} != tagged:
            chosen = [i for i, o in enumerate(objectives) if o.name in group.objectives]
        if not chosen:
            raise InputError(
                f"mixture {self.mixture.name!r}: {group.name} has only the objectives"
                f" {' and '.join(group.objectives)}, but `objectives` has"
                f" {', '.join(o.name for o in objectives)}"
            )
        supervision = self.supervision
        if (
            supervision is not None and self.split == "train"
        ):  # depends on the first of all objectives
            supervision = supervision.for_objectives(objectives)
        data = load_dataset(
            self._dataset(str(group.dataset)),
            self.split,
            tuple(objectives[i] for i in chosen),
            vocabulary.source,
            (self.folder, self.task_module),
            supervision,
        )
        (part,) = data.parts
        columns = [
            dataclasses.replace(c, objective=chosen[c.objective - 1] + 1) for c in part.columns
        ]
        changed = {"name": group.name, "columns": tuple(columns), "drawn": group.alone}
        return dataclasses.replace(part, **changed, rate=group.rate)


def _as_it_is(number: int, objective: Objective) -> Objective:
    """Returns a copy of an objective, changed to use the inputs and targets of plain tasks as they are."""
    field = "label" if number == 0 else objective.name
    return Objective(objective.name, "{input}", f"{{{field}}}", objective.weight)
