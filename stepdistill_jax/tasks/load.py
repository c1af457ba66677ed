"""From a task's name to token stores: prepared datasets, `add_task`, and plain SeqIO tasks."""

import dataclasses
import os
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from stepdistill_jax.data.builder import VERSION, tensorflow
from stepdistill_jax.data.joint_vocabulary import joint_vocabulary
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
from stepdistill_jax.tasks.mixtures import SINGLE, Group, TaskObjectives, groups_of, is_mixture
from stepdistill_jax.tasks.pairing import paired, why_not
from stepdistill_jax.tasks.prepared_rows import PreparedRows
from stepdistill_jax.tasks.registry import Column, TaskSpec
from stepdistill_jax.tasks.sources import describe, files_of, named_errors
from stepdistill_jax.tasks.supervision import Supervision, check_rationales, most_rationales
from stepdistill_jax.tasks.task_data import Part, TaskData
from stepdistill_jax.tasks.token_store import ROW_IDS, TokenStore
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
    task_objectives: TaskObjectives = None,
) -> TaskData:
    """The tokens of a task's split; tokenised on first use, memory-mapped from then on.

    A prepared dataset is a task by its name. A plain SeqIO task is one objective, `label`, on its
    own inputs and targets. The tasks of a mixture give the objectives that their tags or
    `task_objectives` name.

    Args:
        task: a prepared dataset, a task of `add_task`, or a SeqIO task or mixture.
        split: e.g. `train`.
        objectives: an arm's name or objectives; of a plain SeqIO task the names and weights count.
        vocabulary: path of a `spiece.model`, or `bytes`; None is the task's own.
        data_dir: of prepared datasets and token stores; None is the default one.
        task_module: module that registers the task; imported first.
        supervision: which label and rationales are taken; None takes each row as it is, those
            without a label, too.
        task_objectives: for names of a mixture's plain tasks the objective that each gives;
            `single` trains all tasks of a mixture as one objective.

    Raises:
        InputError: an unknown task or split, a mixture of which it is not known which task gives
            which objective, a task that cannot be read, a plain task whose
            vocabulary is not the one asked for, or a supervision that its rows do not offer.
    """
    folder = data_folder(data_dir)
    found = find_task(task, data_dir=folder, task_module=task_module)
    objectives = resolve(objectives)
    given = None if vocabulary is None else os.fspath(vocabulary)
    if isinstance(found, PreparedDataset | TaskSpec):
        where = (folder, task_module)
        return _load_dataset(found, split, objectives, given, where, supervision)
    if is_mixture(found):
        load = _MixtureLoader(found, split, objectives, folder, task_module, supervision)
        return load(given, task_objectives)
    _check_split(task, split, found.splits)
    _check_plain(found.name, supervision)
    vocabulary = _common_vocabulary(task, [found], given, folder)
    store = _plain_store(found, split, vocabulary, folder, task_module)
    return TaskData.of_store(task, split, PLAIN, store, vocabulary, own_inputs=True, task=found)


def _load_dataset(
    found: PreparedDataset | TaskSpec,
    split: str,
    objectives: Sequence[Objective],
    given: str | None,
    where: tuple[pathlib.Path, str | None],
    supervision: Supervision | None,
) -> TaskData:
    """Returns what `prepare` or `add_task` made; `where` is the data's folder and the task module."""
    if isinstance(found, PreparedDataset):
        return _load_prepared(found, split, objectives, given, where[0], supervision)
    return _load_spec(found, split, objectives, given, *where, supervision)


def _load_prepared(
    found: PreparedDataset,
    split: str,
    objectives: Sequence[Objective],
    given: str | None,
    folder: pathlib.Path,
    supervision: Supervision | None,
) -> TaskData:
    task = found.name
    _check_split(task, split, found.splits)
    found.check(f"{split}.jsonl")
    _check_fields(found, objectives)
    if supervision is not None and split == "train":
        supervision = supervision.for_objectives(objectives)
    vocabulary = os.fspath(found.spiece_model) if given is None else given
    parts = _parts_of(found, split, supervision)
    most = 1
    if supervision is not None and supervision.rationales != "first":
        most = max(most_rationales(found.file(part)) for part in parts)

    def prepared_task():
        found.check(VERSION)  # TFDS's files, before they are read for the one time
        if PreparedRows.can_read(supervision):
            labelled = supervision is not None
            return PreparedRows(found, split, objectives, load_vocabulary(vocabulary), labelled)
        spec = _spec_of(found, vocabulary, {split: "+".join(parts)})
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
    _check_split(task, split, found.source.splits)
    if supervision is not None and split == "train":
        supervision = supervision.for_objectives(objectives)
    vocabulary = found.vocabulary if given is None else given
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
    own = None
    if found.function is not None:
        own = registry.joint_task(found, objectives, vocabulary, supervision)
    return TaskData.of_store(task, split, objectives, store, opened, metric=found.metric, task=own)


