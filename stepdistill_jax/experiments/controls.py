"""Datasets with another train split: rationales that are spoilt on purpose, a teacher that errs."""

import json
import os
import pathlib
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from stepdistill_jax.data.example import Example
from stepdistill_jax.data.prepare import ensure_prepared, prepare
from stepdistill_jax.data.prepared import PreparedDataset, data_folder, is_prepared, open_prepared
from stepdistill_jax.data.reading import SPLITS
from stepdistill_jax.errors import InputError
from stepdistill_jax.runtime.checks import one_of

KINDS = ("shuffled", "wrong", "missing", "teacher_errs")


def spoil(
    examples: Sequence[Example], kind: str, share: float = 1.0, *, seed: int = 0
) -> list[dict[str, Any]]:
    """Rows of JSON lines with other rationales; inputs, labels and ids stay.

    Args:
        examples: of the train split.
        kind: `shuffled` gives each row that of another row, at random; `wrong` that of a row with
            another label; `missing` gives it none; `teacher_errs` gives it both rationale and label, as
            the field `llm_label`, of a row with another label, and all other rows their own.
        share: of the rows that have a rationale, chosen at random, to which this happens.
        seed: of what is random.

    Raises:
        InputError: another kind, or one label only where a second is needed.
    """
    one_of("kind", kind, KINDS)
    rng = np.random.default_rng(seed)
    rows = [e.to_json() for e in examples]
    order = rng.permutation([i for i, e in enumerate(examples) if e.rationale])
    chosen = order[: round(len(order) * share)]
    for row in rows:
        row.pop("rationales", None)
        if kind == "teacher_errs":
            row["llm_label"] = row["label"]
    for i, after in zip(chosen.tolist(), np.roll(chosen, 1).tolist(), strict=True):
        if kind == "missing":
            rows[i].pop("rationale", None)
        elif kind == "shuffled":  # a ring through the chosen rows: none keeps its own
            rows[i]["rationale"] = examples[after].rationale
        else:
            label = examples[i].label
            others = [e for e in examples if e.rationale and e.label != label]
            if not others:
                raise InputError(f"kind {kind}: all rows have the same label")
            other = others[rng.integers(len(others))]
            rows[i]["rationale"] = other.rationale
            if kind == "teacher_errs":
                rows[i]["llm_label"] = other.label
    return rows


def prepare_control(
    name: str,
    kind: str,
    share: float = 1.0,
    *,
    seed: int = 0,
    data_dir: os.PathLike | str | None = None,
) -> PreparedDataset:
    """The dataset NAME_KIND_PERCENT: NAME with the train split of `spoil`, and its validation and test.

    Raises:
        InputError: as `spoil` and `prepare_variant`.
    """
    return prepare_variant(
        name,
        f"{name}_{kind}_{round(100 * share)}",
        lambda examples: spoil(examples, kind, share, seed=seed),
        data_dir=data_dir,
    )


def prepare_variant(
    name: str,
    new_name: str,
    change: Callable[[Sequence[Example]], Iterable[Mapping[str, Any]]],
    *,
    fields: Sequence[str] = (),
    data_dir: os.PathLike | str | None = None,
) -> PreparedDataset:
    """The dataset NEW_NAME: NAME with another train split, and NAME's validation and test.

    So its runs answer the same rows, and may be compared. Other splits are left out. It is prepared once.

    Args:
        name, new_name: of a prepared dataset (or `delivery`), and of this one.
        change: from the train split's examples to the rows of JSON lines that take their place.
        fields: of these rows, beside the dataset's own, that objectives may name.
        data_dir: None for `$STEPDISTILL_DATA_DIR`, else the user's cache folder.

    Raises:
        InputError: as `prepare` and `open_prepared`.
    """
    folder = data_folder(data_dir)
    if is_prepared(new_name, folder):
        return open_prepared(new_name, folder)
    dataset = ensure_prepared(name, folder)
    with tempfile.TemporaryDirectory() as scratch:
        for split in [split for split in dataset.splits if split in SPLITS]:
            examples = list(dataset.examples(split))
            rows = change(examples) if split == "train" else (e.to_json() for e in examples)
            text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
            pathlib.Path(scratch, f"{split}.jsonl").write_text(text, encoding="utf-8")
        fields = [*dataset.fields, *fields]
        prepare("jsonl", source=scratch, new_name=new_name, fields=fields, data_dir=folder)
    return open_prepared(new_name, folder)
