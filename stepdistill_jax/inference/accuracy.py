"""Counts how many answers are right and how many are not valid labels."""

from collections.abc import Mapping, Sequence
from typing import Any

from stepdistill_jax.data.text_metrics import LabelCounts, is_valid, metric_fn
from stepdistill_jax.inference.calibration import ALL_RIGHT, Calibration


class AccuracyCounts:
    """Counts right and invalid answers, in bounded memory."""

    def __init__(self, metric: str, labels: Sequence[str] = (), temperature: float = 1.0):
        """Starts all counts at zero.

        Args:
            labels: the task's labels if they are a closed set; else empty.
            temperature: softmax temperature with which the probabilities for `add` are computed.
        """
        self._calibration = Calibration(temperature)
        self._matches = metric_fn(metric)
        self._metric, self._allowed = metric, tuple(labels)
        self.rows = self._right = self._invalid = self._checked = 0
        self._labels = LabelCounts(metric)
        self._distinct: set[str] = set()

    def add(
        self,
        prediction: str,
        label: str,
        choices: Sequence[str] = (),
        probabilities: Mapping[str, float] | None = None,
    ) -> None:
        """Counts one answer.

        Args:
            label: the gold label; empty if unknown.
            choices: the row's own choices.
            probabilities: {allowed answer: its probability}; None if answers were not restricted.
        """
        self.rows += 1
        if label:
            self._labels.add(label)
            self._right += self._matches(prediction, label)
            if probabilities:
                is_gold = [self._matches(choice, label) for choice in probabilities]
                self._calibration.add(list(probabilities.values()), is_gold)
        valid = bool(probabilities) or is_valid(
            prediction, metric=self._metric, labels=self._allowed, choices=choices
        )
        if valid is not None:
            self._checked += 1
            self._invalid += not valid
        if len(self._distinct) < 2:
            self._distinct.add(prediction)

    def summary(self) -> dict[str, Any]:
        """Returns the counts and averages of all rows.

        Returns:
            `rows`: number of rows.
            `accuracy`, `majority_baseline`: over the rows with a gold label; absent if there are none.
            `rows_with_label`: number of rows with a gold label; absent if all rows or no rows have one.
            `invalid_labels`: number of invalid answers; None if the valid labels are unknown.
            `collapsed`: whether there are at least two rows and all have the same answer.
            The entries of `Calibration.summary`, if answers were chosen from a closed set.
        """
        result: dict[str, Any] = {"rows": self.rows}
        if labelled := self._labels.rows:
            result["accuracy"] = self._right / labelled
            result["majority_baseline"] = self._labels.majority()
        if labelled not in (0, self.rows):
            result["rows_with_label"] = labelled
        result |= self._calibration.summary()
        result["invalid_labels"] = self._invalid if self._checked else None
        result["collapsed"] = self.rows > 1 and len(self._distinct) == 1
        return result


def in_words(summary: dict[str, Any]) -> str:
    """Returns the summary as text: a line of counts and measures, then the task's metrics and any warnings.

    Example: `500 rows  accuracy 0.986 (baseline that always gives the commonest label: 0.502)  invalid labels 1 (0.2%)
    unfinished 0  812.4 rows/s`.
    """
    rows = summary["rows"]
    parts = [f"{rows} rows"]
    if "accuracy" in summary:
        parts.append(
            f"accuracy {summary['accuracy']:.4g}"
            f" (baseline that always gives the commonest label: {summary['majority_baseline']:.4g})"
        )
        if "rows_with_label" in summary:
            parts[-1] += f" over the {summary['rows_with_label']} of {rows} rows that have a label"
    for name, words in (
        ("invalid_labels", "invalid labels"),
        ("unfinished", "unfinished"),
        ("unparsed", "answers without a label"),
        ("unfinished_rationales", "unfinished rationales"),
        ("gold_not_a_choice", "gold labels not among the choices"),
        ("cut_inputs", "truncated inputs"),
        ("incomplete_inputs", "inputs that lack a field that the model reads"),
        ("skipped", "bad rows skipped"),
    ):
        count = summary.get(name)
        if count is not None and (count or name in ("invalid_labels", "unfinished", "unparsed")):
            share = f" ({count / rows:.1%})" if count and rows and name != "skipped" else ""
            parts.append(f"{words} {count}{share}")
    if "expected_calibration_error" in summary:
        parts.append(f"calibration error {summary['expected_calibration_error']:.4g}")
    if summary.get("log_loss") is not None:
        best = f"lowest at temperature {summary['best_temperature']:.4g}"
        if summary["best_temperature"] == ALL_RIGHT:
            best = "no temperature can be fitted, since all answers to rows with an allowed gold label are right"
        parts.append(f"log loss {summary['log_loss']:.4g} ({best})")
    parts.append(f"{summary['rows_per_second']:.1f} rows/s")
    line = "  ".join(parts)
    if own := summary.get("metrics"):
        values = (f"{n} {'NaN' if v is None else format(v, '.4g')}" for n, v in own.items())
        line += "\n" + "  ".join(values)
    if summary.get("reads"):
        line += (
            f"\nin addition to the input, the model reads each row's {' and '.join(summary['reads'])}, so a teacher must"
            " write this for test rows as well"
        )
    if "split" in summary and "accuracy" not in summary:
        line += "\nno accuracy: no row of this split has a gold label"
    if summary["collapsed"] and summary.get("majority_baseline") != 1:
        known = "accuracy" in summary
        line += (
            f"\nall {rows} answers are the same: {'' if known else 'unless this label is right for all rows, '}"
            "the model does not distinguish the inputs (train longer, or check the learning rate and the"
            " balance of the labels)"
        )
    return line
