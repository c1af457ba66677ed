"""Which label and which rationales of an example are trained on."""

import collections
import dataclasses
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from stepdistill_jax.data.builder import tensorflow
from stepdistill_jax.data.corpora.paper_layout import TEACHER
from stepdistill_jax.data.objectives import Objective
from stepdistill_jax.data.text_metrics import metric_fn
from stepdistill_jax.errors import InputError, nearest
from stepdistill_jax.runtime.checks import keep, number, of_type, one_of
from stepdistill_jax.runtime.progress import log

LABEL_SOURCES = ("gold", "llm", "gold_else_llm", "agree")
RATIONALES = ("first", "all", "sample")
# a field of its own, with a name that no dataset's can have: a weight of 0 is a mistake in the data
# and is to be named
KEEP = "is kept"


@dataclasses.dataclass(frozen=True)
class Supervision:
    """What a run takes from an example that may have two labels and several rationales.

    Attributes:
        label_source: `gold`; `llm`, the teacher's own (standard distillation); `gold_else_llm`; or
            `agree`, gold where the teacher gave the same, by the task's metric. An example without
            the label that is asked for is left out, with all its rows.
        disagree_weight: under `agree` the factor of an example whose teacher said something else or
            nothing; 0 leaves it out.
        rationales: `first` takes the example's `rationale`; `all` makes a row of each of its
            `rationales`; `sample` draws one of them in each epoch, by the seed. Under `agree`,
            `all` and `sample` leave out a rationale that argues for another label.
        rationale_source: only rationales of this `source` (`human`, `llm`, a teacher's name); None
            takes any. A row's `rationale` that stands in no list is the teacher's, `llm`.

    Raises:
        InputError: a value that is none of these.
    """

    label_source: str = "gold"
    disagree_weight: float = 0.0
    rationales: str = "first"
    rationale_source: str | None = None

    def __post_init__(self):
        one_of("label_source", self.label_source, LABEL_SOURCES)
        one_of("rationales", self.rationales, RATIONALES)
        of_type("rationale_source", self.rationale_source, str | None, "text or None")
        keep(self, number, "disagree_weight", least=0, most=1)
        if self.disagree_weight and self.label_source != "agree":
            raise InputError("`disagree_weight` needs `label_source=agree`")

    @property
    def needs_list(self) -> bool:
        """Whether the row's list `rationales` is read, and not `rationale` alone."""
        return self.rationales != "first" or self.rationale_source is not None

    def for_objectives(self, objectives: Sequence[Objective]) -> "Supervision":
        """That of training on these: where the teacher's label is the target no gold one is needed."""
        if objectives[0].label_field == "llm_label" and self.label_source == "gold":
            return dataclasses.replace(self, label_source="llm")
        return self

    def held_out(self) -> "Supervision":
        """That of validation: gold labels; the teacher's only where a row has no gold one.

        A run that trains on gold alone never compares itself with a teacher.
        """
        return Supervision("gold" if self.label_source == "gold" else "gold_else_llm")


def most_rationales(path: pathlib.Path) -> int:
    """The longest list `rationales` of a prepared SPLIT.jsonl, at least 1."""
    most = 1
    with open(path, encoding="utf-8") as f:
        for line in f:
            if '"rationales"' in line:
                most = max(most, len(json.loads(line).get("rationales", ())))
    return most


def check_rationales(
    task: str, path: pathlib.Path, supervision: Supervision, with_rationale: int, examples: int
) -> None:
    """Says how many examples have a rationale of the source that is asked for.

    Raises:
        InputError: none has: training would be on labels alone; lists the sources that there are.
    """
    if supervision.rationale_source is None:
        return
    if not with_rationale:
        sources: collections.Counter[str] = collections.Counter()
        with open(path, encoding="utf-8") as f:
            for line in f:
                listed = json.loads(line).get("rationales", ())
                sources.update(list(dict.fromkeys(r["source"] for r in listed)))
        named = ", ".join(f"{name or '(none)'} in {n}" for name, n in sources.most_common())
        raise InputError(
            f"supervision.rationale_source: no row of {task} that is trained on has a rationale of"
            f" source {supervision.rationale_source!r} (rows by source: {named or 'no lists'})"
            f"{nearest(supervision.rationale_source, sources)}"
        )
    log(
        f"{task}: {with_rationale} of {examples} examples have a rationale of source"
        f" {supervision.rationale_source!r}"
    )


def choose(dataset: Any, *, task: str, supervision: Supervision, metric: str, most: int) -> Any:
    """SeqIO preprocessor: the label that is trained on as `label`, rationales, and the weight.

    Rationale 0 is in the field `rationale`, those after it in `rationale.1` to `rationale.MOST-1`;
    an absent one is empty.

    Raises:
        InputError: the supervision reads a list `rationales` and the rows have none.
    """
    tf = tensorflow()
    s, matches = supervision, metric_fn(metric)
    if s.needs_list and "rationales" not in dataset.element_spec:
        raise InputError(
            f"task {task!r}: `rationales={s.rationales}` with rationale_source={s.rationale_source}"
            " reads the list 'rationales', which its rows lack; `stepdistill prepare jsonl` keeps it"
        )

    def same_label(labels: np.ndarray, label: bytes) -> np.ndarray:
        return np.array([matches(x.decode(), label.decode()) for x in np.ravel(labels)], bool)

    def agrees(labels: Any, label: Any) -> Any:
        found = tf.numpy_function(same_label, [labels, label], tf.bool)
        found.set_shape([None])
        return found & (tf.strings.length(labels) > 0)

    def convert(row: Mapping[str, Any]) -> dict[str, Any]:
        none = tf.constant("")
        gold, llm = row.get("label", none), row.get("llm_label", none)
        weight, factor, label = tf.cast(row.get("weight", 1.0), tf.float32), 1.0, gold
        if s.label_source == "llm":
            label = llm
        elif s.label_source == "gold_else_llm":
            label = tf.where(tf.strings.length(gold) > 0, gold, llm)
        elif s.label_source == "agree":
            factor = tf.where(agrees(llm[None], gold)[0], 1.0, s.disagree_weight)
        keep = (tf.strings.length(label) > 0) & (factor > 0)
        found = {"rationale": row.get("rationale", none)}
        if s.needs_list:
            found = numbered(row, label)
        rest = {name: x for name, x in row.items() if name != "rationales"}
        return rest | found | {"label": label, "weight": weight * factor, KEEP: keep}

    def numbered(row: Mapping[str, Any], label: Any) -> dict[str, Any]:
        listed = row["rationales"]
        keep = tf.strings.length(listed["text"]) > 0
        if s.rationale_source is not None:
            keep &= listed["source"] == s.rationale_source
        if s.label_source == "agree" and s.rationales != "first":
            keep &= (tf.strings.length(listed["label"]) == 0) | agrees(listed["label"], label)
        texts = tf.boolean_mask(listed["text"], keep)
        # a row may have the one field, the teacher's, without the list
        if s.rationale_source in (None, TEACHER):
            no_list = tf.size(listed["text"]) == 0
            texts = tf.cond(no_list, lambda: row["rationale"][None], lambda: texts)
        texts = tf.concat([texts, tf.fill([most], "")], 0)[:most]
        return {f"rationale.{i}" if i else "rationale": texts[i] for i in range(most)}

    chosen = dataset.map(convert, num_parallel_calls=tf.data.AUTOTUNE)
    return chosen.filter(lambda row: row[KEEP])
