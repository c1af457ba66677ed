"""Measures the calibration of the probabilities of `choices`, in bounded memory."""

from collections.abc import Sequence
from typing import Any

import numpy as np

BINS = 15  # as in Guo et al. 2017
# 3% apart; the loss is flat near its minimum, so a finer grid would change only its 5th digit
TEMPERATURES = np.geomspace(0.05, 100.0, 257)
ALL_RIGHT = 1.0  # reported if all answers are right; none of `TEMPERATURES`
_SMALLEST = np.log(np.finfo(np.float64).tiny)


class Calibration:
    """Adds up the sums from which the calibration is computed."""

    def __init__(self, temperature: float = 1.0):
        """Starts all sums at zero.

        Args:
            temperature: temperature of the probabilities that will be passed to `add`.
        """
        self._temperature = temperature
        self._count, self._sure, self._right = np.zeros((3, BINS))
        self._losses = np.zeros(len(TEMPERATURES))
        self._loss, self._scored, self._without = 0.0, 0, 0

    def add(self, probabilities: Sequence[float], is_gold: Sequence[bool]) -> None:
        """Adds one row with a known gold label.

        Args:
            probabilities: probability of each allowed label; they sum to 1.
            is_gold: whether each allowed label equals the gold label.
        """
        p, gold = np.asarray(probabilities, np.float64), np.asarray(is_gold, bool)
        best = int(p.argmax())
        place = min(max(int(np.ceil(p[best] * BINS)) - 1, 0), BINS - 1)
        self._count[place] += 1
        self._sure[place] += p[best]
        self._right[place] += gold[best]
        if not gold.any():
            self._without += 1
            return
        logs = np.log(p, out=np.full(len(p), _SMALLEST), where=p > 0)
        self._scored += 1
        self._loss += _surprise(logs[None], gold)[0]
        self._losses += _surprise(logs * self._temperature / TEMPERATURES[:, None], gold)

    def summary(self) -> dict[str, Any]:
        """Returns the measures of calibration; {} if no row was added.

        Returns:
            `expected_calibration_error`: mean over 15 bins of |share of right answers - mean probability|,
            weighted by the rows per bin. The answer's probability determines a row's bin (Guo et al. 2017,
            arXiv:1706.04599, section 2).
            `log_loss`: mean of -log(probability of the gold label), in nats, over the rows whose gold
            label is one of the allowed labels; None if there is no such row.
            `best_temperature`: temperature in [0.05, 100] with the smallest log loss (section 4.2); None if
            `log_loss` is None. If all answers to these rows are right, the log loss has no
            minimum, and the result is 1.
            `gold_not_a_choice`: number of rows whose gold label is not one of the allowed labels.
        """
        rows = self._count.sum()
        if not rows:
            return {}
        gap = np.abs(self._right - self._sure).sum() / rows
        all_right = self._right.sum() == self._scored
        best = ALL_RIGHT if all_right else float(TEMPERATURES[self._losses.argmin()])
        return {
            "expected_calibration_error": float(gap),
            "log_loss": self._loss / self._scored if self._scored else None,
            "best_temperature": round(best, 4) if self._scored else None,
            "gold_not_a_choice": self._without,
        }


def _surprise(logs: np.ndarray, gold: np.ndarray) -> np.ndarray:
    """Returns -log(total probability of the gold labels), [...].

    `logs` are unnormalized log probabilities, [..., labels].
    """
    return np.logaddexp.reduce(logs, axis=-1) - np.logaddexp.reduce(logs[..., gold], axis=-1)
