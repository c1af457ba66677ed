"""Counts the rows of a prepared dataset whose texts its vocabulary cannot reproduce."""

import functools
import pathlib
from collections.abc import Iterable

from stepdistill_jax.data import prepared
from stepdistill_jax.data.vocabulary import UNK_ID, SentencePieceVocabulary
from stepdistill_jax.runtime.files import read_jsonl

FIELDS = ("input", "label", "rationale")
CACHED_TEXTS = 10_000  # labels, which recur


def round_trips(folder: pathlib.Path, splits: Iterable[str]) -> dict[str, dict[str, int]]:
    """Counts each split's unknown pieces, and its rows whose texts change when they are encoded and decoded.

    Returns:
        {SPLIT: {"unknown_pieces", "changed_rows", "changed_whitespace_rows"}}. `changed_rows` leaves out rows in which
        only whitespace changes.
    """
    vocabulary = SentencePieceVocabulary(folder / prepared.VOCABULARY)

    @functools.lru_cache(CACHED_TEXTS)
    def label(text: str) -> tuple[int, bool, bool]:
        return _there_and_back(text, vocabulary)

    counts = {}
    for split in splits:
        unknown = rows = whitespace_rows = 0
        for _, row in read_jsonl(folder / f"{split}.jsonl"):
            changed = squeezed = False
            for name in FIELDS:
                if text := row.get(name):
                    found = label(text) if name == "label" else _there_and_back(text, vocabulary)
                    unknown += found[0]
                    changed |= found[1]
                    squeezed |= found[2]
            rows += changed
            whitespace_rows += squeezed and not changed
        counts[split] = {
            "unknown_pieces": unknown,
            "changed_rows": rows,
            "changed_whitespace_rows": whitespace_rows,
        }
    return counts


def _there_and_back(text: str, vocabulary: SentencePieceVocabulary) -> tuple[int, bool, bool]:
    """Returns (number of unknown pieces, whether words change, whether only whitespace changes)."""
    ids = vocabulary.encode(text)
    back = vocabulary.decode(ids)
    changed = back != text
    same_words = changed and back.split() == text.split()
    return ids.count(UNK_ID), changed and not same_words, same_words
