"""How a model is asked: prompts, lengths, and how answers are compared."""

import dataclasses
import os
from typing import Any

from stepdistill_jax.data.example import INPUT_PAIR, Example
from stepdistill_jax.data.objectives import (
    LABEL_INPUT,
    RATIONALE_INPUT,
    Objective,
    fields_of,
    gives_rationale,
)
from stepdistill_jax.data.prepared import open_prepared
from stepdistill_jax.data.vocabulary import Vocabulary, truncate
from stepdistill_jax.errors import InputError
from stepdistill_jax.inference.engines import Engine
from stepdistill_jax.inference.model import LoadedModel
from stepdistill_jax.inference.options import DecodeOptions

RATIONALE = "rationale"
WRITTEN = ("id", "score", "probability", "choices")  # of each answer, whatever a template names
# for a directory that does not say: the paper's prefixes and lengths
BARE_OBJECTIVES = (
    Objective("label", LABEL_INPUT, "{label}"),
    Objective(RATIONALE, RATIONALE_INPUT, "{rationale}"),
)
BARE_INPUT_LENGTH, BARE_LABEL_LENGTH, BARE_RATIONALE_LENGTH = 1024, 64, 256


@dataclasses.dataclass(frozen=True)
class Prompting:
    """How a model is asked.

    Attributes:
        objectives: the label's, and the rationale's if rationales are requested.
        prefix: replaces the label objective's template by this text and the input.
        input_length: most ids of an input, the end of sequence included; longer ones are cut.
        decode_lengths: most ids of an answer, per objective.
        metric, labels: the task's.
        input_pair: whether a row needs a second text of the input.
    """

    objectives: tuple[Objective, ...]
    prefix: str | None
    input_length: int
    decode_lengths: tuple[int, ...]
    metric: str
    labels: tuple[str, ...]
    input_pair: bool = False

    @property
    def reads(self) -> tuple[str, ...]:
        """Returns the fields of a row that the model reads besides the input."""
        shown = [o.read_beside_input for o in self.objectives[self.prefix is not None :]]
        pair = [(INPUT_PAIR,)] if self.input_pair else []
        return tuple(dict.fromkeys(name for names in pair + shown for name in names))

    def lacks(self, row: Example) -> tuple[str, ...]:
        """Those of `reads` that a row has not."""
        texts = row.texts
        return tuple(name for name in self.reads if not texts.get(name))

    def input_pair_of(self, row: Example) -> str:
        """Returns the row's second text where the model reads one."""
        return row.input_pair if self.input_pair else ""

    def prompts(self, row: Example) -> list[str]:
        """One text per objective."""
        texts = [objective.render(row.texts)[0] for objective in self.objectives]
        if self.prefix is not None:
            texts[0] = self.prefix + row.input
        return texts


def prompting_for(
    model: LoadedModel | Engine,
    options: DecodeOptions | None = None,
    *,
    task: str | None = None,
    with_rationale: bool = False,
    data_dir: os.PathLike | str | None = None,
) -> Prompting:
    """What the model's `stepdistill.json` says, or the paper's habits where it has none.

    Args:
        model: that is asked.
        options: their `max_decode_len` and `prefix` replace the model's own; None is none.
        task: prepared dataset, whose metric and labels replace the model's own.
        with_rationale: also asks for a rationale.
        data_dir: where `task` is prepared.

    Raises:
        InputError: an unprepared `task`, or a rationale of a model that was not trained to give one.
    """
    options = options or DecodeOptions()
    info = model.task_info
    objectives = info.objectives if info else BARE_OBJECTIVES
    lengths = [options.max_decode_len or (info.max_decode_len if info else BARE_LABEL_LENGTH)]
    chosen = [objectives[0]]
    if with_rationale:
        found = [o for o in objectives[1:] if o.name == RATIONALE]
        if not gives_rationale(objectives):
            raise InputError(
                f"`with_rationale`: {model.path} has no objective named {RATIONALE!r}"
                f" (it has {', '.join(o.name for o in objectives)})"
            )
        chosen += found
        lengths += [info.target_length if info else BARE_RATIONALE_LENGTH] * len(found)
    metric, labels = (info.metric, info.labels) if info else ("text_match", ())
    input_pair = info is not None and info.input_pair
    if task is not None:
        dataset = open_prepared(task, data_dir)
        metric, labels = dataset.metric, dataset.labels
        input_pair = input_pair or (info is None and INPUT_PAIR in dataset.fields)
    return Prompting(
        tuple(chosen),
        options.prefix,
        info.input_length if info else BARE_INPUT_LENGTH,
        tuple(lengths),
        metric,
        labels,
        input_pair,
    )


def rationale_prompting_for(
    model: LoadedModel | Engine, options: DecodeOptions | None = None
) -> Prompting | None:
    """Returns `prompting_for` with the rationale; None of a model that gives none, or in its answer only."""
    objectives = model.task_info.objectives if model.task_info else BARE_OBJECTIVES
    if not any(o.name == RATIONALE for o in objectives[1:]):
        return None
    return prompting_for(model, options, with_rationale=True)


def read_answer(objective: Objective, text: str) -> tuple[dict[str, Any], bool]:
    """What is written of an answer, and whether its label was found.

    `label` and the other fields of the target. Without the words between them nobody knows where
    the label begins: it is empty then, and all of the text is the `rationale`, or `text` where the
    target has no rationale.
    """
    if (found := objective.parse(text)) is not None:
        return {name: found[name] for name in found if name not in WRITTEN}, True
    rest = RATIONALE if RATIONALE in fields_of(objective.target_template) else "text"
    return {"label": "", rest: text}, False


def scored_answer(objective: Objective, text: str, score: float) -> tuple[dict[str, Any], bool]:
    """`read_answer`, with the `score` as it is written: 6 digits."""
    found, parsed = read_answer(objective, text)
    # + 0.0: a rounded -0.0 would be written as such
    return {"label": found["label"], "score": round(float(score), 6) + 0.0, **found}, parsed


def encode_input(
    vocabulary: Vocabulary, text: str, input_length: int, input_pair: str = ""
) -> tuple[list[int], bool]:
    """Returns (ids, whether they were cut), as training batches cut them.

    Args:
        vocabulary: of the model.
        text: a prompt.
        input_length: most ids, bos and the end of sequence included.
        input_pair: the row's second text, which the encoder reads after the end of the first.
    """
    texts = [text, input_pair] if input_pair else [text]
    ids = vocabulary.framing.input_ids(*map(vocabulary.encode, texts))
    return truncate(ids, input_length), len(ids) > input_length
