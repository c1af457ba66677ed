"""Weights of single target tokens, from a field of the rows that has a number for each word."""

import dataclasses
import os
import string
from collections.abc import Mapping

import numpy as np

from stepdistill_jax.data.prepared import PreparedDataset, data_folder
from stepdistill_jax.data.vocabulary import EOS_ID, Vocabulary
from stepdistill_jax.errors import InputError, nearest
from stepdistill_jax.runtime.checks import FLOAT32
from stepdistill_jax.runtime.fingerprints import digest, sha256_of
from stepdistill_jax.tasks.lookup import find_task
from stepdistill_jax.tasks.prepared_rows import PreparedRows
from stepdistill_jax.tasks.supervision import Supervision
from stepdistill_jax.tasks.task_data import TaskData


def with_token_weights(
    data: TaskData,
    fields: Mapping[str, str],
    *,
    supervision: Supervision,
    data_dir: os.PathLike | str | None = None,
    task_module: str | None = None,
) -> TaskData:
    """The data of a train split with `token_weights` beside the targets that a field weighs.

    Example: {"rationale": "rationale_weights"}, and a row whose rationale is "a late parcel" and whose
    `rationale_weights` is "0 1 2": all tokens of "parcel" weigh 2. A row without the field weighs 1
    everywhere, and so does each end of sequence.

    Args:
        data: of `load_task`.
        fields: for names of objectives, that of the field.
        supervision: the run's; weights follow a row's own label and first rationale only.
        data_dir, task_module: as for `load_task`.

    Raises:
        InputError: an unknown objective, a task or field that `prepare` did not write, a supervision
            that chooses among rationales or labels, or a row whose numbers do not fit its words.
    """
    dataset = find_task(data.name, data_dir=data_folder(data_dir), task_module=task_module)
    where = "`token_weights`"
    if not isinstance(dataset, PreparedDataset):
        raise InputError(
            f"{where}: {data.name} is a SeqIO task; prepare the rows as a dataset"
            " (`stepdistill prepare jsonl --fields`)"
        )
    if not PreparedRows.can_read(supervision.for_objectives(data.objectives)):
        raise InputError(
            f"{where}: goes with `label_source=gold` and `rationales=first` alone, since a row has"
            " weights for one target"
        )
    names = [o.name for o in data.objectives]
    for name, field in fields.items():
        if name not in names:
            raise InputError(f"{where}: no objective is called {name!r}{nearest(name, names)}")
        if field not in dataset.fields:
            raise InputError(
                f"{where}: dataset {data.name!r} keeps no field {field!r} (it keeps"
                f" {', '.join(dataset.fields) or 'none'}){nearest(field, dataset.fields)};"
                f" `stepdistill prepare jsonl --fields {field}` keeps one"
            )
    (store,) = data.stores
    targets_of = {name: store.rows[names.index(name)]["targets"] for name in fields}
    weighed = {name: np.ones(len(rows.ids), np.float32) for name, rows in targets_of.items()}
    begins = begins_word(data.vocabulary)
    examples = (e for e in dataset.examples(data.split) if e.label)  # those that are tokenised
    for number, example in zip(range(store.num_examples), examples, strict=True):
        for name, field in fields.items():
            objective, targets = data.objectives[names.index(name)], targets_of[name]
            if not (text := example.texts.get(field)) or not targets.lengths[number]:
                continue
            start = targets.starts[number]
            end = start + targets.lengths[number]
            try:
                _, target = objective.render(example.texts)
                weighed[name][start:end] = of_tokens(text, target, targets.ids[start:end], begins)
            except ValueError as error:
                raise InputError(
                    f"{data.name}, split {data.split}, row {example.id!r}: {field}: {error}"
                ) from None
    rows = [
        {**rows, **({"token_weights": weighed[name]} if name in weighed else {})}
        for name, rows in zip(names, store.rows, strict=True)
    ]
    sums = {name: sha256_of(w.tobytes()) for name, w in weighed.items()}
    fingerprint = digest([store.fingerprint, sums])
    changed = dataclasses.replace(store, rows=tuple(rows), fingerprint=fingerprint)
    part = dataclasses.replace(data.parts[0], store=changed)
    return dataclasses.replace(data, parts=(part,))


def begins_word(vocabulary: Vocabulary) -> np.ndarray:
    """[vocab] int8 of each id: 1 begins a word (SentencePiece's `▁`), 0 goes on, -1 is a blank (bytes)."""
    pieces = vocabulary.pieces()
    blank = string.whitespace  # ASCII's: other blanks are several bytes
    return np.array([1 if p[:1] == "▁" else -1 if p in blank else 0 for p in pieces], np.int8)


def of_tokens(text: str, target: str, ids: np.ndarray, begins: np.ndarray) -> np.ndarray:
    """[tokens] float32 of a target's ids, from a number for each word of its text.

    A blank, where the vocabulary has it as a token of its own, belongs to the word behind it.

    Raises:
        ValueError: something that is no number from 0, or not as many as words.
    """
    numbers = [_number(word) for word in text.split()]
    words = len(target.split())
    if len(numbers) != words:
        raise ValueError(
            f"{len(numbers)} numbers, and the target has {words} words: {target!r:.80}"
        )
    ends = len(ids) - (ids[-1] == EOS_ID)
    kinds = begins[np.minimum(ids[:ends], len(begins) - 1)]
    word = np.cumsum(kinds == 1)
    if (kinds == -1).any():  # bytes: a word goes on until the first blank behind it
        blank = kinds == -1
        word = 1 + np.cumsum(blank & ~np.concatenate([[True], blank[:-1]]))
    word = word - word[0]
    if word[-1] + 1 != words:
        raise ValueError(
            f"the vocabulary cuts the target into {word[-1] + 1} words, and it has {words}: {target!r:.80}"
        )
    return np.concatenate([np.asarray(numbers)[word], np.ones(len(ids) - ends)]).astype(np.float32)


def _number(word: str) -> float:
    number = float(word)
    if not 0 <= number <= FLOAT32:
        raise ValueError(f"numbers from 0 are wanted, got {word}")
    return number
