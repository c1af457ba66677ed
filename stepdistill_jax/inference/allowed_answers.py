"""Restricts answers to those that the option `choices` allows."""

import functools
import os
from collections.abc import Sequence
from typing import Any

import numpy as np

from stepdistill_jax.data.example import Example
from stepdistill_jax.data.objectives import Objective, fields_of
from stepdistill_jax.data.rows import as_text
from stepdistill_jax.data.text_metrics import normalize
from stepdistill_jax.data.vocabulary import EOS_ID, Vocabulary
from stepdistill_jax.errors import InputError
from stepdistill_jax.inference.engines import Engine
from stepdistill_jax.inference.options import DecodeOptions
from stepdistill_jax.inference.prompting import BARE_INPUT_LENGTH, Prompting
from stepdistill_jax.runtime.files import check_file, read_json
from stepdistill_jax.runtime.fingerprints import digest
from stepdistill_jax.runtime.stores import local_path

ROW, LABELS = "row", "labels"
OTHER_CHOICES = "pass `choices=labels` or a file of labels, or leave `choices` out"
_KEPT = 2**16  # labels whose ids are cached: many rows have the same labels


class Allowed:
    """The allowed answers of each row, and their token ids.

    Attributes:
        labels: the allowed labels; empty if each row has its own choices.
        key: digest of the labels and the temperature.
    """

    def __init__(
        self,
        choices: os.PathLike | str | Sequence[str],
        *,
        labels: Sequence[str],
        objective: Objective,
        vocabulary: Vocabulary,
        most_ids: int,
        temperature: float = 1.0,
    ):
        """Reads the labels, unless each row has its own choices.

        Args:
            choices: as in `DecodeOptions`, but not None. A file has one label per line, or is a JSON list if
                its name ends in .json.
            labels: the task's labels; empty if they are not a closed set.
            objective: objective that trains the model to write labels.
            most_ids: largest number of ids in an answer, the end of sequence included.
            temperature: temperature of the softmax that turns scores into probabilities. The scores stay the same.

        Raises:
            InputError: the objective's target contains other fields than the label, the file cannot be read, or
                the labels are unsuitable, such as repeated or too long.
        """
        if fields_of(objective.target_template) != (objective.label_field,):
            raise InputError(
                f"`choices`: the model writes {objective.target_template!r}, so a label alone has no probability;"
                " leave `choices` out"
            )
        self._objective, self._vocabulary, self._most_ids = objective, vocabulary, most_ids
        self.temperature = float(temperature)
        self._ids_of = functools.lru_cache(_KEPT)(self._encode)
        self.labels: tuple[str, ...] = ()
        if choices != ROW:
            name, found = _read_labels(choices, labels)
            self.labels = _each_checked(found, name)
            try:
                self._ids = self._checked(self.labels)
            except InputError as error:
                raise InputError(f"{name}: {error}") from None
        self.key = digest([ROW if choices == ROW else self.labels, self.temperature])

    def of(self, row: Example) -> tuple[str, ...]:
        """Returns the row's allowed labels in their given order, without repetitions."""
        return self.labels or _each_once(row.choices)

    def ids(self, row: Example) -> list[tuple[int, ...]]:
        """Returns the token ids of each label in `of(row)`, each with an end of sequence."""
        return self._ids if self.labels else self._checked(self.of(row))

    def check(self, row: Example) -> None:
        """Refuses a row that has no choices, or choices that the model cannot score.

        Raises:
            InputError: the row is refused. The message does not name the file and line.
        """
        if self.labels:
            return
        if not row.choices:
            raise InputError("the field 'choices' is missing or empty, but `choices=row` needs it")
        self.ids(row)

    def answer(self, row: Example, scores: np.ndarray) -> dict[str, Any]:
        """Returns the output fields of a row.

        Args:
            scores: natural log of the probability of each label in `of(row)`, [labels].

        Returns:
            `label`: the first label with the highest score.
            `score`: the score of `label`, rounded to 6 decimals.
            `probability`: the probability of `label`, as in `choices`.
            `choices`: {label: probability}, rounded to 6 significant digits. The probabilities are the softmax of
                scores / `self.temperature`.
        """
        labels, scores = self.of(row), np.asarray(scores, np.float64)
        best = int(scores.argmax())
        shares = np.exp((scores - scores[best]) / self.temperature)
        shares /= shares.sum()
        probabilities = [float(f"{share:.6g}") for share in shares]
        return {
            "label": labels[best],
            "score": round(float(scores[best]), 6) + 0.0,  # -0.0 would be written as such
            "probability": probabilities[best],
            "choices": dict(zip(labels, probabilities, strict=True)),
        }

    def _encode(self, label: str) -> tuple[int, ...]:
        """Returns the ids of a label, encoded like a target in training, but never truncated."""
        target = self._objective.target_template.format_map({self._objective.label_field: label})
        return (*self._vocabulary.encode(target), EOS_ID)

    def _checked(self, labels: Sequence[str]) -> list[tuple[int, ...]]:
        found: dict[tuple[int, ...], str] = {}
        for label in labels:
            ids = self._ids_of(label)
            if len(ids) == 1:
                raise InputError(f"the label {label!r} has no ids in the model's vocabulary")
            if len(ids) > self._most_ids:
                raise InputError(
                    f"the label {label!r:.60} has {len(ids)} ids, but the model was trained to write"
                    f" at most {self._most_ids}"
                )
            if ids in found:
                raise InputError(
                    f"the labels {found[ids]!r} and {label!r} have the same ids in the model's"
                    " vocabulary, so the model cannot tell them apart"
                )
            found[ids] = label
        return list(found)


