"""Decodes or chooses the label of each row, for `predict`, `evaluate` and `serve`."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from stepdistill_jax.data.example import Example
from stepdistill_jax.inference.allowed_answers import Allowed
from stepdistill_jax.inference.engines import Engine, require_finite
from stepdistill_jax.inference.prompting import Prompting, scored_answer


class Labels(NamedTuple):
    """Labels of rows, in row order.

    Attributes:
        answers: the output fields of each row, without the row's id.
        ids: token ids of each answer.
        scores: natural log of each answer's probability, [rows].
        unfinished: number of answers without an end of sequence.
        unparsed: number of answers without a label.
    """

    answers: list[dict[str, Any]]
    ids: Sequence[Sequence[int]]
    scores: np.ndarray
    unfinished: int = 0
    unparsed: int = 0


def label_rows(
    model: Engine,
    prompting: Prompting,
    allowed: Allowed | None,
    rows: Sequence[Example],
    inputs: Sequence[Sequence[int]],
    on_progress: Callable[[int], None] | None = None,
) -> Labels:
    """Returns the label of each row.

    Args:
        allowed: answers to choose from; None decodes the label.
        inputs: ids of each row's prompt (`encode_input`).
        on_progress: called with the row count of each finished batch.

    Raises:
        NotFinite: the model gives NaN.
    """
    if allowed is not None:
        ids = [allowed.ids(row) for row in rows]
        scores = model.score(inputs, ids, on_progress)
        for of_row in scores:
            require_finite(model, of_row)
        return Labels(
            [allowed.answer(row, s) for row, s in zip(rows, scores, strict=True)],
            [of_row[s.argmax()] for of_row, s in zip(ids, scores, strict=True)],
            np.array([s.max() for s in scores]),
        )
    decoded = model.decode(inputs, prompting.decode_lengths[0], on_progress)
    require_finite(model, decoded.scores)
    objective = prompting.objectives[0]
    found = [
        scored_answer(objective, model.vocabulary.decode(ids), score)
        for ids, score in zip(decoded.ids, decoded.scores, strict=True)
    ]
    unparsed = sum(not parsed for _, parsed in found)
    answers, unfinished = [answer for answer, _ in found], int((~decoded.finished).sum())
    return Labels(answers, decoded.ids, decoded.scores, unfinished, unparsed)


def explain_rows(
    model: Engine, prompting: Prompting, objective: int, inputs: Sequence[Sequence[int]]
) -> tuple[list[str], int]:
    """Decodes the text of one objective, such as the rationale, for each row.

    Args:
        objective: index in `prompting.objectives`.
        inputs: ids of each row's prompt for that objective.

    Returns:
        The text of each row.
        The number of texts without an end of sequence.

    Raises:
        NotFinite: the model gives NaN.
    """
    prefix = prompting.objectives[objective].decoder_prefix
    given = {"decoder_prefix": model.vocabulary.encode(prefix)} if prefix else {}
    decoded = model.decode(inputs, prompting.decode_lengths[objective], None, **given)
    require_finite(model, decoded.scores)
    texts = [model.vocabulary.decode(ids) for ids in decoded.ids]
    return texts, int((~decoded.finished).sum())


def score_targets(
    score: Callable[..., list[np.ndarray]],
    inputs: Sequence[Sequence[int]],
    targets: Sequence[Sequence[int]],
    on_progress: Callable[[int], None] | None = None,
) -> np.ndarray:
    """Returns the natural log of each target's probability, [rows] float32; 0 for a target without ids.

    Args:
        score: function with the arguments and result of `Engine.score`.
        inputs: ids of each row's prompt.
        targets: ids of each row's target, with its end of sequence.
        on_progress: called with the row count of each finished batch.
    """
    places = [i for i, ids in enumerate(targets) if ids]
    found = score([inputs[i] for i in places], [[targets[i]] for i in places], on_progress)
    scores = np.zeros(len(targets), np.float32)
    scores[places] = [of_row[0] for of_row in found]
    return scores
