"""A model that is asked row by row, as `predict` asks it: the same prompts, ids, labels and scores."""

import contextlib
import dataclasses
import functools
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import stepdistill_jax
from stepdistill_jax.data.example import Example
from stepdistill_jax.data.vocabulary import PAD_ID
from stepdistill_jax.errors import InputError
from stepdistill_jax.inference.allowed_answers import LABELS, ROW, Allowed
from stepdistill_jax.inference.engines import (
    CTranslate2Engine,
    Engine,
    JaxEngine,
    NotFinite,
)
from stepdistill_jax.inference.labels import explain_rows, label_rows
from stepdistill_jax.inference.predictor import checked_row
from stepdistill_jax.inference.prompting import RATIONALE, Asking, encode_input
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
    """An engine and how it is asked. A label is what the method serves; a rationale is for looking."""

    def __init__(
        self,
        engine: Engine,
        asking: Asking,
        allowed: Allowed | None = None,
        explaining: Asking | None = None,
    ):
        """Takes what `predict` takes.

        Args:
            engine: opened by `open_engine`.
            asking: of `how_to_ask`, without the rationale.
            allowed: where choices are scored.
            explaining: with the rationale; None where the model gives none by itself.
        """
        self._engine, self._asking, self._allowed = engine, asking, allowed
        self._explaining = explaining
        self.batch_size = engine.batch_size

    @property
    def explains(self) -> bool:
        """Whether there are rationales to ask for."""
        return self._explaining is not None

    def question(self, row: dict[str, Any], number: int) -> Question:
        """The question of a JSON object; an input that is too long is cut, as in training.

        Args:
            row: with the fields of `predict`'s input.
            number: of the row in its request, from 1.

        Raises:
            InputError: a field that is missing or of a wrong type, choices that cannot be scored, or
                some where the server's own labels are.
        """
        checked = checked_row(row, number, self._asking, self._allowed, most_choices=MAX_CHOICES)
        if checked.choices and self._allowed and self._allowed.labels:
            raise InputError(
                f"row {number}: this server scores its own labels, not a row's `choices`"
            )
        return self._question(self._asking, 0, checked)

    def rationale_question(self, row: dict[str, Any]) -> Question:
        """The question of a JSON object that asks for a rationale; see `question`."""
        assert self._explaining is not None
        return self._question(self._explaining, 1, checked_row(row, 1, self._explaining, None))

    def _question(self, asking: Asking, objective: int, row: Example) -> Question:
        ids, _ = encode_input(
            self._engine.vocabulary,
            asking.prompts(row)[objective],
            asking.input_length,
            asking.input_pair_of(row),
        )
        return Question(row, ids)

    def answers(self, questions: Sequence[Question]) -> list[dict[str, Any]]:
        """What `predict` writes of each question.

        Raises:
            InputError: an engine that cannot ask one of them.
            ArithmeticError: the model gives NaN.
        """
        with self._errors_for_clients():
            found = self._asked(questions)
        return [{"id": q.row.id, **answer} for q, answer in zip(questions, found, strict=True)]

    def explanation(self, question: Question) -> dict[str, Any]:
        """The row's id and the rationale that `predict` writes next to a label; errors as `answers`."""
        with self._errors_for_clients():
            return {"id": question.row.id, RATIONALE: self._explained(question)}

    def _explained(self, question: Question) -> str:
        assert self._explaining is not None
        ids = question.ids
        if isinstance(self._engine, JaxEngine):  # one length: one program, which is warm
            ids = ids + [PAD_ID] * (self._explaining.input_length - len(ids))
        (text,), _ = explain_rows(self._engine, self._explaining, 1, [ids])
        return text

    @contextlib.contextmanager
    def _errors_for_clients(self) -> Iterator[None]:
        try:
            yield
        except NotFinite:
            raise ArithmeticError("the model gives NaN") from None
        except InputError as error:
            # where the model lies is not for those who ask it
            raise InputError(str(error).removeprefix(f"{self._engine.path}: ")) from None

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
        unknown = self._engine.vocabulary.unk_id
        if self._explaining and isinstance(self._engine, JaxEngine):
            yield functools.partial(self._explained, Question(Example("", ""), [unknown]))
        if self._allowed and not self._allowed.labels:
            return
        longest, length = self._asking.input_length, 0
        while length < longest:
            length = min(lane_length(length + 1), longest)
            question = Question(Example("", ""), [unknown] * length)
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
            "choices": self._allowed and (LABELS if self._allowed.labels else ROW),
            "reads": list(asking.reads),
            "rationale": self.explains,
            "input_length": asking.input_length,
            "max_decode_len": asking.decode_lengths[0],
            "batch_size": self.batch_size,
        }
