"""Registers a dataset with one call: a SeqIO task for each objective, and the mixture of these tasks."""

import contextlib
import dataclasses
import functools
import inspect
import itertools
import os
import re
import sys
from collections.abc import Callable, Sequence
from typing import Any, cast

from stepdistill_jax.data.builder import tensorflow
from stepdistill_jax.data.corpora.row_sources import split_lists
from stepdistill_jax.data.objectives import Objective, resolve
from stepdistill_jax.data.text_metrics import METRICS, accuracy, metric_fn
from stepdistill_jax.data.vocabulary import BYTES, Framing, load_vocabulary
from stepdistill_jax.errors import InputError
from stepdistill_jax.tasks.preprocessors import (
    LABEL_TEXT,
    drop_absent_rows,
    empty_absent_targets,
    framing_steps,
    in_turn,
    paired_mixture,
    render,
    with_absent_rows,
)
from stepdistill_jax.tasks.sources import (
    Rows,
    RowsOfFunction,
    check_source,
    describe_source,
    named_errors,
    rows_of_lists,
)
from stepdistill_jax.tasks.supervision import Supervision, choose

CHECKED_ROWS = 4  # rows that `add_task` reads as a trial


@dataclasses.dataclass(frozen=True)
class TaskSpec:
    """The arguments of `add_task`. They define its SeqIO mixture.

    A training run can use other objectives or another vocabulary.

    Attributes:
        name: name of the mixture. Its tasks are named NAME_OBJECTIVE.
        source: a `seqio.DataSource`.
        vocabulary: path of a `spiece.model`, or `bytes`.
        metric: name in `data.text_metrics.METRICS`.
        function: the user's metric function, or None.
    """

    name: str
    source: Any
    preprocessors: tuple[Callable, ...]
    objectives: tuple[Objective, ...]
    vocabulary: str
    metric: str
    function: Callable | None = None


@dataclasses.dataclass(frozen=True)
class Tag:
    """Names of the dataset and of the objective of a registered SeqIO task."""

    dataset: str
    objective: str


SPECS: dict[str, TaskSpec] = {}
TAGS: dict[str, Tag] = {}  # by name of the SeqIO task


def add_task(
    name: str,
    *,
    source: Any,
    splits: Sequence[str] | None = None,
    objectives: str | Sequence[Objective] = "step_by_step",
    vocabulary: os.PathLike | str = BYTES,
    metric: str | Callable = "text_match",
    preprocessors: Sequence[Callable] = (),
) -> Any:
    """Registers the SeqIO tasks NAME_label, NAME_rationale, ... and the mixture NAME, and reads the first rows.

    Example: `add_task("sums", source=rows, splits=["train"])`, where `rows("train")` yields dicts such as
    `{"input": "2 + 2", "label": "4", "rationale": "two and two make four"}`.

    Args:
        source: a list of rows, which becomes the split `train`; or a dict {name of a split: list of rows}; or a
            `seqio.DataSource`; or a function that takes the name of a split and returns the split's rows. A row is
            a dict with `input`, `label` and optionally `rationale`, `llm_label`, `weight`, and text fields that
            `objectives` name.
        splits: names of the splits; required for a function, otherwise not allowed.
        objectives: name of an arm, or a list of objectives. Each objective becomes a task, whose targets lack
            the `decoder_prefix`; training adds it.
        vocabulary: path of a `spiece.model`, or `bytes`. The vocabulary of `init_from` takes precedence.
        metric: `text_match`, `value_match`, or a SeqIO metric function to use in addition to `text_match`. The
            function takes `(targets, predictions)` or `(targets, scores)`, and returns a dict of numbers. The
            targets and predictions are labels.
        preprocessors: SeqIO preprocessors to apply first.

    Returns:
        The `seqio.Mixture`.

    Raises:
        InputError: the name is taken, or the first rows cannot be read. Nothing stays registered.
    """
    tensorflow()
    import seqio

    if not re.fullmatch(r"[A-Za-z][\w.]*", name):
        raise InputError(f"add_task: expected a name of letters, digits and _, got {name!r}")
    if not isinstance(metric, str) and not callable(metric):
        raise InputError(
            f"add_task({name!r}): metric: expected a name ({', '.join(METRICS)}) or a function, got"
            f" {type(metric).__name__}"
        )
    function, metric = (metric, "text_match") if callable(metric) else (None, metric)
    metric_fn(metric)
    objectives = resolve(objectives)
    if splits is None and (lists := split_lists(source)) is not None:
        source, splits = rows_of_lists(lists), list(lists)
    if callable(source) and not isinstance(source, seqio.DataSource):
        if not splits:
            raise InputError(
                f"add_task({name!r}): the source is a function: name its splits with splits=[...]"
            )
        named = dict.fromkeys(field for o in objectives for field in o.fields)
        more = [field for field in named if field not in Objective.FIELDS]
        source = seqio.FunctionDataSource(
            RowsOfFunction(name, cast(Rows, source), more), splits=list(splits)
        )
    elif splits is not None:
        raise InputError(
            f"add_task({name!r}): pass `splits` only if the source is a function; this source defines its own splits"
        )
    elif not isinstance(source, seqio.DataSource):
        raise InputError(
            f"add_task({name!r}): source must be a list of dicts,"
            f" a dict {{split: list of dicts}}, a seqio.DataSource, or a function that takes the split's name; got"
            f" {type(source).__name__}"
        )
    check_source(name, source)
    load_vocabulary(vocabulary)
    vocabulary = os.fspath(vocabulary)
    spec = TaskSpec(name, source, tuple(preprocessors), objectives, vocabulary, metric, function)
    names = [f"{name}_{o.name}" for o in spec.objectives]
    taken = registered_names()
    for one in (*names, name):
        if one in taken:
            raise InputError(f"add_task({name!r}): SeqIO already has a task or mixture {one!r}")
    # a failure below removes everything again, so that the call can be repeated after a fix
    try:
        for objective in spec.objectives:
            seqio.TaskRegistry.add(f"{name}_{objective.name}", **task_arguments(spec, objective))
        mixture = add_mixture(name, names)
        for task in map(seqio.TaskRegistry.get, names):
            _try_out(with_absent_rows(task), spec)
        _try_out(mixture, spec)
        metric_functions(seqio.TaskRegistry.get(names[0]))
    except BaseException:
        for one in names:
            with contextlib.suppress(ValueError, KeyError):
                seqio.TaskRegistry.remove(one)
        with contextlib.suppress(ValueError, KeyError):
            seqio.MixtureRegistry.remove(name)
        raise
    SPECS[name] = spec
    TAGS.update({f"{name}_{o.name}": Tag(name, o.name) for o in spec.objectives})
    return mixture


