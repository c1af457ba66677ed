"""Computes a SeqIO task's own metrics on the rows of a split, as `seqio.Evaluator` does."""

import collections
import functools
import numbers
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from stepdistill_jax.errors import InputError
from stepdistill_jax.runtime.on_processes import on_process_0
from stepdistill_jax.runtime.progress import log
from stepdistill_jax.tasks.registry import metric_functions
from stepdistill_jax.tasks.sources import named_errors, raised_at
from stepdistill_jax.tasks.task_data import Part
from stepdistill_jax.tasks.tokenizing import unshuffled


class TaskMetrics:
    """Computes a SeqIO task's `metric_fns` and `metric_objs` over all rows of a split.

    The task's `postprocess_fn` gets each row as its argument `example`. Only process 0 reads rows.

    Attributes:
        reads_target_scores: whether a metric takes `(targets, scores)`.
    """

    def __init__(self, part: Part, split: str):
        """Checks the signatures of the metrics, without reading rows.

        Raises:
            InputError: a metric takes arguments that SeqIO does not know.
        """
        from seqio.metrics import ModelOutputType

        self._part, self._task, self._split = part, part.task, split
        self._metrics = _named_metrics(part.task)
        kinds = {metric.model_output_type for _, metric in self._metrics}
        if ModelOutputType.SCORE_WITH_INTERMEDIATES in kinds:
            raise InputError(
                f"task {self._task.name!r}: a metric needs intermediate values of the model, but metrics get"
                " only answers and scores; use a metric of (targets, scores)"
            )
        self.reads_target_scores = ModelOutputType.SCORE in kinds
        name = part.columns[part.label_column or 0].name
        self._prefix = "" if "targets" in self._task.output_features else f"{name}_"
        self._targets: Any = []  # postprocessed, from the first metric that returns them
        self._left_out: set[str] = set()

    @classmethod
    def of(cls, part: Part, split: str) -> "TaskMetrics | None":
        """Returns the metrics of a part, or None if the part has no metrics, no SeqIO task or no labels."""
        if part.task is None or part.label_column is None:
            return None
        found = cls(part, split)
        return found if found._metrics else None

    @functools.cached_property
    def targets(self) -> list[list[int]]:
        """Target ids of each labelled row, not truncated."""
        return self._part.label_targets()

    def try_out(self) -> list[str]:
        """Computes the metrics once with the targets as answers, and returns the names of all values.

        Each target is scored with the negative of its token count.
        """
        scores = -np.array(list(map(len, self.targets)), np.float32)
        return list(self.compute(self.targets, scores, scores))

    def compute(
        self,
        answers: Sequence[Sequence[int]],
        scores: Sequence[float] | np.ndarray,
        target_scores: Sequence[float] | np.ndarray | None = None,
    ) -> dict[str, float]:
        """Returns the values of all metrics by name. All processes must call this.

        Args:
            answers: predicted ids for each of the part's `labelled_inputs`.
            scores: natural log of each answer's probability, [rows]. Metrics see it as `aux_values["scores"]`.
            target_scores: natural log of each target's probability, [rows]. Required if `reads_target_scores`
                is true.

        Raises:
            InputError: a metric fails or does not return a dict of numbers, or the source's rows have changed.
                Every process raises the error.
        """
        return on_process_0(lambda: self._compute(answers, scores, target_scores))

    def _compute(self, answers, scores, target_scores) -> dict[str, float]:
        from seqio.metrics import ModelOutputType

        ids = np.zeros((len(answers), max([1, *map(len, answers)])), np.int32)
        for row, answer in zip(ids, answers, strict=True):
            row[: len(answer)] = answer
        outputs = {
            ModelOutputType.PREDICTION: ids,
            ModelOutputType.PREDICTION_WITH_AUX: (ids, {"scores": np.asarray(scores)}),
            ModelOutputType.SCORE: np.asarray(target_scores),
        }
        found: dict[str, float] = {}
        for name, metric in self._metrics:
            where = f"task {self._task.name!r}, split {self._split!r}: metric {name}"
            for key, value in self._values(metric, outputs, where).items():
                if key in found:
                    raise InputError(f"{where}: another metric also returns a value {key!r}")
                found[key] = value
        return found

    def _values(self, metric: Any, outputs: Mapping[Any, Any], where: str) -> dict[str, float]:
        from seqio.metrics import CollectingMetric, MetricValue, Scalar

        rows, field = self._rows, f"{self._prefix}targets"
        try:
            made = metric.from_model_output(
                rows, outputs[metric.model_output_type], self._task.output_features, field
            )
            if isinstance(made, CollectingMetric):
                values, kept = made.actual_compute(
                    rows, self._task.output_features, field, self._targets
                )
                self._targets = kept["targets"]
            else:
                values = made.compute()
        except Exception as error:
            raise InputError(
                f"{where}, or the task's postprocess_fn, failed: {type(error).__name__}: {error}"
                f"{raised_at(error)}"
            ) from error
        expected = 'expected a dict of numbers, such as {"f1": 0.5}'
        if not isinstance(values, Mapping):
            raise InputError(f"{where} returned a {type(values).__name__}; {expected}")
        found = {}
        for key, value in values.items():
            if isinstance(value, Scalar):
                value = value.value
            elif isinstance(value, MetricValue):  # an image or text, for SeqIO's loggers
                self._say_left_out(where, key, type(value).__name__)
                continue
            if not isinstance(key, str) or not key or not _is_number(value):
                raise InputError(f"{where} returned {{{key!r}: {value!r:.60}}}; {expected}")
            found[key] = float(value)
        return found

    @functools.cached_property
    def _rows(self) -> list[dict[str, Any]]:
        """The task's rows as SeqIO reads them, in the order of `Part.labelled_inputs`."""
        import tensorflow_datasets as tfds

        task, split = self._task, self._split
        # Matches rows by their token ids, since pairing may have changed their order. Equal rows are taken one
        # after the other.
        by_ids: dict[Any, collections.deque[dict[str, Any]]] = {}
        with named_errors(task.name, task.source, split):
            for row in tfds.as_numpy(unshuffled(task, split)):
                key = tuple(_bytes_of(row[f"{self._prefix}{n}"]) for n in ("inputs", "targets"))
                by_ids.setdefault(key, collections.deque()).append(row)
        inputs, _ = self._part.labelled_inputs()
        keys = zip(map(_bytes_of, inputs), map(_bytes_of, self.targets), strict=True)
        found = [same.popleft() if (same := by_ids.get(key)) else None for key in keys]
        rows = [row for row in found if row is not None]
        if len(rows) < len(found) or any(by_ids.values()):
            raise InputError(
                f"task {task.name!r}, split {split!r}: its source no longer gives the rows that were"
                " tokenised, so answers would be compared with the wrong targets; run the command again"
                " to tokenise the split again"
            )
        return rows

    def _say_left_out(self, where: str, key: str, kind: str) -> None:
        if key not in self._left_out:
            self._left_out.add(key)
            log(f"{where}: {key!r} is a {kind}, so it is left out; only numbers are kept")


def _named_metrics(task: Any) -> list[tuple[str, Any]]:
    """Returns (name of the metric's function or class, metric object) for each metric of a task."""
    # SeqIO's `metric_objs` are the task's own objects, followed by one object for each metric function
    functions, objects = metric_functions(task), task.metric_objs
    named = [*objects[: len(objects) - len(functions)], *functions]
    return list(zip(map(_name, named), objects, strict=True))


def _name(metric: Any) -> str:
    metric = getattr(metric, "func", metric)  # functools.partial
    return getattr(metric, "__name__", type(metric).__name__)


def _bytes_of(ids: Any) -> bytes:
    return np.asarray(ids, np.int32).tobytes()


def _is_number(value: Any) -> bool:
    """Returns whether `value` is a real number or a 0-d array (NumPy, JAX, TensorFlow)."""
    if isinstance(value, numbers.Real):
        return True
    return getattr(value, "shape", None) == () and np.asarray(value).dtype.kind in "biuf"
