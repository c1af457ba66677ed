"""Raw files in, a prepared dataset out; nothing is dropped in silence."""

import collections
import logging
import os
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

from stepdistill_jax.data import prepared, writing
from stepdistill_jax.data.reading import Reading, Row, defect_counts
from stepdistill_jax.errors import InputError, nearest
from stepdistill_jax.text.vocabulary import UNK_ID, SentencePieceVocabulary

logger = logging.getLogger(__name__)

NAMES = ("cqa", "svamp", "jsonl", "delivery")
TEACHER_FIGURES = ("teacher_accuracy", "teacher_accuracy_by_text", "teacher_accuracy_repaired")


def prepare(
    name: str,
    *,
    source: os.PathLike | str | None = None,
    new_name: str | None = None,
    field_map: Mapping[str, str] | None = None,
    teacher: bool = True,
    data_dir: os.PathLike | str | None = None,
) -> dict[str, Any]:
    """Reads a dataset's original files, checks every row, and writes it where tasks look for it.

    Writes `data_dir/NAME/` with the TFDS dataset, SPLIT.jsonl, defects.jsonl, dataset.json and a
    vocabulary trained on train. It appears whole or not at all. If it is there already with the
    same fingerprint nothing is written; with another one it is replaced, and a note says so.

    Args:
        name: `cqa`, `svamp` (the original layout), `jsonl` (anybody's own rows) or `delivery`
            (embedded, without source).
        source: the folder of the original files; for `jsonl` a file, or a folder with train.jsonl
            and optionally validation.jsonl and test.jsonl.
        new_name: what to call the dataset, lower_snake_case; needed for `jsonl`.
        field_map: for `jsonl`, our field to the source's, e.g. {"input": "question"}.
        teacher: False reads no teacher texts.
        data_dir: None for `$STEPDISTILL_DATA_DIR`, else the user's cache folder.

    Returns:
        {"name", "directory", "fingerprint", "metric", "reused", "notes", "vocabulary_size",
        "splits": {SPLIT: {"rows", "with_rationale", "teacher_accuracy", "teacher_accuracy_by_text",
        "teacher_accuracy_repaired", "defects": {KIND: count}, "first_defects": {KIND: "file:row"},
        "vocabulary": {"unknown_pieces", "changed_rows", "changed_whitespace_rows"}}}}. Accuracies
        are shares of all rows, None where they do not apply; a changed row does not come back the
        same from encoding and decoding, a changed-whitespace row does but for its whitespace.

    Raises:
        InputError: bad usage or a source that cannot be read as it should; nothing is written.
    """
    dataset_name = _dataset_name(name, new_name)
    reading = _read(name, source, field_map, teacher)
    data_dir = prepared.default_data_dir() if data_dir is None else pathlib.Path(data_dir)
    directory = data_dir / dataset_name
    result = {
        "name": dataset_name,
        "directory": str(directory),
        "fingerprint": writing.fingerprint(reading),
        "metric": reading.metric,
        "reused": False,
        "notes": [*reading.notes, *_shared_inputs(reading.splits)],
        "vocabulary_size": None,
        "splits": {split: _figures(rows) for split, rows in reading.splits.items()},
    }
    with writing.locked(data_dir, dataset_name):
        found = _existing(dataset_name, data_dir)
        result["reused"] = found is not None and found.fingerprint == result["fingerprint"]
        if result["reused"]:
            result["notes"].append("sources and rows are unchanged: nothing to do")
        else:
            if found is not None:
                result["notes"].append("the sources or rows have changed: rebuilt")
            writing.write(dataset_name, data_dir, reading, result["fingerprint"])
    vocabulary_file = directory / prepared.VOCABULARY
    if vocabulary_file.exists():
        vocabulary = SentencePieceVocabulary(vocabulary_file)
        result["vocabulary_size"] = vocabulary.size
        for split, rows in reading.splits.items():
            result["splits"][split]["vocabulary"] = _round_trip(rows, vocabulary)
    return result


def ensure_prepared(
    name: str, data_dir: os.PathLike | str | None = None
) -> prepared.PreparedDataset:
    """The prepared dataset; the embedded one is prepared on first use.

    Raises:
        InputError: as `open_prepared`.
    """
    folder = prepared.default_data_dir() if data_dir is None else pathlib.Path(data_dir)
    if name == prepared.EMBEDDED and not (folder / name / prepared.FILE).is_file():
        logger.info("preparing the embedded dataset %r in %s", name, folder)
        prepare(name, data_dir=folder)
    return prepared.open_prepared(name, folder)


