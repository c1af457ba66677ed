"""Determines a model's prompts and lengths, and how its answers are parsed and compared."""

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
WRITTEN = ("id", "score", "probability", "choices")  # output fields that no template may overwrite
# for a directory without stepdistill.json: the paper's prefixes and lengths
BARE_OBJECTIVES = (
    Objective("label", LABEL_INPUT, "{label}"),
    Objective(RATIONALE, RATIONALE_INPUT, "{rationale}"),
)
BARE_INPUT_LENGTH, BARE_LABEL_LENGTH, BARE_RATIONALE_LENGTH = 1024, 64, 256


@dataclasses.dataclass(frozen=True)
class Prompting:
    """Prompts and lengths of a model, and how its answers are compared.

    Attributes:
        objectives: the label's objective, then the rationale's if requested.
        prefix: text before the input in the label's prompt; None means the objective's input template.
        input_length: number of ids to which inputs are truncated.
        decode_lengths: largest number of ids in an answer, for each objective.
        labels: the task's labels if they are a closed set; else empty.
        input_pair: whether rows need a second input text.
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
        """Names of the fields that the model reads in addition to the input."""
        shown = [o.read_beside_input for o in self.objectives[self.prefix is not None :]]
        pair = [(INPUT_PAIR,)] if self.input_pair else []
        return tuple(dict.fromkeys(name for names in pair + shown for name in names))

    def lacks(self, row: Example) -> tuple[str, ...]:
        """Returns the fields in `reads` that are missing or empty in a row."""
        texts = row.texts
        return tuple(name for name in self.reads if not texts.get(name))

    def input_pair_of(self, row: Example) -> str:
        """Returns the row's second input text; empty if the model reads none."""
        return row.input_pair if self.input_pair else ""

    def prompts(self, row: Example) -> list[str]:
        """Returns the row's prompt for each objective."""
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
    """Returns the prompting that the model's `stepdistill.json` describes.

    If the model has no such file, returns the paper's prompting.

    Args:
        options: `max_decode_len` and `prefix` replace the model's own values.
        task: prepared dataset. Its metric and labels replace the model's own.
        data_dir: folder in which `task` is prepared.

    Raises:
        InputError: `task` is not prepared, or the model was not trained to write rationales.
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
                f"`with_rationale`: the model {model.path} has no objective named {RATIONALE!r}"
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
    """Returns the prompting for label and rationale; None if the model has no objective for rationales."""
    objectives = model.task_info.objectives if model.task_info else BARE_OBJECTIVES
    if not any(o.name == RATIONALE for o in objectives[1:]):
        return None
    return prompting_for(model, options, with_rationale=True)


def read_answer(objective: Objective, text: str) -> tuple[dict[str, Any], bool]:
    """Parses a decoded answer with the objective's target template.

    Returns:
        The fields. If no label is found, `label` is empty, and `rationale` (or `text`, if the template has no
        rationale) has the whole text.
        Whether a label was found.
    """
    if (found := objective.parse(text)) is not None:
        return {name: found[name] for name in found if name not in WRITTEN}, True
    rest = RATIONALE if RATIONALE in fields_of(objective.target_template) else "text"
    return {"label": "", rest: text}, False


def scored_answer(objective: Objective, text: str, score: float) -> tuple[dict[str, Any], bool]:
    """Returns the result of `read_answer` with the additional field `score`, rounded to 6 decimals."""
    found, parsed = read_answer(objective, text)
    # + 0.0: a rounded -0.0 would be written as such
    return {"label": found["label"], "score": round(float(score), 6) + 0.0, **found}, parsed


def encode_input(
    vocabulary: Vocabulary, text: str, input_length: int, input_pair: str = ""
) -> tuple[list[int], bool]:
    """Returns the ids of a prompt, truncated as in training, and whether they were truncated.

    Args:
        input_length: largest number of ids, special ones included.
        input_pair: the row's second input text; empty if there is none.
    """
    texts = [text, input_pair] if input_pair else [text]
    ids = vocabulary.framing.input_ids(*map(vocabulary.encode, texts))
    return truncate(ids, input_length), len(ids) > input_length
