"""Writes a reader's rows, and the files made from them, to the folder of a dataset."""

import contextlib
import json
import os
import pathlib
from collections.abc import Mapping
from typing import Any

from stepdistill_jax.data import objectives, prepared
from stepdistill_jax.data import train_vocabulary as training
from stepdistill_jax.data.bad_rows import DEFECTS, BadRows
from stepdistill_jax.data.counts import SplitCounts
from stepdistill_jax.data.example import Example
from stepdistill_jax.data.reading import Reading, in_order
from stepdistill_jax.data.rows import BadRow
from stepdistill_jax.errors import InputError
from stepdistill_jax.runtime.files import atomic_write, fsync, read_json, read_jsonl, write_json
from stepdistill_jax.runtime.fingerprints import digest_each, sha256
from stepdistill_jax.runtime.folders import REPLACED
from stepdistill_jax.runtime.overwriting import foreign_file
from stepdistill_jax.runtime.progress import progress

FORMAT = 2  # increased when the same rows would be written differently
PARALLEL_ROWS = (
    20_000  # if there are this many rows or more, a second process writes the TFDS files
)
MAX_VOCABULARY_CHARACTERS = 20_000_000  # the trainer needs about 50 bytes of memory for each
_FIELDS = {
    "name",
    "fingerprint",
    "splits",
    "metric",
    "reader",
    "sources",
}  # every dataset.json has these


def write_rows(
    reading: Reading, folder: pathlib.Path
) -> tuple[dict[str, SplitCounts], str, BadRows]:
    """Reads all rows once. Writes the rows to SPLIT.jsonl and their defects to defects.jsonl.

    Returns:
        {split: counts}, train first.
        The fingerprint of the dataset.
        The bad rows, which no SPLIT.jsonl contains.

    Raises:
        InputError: the source cannot be read.
    """
    bad = BadRows()
    splits: dict[str, SplitCounts] = {}
    files: dict[str, Any] = {}
    with contextlib.ExitStack() as stack:
        bar = stack.enter_context(progress(None, f"reading {reading.reader}, rows"))
        defects = stack.enter_context(atomic_write(folder / DEFECTS))
        for split, row in reading.rows():
            bar.update()
            if isinstance(row, BadRow):
                defects.write(_line(bad.add(row, split)))
                continue
            if split not in files:
                files[split] = stack.enter_context(atomic_write(folder / f"{split}.jsonl"))
                splits[split] = SplitCounts()
            files[split].write(_line(row.example.to_json()))
            splits[split].add(row)
            for defect in row.defects:
                about = {"split": split, "id": row.example.id}
                defects.write(_line(about | vars(defect)))
    splits = {split: splits[split] for split in in_order(splits)}
    rows = {split: sha256(folder / f"{split}.jsonl") for split in splits}
    return splits, prepared.fingerprint(describe(reading), rows), bad


def describe(reading: Reading) -> dict[str, Any]:
    """Returns the fields of dataset.json that the dataset's fingerprint covers, in addition to the rows."""
    return {
        "metric": reading.metric,
        "reader": {"name": reading.reader, "version": reading.version},
        "format": FORMAT,
        "options": reading.options,
        "sources": reading.sources,
    }


