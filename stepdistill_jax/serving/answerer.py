"""A model that is asked row by row, as `predict` asks it: the same prompts, ids, labels and scores."""

import dataclasses
import functools
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import stepdistill_jax
from stepdistill_jax.data.example import Example
from stepdistill_jax.data.rows import JsonRow
from stepdistill_jax.data.vocabulary import EOS_ID, PAD_ID, UNK_ID
from stepdistill_jax.errors import InputError
from stepdistill_jax.inference.allowed_answers import Allowed
from stepdistill_jax.inference.engines import (
    CTranslate2Engine,
    Engine,
    JaxEngine,
    NotFinite,
)
from stepdistill_jax.inference.input_rows import question
from stepdistill_jax.inference.labels import label_rows
from stepdistill_jax.inference.prompting import Asking, encode_input
from stepdistill_jax.serving.batcher import lane_length

MAX_CHOICES = 256  # of one row: each costs time that others wait for


@dataclasses.dataclass(frozen=True)
class Question:
    """A row of a request, and the ids that the model is asked with."""

    row: Example
    ids: list[int]

    @property
    def length(self) -> int:
        """Number of ids."""
        return len(self.ids)


class Answerer:
    """An engine and how it is asked. Only the label is decoded: that is what the method is for."""

    def __init__(self, engine: Engine, asking: Asking, allowed: Allowed | None = None):
        """As `predict` has them: `asking` without the rationale, `allowed` where choices are scored."""
        self._engine, self._asking, self._allowed = engine, asking, allowed
        self.batch_size = engine.batch_size

    def question(self, row: dict[str, Any], number: int) -> Question:
        """The question of a JSON object; an input that is too long is cut, as in training.

        Args:
            row: with the fields of `predict`'s input.
            number: of the row in its request, from 1.

        Raises:
            InputError: a field that is missing or of a wrong type, or choices that cannot be scored.
        """
        where = f"row {number}"
        parsed = question(JsonRow(row, where, number), self._asking.reads)
        if absent := self._asking.lacks(parsed):
            raise InputError(f"{where}: no field {absent[0]!r}, which this model reads, too")
        if self._allowed:
            if not self._allowed.labels and len(parsed.choices) > MAX_CHOICES:
                raise InputError(f"{where}: more than {MAX_CHOICES} choices")
            try:
                self._allowed.check(parsed)
            except InputError as error:
                raise InputError(f"{where}: {error}") from None
        text = self._asking.prompts(parsed)[0]
        ids, _ = encode_input(
            self._engine.vocabulary,
            text,
            self._asking.input_length,
            self._asking.input_pair_of(parsed),
        )
        return Question(parsed, ids)

    def answers(self, questions: Sequence[Question]) -> list[dict[str, Any]]:
        """What `predict` writes of each question.

        Raises:
            InputError: an engine that cannot ask one of them.
            ArithmeticError: the model gives NaN.
        """
        try:
            found = self._asked(questions)
        except NotFinite:
            raise ArithmeticError("the model gives NaN") from None
        except InputError as error:
            # where the model lies is not for those who ask it
            raise InputError(str(error).removeprefix(f"{self._engine.path}: ")) from None
        return [{"id": q.row.id, **answer} for q, answer in zip(questions, found, strict=True)]

    def _asked(self, questions: Sequence[Question]) -> list[dict[str, Any]]:
        inputs = [question.ids for question in questions]
        if isinstance(self._engine, JaxEngine):
            # one row is padded, and with it the batch: a lane has more lengths than are to be compiled
            length = min(lane_length(max(map(len, inputs))), self._asking.input_length)
            inputs[0] = inputs[0] + [PAD_ID] * (length - len(inputs[0]))
        rows = [question.row for question in questions]
        return label_rows(self._engine, self._asking, self._allowed, rows, inputs).answers

    def warm_up(self) -> Iterator[Callable[[], Any]]:
        """Pieces of work after which no row makes the engine compile.

        Choices of the rows themselves have shapes that nobody knows before: nothing is promised there.
        CTranslate2 compiles nothing.

        The pieces raise InputError where the model gives NaN.
        """
        if self._allowed and not self._allowed.labels:
            return
        longest, length = self._asking.input_length, 0
        while length < longest:
            length = min(lane_length(length + 1), longest)
            question = Question(Example("", ""), [UNK_ID] * (length - 1) + [EOS_ID])
            count = 1
            while True:  # few rows are decoded in halves of a batch: one of these counts needs each
                yield functools.partial(self._asked, [question] * count)
                if isinstance(self._engine, CTranslate2Engine):
                    return
                if count == self.batch_size:
                    break
                count = min(2 * count, self.batch_size)

    def info(self) -> dict[str, Any]:
        """What a client may want to know of the model."""
        engine, asking = self._engine, self._asking
        return {
            # its name alone: where it lies is not for those who ask
            "model": os.path.basename(os.path.abspath(engine.path)),
            "step": engine.step,
            "version": stepdistill_jax.__version__,
            "engine": type(engine).__name__.removesuffix("Engine").lower(),
            "device": engine.device,
            "task": engine.task_info.task if engine.task_info else None,
            "labels": list(self._allowed.labels if self._allowed else asking.labels),
            "input_length": asking.input_length,
            "max_decode_len": asking.decode_lengths[0],
            "batch_size": self.batch_size,
        }