def add_mixture(name: str, tasks: Sequence[str]) -> Any:
    """Registers the mixture of a dataset's tasks under the name of the dataset."""
    import seqio

    return seqio.MixtureRegistry.add(
        name, list(tasks), default_rate=1.0, mixture_cls=paired_mixture(), sample_fn=in_turn
    )


def _try_out(provider: Any, spec: TaskSpec) -> None:
    """Reads the first rows of a task or mixture from its first split, so that errors are raised at once."""
    split = next(iter(spec.source.splits))
    with named_errors(provider.name, spec.source, split):
        dataset = provider.get_dataset(
            None, split, shuffle=False, num_epochs=1, try_in_mem_cache=False
        )
        found = list(itertools.islice(dataset.as_numpy_iterator(), CHECKED_ROWS))
    if not found and provider.name == spec.name:
        raise InputError(
            f"task {provider.name!r}: {describe_source(spec.source)} has no row with a target in"
            f" split {split!r}"
        )


def metric_functions(task: Any) -> Sequence[Callable]:
    """Returns the `metric_fns` of a `seqio.Task`.

    Raises:
        InputError: a metric takes arguments unknown to SeqIO.
    """
    try:
        return task.metric_fns
    except ValueError as error:
        raise InputError(f"task {task.name!r}: {' '.join(str(error).split())}") from None


def registered_names() -> list[str]:
    """Returns the names of all SeqIO tasks and mixtures in this process, without importing SeqIO."""
    if "seqio" not in sys.modules:
        return []
    import seqio

    return sorted({*seqio.TaskRegistry.names(), *seqio.MixtureRegistry.names()})


def task_arguments(spec: TaskSpec, objective: Objective) -> dict[str, Any]:
    """Returns the arguments of `seqio.Task` for one objective, with SeqIO's feature names.

    Only the first objective's task gets a metric. `seqio_cache_tasks` stores the tokens before they are truncated,
    so a cache serves runs of any sequence length.
    """
    import seqio

    framing = load_vocabulary(spec.vocabulary).framing
    # rows that depend on a run's lengths must not be cached, since the lengths are not known yet
    by_length = any(
        "sequence_length" in inspect.signature(p).parameters for p in spec.preprocessors
    )
    may_cache = spec.source.caching_permitted and not by_length
    return {
        "source": spec.source,
        "preprocessors": [
            *spec.preprocessors,
            functools.partial(
                render,
                task=f"{spec.name}_{objective.name}",
                source=describe_source(spec.source),
                objectives={"": objective},
            ),
            seqio.preprocessors.tokenize,
            *([seqio.CacheDatasetPlaceholder()] if may_cache else []),
            *framing_steps(framing),
            # truncates to a run's lengths and keeps the end of sequence
            seqio.preprocessors.append_eos_after_trim,
            empty_absent_targets,
            drop_absent_rows,
        ],
        "output_features": _features(spec.vocabulary, framing),
        **(_label_metrics(spec, objective) if objective is spec.objectives[0] else {}),
    }


