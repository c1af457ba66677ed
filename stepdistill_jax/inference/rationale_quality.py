"""Compares a model's rationales with the rationales of the dataset, and with the model's own labels."""

import re
from collections import Counter
from collections.abc import Sequence
from typing import Any

from stepdistill_jax.data.example import Example
from stepdistill_jax.data.text_metrics import metric_fn, normalize

CONSISTENT, INCONSISTENT, NAMES_NO_LABEL = "consistent", "inconsistent", "names_no_label"
VERDICTS = (CONSISTENT, INCONSISTENT, NAMES_NO_LABEL)
SHOWN = 5  # rows of `disagreements`
# not the 53 of "a53" or the 3 of "1.53"; a minus counts in "= -53", but not in "79-53"
_NUMBER = re.compile(r"(?<![\w.])-?[0-9]+(?:,[0-9]{3})*(?:\.[0-9]+)?")


def named_label(rationale: str, labels: Sequence[str]) -> str | None:
    """Returns the label that the rationale names last; None if it names none.

    Case and a plural ending (s or es) do not matter. If two labels start at the same word, the longer one counts.

    Example: `named_label("Of these, only wooded areas have beavers.", ["zoo", "wooded area"])` is
    "wooded area".
    """
    by_text = {normalize(label).casefold(): label for label in labels}
    longest_first = sorted(filter(None, by_text), key=len, reverse=True)
    if not longest_first:
        return None
    any_label = "|".join(map(re.escape, longest_first))
    text = normalize(rationale).casefold()
    found = re.findall(rf"(?<!\w)({any_label})(?:e?s)?(?!\w)", text)
    return by_text[found[-1]] if found else None


def named_number(rationale: str) -> str | None:
    """Returns the last number in the rationale, without thousands separators; None if there is none."""
    found = _NUMBER.findall(rationale)
    return found[-1].replace(",", "") if found else None


def named_answer(
    rationale: str, label: str, *, metric: str, labels: Sequence[str]
) -> tuple[str | None, str | None]:
    """Compares the answer that a rationale names last with the label.

    Args:
        metric: the task's metric. With `value_match`, the answer is a number; otherwise, one of `labels`.
        labels: the possible labels; empty if unknown.

    Returns:
        The answer; None if there is none.
        One of `VERDICTS`; None if the possible labels are unknown.
    """
    if metric == "value_match":
        named = named_number(rationale)
    elif labels:
        named = named_label(rationale, labels)
    else:
        return None, None
    if named is None:
        return None, NAMES_NO_LABEL
    same = metric_fn(metric)(named.casefold(), label.casefold())
    return named, CONSISTENT if same else INCONSISTENT


def references(example: Example) -> list[str]:
    """Returns the texts of all rationales that the dataset has for a row."""
    if example.rationales:
        return [r.text for r in example.rationales]
    return [example.rationale] if example.rationale else []


