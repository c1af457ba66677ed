"""Compares decoded labels with gold labels, and computes the majority baseline."""

from collections.abc import Callable, Iterable, Sequence

from stepdistill_jax.data import arithmetic
from stepdistill_jax.errors import InputError, nearest


def normalize(text: str) -> str:
    """Returns `text` stripped, with each inner run of whitespace as one space."""
    return " ".join(text.split())


def text_match(prediction: str, label: str) -> bool:
    """Returns whether two texts are equal, ignoring differences in whitespace but not in case."""
    return normalize(prediction) == normalize(label)


def value_match(prediction: str, label: str) -> bool:
    """Returns whether two equations, e.g. `( 8 + 2 )` and `10.0`, have equal values (see `arithmetic.equal`).

    A label that is not an equation is compared as text.
    """
    expected = arithmetic.evaluate(label)
    if expected is None:
        return text_match(prediction, label)
    got = arithmetic.evaluate(prediction)
    return got is not None and arithmetic.equal(got, expected)


METRICS: dict[str, Callable[[str, str], bool]] = {
    "text_match": text_match,
    "value_match": value_match,
}


def metric_fn(metric: str) -> Callable[[str, str], bool]:
    """Returns the comparison function of this name.

    Raises:
        InputError: the name is unknown.
    """
    if metric not in METRICS:
        raise InputError(
            f"metric: unknown name {metric!r} (known: {', '.join(METRICS)})"
            f"{nearest(metric, METRICS)}"
        )
    return METRICS[metric]


def accuracy(predictions: Sequence[str], labels: Sequence[str], metric: str) -> float:
    """Returns the share of predictions that match their label, or 0.0 if there are none.

    Example: `accuracy(["10", "3"], ["( 8 + 2 )", "4"], "value_match")` is 0.5.

    Raises:
        ValueError: the two lists differ in length.
    """
    matches = metric_fn(metric)
    right = sum(matches(p, y) for p, y in zip(predictions, labels, strict=True))
    return right / len(labels) if labels else 0.0


def majority_baseline(labels: Iterable[str], metric: str) -> float:
    """Returns the accuracy of answering every row with the commonest label, or 0.0 if there are no rows.

    Example: `majority_baseline(["4", "( 2 + 2 )", "5"], "value_match")` is 2/3.
    """
    counts = LabelCounts(metric)
    for label in labels:
        counts.add(label)
    return counts.majority()


class LabelCounts:
    """Computes `majority_baseline` for labels that come one by one, in bounded memory.

    Exact for up to 100,000 different labels, and at most 1e-5 too low for more (Misra and Gries 1982, Finding
    repeated elements).
    """

    MOST = 100_000  # counters; about 15 MB

    def __init__(self, metric: str):
        """`metric` decides which labels are equal."""
        self._key = _value_key if metric_fn(metric) is value_match else normalize
        self._counts: dict[int, int] = {}
        self.rows = 0

    def add(self, label: str) -> None:
        """Counts one label."""
        self.rows += 1
        key = hash(self._key(label))  # 64 bits, however long the label is
        if key in self._counts or len(self._counts) < self.MOST:
            self._counts[key] = self._counts.get(key, 0) + 1
        else:  # drop one of each label, also the new one; this happens at most rows / (MOST + 1) times
            self._counts = {k: n - 1 for k, n in self._counts.items() if n > 1}

    def majority(self) -> float:
        """Returns the share of the commonest label, or 0.0 if no label was counted."""
        return max(self._counts.values(), default=0) / self.rows if self.rows else 0.0


def _value_key(label: str) -> str:
    """Returns a key that is the same for labels whose values agree to 6 significant digits."""
    value = arithmetic.evaluate(label)
    return f"text {normalize(label)}" if value is None else f"value {value + 0.0:.6g}"


def is_valid(
    prediction: str, *, metric: str, labels: Sequence[str] = (), choices: Sequence[str] = ()
) -> bool | None:
    """Returns whether `prediction` is a valid answer, right or wrong; None if that is unknown.

    Args:
        metric: under `value_match`, any expression with a value is valid.
        labels: the valid answers under other metrics; empty if unknown.
        choices: the row's choices. If there are any, only they are valid, whatever the metric and labels.
    """
    matches = metric_fn(metric)
    if choices:
        return any(matches(prediction, choice) for choice in choices)
    if metric == "value_match":
        return arithmetic.evaluate(prediction) is not None
    return any(matches(prediction, label) for label in labels) if labels else None
