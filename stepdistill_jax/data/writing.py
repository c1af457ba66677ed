"""A reading on disk: it appears whole or not at all, and one process at a time writes it."""

import contextlib
import dataclasses
import hashlib
import json
import os
import pathlib
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from stepdistill_jax import objectives
from stepdistill_jax.data import prepared
from stepdistill_jax.data.example import Example
from stepdistill_jax.data.reading import Reading, Row
from stepdistill_jax.errors import InputError
from stepdistill_jax.files import atomic_write, digest, fsync_folder, write_json
from stepdistill_jax.text.train_vocabulary import train_vocabulary

FORMAT = 1  # raised when the same rows would be written otherwise
MAX_LABELS = 50


def fingerprint(reading: Reading) -> str:
    """Digest of sources, reader, options and rows: any change of these changes it.

    Rows are in it beside their sources, so that a changed reader shows even if its version was
    forgotten.
    """
    return digest(
        {
            "format": FORMAT,
            "reader": [reading.reader, reading.version, reading.metric],
            "options": reading.options,
            "sources": reading.sources,
            "splits": {s: _rows_digest(rows) for s, rows in reading.splits.items()},
        }
    )


def _rows_digest(rows: Sequence[Row]) -> str:
    state = hashlib.sha256()
    for row in rows:
        state.update(_line(row.example.to_json()).encode())
    return state.hexdigest()


def write(name: str, data_dir: pathlib.Path, reading: Reading, fingerprint: str) -> None:
    """Builds everything in a temporary folder beside the final one, then renames it."""
    from stepdistill_jax.data import builder

    for left in data_dir.glob(f".{name}.partial-*"):  # by a run that was killed; we hold the lock
        shutil.rmtree(left, ignore_errors=True)
    work = pathlib.Path(tempfile.mkdtemp(prefix=f".{name}.partial-", dir=data_dir))
    try:
        examples = {s: [row.example for row in rows] for s, rows in reading.splits.items()}
        builder.build(name, examples, work)
        new = work / name
        for split, rows in examples.items():
            with atomic_write(new / f"{split}.jsonl") as f:
                f.writelines(_line(example.to_json()) for example in rows)
        with atomic_write(new / "defects.jsonl") as f:
            for split, found in reading.splits.items():
                for row in found:
                    for defect in row.defects:
                        f.write(
                            _line(
                                {"split": split, "id": row.example.id} | dataclasses.asdict(defect)
                            )
                        )
        train = examples.get("train", [])
        if train:
            train_vocabulary(_texts(train), new / prepared.VOCABULARY)
        write_json(
            new / prepared.FILE,
            {
                "name": name,
                "fingerprint": fingerprint,
                "metric": reading.metric,
                "splits": {split: len(rows) for split, rows in examples.items()},
                "labels": _labels(train),
                "reader": {"name": reading.reader, "version": reading.version},
                "format": FORMAT,
                "options": reading.options,
                "sources": reading.sources,
                "notes": list(reading.notes),
            },
        )
        _replace(new, data_dir / name, work / "replaced")
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _replace(new: pathlib.Path, final: pathlib.Path, old: pathlib.Path) -> None:
    if final.exists():
        os.replace(final, old)
    os.replace(new, final)
    fsync_folder(final.parent)


def _texts(examples: Sequence[Example]) -> list[str]:
    """What the step-by-step model reads and writes: the prefixes become pieces of their own."""
    texts = []
    for example in examples:
        fields = {name: getattr(example, name) for name in objectives.Objective.FIELDS}
        for objective in objectives.step_by_step():
            model_input, target = objective.render(fields)
            texts.extend(text for text in (model_input, target) if target)
    return texts


def _labels(examples: Sequence[Example]) -> list[str]:
    """The labels of train where they are few and the same for every row; else none."""
    if any(example.choices for example in examples):
        return []
    labels = {example.label for example in examples}
    return sorted(labels) if len(labels) <= MAX_LABELS else []


def _line(value: Mapping[str, Any]) -> str:
    return json.dumps(value, ensure_ascii=False) + "\n"


@contextlib.contextmanager
def locked(data_dir: pathlib.Path, name: str) -> Iterator[None]:
    """One process at a time prepares `name`: the others wait, and find it done.

    Raises:
        InputError: `data_dir` cannot be made or written.
    """
    import fcntl  # not on Windows, where nothing can be prepared, but predict imports this package

    with contextlib.ExitStack() as stack:
        try:
            data_dir.mkdir(parents=True, exist_ok=True)
            lock = stack.enter_context(open(data_dir / f".{name}.lock", "w"))
        except OSError as error:
            raise InputError(
                f"--data-dir {data_dir}: cannot be written ({error.strerror})"
            ) from None
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
