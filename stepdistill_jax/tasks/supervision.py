"""Selects the label and the rationales of each example for training."""

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
# A separate field, whose name no dataset's field can have. A weight of 0 cannot mark rows to drop, since it is
# an error in the data.
KEEP = "is kept"


@dataclasses.dataclass(frozen=True)
class Supervision:
    """Decides which label and which rationales of an example are used in training.

    Attributes:
        label_source: `gold` uses the gold label. `llm` uses the teacher's label (standard distillation).
            `gold_else_llm` uses the gold label, or the teacher's label if there is no gold label. `agree` uses
            the gold label if the teacher's label equals it by the task's metric; for other examples, see
            `disagree_weight`. Examples without the selected label are left out.
        disagree_weight: if `label_source` is `agree`, factor for the weight of an example whose teacher's label
            is missing or differs from the gold label. 0 leaves the example out.
        rationales: `first` uses the example's `rationale`. `all` makes a row from each rationale in the
            example's list `rationales`. `sample` draws one rationale of the list in each epoch, with the run's
            seed. If `label_source` is `agree`, `all` and `sample` leave out rationales that argue for another
            label.
        rationale_source: only rationales with this `source` are used (`human`, `llm`, or a teacher's name).
            None means all sources. If an example has no list, the source of its field `rationale` is `llm`.

    Raises:
        InputError: a field has a value that is not allowed.
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
        """Whether a row's list `rationales` is needed, in addition to the field `rationale`."""
        return self.rationales != "first" or self.rationale_source is not None

    def for_objectives(self, objectives: Sequence[Objective]) -> "Supervision":
        """Returns the supervision for these objectives.

        The `label_source` "gold" becomes "llm" if the first objective's target is the teacher's label.
        """
        if objectives[0].label_field == "llm_label" and self.label_source == "gold":
            return dataclasses.replace(self, label_source="llm")
        return self

    def held_out(self) -> "Supervision":
        """Returns the supervision for validation, which prefers gold labels.

        Rows without a gold label use the teacher's label, unless the run trains only on gold labels.
        """
        return Supervision("gold" if self.label_source == "gold" else "gold_else_llm")


def most_rationales(path: pathlib.Path) -> int:
    """Returns the length of the longest list `rationales` in a prepared SPLIT.jsonl, or 1 if there is no list."""
    most = 1
    with open(path, encoding="utf-8") as f:
        for line in f:
            if '"rationales"' in line:
                most = max(most, len(json.loads(line).get("rationales", ())))
    return most


def check_rationales(
    task: str, path: pathlib.Path, supervision: Supervision, with_rationale: int, examples: int
) -> None:
    """Logs how many examples have a rationale from the selected source.

    Raises:
        InputError: no example has such a rationale, so a run would train only on labels.
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
            f"supervision.rationale_source: no training row of {task} has a rationale from source"
            f" {supervision.rationale_source!r} (rows per source: {named or 'no row has a `rationales` list'})"
            f"{nearest(supervision.rationale_source, sources)}"
        )
    log(
        f"{task}: {with_rationale} of {examples} examples have a rationale from source"
        f" {supervision.rationale_source!r}"
    )


def choose(dataset: Any, *, task: str, supervision: Supervision, metric: str, most: int) -> Any:
    """SeqIO preprocessor: writes the selected label, rationales and weight.

    Examples without a selected label are dropped, and so are those whose weight the supervision sets to 0.

    Args:
        most: number of rationale fields (`rationale`, `rationale.1`, `rationale.2`, ...) to write if the
            supervision needs the list `rationales`. Otherwise, `most` is ignored, and only `rationale` is
            written. A field without a rationale is "".

    Raises:
        InputError: the supervision needs the list `rationales`, but the rows have no such list.
    """
    tf = tensorflow()
    s, matches = supervision, metric_fn(metric)
    if s.needs_list and "rationales" not in dataset.element_spec:
        raise InputError(
            f"task {task!r}: `rationales={s.rationales}` with rationale_source={s.rationale_source}"
            " needs the list 'rationales', but the rows have no such list; `stepdistill prepare jsonl`"
            " keeps it"
        )

    # metrics are Python functions, so TensorFlow calls back into Python here
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
        # a row without a list may still have the field `rationale`, which is the teacher's
        if s.rationale_source in (None, TEACHER):
            no_list = tf.size(listed["text"]) == 0
            texts = tf.cond(no_list, lambda: row["rationale"][None], lambda: texts)
        # always `most` texts: with most 3, [a, b] becomes [a, b, ""]
        texts = tf.concat([texts, tf.fill([most], "")], 0)[:most]
        return {f"rationale.{i}" if i else "rationale": texts[i] for i in range(most)}

    chosen = dataset.map(convert, num_parallel_calls=tf.data.AUTOTUNE)
    return chosen.filter(lambda row: row[KEEP])