class RationaleCounts:
    """Measures the quality of rationales, in bounded memory."""

    def __init__(self, metric: str, labels: Sequence[str] = ()):
        """Starts all counts at zero.

        Args:
            labels: the task's labels if they are a closed set; else empty.
        """
        # imported here, since rouge_score imports NLTK, which takes a second
        from rouge_score.rouge_scorer import RougeScorer
        from sacrebleu.metrics.chrf import CHRF

        self._metric, self._labels = metric, tuple(labels)
        self._rouge, self._chrf = RougeScorer(["rougeL"]), CHRF()
        self._rows = self._empty = self._words = self._referenced = 0
        self._rouge_sum = self._chrf_sum = 0.0
        self._verdicts: Counter[str | None] = Counter()
        self._teacher: Counter[str | None] = Counter()
        self._disagreements: list[dict[str, Any]] = []

    def add(self, example: Example, label: str, rationale: str) -> None:
        """Adds the label and the rationale that a model gave for a row of the dataset."""
        self._rows += 1
        self._empty += not rationale.strip()
        self._words += len(rationale.split())
        if texts := references(example):
            self._referenced += 1
            self._rouge_sum += self._rouge.score_multi(texts, rationale)["rougeL"].fmeasure
            self._chrf_sum += self._chrf.sentence_score(rationale, texts).score
        options = {"metric": self._metric, "labels": example.choices or self._labels}
        named, verdict = named_answer(rationale, label, **options)
        self._verdicts[verdict] += 1
        if verdict == INCONSISTENT and len(self._disagreements) < SHOWN:
            row = {"id": example.id, "label": label, "named": named, "rationale": rationale}
            self._disagreements.append(row)
        if example.rationale:
            its_label = example.llm_label or example.label
            self._teacher[named_answer(example.rationale, its_label, **options)[1]] += 1

    def summary(self) -> dict[str, Any]:
        """Returns the entry `rationale` of an `evaluate` result, without `unfinished`.

        Returns:
            `rows`: number of rows.
            `empty`: number of rationales without text.
            `mean_words`: mean number of words in a rationale.
            `references`: number of rows that have a rationale in the dataset.
            `rouge_l`: mean F1 of ROUGE-L (0 to 1) over these rows, each with its best reference.
            `chrf`: mean sentence chrF2 (0 to 100) over these rows. Both are None if `references` is 0.
            `consistent`, `inconsistent`, `names_no_label`: number of rows with each verdict of `named_answer`;
            None if no row has a verdict.
            `teacher`: {verdict: number of rows}, where the verdicts compare the rationale in the dataset with the
            teacher's label or, in rows without one, with the gold label; None if no row has a verdict.
            `disagreements`: the first rows whose verdict is `inconsistent`.
        """
        return {
            "rows": self._rows,
            "empty": self._empty,
            "mean_words": self._words / self._rows if self._rows else 0.0,
            "references": self._referenced,
            "rouge_l": self._rouge_sum / self._referenced if self._referenced else None,
            "chrf": self._chrf_sum / self._referenced if self._referenced else None,
            **(_counts(self._verdicts) or dict.fromkeys(VERDICTS)),
            "teacher": _counts(self._teacher),
            "disagreements": self._disagreements,
        }


def _counts(verdicts: Counter[str | None]) -> dict[str, int] | None:
    """Returns {verdict: count of rows}; None if no row has a verdict."""
    counts = {verdict: verdicts[verdict] for verdict in VERDICTS}
    return counts if any(counts.values()) else None


def in_words(figures: dict[str, Any]) -> str:
    """Returns the results as readable lines, followed by the first disagreements.

    Example of the first line, wrapped here: `rationales: ROUGE-L 0.412  chrF 38.2  (1221 rows with a reference)
    24.1 words on average  empty 0  unfinished 3`.
    """
    parts = []
    if figures["references"]:
        parts.append(f"ROUGE-L {figures['rouge_l']:.3f}  chrF {figures['chrf']:.1f}")
    parts.append(f"({figures['references']} rows with a reference)")
    parts.append(f"{figures['mean_words']:.1f} words on average")
    parts += [f"{name} {figures[name]}" for name in ("empty", "unfinished")]
    lines = ["rationales: " + "  ".join(parts)]
    teacher = figures["teacher"] or dict.fromkeys(VERDICTS, 0)
    if figures[CONSISTENT] is None:
        lines.append("label and rationale: not compared, since the possible labels are unknown")
    elif not any(c[verdict] for c in (figures, teacher) for verdict in (CONSISTENT, INCONSISTENT)):
        lines.append("label and rationale: not compared, since no rationale names a label")
    else:
        lines.append(f"label and rationale: {_verdicts_in_words(figures)}")
        if figures["teacher"]:
            lines.append(f"the teacher's own: {_verdicts_in_words(figures['teacher'])}")
    for row in figures["disagreements"]:
        lines.append(
            f"  {row['id']}: label {row['label']!r}, but rationale {row['rationale']!r} names {row['named']!r}"
        )
    return "\n".join(lines)


def _verdicts_in_words(counts: dict[str, int]) -> str:
    rows = sum(counts[verdict] for verdict in VERDICTS)
    return "  ".join(
        f"{verdict.replace('_', ' ')} {counts[verdict]} ({counts[verdict] / rows:.1%})"
        for verdict in VERDICTS
    )