def _check_plain(task: str, supervision: Supervision | None) -> None:
    _one_rationale(task, supervision)
    if supervision is not None and supervision.label_source != "gold":
        raise InputError(
            f"task {task!r}: `label_source={supervision.label_source}` needs the fields label and"
            " llm_label; a plain SeqIO task or mixture brings targets of its own (add_task has them)"
        )


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
            f"task {name!r}: split {split!r} has no rows (training leaves out those without the"
            " label that `label_source` asks for)"
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


def _spec_of(dataset: PreparedDataset, vocabulary: str, splits: dict[str, str]) -> TaskSpec:
    """A prepared dataset as `add_task` would have it; `splits` maps names to TFDS's."""
    tensorflow()
    import seqio

    source = seqio.TfdsDataSource(
        f"{dataset.name}:{VERSION}",
        tfds_data_dir=os.fspath(dataset.directory.parent),
        splits=splits,
    )
    return TaskSpec(dataset.name, source, (), (), vocabulary, dataset.metric)


def _plain_store(
    task: Any, split: str, vocabulary: Vocabulary, folder: pathlib.Path, module: str | None
) -> TokenStore:
    """Returns the tokens of a SeqIO task of other people's making, as they are."""
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
            _files(task, split),
            ROW_IDS,  # unlike stores of older versions
        ],
        data_dir=folder,
        compare=True,
    )
    return _with_rows(store, task.name, split)


def _common_vocabulary(
    name: str, tasks: Sequence[Any], given: str | None, folder: pathlib.Path
) -> Vocabulary:
    """Returns the one vocabulary of plain tasks, `given` (of INIT_FROM) if that is equal.

    Raises:
        InputError: two that differ.
    """
    files = [_vocabulary_file(task, folder) for task in tasks]
    opened = load_vocabulary(files[0])
    for other in [*files[1:], *([] if given is None else [given])]:
        if not _equal(opened, load_vocabulary(other)):
            raise InputError(
                f"task {name!r}: tokenised with {files[0]}, but"
                f" {'`init_from` brings' if other == given else 'another of its tasks has'}"
                f" {other}; a model has one vocabulary"
            )
    return opened


