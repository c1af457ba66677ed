"""Measures the calibration of the probabilities of `choices`, in bounded memory."""

from collections.abc import Sequence
from typing import Any

import numpy as np

BINS = 15  # as in Guo et al. 2017
# 3% apart; the loss is flat near its minimum, so a finer grid would change only its 5th digit
TEMPERATURES = np.geomspace(0.05, 100.0, 257)
_SMALLEST = np.log(np.finfo(np.float64).tiny)


class Calibration:
    """Adds up, over rows in any order, what the calibration needs; each row has a known gold label."""

    def __init__(self, temperature: float = 1.0):
        """Takes the temperature of the probabilities that will be added."""
        self._temperature = temperature
        self._count, self._sure, self._right = np.zeros((3, BINS))
        self._losses = np.zeros(len(TEMPERATURES))
        self._loss, self._scored, self._without = 0.0, 0, 0

    def add(self, probabilities: Sequence[float], is_gold: Sequence[bool]) -> None:
        """Adds one row.

        Args:
            probabilities: probability of each allowed label; they sum to 1.
            is_gold: whether each allowed label is right; all False if the gold label is not allowed.
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
        """Returns `expected_calibration_error`, `log_loss`, `best_temperature` and `gold_not_a_choice`, or {}.

        The calibration error is the mean over rows of |share of right answers - mean probability| of
        the row's bin, with 15 bins of equal width (Guo et al. 2017, arXiv:1706.04599, section 2).
        `log_loss` is the mean of -log of the gold label's probability (nats). `best_temperature`, from
        0.05 to 100, minimises it on these rows (section 4.2). Both cover the rows whose gold label is
        allowed and are None without such rows; `gold_not_a_choice` counts the other rows.
        """
        rows = self._count.sum()
        if not rows:
            return {}
        gap = np.abs(self._right - self._sure).sum() / rows
        best = float(TEMPERATURES[self._losses.argmin()])
        return {
            "expected_calibration_error": float(gap),
            "log_loss": self._loss / self._scored if self._scored else None,
            "best_temperature": round(best, 4) if self._scored else None,
            "gold_not_a_choice": self._without,
        }


def _surprise(logs: np.ndarray, gold: np.ndarray) -> np.ndarray:
    """Returns -log of the gold labels' share: logs [..., labels], up to a constant -> [...]."""
    return np.logaddexp.reduce(logs, axis=-1) - np.logaddexp.reduce(logs[..., gold], axis=-1)