def write_rest(
    name: str,
    folder: pathlib.Path,
    reading: Reading,
    splits: Mapping[str, SplitCounts],
    fingerprint: str,
) -> None:
    """Writes the vocabulary and the TFDS files, which are made from SPLIT.jsonl, and finally dataset.json.

    For a large dataset, a second process writes the TFDS files while this one trains the vocabulary.
    """
    from stepdistill_jax.data import builder, round_trip

    counts = {name: found.rows for name, found in splits.items()}
    vocabulary: dict[str, dict[str, int]] = {}
    parallel = sum(counts.values()) >= PARALLEL_ROWS
    build = builder.build_in_subprocess if parallel else builder.build_first
    with build(name, folder, counts, reading.fields):
        if "train" in splits:
            path = folder / prepared.VOCABULARY
            train = splits["train"]
            texts = vocabulary_texts(folder / "train.jsonl", train.texts, train.characters)
            training.train_vocabulary(texts, path)
            vocabulary = round_trip.round_trips(folder, counts)
    files = [p.relative_to(folder).as_posix() for p in sorted(folder.rglob("*")) if p.is_file()]
    write_json(
        folder / prepared.FILE,
        {
            "name": name,
            "fingerprint": fingerprint,
            "splits": counts,
            "labels": splits["train"].labels if "train" in splits else [],
            **describe(reading),
            "notes": reading.notes,
            "vocabulary": vocabulary,
            "files": digest_each(sha256, folder, files),
        },
    )


def is_ours(folder: pathlib.Path) -> bool:
    """Returns whether a folder has a dataset.json with the fields that `prepare` writes."""
    try:
        stored = read_json(folder / prepared.FILE)
    except InputError:
        return False
    return isinstance(stored, dict) and stored.keys() >= _FIELDS


def check_replaceable(folder: pathlib.Path, name: pathlib.Path | None = None) -> None:
    """Checks that a folder contains only files that `prepare` wrote.

    Args:
        folder: a folder that is empty, missing, or satisfies `is_ours`.
        name: path to show in the message; None means `folder`.

    Raises:
        InputError: there is another file, or the folder is a link.
    """
    shown = name or folder
    if folder.is_symlink():
        raise foreign_file(shown, "prepare", " (it is a link)")
    found = [path for path in folder.rglob("*") if path.is_symlink() or not path.is_dir()]
    stored = read_json(folder / prepared.FILE) if found else {}
    splits = [f"{split}.jsonl" for split in stored.get("splits") or ()]
    own = {*(stored.get("files") or ()), *splits, DEFECTS, prepared.FILE, prepared.VOCABULARY}
    for path in found:
        file = path.relative_to(folder)
        # early versions of dataset.json have no list of files
        listed = stored.get("files") or file.parts[0] != prepared.TFDS_VERSION
        if listed and file.as_posix() not in own:
            raise foreign_file(shown / file, "prepare", ", which would replace its folder")


def replace(new: pathlib.Path, final: pathlib.Path) -> None:
    """Renames the folder `new` to `final`.

    First moves an existing `final` next to `new`, where `staged_folder` removes it at the end.

    Raises:
        InputError: `final` now contains a file that `prepare` did not write.
    """
    if final.exists():
        os.replace(final, new.parent / REPLACED)
        check_replaceable(new.parent / REPLACED, final)
    os.replace(new, final)
    fsync(final.parent)


def vocabulary_texts(path: pathlib.Path, texts: int, characters: int) -> list[str]:
    """Returns the texts of a SPLIT.jsonl from which a vocabulary is trained.

    These are the optional text fields, all rationales, and the inputs and targets of a step-by-step model,
    with prefixes. If the vocabulary's files are too large for its trainer, only every n-th row is used.

    Args:
        texts: approximate number of texts in all of the vocabulary's files.
        characters: approximate number of characters in these files.
    """
    # every step-th row, since the trainer keeps all texts in memory
    step = max(-(-texts // training.MAX_TEXTS), -(-characters // MAX_VOCABULARY_CHARACTERS))
    found: list[str] = []
    for i, (_, row) in enumerate(read_jsonl(path)):
        if i % step == 0:
            found += _texts_of(Example.from_json(row))
    return found


def _texts_of(example: Example) -> list[str]:
    texts = [
        text for o in objectives.step_by_step() for text in o.render(example.texts) if text.strip()
    ]
    texts += example.more.values()
    return texts + [r.text for r in example.rationales if r.text != example.rationale]


def _line(value: Mapping[str, Any]) -> str:
    return json.dumps(value, ensure_ascii=False) + "\n"
