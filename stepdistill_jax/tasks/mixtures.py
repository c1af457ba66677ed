"""Finds the objective of each task in a SeqIO mixture, and groups tasks whose rows may belong to the same examples."""

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from stepdistill_jax.errors import InputError, nearest
from stepdistill_jax.tasks.registry import TAGS
from stepdistill_jax.tasks.sources import named_errors

SINGLE = "single"  # value of TASK_OBJECTIVES: all tasks have the same objective
TaskObjectives = Mapping[str, str] | str | None


@dataclasses.dataclass(frozen=True)
class Group:
    """Tasks of a mixture, whose rows may belong to the same examples.

    Attributes:
        name: name of the dataset. A group of plain tasks is named after its task with the run's first objective,
            or after its first task if none has that objective. A group that the method `each` returned is named
            after its only task.
        tasks: the `seqio.Task`s.
        objectives: name of each task's objective.
        rate: rate at which examples are drawn, relative to other groups.
        dataset: name of the dataset of `add_task` or `register_prepared`; None for plain tasks.
        alone: why the method `each` put the task into a group of its own; "" for other groups.
    """

    name: str
    tasks: tuple[Any, ...]
    objectives: tuple[str, ...]
    rate: float
    dataset: str | None = None
    alone: str = ""

    def each(self, alone: str) -> list["Group"]:
        """Splits the group into groups of one task each. `alone` is the reason for the split."""
        pairs = zip(self.tasks, self.objectives, strict=True)
        return [Group(t.name, (t,), (o,), self.rate, self.dataset, alone) for t, o in pairs]


def groups_of(
    mixture: Any, objectives: Sequence[str], task_objectives: TaskObjectives
) -> list[Group]:
    """Returns the groups of a `seqio.Mixture`, sorted by the names of their first tasks.

    The tasks of a dataset form one group if their rates are equal and their objectives differ. Otherwise each
    task forms its own group. The plain tasks that one mixture lists directly are grouped by the same rule.

    Args:
        task_objectives: {name of a plain task: name of its objective}. With "single", each task forms its own
            group and has the first objective.

    Raises:
        InputError: a rate is not above 0, a task has no objective, or `task_objectives` has a wrong entry.
    """
    import seqio

    tasks = seqio.get_subtasks(mixture)
    rates = {task.name: _rate(mixture, task) for task in tasks}
    if task_objectives == SINGLE:
        return [Group(t.name, (t,), (objectives[0],), rates[t.name]) for t in tasks]
    assert not isinstance(task_objectives, str)  # `single` is the only text
    named = _objectives_of(mixture, tasks, objectives, task_objectives or {})
    found: dict[str, Group] = {}
    for dataset, members in _families(mixture):
        taught = tuple(named[task.name] for task in members)
        # a group of plain tasks has the name of the task with the labels
        at = taught.index(objectives[0]) if objectives[0] in taught else 0
        name = dataset or members[at].name
        group = Group(name, members, taught, 0.0, dataset)
        several = [group]
        if not all(math.isclose(rates[t.name], rates[members[0].name]) for t in members):
            several = group.each("the rates of its mixture differ")
        elif len(set(taught)) < len(members):
            several = group.each("several tasks of its mixture have the same objective")
        for one in several:
            first = one.tasks[0].name
            found[first] = dataclasses.replace(one, rate=rates[first])
    return [found[name] for name in sorted(found)]


def label_tasks(
    mixture: Any, objectives: Sequence[str], task_objectives: TaskObjectives
) -> list[str]:
    """Returns the names of a mixture's datasets and plain tasks that have the model's first objective.

    A plain task (see `load_task`) has the objective that `task_objectives` names, or else the first one.

    Args:
        mixture: the `seqio.Mixture` to evaluate.
        objectives: names of the model's objectives.
        task_objectives: the `task_objectives` of the model's training run, which may have used another mixture.

    Raises:
        InputError: no dataset or plain task of the mixture has that objective.
    """
    import seqio

    tasks = seqio.get_subtasks(mixture)
    given = task_objectives if isinstance(task_objectives, Mapping) else {}
    there, names = {task.name for task in tasks}, {}
    for task in tasks:
        tag = TAGS.get(task.name)
        if tag is None or task_objectives == SINGLE:
            if given.get(task.name, objectives[0]) == objectives[0]:
                names[task.name] = None
        else:
            # a dataset is included if its label task, or every one of its tasks, is in the mixture
            whole = {name for name, other in TAGS.items() if other.dataset == tag.dataset}
            if whole <= there or tag.objective == objectives[0]:
                names[tag.dataset] = None
    if not names:
        raise InputError(
            f"mixture {mixture.name!r}: none of its tasks has the objective {objectives[0]}, which the"
            f" model is asked to predict (its tasks: {', '.join(sorted(there))})"
        )
    return list(names)


