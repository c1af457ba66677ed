"""Datasets whose rationales are spoilt on purpose: what does a model learn from reasons that are none?"""

import json
import os
import pathlib
import tempfile
from collections.abc import Sequence
from typing import Any

import numpy as np

from stepdistill_jax.data.example import Example
from stepdistill_jax.data.prepare import ensure_prepared, prepare
from stepdistill_jax.data.prepared import PreparedDataset, data_folder, is_prepared, open_prepared
from stepdistill_jax.errors import InputError

KINDS = ("shuffled", "wrong", "missing")


def spoil(
    examples: Sequence[Example], kind: str, share: float = 1.0, *, seed: int = 0
) -> list[dict[str, Any]]:
    """Rows of JSON lines with other rationales; inputs, labels and ids stay.

    Args:
        examples: of the train split.
        kind: `shuffled` gives each row that of another row, at random; `wrong` that of a row with
            another label; `missing` gives it none.
        share: of the rows that have a rationale, chosen at random, to which this happens.
        seed: of what is random.

    Raises:
        InputError: another kind, or one label only where `wrong` needs a second.
    """
    if kind not in KINDS:
        raise InputError(f"kind: one of {', '.join(KINDS)} is wanted, got {kind!r}")
    rng = np.random.default_rng(seed)
    rows = [e.to_json() for e in examples]
    order = rng.permutation([i for i, e in enumerate(examples) if e.rationale])
    chosen = order[: round(len(order) * share)]
    for row in rows:
        row.pop("rationales", None)
    for i, after in zip(chosen.tolist(), np.roll(chosen, 1).tolist(), strict=True):
        if kind == "missing":
            rows[i].pop("rationale", None)
        elif kind == "shuffled":  # a ring through the chosen rows: none keeps its own
            rows[i]["rationale"] = examples[after].rationale
        else:
            label = examples[i].label
            others = [e.rationale for e in examples if e.rationale and e.label != label]
            if not others:
                raise InputError("kind wrong: all rows have the same label")
            rows[i]["rationale"] = others[rng.integers(len(others))]
    return rows


def prepare_control(
    name: str,
    kind: str,
    share: float = 1.0,
    *,
    seed: int = 0,
    data_dir: os.PathLike | str | None = None,
) -> PreparedDataset:
    """The dataset NAME_KIND_PERCENT: NAME with the train split of `spoil`; other splits as they are.

    So its runs answer the same validation and test rows, and may be compared. It is prepared once.

    Raises:
        InputError: as `spoil` and `open_prepared`.
    """
    folder = data_folder(data_dir)
    control = f"{name}_{kind}_{round(100 * share)}"
    if is_prepared(control, folder):
        return open_prepared(control, folder)
    dataset = ensure_prepared(name, folder)
    with tempfile.TemporaryDirectory() as scratch:
        for split in dataset.splits:
            examples = list(dataset.examples(split))
            whole = [e.to_json() for e in examples]
            rows = spoil(examples, kind, share, seed=seed) if split == "train" else whole
            text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
            pathlib.Path(scratch, f"{split}.jsonl").write_text(text, encoding="utf-8")
        prepare("jsonl", source=scratch, new_name=control, fields=dataset.fields, data_dir=folder)
    return open_prepared(control, folder)
