"""Makes an output row from the answers to a question: the commonest label, and a rationale for it."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from stepdistill_jax.data.example import Example
from stepdistill_jax.data.text_metrics import metric_fn
from stepdistill_jax.teacher.answers import Answer, Reading, metric_name

Sample = tuple[Answer, Reading]


def vote(labels: Sequence[str], metric: str) -> tuple[str, float]:
    """Returns the commonest label, and its share of the labels.

    `metric` decides which labels are equal. A tie goes to the label that appears first.

    Example: `vote(["(84 / 2)", "(4 * 2)", "42"], "value_match")` is ("(84 / 2)", 2 / 3).
    """
    matches = metric_fn(metric)
    counts: list[list[Any]] = []  # [label, votes], in the order of their first appearance
    for label in labels:
        same = next((entry for entry in counts if matches(label, entry[0])), None)
        if same is None:
            counts.append([label, 1])
        else:
            same[1] += 1
    label, votes = max(counts, key=lambda entry: entry[1])
    return label, votes / len(labels)


def output_row(
    row: Example,
    samples: Sequence[Sample],
    *,
    task: str,
    source: str,
    label_given: bool,
    provenance: dict[str, Any],
) -> dict[str, Any]:
    """Returns a question and its answers as a row of the generic format.

    All rationales of usable answers are stored in `rationales`, and one of them in `rationale`. If the teacher was
    not given the label, the commonest label is stored in `llm_label`. If there are
    several samples, `weight` is also multiplied by the share of the usable answers with this label.

    Args:
        row: the question.
        samples: its answers, in order.
        source: source of the rationales.
        label_given: whether the teacher was given the label.
        provenance: entries of the field `provenance`, which also contains the answers.
    """
    result: dict[str, Any] = {"id": row.id, "input": row.input}
    if row.label:
        result["label"] = row.label
    if row.llm_label:
        result["llm_label"] = row.llm_label  # replaced below if there is a new one
    usable = [reading for _, reading in samples if reading.usable]
    weight, rationale = row.weight, ""
    if usable and label_given:
        rationale = usable[0].rationale
    elif usable:
        label, share = vote([reading.label for reading in usable], metric_name(task))
        result["llm_label"] = label
        matches = metric_fn(metric_name(task))
        rationale = next(r.rationale for r in usable if matches(r.label, label))
        if len(samples) > 1:
            weight *= share
    if rationale:
        result["rationale"] = rationale
    rationales = [
        {"text": r.rationale, "source": source, "label": row.label if label_given else r.label}
        for r in usable
    ]
    if row.rationale and row.rationale not in (r.text for r in row.rationales):
        rationales.append({"text": row.rationale})
    rationales += [{k: v for k, v in vars(r).items() if v} for r in row.rationales]
    if rationales:
        result["rationales"] = rationales
    if weight != 1.0 or (len(samples) > 1 and usable and not label_given):
        result["weight"] = round(weight, 6)
    if row.choices:
        result["choices"] = list(row.choices)
    answers = []
    for answer, reading in samples:
        entry = dataclasses.asdict(answer)
        if reading.problems:
            entry["problems"] = list(reading.problems)
        answers.append(entry)
    result["provenance"] = provenance | {"answers": answers}
    return result
