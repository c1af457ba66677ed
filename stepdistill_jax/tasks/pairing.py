"""Pairs the rows of several tasks: rows with the same id become one example."""

import dataclasses
import json
from collections.abc import Sequence

import numpy as np

from stepdistill_jax.runtime.fingerprints import digest
from stepdistill_jax.tasks.token_store import TokenStore


def why_not(stores: Sequence[TokenStore], names: Sequence[str]) -> str | None:
    """Returns the reason why the rows of these tasks cannot be paired, or None if they can."""
    for store, name in zip(stores, names, strict=True):
        if store.row_ids is None:
            return f"the rows of {name} have no feature 'id'"
        unique, counts = np.unique(store.row_ids, return_counts=True)
        if len(unique) < store.num_examples:
            one, other = np.flatnonzero(store.row_ids == unique[counts.argmax()])[:2] + 1
            return f"rows {one} and {other} of {name} have the same id"
    first, *others = (np.asarray(store.row_ids) for store in stores)
    for other, name in zip(others, names[1:], strict=True):
        if not np.isin(first, other).any():
            return f"no row of {name} has the same id as a row of {names[0]}"
    return None


def paired(stores: Sequence[TokenStore]) -> TokenStore:
    """Returns one store in which rows with the same id form one example.

    The caller must have checked the stores with `why_not`. The first store's examples come first, and only
    they have label texts.

    For example, stores with the row ids [a, b] and [b, c] give the examples a, b and c. Example a has no row
    from the second store, and example c has none from the first.
    """
    # ids are 8-byte hashes of the texts, so sorting and searching need no strings
    row_ids = [np.asarray(store.row_ids) for store in stores]
    ids, first = np.unique(np.concatenate(row_ids), return_index=True)
    order = np.argsort(first)  # `ids` is sorted; this restores the order of first occurrence
    rows, names = [], []
    for store, own in zip(stores, row_ids, strict=True):
        # own = [30, 10] and ids = [10, 20, 30]: place [1, 0, 0], taken [1, -1, 0] before reordering
        by_id = np.argsort(own)
        place = np.searchsorted(own[by_id], ids)
        place = by_id[np.minimum(place, len(own) - 1)]
        # -1 if the store has no row with this id
        taken = np.where(own[place] == ids, place, -1)[order]
        weights = np.where(taken < 0, np.float32(1), store.weights[taken])
        (features,) = store.rows
        rows.append({name: r.take(taken) for name, r in features.items()} | {"weights": weights})
        names += store.objectives
    labels = stores[0].label_texts + [""] * (len(ids) - stores[0].num_examples)
    text = "".join(json.dumps(label, ensure_ascii=False) + "\n" for label in labels)
    return dataclasses.replace(
        stores[0],
        fingerprint=digest(["paired", *(store.fingerprint for store in stores)]),
        objectives=tuple(names),
        rows=tuple(rows),
        weights=np.ones(len(ids), np.float32),
        labels=np.frombuffer(text.encode(), np.uint8),
        row_ids=ids[order],
        others=tuple(store.directory for store in stores[1:]),
    )