def _dataset_name(name: str, new_name: str | None) -> str:
    if name not in NAMES:
        raise InputError(
            f"prepare: unknown dataset {name!r} (known: {', '.join(NAMES)}){nearest(name, NAMES)}"
        )
    if new_name is None:
        if name == "jsonl":
            raise InputError("prepare jsonl: say what to call the dataset with --name")
        return name
    if not re.fullmatch(r"[a-z][a-z0-9]*(_[a-z0-9]+)*", new_name):
        raise InputError(f"--name: lower_snake_case is wanted (e.g. my_task), got {new_name!r}")
    if new_name in NAMES and new_name != name:
        raise InputError(f"--name: {new_name!r} belongs to `prepare {new_name}`, choose another")
    return new_name


def _read(
    name: str,
    source: os.PathLike | str | None,
    field_map: Mapping[str, str] | None,
    teacher: bool,
) -> Reading:
    if field_map and name != "jsonl":
        raise InputError(f"--map: only `prepare jsonl` has fields to map, not {name}")
    if name == "delivery":
        from stepdistill_jax.data.readers import delivery

        if source is not None:
            raise InputError("prepare delivery: it is generated, leave --source out")
        return delivery.read()
    if source is None:
        raise InputError(f"prepare {name}: say where its files are with --source")
    source = pathlib.Path(source)
    if name == "jsonl":
        from stepdistill_jax.data.readers import jsonl

        return jsonl.read(source, field_map=field_map or {}, teacher=teacher)
    if name == "cqa":
        from stepdistill_jax.data.readers import cqa

        return cqa.read(source, teacher=teacher)
    from stepdistill_jax.data.readers import svamp

    return svamp.read(source, teacher=teacher)


def _figures(rows: Sequence[Row]) -> dict[str, Any]:
    first: dict[str, str] = {}
    right: collections.Counter[str] = collections.Counter()
    for row in rows:
        for defect in row.defects:
            first.setdefault(defect.kind, f"{defect.file}:{defect.row}")
        right.update(row.right)
    return {
        "rows": len(rows),
        "with_rationale": sum(bool(row.example.rationale) for row in rows),
        **{f: right[f] / len(rows) if f in right else None for f in TEACHER_FIGURES},
        "defects": defect_counts(rows),
        "first_defects": first,
    }


def _round_trip(rows: Sequence[Row], vocabulary: SentencePieceVocabulary) -> dict[str, int]:
    """What the vocabulary does to the texts of a split."""
    counts = {"unknown_pieces": 0, "changed_rows": 0, "changed_whitespace_rows": 0}
    for row in rows:
        example = row.example
        changed = squeezed = False
        for text in (example.input, example.label, example.rationale):
            ids = vocabulary.encode(text)
            counts["unknown_pieces"] += ids.count(UNK_ID)
            back = vocabulary.decode(ids)
            if back != text:
                same = back.split() == text.split()
                squeezed, changed = squeezed or same, changed or not same
        counts["changed_rows"] += changed
        counts["changed_whitespace_rows"] += squeezed and not changed
    return counts


def _existing(name: str, data_dir: pathlib.Path) -> prepared.PreparedDataset | None:
    """What is prepared under that name; None if nothing is, or it is damaged and to be replaced.

    Raises:
        InputError: the folder holds something that is not ours to replace.
    """
    folder = data_dir / name
    if folder.exists() and not (folder / prepared.FILE).exists() and any(folder.iterdir()):
        raise InputError(
            f"{folder}: is there and was not written by `prepare` (no {prepared.FILE}), so it is"
            " left as it is; move it away, or choose another --name or --data-dir"
        )
    try:
        return prepared.open_prepared(name, data_dir)
    except InputError:
        return None


def _shared_inputs(splits: Mapping[str, Sequence[Row]]) -> list[str]:
    """Warns of inputs that are trained on and then asked for again."""
    seen = {row.example.input for row in splits.get("train", ())}
    counts = {
        split: sum(row.example.input in seen for row in rows)
        for split, rows in splits.items()
        if split != "train"
    }
    return [f"{n} inputs of {split} stand in train, too" for split, n in counts.items() if n]
