"""The layout of the paper's files: NAME_SPLIT.json as JSON lines, llm/SPLIT_CoT_I.json as lists."""

import dataclasses
import itertools
import pathlib
from collections.abc import Callable
from typing import Any

from stepdistill_jax.data.reading import Reading, Row, take_validation
from stepdistill_jax.errors import InputError
from stepdistill_jax.files import read_json, read_jsonl, sha256

FILE_SPLITS = {"train": "train", "valid": "validation", "test": "test"}


@dataclasses.dataclass(frozen=True)
class TeacherText:
    """A raw completion and where it stands: the file's name in the source, its number from 1."""

    text: str
    file: str
    row: int


@dataclasses.dataclass(frozen=True)
class Record:
    """A row of an input file, and the teacher's text for it (None if no teacher was asked).

    Attributes:
        fields: the JSON object.
        file: name of the file in the source.
        row: line number from 1.
        number: which of the file's rows it is, from 1; blank lines are none.
        where: `file:line` for messages, with the path as the user gave it.
        teacher: the completion.
    """

    fields: dict[str, Any]
    file: str
    row: int
    number: int
    where: str
    teacher: TeacherText | None


def read(
    name: str,
    version: int,
    metric: str,
    source: pathlib.Path,
    *,
    teacher: bool,
    to_rows: Callable[[list[Record]], list[Row]],
) -> Reading:
    """Reads every split that is there, pairs each row with its teacher text, and checks the counts.

    Args:
        name: prefix of the files, `cqa` for cqa_train.json.
        version: of the reader.
        metric: how its labels are compared.
        source: the folder that holds the files, or one that holds it under `name`.
        teacher: False reads no teacher texts.
        to_rows: makes the checked rows of one file.

    Raises:
        InputError: no files, broken JSON, no teacher texts, or not as many as rows.
    """
    source = _folder(source, name)
    sources: dict[str, str] = {}
    splits: dict[str, list[Row]] = {}
    notes = []
    for part, split in FILE_SPLITS.items():
        path = source / f"{name}_{part}.json"
        if not path.exists():
            if split != "validation":
                notes.append(f"{path}: no such file, so the split {split} is left out")
            continue
        rows = list(read_jsonl(path))
        if not rows:
            raise InputError(f"{path}: no rows in it")
        texts: list[TeacherText] | None = None
        if teacher:
            files = _teacher_files(source, part)
            texts = _teacher_texts(source, files)
            _check_counts(path, rows, files, texts)
            sources |= {str(file.relative_to(source)): sha256(file) for file in files}
        sources[path.name] = sha256(path)
        splits[split] = to_rows(
            [
                Record(
                    fields, path.name, line, i + 1, f"{path}:{line}", texts[i] if texts else None
                )
                for i, (line, fields) in enumerate(rows)
            ]
        )
    if "validation" not in splits:
        notes.append(_hold_out(splits, source / f"{name}_valid.json"))
    if not teacher:
        notes.append("no teacher texts were read: rows have labels only")
    order = [split for split in FILE_SPLITS.values() if splits.get(split)]
    return Reading(
        name,
        version,
        metric,
        {split: splits[split] for split in order},
        sources,
        {"teacher": teacher},
        tuple(notes),
    )


def _hold_out(splits: dict[str, list[Row]], path: pathlib.Path) -> str:
    """Moves a tenth of train to validation; says so."""
    if "train" not in splits:
        return f"{path}: no such file, so the split validation is left out"
    splits["train"], splits["validation"] = take_validation(splits["train"])
    return f"{path}: no such file, so validation is the tenth of train whose hashed id falls there"


def _folder(source: pathlib.Path, name: str) -> pathlib.Path:
    if not source.is_dir():
        raise InputError(f"--source {source}: no such folder")
    for folder in (source, source / name):
        if any((folder / f"{name}_{part}.json").exists() for part in FILE_SPLITS):
            return folder
    raise InputError(f"--source {source}: neither {name}_train.json nor {name}_test.json is in it")


def _teacher_files(source: pathlib.Path, part: str) -> list[pathlib.Path]:
    """llm/PART_CoT_0.json, _1, ... without a gap."""
    files = []
    for i in itertools.count():
        path = source / "llm" / f"{part}_CoT_{i}.json"
        if not path.exists():
            break
        files.append(path)
    if not files:
        raise InputError(
            f"{source / 'llm' / f'{part}_CoT_0.json'}: no such file; without teacher texts only"
            " labels can be prepared: say so with --no-teacher"
        )
    beyond = set((source / "llm").glob(f"{part}_CoT_*.json")) - set(files)
    if beyond:
        raise InputError(
            f"{source / 'llm' / f'{part}_CoT_{len(files)}.json'}: no such file, but"
            f" {min(beyond).name} is there: the numbers must have no gap"
        )
    return files


def _teacher_texts(source: pathlib.Path, files: list[pathlib.Path]) -> list[TeacherText]:
    texts = []
    for path in files:
        values = read_json(path)
        if not isinstance(values, list):
            raise InputError(f"{path}: a JSON list of texts is wanted")
        for row, value in enumerate(values, 1):
            if not isinstance(value, str):
                raise InputError(f"{path}: item {row} must be text, got {type(value).__name__}")
            texts.append(TeacherText(value, str(path.relative_to(source)), row))
    return texts


def _check_counts(
    path: pathlib.Path,
    rows: list[tuple[int, dict]],
    files: list[pathlib.Path],
    texts: list[TeacherText],
) -> None:
    """Texts belong to rows by their order alone, so a count that differs would shift them."""
    if len(rows) == len(texts):
        return
    span = files[0].name if len(files) == 1 else f"{files[0].name} to {files[-1].name}"
    counts = f"{len(rows)} rows, but {len(texts)} teacher texts in {files[0].parent}/ ({span})"
    if len(rows) > len(texts):
        raise InputError(f"{path}:{rows[len(texts)][0]}: no teacher text for this row: {counts}")
    extra = texts[len(rows)]
    raise InputError(f"{path.parent / extra.file}: item {extra.row} belongs to no row: {counts}")
