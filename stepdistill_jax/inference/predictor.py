"""Defines `load`, which opens a trained model in Python. It gives the same labels as `predict`."""

import collections
import dataclasses
import os
import pathlib
import threading
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from stepdistill_jax.data.example import Example
from stepdistill_jax.data.rows import JsonRow
from stepdistill_jax.errors import InputError
from stepdistill_jax.inference.allowed_answers import Allowed, allow
from stepdistill_jax.inference.engines import Engine, open_engine
from stepdistill_jax.inference.input_rows import next_window, question
from stepdistill_jax.inference.options import DecodeOptions, decode_options
from stepdistill_jax.inference.predict import decode_window, window_rows
from stepdistill_jax.inference.prompting import Prompting, prompting_for

_OF_A_CALL = ("choices", "choices_temperature")  # options that `Predictor.predict` takes itself


def load(path: os.PathLike | str, **options: Any) -> "Predictor":
    """Opens a trained model for use from Python.

    Args:
        path: workdir or model directory, in Hugging Face's or CTranslate2's layout.
        **options: fields of `DecodeOptions`, except `choices` and `choices_temperature`.

    Raises:
        InputError: an option or the model is bad.
    """
    chosen = decode_options(load, options, without=_OF_A_CALL)
    return Predictor(open_engine(path, chosen), chosen)


class Predictor:
    """A trained model. Threads may share it; their calls run one after another.

    Attributes:
        step: step of the checkpoint; None if the model is not from a workdir.
        labels: the task's labels if they are a closed set; else empty.
    """

    def __init__(self, engine: Engine, options: DecodeOptions):
        """Wraps an open engine; users call `load` instead."""
        self._engine, self._options = engine, options
        self._turn = threading.Lock()
        self.path: pathlib.Path = engine.path
        self.step: int | None = engine.step
        self.labels: tuple[str, ...] = prompting_for(engine, options).labels

    def predict(
        self,
        rows: Iterable[str | Mapping[str, Any]],
        *,
        with_rationale: bool = False,
        choices: os.PathLike | str | Sequence[str] | None = None,
        choices_temperature: float = 1.0,
    ) -> list[dict[str, Any]]:
        """Returns a dict for each row, with the fields that `inference.predict` writes (`id`, `label`, ...).

        Args:
            rows: inputs, or dicts with the fields that `inference.predict` reads. The id of a row without
                `id` is its 1-based index, such as "1".
            with_rationale: also decodes a rationale.
            choices, choices_temperature: see `DecodeOptions`.

        Raises:
            InputError: an option or a row is bad.
        """
        if isinstance(rows, str | Mapping):
            raise InputError("`rows`: expected a list of rows, but got a single row; pass [ROW]")
        given = {"choices": choices, "choices_temperature": choices_temperature}
        options = dataclasses.replace(self._options, **given)
        prompting = prompting_for(self._engine, options, with_rationale=with_rationale)
        allowed = allow(options, prompting, self._engine)
        checked = iter(
            [checked_row(_fields(row, n), n, prompting, allowed) for n, row in enumerate(rows, 1)]
        )
        answers, counts = [], collections.Counter()
        most = window_rows(self._engine, allowed)
        with self._turn:
            while window := next_window(checked, most):
                answers += decode_window(self._engine, prompting, window, counts, None, allowed)
        return answers


def _fields(row: Any, number: int) -> Mapping[str, Any]:
    if isinstance(row, str):
        return {"input": row}
    if not isinstance(row, Mapping):
        raise InputError(f"row {number}: expected a string or a dict, but got {type(row).__name__}")
    return row


def checked_row(
    fields: Mapping[str, Any],
    number: int,
    prompting: Prompting,
    allowed: Allowed | None,
    *,
    most_choices: int | None = None,
) -> Example:
    """Checks a row that does not come from a file, and returns it as an `Example`.

    Args:
        fields: the row's fields, as in `predict`'s input.
        number: 1-based index of the row.
        most_choices: maximum number of choices that the row itself may list; None means no limit.

    Raises:
        InputError: a field is missing or bad, or the choices are too many or cannot be scored.
    """
    where = f"row {number}"
    row = question(JsonRow(fields, where, number), prompting.reads)
    if absent := prompting.lacks(row):
        raise InputError(
            f"{where}: the field {absent[0]!r} is missing or empty, but this model needs it"
        )
    if allowed is None:
        return row
    if most_choices is not None and not allowed.labels and len(row.choices) > most_choices:
        raise InputError(f"{where}: there are more than {most_choices} choices")
    try:
        allowed.check(row)
    except InputError as error:
        raise InputError(f"{where}: {error}") from None
    return row
