"""Warns about suspicious labels and duplicate rows of a dataset."""

import collections
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from stepdistill_jax.data.counts import COUNTED_LABELS, SplitCounts
from stepdistill_jax.errors import nearest, printable

ROWS_OF_A_LABEL = 5  # a closed set of labels has at least this many rows per label on average
NUMBERS = 20  # a closed set has at most this many numbers: ratings, not answers to sums
EXAMPLES = 3  # places that a warning names
_NUMBER = re.compile(r"[-+]?\d+([.,]\d+)?%?")


def label_counts(splits: Mapping[str, SplitCounts]) -> dict[str, dict[str, int]]:
    """Returns {label: {split: number of rows}}, with the commonest label first; {} for free text.

    Labels count as free text if there are over 1,000 different labels (over 20 if most of them are numbers), or
    under five rows per label on average.
    """
    found: dict[str, dict[str, int]] = {}
    for split, counts in splits.items():
        if counts.label_rows is None:
            return {}
        for label, (count, _) in counts.label_rows.items():
            found.setdefault(label, {})[split] = count
    rows = sum(sum(counts.values()) for counts in found.values())
    most = NUMBERS if 2 * len(_numbers(found)) > len(found) else COUNTED_LABELS
    if len(found) > most or rows < ROWS_OF_A_LABEL * len(found):
        return {}
    ordered = sorted(found, key=lambda label: (-sum(found[label].values()), label))
    return {label: found[label] for label in ordered}


def warnings(splits: Mapping[str, SplitCounts]) -> list[dict[str, Any]]:
    """Returns the warnings: [{"kind", "count", "examples": ["file:line", ...], "message"}].

    Kinds are `duplicate_rows`, `different_labels` and, unless labels are free text, `labels_alike`,
    `numbers_among_labels` and `labels_of_one_row`. `count` is the number of affected inputs for
    `different_labels`, and the number of affected rows for the other kinds.
    """
    counts = label_counts(splits)
    totals = {label: sum(by_split.values()) for label, by_split in counts.items()}
    first = {label: _first(label, splits) for label in totals}
    found = [
        *_alike(totals, first),
        *_numbers_among(totals, first),
        *_single(totals, first),
        *_repeated(splits),
    ]
    return [
        {
            "kind": kind,
            "count": count,
            "examples": [place for place in places if place][:EXAMPLES],
            "message": message,
        }
        for kind, count, places, message in found
    ]


_Found = Iterator[tuple[str, int, Sequence[str], str]]  # kind, count, places, message


def _alike(totals: Mapping[str, int], first: Mapping[str, str]) -> _Found:
    groups = collections.defaultdict(list)
    for label in totals:  # the commonest first
        groups[" ".join(label.casefold().split())].append(label)
    groups = {key: labels for key, labels in groups.items() if len(labels) > 1}
    if not groups:
        return
    rarer = [label for labels in groups.values() for label in labels[1:]]
    shown = "; ".join(
        " and ".join(
            f"{_quoted(label)} {_rows(totals[label])}{_at(first[label])}" for label in some
        )
        for some in [*groups.values()][:EXAMPLES]
    )
    yield (
        "labels_alike",
        sum(totals[label] for label in rarer),
        [first[label] for label in rarer],
        f"some labels differ only in case or blanks: {shown}{_more(groups)}. A model treats them as"
        " different answers: choose one spelling",
    )


def _numbers_among(totals: Mapping[str, int], first: Mapping[str, str]) -> _Found:
    numbers = _numbers(totals)
    if not numbers or 2 * len(numbers) > len(totals):
        return
    rows = sum(totals[label] for label in numbers)
    shown = ", ".join(f"{_quoted(x)} {_rows(totals[x])}{_at(first[x])}" for x in numbers[:EXAMPLES])
    yield (
        "numbers_among_labels",
        rows,
        [first[label] for label in numbers],
        f"some labels are numbers, but most are words: {shown}{_more(numbers)}. Correct them unless they are"
        " intended",
    )


def _single(totals: Mapping[str, int], first: Mapping[str, str]) -> _Found:
    single = [label for label, count in totals.items() if count == 1]
    if not single:
        return
    usual = [label for label, count in totals.items() if count >= ROWS_OF_A_LABEL]
    shown = ", ".join(
        f"{_quoted(label)}{_at(first[label], nearest(label, usual))}" for label in single[:EXAMPLES]
    )
    yield (
        "labels_of_one_row",
        len(single),
        [first[label] for label in single],
        f"the dataset has {_many(len(single), 'label')} with a single row: {shown}{_more(single)}. Correct them if they"
        " are mistakes: a model cannot learn a label from one row, but may answer with it",
    )


