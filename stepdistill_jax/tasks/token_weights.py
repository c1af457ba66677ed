"""Reads the weights of target tokens from a field that contains a number for each word of the target."""

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
    """Returns a copy of a train split's data, with `token_weights` for the objectives in `fields`.

    Example: `fields` is {"rationale": "rationale_weights"}, and a row has the rationale "a late parcel" and the
    `rationale_weights` "0 1 2". Then all tokens of "parcel" have weight 2. The end of sequence has weight 1.
    If a row lacks the field, all its weights are 1.

    Args:
        fields: {name of an objective: name of the field with the weights}.
        supervision: must use the gold label and the first rationale.

    Raises:
        InputError: an objective is unknown, `prepare` did not write the task or field, `supervision` is not
            allowed, or a row's numbers do not match its words.
    """
    dataset = find_task(data.name, data_dir=data_folder(data_dir), task_module=task_module)
    where = "`token_weights`"
    if not isinstance(dataset, PreparedDataset):
        raise InputError(
            f"{where}: {data.name} is a SeqIO task, but only a prepared dataset can have token weights;"
            " prepare the rows as a dataset (`stepdistill prepare jsonl --fields`)"
        )
    if not PreparedRows.can_read(supervision.for_objectives(data.objectives)):
        raise InputError(
            f"{where}: set `label_source=gold` and `rationales=first`, since a row has weights for only"
            " one label and one rationale"
        )
    names = [o.name for o in data.objectives]
    for name, field in fields.items():
        if name not in names:
            raise InputError(f"{where}: there is no objective {name!r}{nearest(name, names)}")
        if field not in dataset.fields:
            raise InputError(
                f"{where}: dataset {data.name!r} has no field {field!r} (it has"
                f" {', '.join(dataset.fields) or 'none'}){nearest(field, dataset.fields)};"
                f" `stepdistill prepare jsonl --fields {field}` keeps this field"
            )
    (store,) = data.stores
    targets_of = {name: store.rows[names.index(name)]["targets"] for name in fields}
    weighed = {name: np.ones(len(rows.ids), np.float32) for name, rows in targets_of.items()}
    begins = begins_word(data.vocabulary)
    # only examples with a label are tokenised, so the i-th of them is example i of the store
    examples = (e for e in dataset.examples(data.split) if e.label)
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
    """Returns a code for each token id, [vocab] int8.

    1: the token begins a word (a SentencePiece token that starts with `▁`).
    0: the token continues a word.
    -1: the token is a single whitespace character, as in a byte vocabulary.
    """
    pieces = vocabulary.pieces()
    blank = string.whitespace  # ASCII only, since other blanks are several bytes
    return np.array([1 if p[:1] == "▁" else -1 if p in blank else 0 for p in pieces], np.int8)


def of_tokens(text: str, target: str, ids: np.ndarray, begins: np.ndarray) -> np.ndarray:
    """Returns the weight of each id of a target, [tokens] float32.

    A token that is only whitespace gets the weight of the next word.

    Args:
        text: a number for each word of `target`.
        begins: result of `begins_word`.

    Raises:
        ValueError: a number is negative or malformed, or the counts of numbers and words differ.
    """
    numbers = [_number(word) for word in text.split()]
    words = len(target.split())
    if len(numbers) != words:
        raise ValueError(
            f"it has {len(numbers)} numbers, but the target has {words} words: {target!r:.80}"
        )
    ends = len(ids) - (ids[-1] == EOS_ID)
    # ids above those of the vocabulary, if there are any, are treated like its last piece
    kinds = begins[np.minimum(ids[:ends], len(begins) - 1)]
    # number of each id's word: pieces `▁a ▁la te` have kinds [1, 1, 0], so words [1, 2, 2]
    word = np.cumsum(kinds == 1)
    if (kinds == -1).any():  # bytes: the first blank after a word ends it and starts the next
        # `a la`: kinds [0, -1, 0, 0], so words [1, 2, 2, 2]
        blank = kinds == -1
        word = 1 + np.cumsum(blank & ~np.concatenate([[True], blank[:-1]]))
    word = word - word[0]  # from 0
    if word[-1] + 1 != words:
        raise ValueError(
            f"the target has {words} words, but the vocabulary splits it into {word[-1] + 1}:"
            f" {target!r:.80}"
        )
    return np.concatenate([np.asarray(numbers)[word], np.ones(len(ids) - ends)]).astype(np.float32)


def _number(word: str) -> float:
    number = float(word)
    if not 0 <= number <= FLOAT32:
        raise ValueError(f"expected numbers of at least 0, got {word}")
    return number