def is_mixture(found: Any) -> bool:
    """Returns whether a result of `find_task` is a `seqio.Mixture`."""
    import seqio

    return isinstance(found, seqio.Mixture)


def _rate(mixture: Any, task: Any) -> float:
    with named_errors(mixture.name, f"rate of {task.name}", "train"):
        rate = float(mixture.get_rate(task))
    if not (rate > 0 and math.isfinite(rate)):
        raise InputError(
            f"mixture {mixture.name!r}: the rate of {task.name} is {rate:g}; set a rate above 0, or"
            " leave the task out of the mixture"
        )
    return rate


def _objectives_of(
    mixture: Any, tasks: Sequence[Any], objectives: Sequence[str], given: Mapping[str, str]
) -> dict[str, str]:
    """Returns {name of a task: name of its objective}."""
    names = [task.name for task in tasks]
    for task, objective in given.items():
        if task in names and task in TAGS and TAGS[task].objective != objective:
            raise InputError(
                f"`task_objectives`: {task} already has the objective {TAGS[task].objective} of dataset"
                f" {TAGS[task].dataset}; leave this task out"
            )
        if task not in names:
            raise InputError(
                f"`task_objectives`: mixture {mixture.name!r} has no task {task!r} (it has"
                f" {', '.join(names)}){nearest(task, names)}"
            )
        if objective not in objectives:
            raise InputError(
                f"`task_objectives`: there is no objective {objective!r} (`objectives` has"
                f" {', '.join(objectives)}){nearest(objective, objectives)}"
            )
    named = {n: TAGS[n].objective for n in names if n in TAGS} | dict(given)
    if missing := [name for name in names if name not in named]:
        proposed = ", ".join(
            f'"{n}": "{objectives[min(i, len(objectives) - 1)]}"' for i, n in enumerate(missing)
        )
        raise InputError(
            f"mixture {mixture.name!r}: the objective of {', '.join(missing)} is not known:"
            f" bind TASK_OBJECTIVES = {{{proposed}}} with names from OBJECTIVES, or bind TASK_OBJECTIVES ="
            f' "{SINGLE}" to train all tasks of the mixture as one objective'
        )
    return named


def _families(mixture: Any) -> Iterator[tuple[str | None, tuple[Any, ...]]]:
    """Yields each task of `mixture` once, grouped by dataset.

    The tasks of no dataset come first: (None, direct tasks) for each mixture inside `mixture`, and for `mixture`
    itself. Then follows (name, tasks) for each dataset.
    """
    seen: set[str] = set()
    datasets: dict[str, list[Any]] = {}
    for tasks in _inner(mixture):
        others = []
        for task in tasks:
            if task.name in seen:
                continue
            seen.add(task.name)
            if tag := TAGS.get(task.name):
                datasets.setdefault(tag.dataset, []).append(task)
            else:
                others.append(task)
        if others:
            yield None, tuple(others)
    for name, members in datasets.items():
        yield name, tuple(members)


def _inner(mixture: Any) -> Iterator[list[Any]]:
    """Yields the tasks that a mixture contains directly, for each mixture inside `mixture`, and last for `mixture`."""
    import seqio

    direct = []
    for name in sorted(mixture.rate_per_task_name):
        found = seqio.get_mixture_or_task(name)
        if isinstance(found, seqio.Mixture):
            yield from _inner(found)
        else:
            direct.append(found)
    yield direct
