"""Answers the rows of requests, with the same prompts, ids, labels and scores as `predict`."""

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
from stepdistill_jax.inference.prompting import RATIONALE, Prompting, encode_input
from stepdistill_jax.serving.batcher import lane_length

MAX_CHOICES = 256  # per row; each choice delays the requests of other clients


@dataclasses.dataclass(frozen=True)
class Question:
    """A row of a request, and the token ids of its prompt."""

    row: Example
    ids: list[int]

    @property
    def length(self) -> int:
        """Count of token ids."""
        return len(self.ids)


class Answerer:
    """Labels rows with an engine, and writes rationales on request."""

    def __init__(
        self,
        engine: Engine,
        prompting: Prompting,
        allowed: Allowed | None = None,
        explaining: Prompting | None = None,
    ):
        """Combines the parts that `predict` uses.

        Args:
            prompting: result of `prompting_for` for the label alone.
            explaining: prompting for label and rationale; None if the model has no such objective.
        """
        self._engine, self._prompting, self._allowed = engine, prompting, allowed
        self._explaining = explaining
        self.batch_size = engine.batch_size

    @property
    def explains(self) -> bool:
        """Whether the model can write rationales."""
        return self._explaining is not None

    def question(self, row: dict[str, Any], number: int) -> Question:
        """Encodes a row of a request, truncated as in training.

        Args:
            row: fields that `predict` reads.
            number: index of the row, from 1, for messages.

        Raises:
            InputError: a field is missing or malformed, a choice cannot be scored, or the row has `choices`
                although the server has fixed labels.
        """
        checked = checked_row(row, number, self._prompting, self._allowed, most_choices=MAX_CHOICES)
        if checked.choices and self._allowed and self._allowed.labels:
            raise InputError(
                f"row {number}: this server has fixed labels; leave the field `choices` out"
            )
        return self._question(self._prompting, 0, checked)

    def rationale_question(self, row: dict[str, Any]) -> Question:
        """Encodes a row of a request with the prompt that asks for a rationale; see `question`."""
        assert self._explaining is not None
        return self._question(self._explaining, 1, checked_row(row, 1, self._explaining, None))

    def _question(self, prompting: Prompting, objective: int, row: Example) -> Question:
        ids, _ = encode_input(
            self._engine.vocabulary,
            prompting.prompts(row)[objective],
            prompting.input_length,
            prompting.input_pair_of(row),
        )
        return Question(row, ids)

    def answers(self, questions: Sequence[Question]) -> list[dict[str, Any]]:
        """Returns the rows that `predict` would write for the questions.

        Raises:
            InputError: the engine cannot answer one of the questions.
            ArithmeticError: the model gives NaN.
        """
        with self._errors_for_clients():
            found = self._asked(questions)
        return [{"id": q.row.id, **answer} for q, answer in zip(questions, found, strict=True)]

    def explanation(self, question: Question) -> dict[str, Any]:
        """Returns the question's id and rationale.

        Raises the same errors as `answers`.
        """
        with self._errors_for_clients():
            return {"id": question.row.id, RATIONALE: self._explained(question)}

    def _explained(self, question: Question) -> str:
        assert self._explaining is not None
        ids = question.ids
        if isinstance(
            self._engine, JaxEngine
        ):  # padded to one length, so that one program serves all
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
            # clients must not learn the model's path
            raise InputError(str(error).removeprefix(f"{self._engine.path}: ")) from None

    def _asked(self, questions: Sequence[Question]) -> list[dict[str, Any]]:
        inputs = [question.ids for question in questions]
        if isinstance(self._engine, JaxEngine):
            # pads the batch to its lane's length through its first row: a lane holds many lengths, and
            # each would compile a program
            length = min(lane_length(max(map(len, inputs))), self._prompting.input_length)
            inputs[0] = inputs[0] + [PAD_ID] * (length - len(inputs[0]))
        rows = [question.row for question in questions]
        return label_rows(self._engine, self._prompting, self._allowed, rows, inputs).answers

    def warm_up(self) -> Iterator[Callable[[], Any]]:
        """Yields functions that compile the model, each for one batch shape.

        After all of them have been called, only rows with the field `choices` can still cause a compilation.
        With CTranslate2, yields at most one function, which answers one row.

        Each function raises InputError if the model gives NaN.
        """
        unknown = self._engine.vocabulary.unk_id
        if self._explaining and isinstance(self._engine, JaxEngine):
            yield functools.partial(self._explained, Question(Example("", ""), [unknown]))
        if self._allowed and not self._allowed.labels:
            return
        longest, length = self._prompting.input_length, 0
        while length < longest:
            length = min(lane_length(length + 1), longest)
            question = Question(Example("", ""), [unknown] * length)
            count = 1
            while (
                True
            ):  # few rows run as a half, a quarter, ... of a batch: these counts use each size
                yield functools.partial(self._asked, [question] * count)
                if isinstance(self._engine, CTranslate2Engine):
                    return
                if count == self.batch_size:
                    break
                count = min(2 * count, self.batch_size)

    def info(self) -> dict[str, Any]:
        """Returns the facts about the model that clients may read at `/info`."""
        engine, prompting = self._engine, self._prompting
        return {
            # the folder's name only: clients must not learn the model's path
            "model": os.path.basename(os.path.abspath(engine.path)),
            "step": engine.step,
            "version": stepdistill_jax.__version__,
            "engine": type(engine).__name__.removesuffix("Engine").lower(),
            "device": engine.device,
            "task": engine.task_info.task if engine.task_info else None,
            "labels": list(self._allowed.labels if self._allowed else prompting.labels),
            "choices": self._allowed and (LABELS if self._allowed.labels else ROW),
            "reads": list(prompting.reads),
            "rationale": self.explains,
            "input_length": prompting.input_length,
            "max_decode_len": prompting.decode_lengths[0],
            "batch_size": self.batch_size,
        }