def _label_metrics(spec: TaskSpec, objective: Objective) -> dict[str, Any]:
    """Returns the arguments of `seqio.Task` for the metric that compares the labels in targets and answers."""

    def label_of(text: str, example: Any = None, is_target: bool = False) -> str:
        if is_target and example is not None and LABEL_TEXT in example:
            return example[
                LABEL_TEXT
            ].decode()  # the gold label; the target may have the teacher's label
        return (objective.parse(text) or {"label": ""})["label"]

    def label_accuracy(targets, predictions):
        return {"accuracy": accuracy(predictions, targets, spec.metric)}

    return {"postprocess_fn": label_of, "metric_fns": [spec.function or label_accuracy]}


@dataclasses.dataclass(frozen=True)
class Column:
    """A column of a token store: an input and a target for each example, made by one objective.

    Attributes:
        objective: index of the objective, from 1.
        variant: index of the rationale among the example's rationales, from 0.
        name: name in the store. The features are `NAME_inputs` and `NAME_targets`.
        reads_rationale: whether the objective's templates contain a rationale.
    """

    objective: int
    variant: int
    name: str
    reads_rationale: bool


def columns_of(objectives: Sequence[Objective], rationales: int = 1) -> tuple[Column, ...]:
    """Returns the columns of a token store.

    For example, `step_by_step` with 2 rationales has the columns `label`, `rationale` and `rationale.1`.

    Args:
        rationales: number of columns for an objective that reads a rationale. Other objectives have one column.
    """
    columns = []
    for number, o in enumerate(objectives, 1):
        reads = "rationale" in o.fields
        for variant in range(rationales if reads else 1):
            name = f"{o.name}.{variant}" if variant else o.name
            columns.append(Column(number, variant, name, reads))
    return tuple(columns)


def joint_task(
    spec: TaskSpec,
    objectives: Sequence[Objective],
    vocabulary: str,
    supervision: Supervision | None = None,
    most: int = 1,
) -> Any:
    """Returns an unregistered `seqio.Task` in which each row has the features of `columns_of(objectives, most)`.

    `most` is the maximum number of rationales of an example. If `supervision` is None, every example is kept unchanged.
    """
    import seqio

    columns = columns_of(objectives, most)
    chosen = []
    if supervision is not None:
        chosen = [
            functools.partial(
                choose, task=spec.name, supervision=supervision, metric=spec.metric, most=most
            )
        ]

    framing = load_vocabulary(vocabulary).framing
    features = _features(vocabulary, framing)
    return seqio.Task(
        spec.name,
        source=spec.source,
        preprocessors=[
            *spec.preprocessors,
            *chosen,
            functools.partial(
                render,
                task=spec.name,
                source=describe_source(spec.source),
                objectives={f"{c.name}_": objectives[c.objective - 1] for c in columns},
                variants={f"{c.name}_": c.variant for c in columns},
            ),
            seqio.preprocessors.tokenize,
            *framing_steps(framing),
            # truncates nothing: a store serves runs of all lengths
            seqio.preprocessors.append_eos,
            empty_absent_targets,
        ],
        output_features={
            f"{c.name}_{side}": feature for c in columns for side, feature in features.items()
        },
        **(_label_metrics(spec, objectives[0]) if spec.function else {}),
    )


def _features(vocabulary: str, framing: Framing) -> dict[str, Any]:
    import seqio

    opened = seqio_vocabulary(vocabulary)
    return {
        "inputs": seqio.Feature(opened, add_eos=framing.add_eos_token),
        "targets": seqio.Feature(opened, add_eos=True),
    }


def seqio_vocabulary(vocabulary: str) -> Any:
    """Returns SeqIO's vocabulary for a `spiece.model` or `bytes`, without extra ids."""
    import seqio

    if vocabulary == BYTES:
        return seqio.ByteVocabulary(extra_ids=0)
    return seqio.SentencePieceVocabulary(vocabulary, extra_ids=0)
