"""Reads from a SeqIO mixture which of its tasks give which objective, and which share examples."""

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from stepdistill_jax.errors import InputError, nearest
from stepdistill_jax.tasks.registry import TAGS
from stepdistill_jax.tasks.sources import named_errors

SINGLE = "single"  # TASK_OBJECTIVES: every task gives the same objective
TaskObjectives = Mapping[str, str] | str | None


@dataclasses.dataclass(frozen=True)
class Group:
    """Tasks of a mixture whose rows may make up the same examples.

    Attributes:
        name: of the dataset, of the mixture that holds these tasks alone, or of the one task.
        tasks: `seqio.Task`s.
        objectives: for each task the name of the objective that it gives.
        rate: share of the drawn examples; those of all groups need not add up to 1.
        dataset: that `add_task` or `register_prepared` made the tasks of, else None.
    """

    name: str
    tasks: tuple[Any, ...]
    objectives: tuple[str, ...]
    rate: float
    dataset: str | None = None

    def each(self) -> list["Group"]:
        """Returns a group for each of the tasks."""
        pairs = zip(self.tasks, self.objectives, strict=True)
        return [Group(t.name, (t,), (o,), self.rate, self.dataset) for t, o in pairs]


def groups_of(
    mixture: Any, objectives: Sequence[str], task_objectives: TaskObjectives
) -> list[Group]:
    """Returns the groups of a `seqio.Mixture` in the order of their first tasks' names.

    The tasks of a dataset are one group where their rates are equal. So are tasks of other people's
    making that stand in one mixture, with equal rates and different objectives.

    Args:
        mixture: that is asked for.
        objectives: names of a run's objectives.
        task_objectives: the objective of each task that carries no tag, or `single`.

    Raises:
        InputError: a rate of 0, a task without an objective, or names that do not exist.
    """
    import seqio

    tasks = seqio.get_subtasks(mixture)
    rates = {task.name: _rate(mixture, task) for task in tasks}
    if task_objectives == SINGLE:
        return [Group(t.name, (t,), (objectives[0],), rates[t.name]) for t in tasks]
    named = _objectives_of(mixture, tasks, objectives, task_objectives or {})
    found: dict[str, Group] = {}
    for name, dataset, members in _families(mixture):
        group = Group(name, members, tuple(named[t.name] for t in members), 0.0, dataset)
        first = rates[members[0].name]
        equal = all(math.isclose(rates[t.name], first) for t in members)
        distinct = len(set(group.objectives)) == len(members)
        several = group.each() if len(members) == 1 and not dataset else [group]
        for one in several if equal and distinct else group.each():
            found[one.tasks[0].name] = dataclasses.replace(one, rate=rates[one.tasks[0].name])
    return [found[name] for name in sorted(found)]


def label_tasks(
    mixture: Any, objectives: Sequence[str], task_objectives: TaskObjectives
) -> list[str]:
    """Returns the datasets and plain tasks of a `seqio.Mixture` that give the first objective.

    Where nothing says which plain task gives which objective, every task counts for itself.
    """
    import seqio

    tasks = seqio.get_subtasks(mixture)
    known = set(TAGS) | (task_objectives.keys() if isinstance(task_objectives, Mapping) else set())
    if not known.issuperset(task.name for task in tasks):
        task_objectives = SINGLE
    names = {}
    for group in groups_of(mixture, objectives, task_objectives):
        for task, objective in zip(group.tasks, group.objectives, strict=True):
            if objective == objectives[0]:
                names[group.dataset or task.name] = None
    return list(names)


def is_mixture(found: Any) -> bool:
    """Returns whether something that `find_task` gave is a `seqio.Mixture`."""
    import seqio

    return isinstance(found, seqio.Mixture)


def _rate(mixture: Any, task: Any) -> float:
    with named_errors(mixture.name, f"rate of {task.name}", "train"):
        rate = float(mixture.get_rate(task))
    if not (rate > 0 and math.isfinite(rate)):
        raise InputError(
            f"mixture {mixture.name!r}: the rate of {task.name} is {rate:g}; give it one above 0, or"
            " leave the task out of the mixture"
        )
    return rate


def _objectives_of(
    mixture: Any, tasks: Sequence[Any], objectives: Sequence[str], given: Mapping[str, str]
) -> dict[str, str]:
    """Returns the objective's name of each task's name."""
    names = [task.name for task in tasks]
    for task, objective in given.items():
        if task not in names:
            raise InputError(
                f"`task_objectives`: mixture {mixture.name!r} has no task {task!r} (it has"
                f" {', '.join(names)}){nearest(task, names)}"
            )
        if objective not in objectives:
            raise InputError(
                f"`task_objectives`: no objective is called {objective!r} (`objectives` has"
                f" {', '.join(objectives)}){nearest(objective, objectives)}"
            )
    named = {n: TAGS[n].objective for n in names if n in TAGS} | dict(given)
    if missing := [name for name in names if name not in named]:
        proposed = ", ".join(
            f'"{n}": "{objectives[min(i, len(objectives) - 1)]}"' for i, n in enumerate(missing)
        )
        raise InputError(
            f"mixture {mixture.name!r}: nothing says which objective {', '.join(missing)} gives:"
            f" bind TASK_OBJECTIVES = {{{proposed}}} with names of OBJECTIVES, or TASK_OBJECTIVES ="
            f' "{SINGLE}" to train all of its tasks as one objective'
        )
    return named


def _families(mixture: Any) -> Iterator[tuple[str, str | None, tuple[Any, ...]]]:
    """Yields (name, dataset, tasks): those of a dataset, and those of one mixture without a dataset."""
    seen: set[str] = set()
    datasets: dict[str, list[Any]] = {}
    for name, tasks in _inner(mixture):
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
            yield name, None, tuple(others)
    for name, members in datasets.items():
        yield name, name, tuple(members)


def _inner(mixture: Any) -> Iterator[tuple[str, list[Any]]]:
    """Yields each mixture's name with the tasks that stand in it directly."""
    import seqio

    direct = []
    for name in sorted(mixture.rate_per_task_name):
        found = seqio.get_mixture_or_task(name)
        if isinstance(found, seqio.Mixture):
            yield from _inner(found)
        else:
            direct.append(found)
    yield mixture.name, direct