@dataclasses.dataclass(frozen=True)
class _MixtureLoader:
    """Loads the groups of a SeqIO mixture, each as a part; see `load_task` for the fields."""

    mixture: Any
    split: str
    objectives: tuple[Objective, ...]
    folder: pathlib.Path
    task_module: str | None
    supervision: Supervision | None

    def __call__(self, given: str | None, task_objectives: TaskObjectives) -> TaskData:
        """Returns the data; `given` is the vocabulary of INIT_FROM, if there is one."""
        name = self.mixture.name
        single = task_objectives == SINGLE
        names = [PLAIN[0].name] if single else [o.name for o in self.objectives]
        groups = groups_of(self.mixture, names, task_objectives)
        own = [task for group in groups if group.dataset is None for task in group.tasks]
        if own:
            _check_plain(name, self.supervision)
        objectives = self.objectives
        if len(own) == sum(len(group.tasks) for group in groups):
            objectives = PLAIN if single else tuple(map(_as_it_is, range(len(names)), objectives))
        vocabulary = self._vocabulary(groups, own, given)
        parts = [p for group in groups for p in self._parts_of(group, objectives, vocabulary)]
        if not parts:
            splits = dict.fromkeys(s for t in self.mixture.tasks for s in t.splits)
            _check_split(name, self.split, splits)
        fed = {column.objective for part in parts for column in part.columns}
        for number, objective in enumerate(objectives, 1):
            if number not in fed and self.split == "train":
                raise InputError(
                    f"mixture {name!r}: no task gives the objective {objective.name} of"
                    f" `objectives` (its tasks give {', '.join(sorted({names[i - 1] for i in fed}))})"
                )
        sample = self.supervision is not None and self.supervision.rationales == "sample"
        return TaskData(name, self.split, objectives, tuple(parts), vocabulary, sample)

    def _vocabulary(
        self, groups: Sequence[Group], own: Sequence[Any], given: str | None
    ) -> Vocabulary:
        """Returns the plain tasks' vocabulary, else INIT_FROM's, else one of the datasets' texts."""
        if own:
            return _common_vocabulary(self.mixture.name, own, given, self.folder)
        if given is not None:
            return load_vocabulary(given)
        names = dict.fromkeys(str(group.dataset) for group in groups)
        found = [self._dataset(name) for name in names]
        prepared = [d for d in found if isinstance(d, PreparedDataset)]
        if not prepared:
            files = dict.fromkeys(spec.vocabulary for spec in found)
            opened = [load_vocabulary(file) for file in files]
            for file, other in zip(files, opened, strict=True):
                if not _equal(opened[0], other):
                    raise InputError(
                        f"mixture {self.mixture.name!r}: its tasks have the vocabularies"
                        f" {' and '.join([next(iter(files)), file])}; give add_task the same one"
                    )
            return opened[0]
        return load_vocabulary(joint_vocabulary(prepared, self.folder / FOLDER))

    def _dataset(self, name: str) -> Any:
        return find_task(name, data_dir=self.folder, task_module=self.task_module)

    def _parts_of(
        self, group: Group, objectives: tuple[Objective, ...], vocabulary: Vocabulary
    ) -> list[Part]:
        """Returns the parts of a group; none where no task of it has the split, other than train."""
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
        order = sorted(  # the label's task first: paired examples have its label
            (numbers[objective], i)
            for i, (objective, has) in enumerate(zip(group.objectives, having, strict=True))
            if has
        )
        tasks = [group.tasks[i] for _, i in order]
        columns = [
            Column(number, 0, objectives[number - 1].name, number > 1) for number, _ in order
        ]
        stores = [
            _plain_store(task, self.split, vocabulary, self.folder, self.task_module)
            for task in tasks
        ]
        own: dict[str, Any] = {"rate": group.rate, "own_inputs": True}
        if len(stores) == 1:
            return [Part(tasks[0].name, stores[0], (columns[0],), **own, task=tasks[0])]
        names = [task.name for task in tasks]
        if reason := why_not(stores, names):
            return [
                Part(task.name, store, (column,), **own, drawn=reason, task=task)
                for task, store, column in zip(tasks, stores, columns, strict=True)
            ]
        drawn = f"{' and '.join(names)} paired by id"
        own |= {"drawn": drawn, "task": tasks[0]}
        return [Part(group.name, paired(stores), tuple(columns), **own)]

    def _part_of_dataset(
        self, group: Group, objectives: tuple[Objective, ...], vocabulary: Vocabulary
    ) -> Part:
        """Returns a dataset's part: with all objectives where the mixture has all of its tasks."""
        tagged = {name for name, tag in registry.TAGS.items() if tag.dataset == group.dataset}
        chosen = list(range(len(objectives)))
        if {task.name for task in group.tasks} != tagged:
            chosen = [i for i, o in enumerate(objectives) if o.name in group.objectives]
        if not chosen:
            raise InputError(
                f"mixture {self.mixture.name!r}: {group.name} gives"
                f" {' and '.join(group.objectives)}, and `objectives` has"
                f" {', '.join(o.name for o in objectives)}"
            )
        data = _load_dataset(
            self._dataset(str(group.dataset)),
            self.split,
            tuple(objectives[i] for i in chosen),
            vocabulary.source,
            (self.folder, self.task_module),
            self.supervision,
        )
        (part,) = data.parts
        columns = [
            dataclasses.replace(c, objective=chosen[c.objective - 1] + 1) for c in part.columns
        ]
        return dataclasses.replace(part, name=group.name, columns=tuple(columns), rate=group.rate)


def _as_it_is(number: int, objective: Objective) -> Objective:
    """Returns an objective whose rows a plain task brings: its name and weight are left."""
    field = "label" if number == 0 else objective.name
    return Objective(objective.name, "{input}", f"{{{field}}}", objective.weight)


def _files(task: Any, split: str) -> list[list[Any]]:
    """`files_of` a task's source; what it raises gets the task's name."""
    with named_errors(task.name, task.source, split):
        return files_of(task.source, split)


def _vocabulary_file(task: Any, folder: pathlib.Path) -> str:
    """A plain task's vocabulary as `load_vocabulary` takes it.

    Raises:
        InputError: no `inputs` and `targets`, two vocabularies, or one of another kind.
    """
    import seqio

    features = task.output_features
    if not {"inputs", "targets"} <= set(features):
        raise InputError(
            f"task {task.name!r}: an encoder-decoder needs the features inputs and targets, it has"
            f" {', '.join(features)}"
        )
    inputs, targets = (features[name].vocabulary for name in ("inputs", "targets"))
    if inputs != targets:
        raise InputError(f"task {task.name!r}: inputs and targets must share one vocabulary")
    if isinstance(inputs, seqio.ByteVocabulary):
        return BYTES
    if not isinstance(inputs, seqio.SentencePieceVocabulary):
        raise InputError(
            f"task {task.name!r}: a SentencePiece or byte vocabulary is wanted, got"
            f" {type(inputs).__name__}"
        )
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