def _repeated(splits: Mapping[str, SplitCounts]) -> _Found:
    """Yields the warnings about equal rows, and about equal inputs with different labels."""

    def joined(name: str) -> np.ndarray:
        return np.concatenate([np.frombuffer(t.hashes[name], np.uint64) for t in splits.values()])

    if not splits:
        return
    rows, inputs, labels = joined("row"), joined("question"), joined("label")
    # rows are counted from 0 over all splits: the hashes [7, 9, 7, 7] give `firsts` [0, 1] and `inverse`
    # [0, 1, 0, 0], so rows 2 and 3 repeat row 0
    values, firsts, inverse = np.unique(rows, return_index=True, return_inverse=True)
    if extra := len(rows) - len(values):
        again = np.flatnonzero(firsts[inverse] != np.arange(len(rows)))
        pairs = [(int(firsts[inverse[i]]), int(i)) for i in again[:EXAMPLES]]
        places = [_place(splits, i) for pair in pairs for i in pair]
        yield (
            "duplicate_rows",
            extra,
            places[1::2],
            f"{_many(extra, 'row')} {'is' if extra == 1 else 'are'} equal to an earlier one"
            f"{_pairs(places, extra)}. Remove them, unless they are meant to count more",
        )
    labelled = labels != 0  # 0 stands for a row without a label
    # sorted by input, then label: an input with two labels has neighbours that differ in the label
    order = np.lexsort((labels, inputs))
    order = order[labelled[order]]
    same = inputs[order][1:] == inputs[order][:-1]
    differ = labels[order][1:] != labels[order][:-1]
    clashing = np.unique(inputs[order][1:][same & differ])
    if not len(clashing):
        return
    members = np.flatnonzero(np.isin(inputs, clashing) & labelled)
    places = []
    for value in dict.fromkeys(inputs[members].tolist()):
        group = members[inputs[members] == value]
        other = group[labels[group] != labels[group[0]]][0]
        places += [_place(splits, int(group[0])), _place(splits, int(other))]
        if len(places) == 2 * EXAMPLES:
            break
    yield (
        "different_labels",
        len(clashing),
        places,
        f"{_many(len(clashing), 'input')} with conflicting labels, in {len(members):,} rows"
        f"{_pairs(places, len(clashing))}. A model cannot tell these rows apart: correct or remove the wrong ones",
    )


def _place(splits: Mapping[str, SplitCounts], number: int) -> str:
    """Returns `file:line` of a row. `number` is the row's 0-based index over all splits."""
    for counts in splits.values():
        if number < counts.rows:
            return counts.place(number)
        number -= counts.rows
    raise IndexError(number)


def _first(label: str, splits: Mapping[str, SplitCounts]) -> str:
    """Returns the place of the first row with this label."""
    some = next(counts for counts in splits.values() if label in (counts.label_rows or ()))
    return some.place((some.label_rows or {})[label][1])


def _numbers(labels: Iterable[str]) -> list[str]:
    return [label for label in labels if _NUMBER.fullmatch(label)]


def _quoted(label: str) -> str:
    return repr(printable(label, 60))


def _rows(count: int) -> str:
    return f"in {_many(count, 'row')}"


def _many(count: int, what: str) -> str:
    return f"{count:,} {what}{'' if count == 1 else 's'}"


def _at(place: str, hint: str = "") -> str:
    inside = f"{place}{hint}" if place else hint.removeprefix("; ")
    return f" ({inside})" if inside else ""


def _pairs(places: Sequence[str], count: int) -> str:
    """Returns the pairs of places for a message, or "" if no place is known.

    Example: places A, B, C and D give ` (A and B, C and D)` if `count`, the number of all pairs, is 2. If it is
    larger, they give ` (such as A and B, C and D)`.
    """
    pairs = [f"{a} and {b}" for a, b in zip(places[::2], places[1::2], strict=True) if a and b]
    such_as = "such as " if len(pairs) < count else ""
    return f" ({such_as}{', '.join(pairs)})" if pairs else ""


def _more(found: Sequence[Any] | Mapping[str, Any]) -> str:
    return f" and {len(found) - EXAMPLES:,} more" if len(found) > EXAMPLES else ""