def allow(options: DecodeOptions, prompting: Prompting, model: Engine) -> Allowed | None:
    """Returns the answers that `options.choices` allows; None if it allows any answer.

    Raises:
        InputError: the labels are unsuitable; see `Allowed`.
    """
    if options.choices is None:
        return None
    info = model.task_info
    return Allowed(
        options.choices,
        labels=prompting.labels,
        objective=prompting.objectives[0],
        vocabulary=model.vocabulary,
        most_ids=info.target_length if info else BARE_INPUT_LENGTH,
        temperature=options.choices_temperature,
    )


def _each_once(labels: Sequence[str]) -> tuple[str, ...]:
    """Returns the labels without repetitions. Some questions of CommonsenseQA repeat a label."""
    found: dict[str, str] = {}
    for label in labels:
        found.setdefault(normalize(label), label)
    return tuple(found.values())


def _read_labels(choices: Any, of_task: Sequence[str]) -> tuple[str, list[Any]]:
    """Returns the labels' source, as error messages name it, and the unchecked labels."""
    if choices == LABELS:
        if not of_task:
            raise InputError(
                "`choices=labels`: the task has no closed set of labels; pass a file of labels, or"
                " `choices=row` if the rows have the field 'choices'"
            )
        return "`choices=labels`", list(of_task)
    if isinstance(choices, str | os.PathLike):
        return f"{choices}", _read_file(choices)
    return "`choices`", list(choices)


def _each_checked(labels: list[Any], name: str) -> tuple[str, ...]:
    """Returns the stripped labels.

    Raises:
        InputError: a label is not a text, is blank or is repeated, or there are fewer than two labels.
    """
    labels = [as_text(x, f"label {i}", name).strip() for i, x in enumerate(labels, 1)]
    first: dict[str, int] = {}
    for number, label in enumerate(labels, 1):
        if not label:
            raise InputError(f"{name}: label {number} is blank")
        if (before := first.setdefault(normalize(label), number)) != number:
            raise InputError(
                f"{name}: the label {label!r} is repeated (labels {before} and {number})"
            )
    if len(labels) < 2:
        raise InputError(f"{name}: expected at least two labels, got {len(labels)}")
    return tuple(labels)


def _read_file(path: os.PathLike | str) -> list[Any]:
    local = local_path(path, "`choices`")
    if not local.exists():
        raise InputError(
            f"`choices` {path}: there is no such file; pass `row` to use each row's own choices, or"
            " `labels` to use the task's labels"
        )
    check_file(local, "a file of labels")
    if local.suffix == ".json":
        found = read_json(local)
        if not isinstance(found, list):
            raise InputError(f"{path}: expected a JSON list of labels")
        return found
    try:
        lines = local.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise InputError(
            f"{path}: the file is not UTF-8 ({error.reason} at byte {error.start})"
        ) from None
    except OSError as error:
        raise InputError(f"{path}: the file cannot be read ({error.strerror})") from None
    return [line for line in lines if line.strip()]
