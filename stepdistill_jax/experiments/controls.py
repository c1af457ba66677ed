"""Prepares datasets for control experiments, with spoilt rationales or a teacher that makes mistakes."""

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
    """Returns the examples as dicts, some of them with spoilt rationales.

    Args:
        kind: what each chosen example gets:
            `shuffled`: the rationale of another chosen example.
            `wrong`: the rationale of a random example with another label.
            `missing`: no rationale.
            `teacher_errs`: the rationale of a random example with another label, and that label as `llm_label`.
                With this kind, examples that are not chosen get their own label as `llm_label`.
        share: share of examples to choose at random, from those with a rationale.

    Raises:
        InputError: `kind` is unknown, or it needs an example with another label and there is none.
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
    # np.roll pairs each chosen row with the one before it: of [4, 7, 2], row 4 gets the rationale of row 2,
    # 7 of 4, and 2 of 7. So no row keeps its own rationale, if more than one row is chosen.
    for i, after in zip(chosen.tolist(), np.roll(chosen, 1).tolist(), strict=True):
        if kind == "missing":
            rows[i].pop("rationale", None)
        elif kind == "shuffled":
            rows[i]["rationale"] = examples[after].rationale
        else:
            label = examples[i].label
            others = [e for e in examples if e.rationale and e.label != label]
            if not others:
                raise InputError(
                    f"kind {kind}: there is no row with another label, since all rows have the same label"
                )
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
    """Prepares the dataset NAME_KIND_PERCENT: the dataset NAME with its train split changed by `spoil`.

    Raises:
        InputError: as in `spoil` or `prepare_variant`.
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
    """Prepares a variant of a dataset with a changed train split, unless the variant exists.

    Validation and test stay the same. Other splits are dropped.

    Args:
        name: a prepared dataset, or `delivery`.
        change: function from the train examples to the rows that replace them.
        fields: additional fields of these rows.
        data_dir: folder of prepared datasets; None means `default_data_dir()`.

    Raises:
        InputError: as in `prepare` or `open_prepared`.
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
