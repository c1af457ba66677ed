"""Anybody's own rows as JSON lines, without code."""

import os
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from stepdistill_jax.data.corpora import fields
from stepdistill_jax.data.example import Defect, Example, Rationale
from stepdistill_jax.data.objectives import FIELD_NAME
from stepdistill_jax.data.prepared import ROW_FIELDS
from stepdistill_jax.data.reading import (
    SPLITS,
    Reading,
    Row,
    defect,
    tenth,
    train_or_validation,
)
from stepdistill_jax.data.text_metrics import text_match
from stepdistill_jax.errors import InputError, nearest, printable
from stepdistill_jax.runtime.files import check_file, read_jsonl
from stepdistill_jax.runtime.fingerprints import sha256

VERSION = 1
FIELDS = ROW_FIELDS
PROVENANCE = "provenance"  # what `annotate` adds to each row
TEACHER_FIELDS = ("rationale", "rationales", "llm_label")
RATIONALE_FIELDS = ("text", "source", "label")


def read(
    source: pathlib.Path,
    *,
    field_map: Mapping[str, str] | None = None,
    more: Sequence[str] = (),
    teacher: bool = True,
) -> Reading:
    """Reads a file, or the train.jsonl, validation.jsonl and test.jsonl of a folder.

    A row is {"id"?, "input", "label", "rationale"?, "rationales"?: [{"text", "source"?, "label"?}],
    "llm_label"?, "weight"?, "choices"?}. A missing id is the row's number from 1. All
    texts but the input are stripped. Of several rationales the first is trained on, unless
    `rationale` names one.

    A file is cut into train (8 tenths), validation and test (a tenth each) by a hash of the id; a
    folder without validation.jsonl takes a tenth of train.

    Args:
        source: file or folder.
        field_map: our field to the source's name for it, e.g. {"input": "question"}.
        more: names of other texts to keep, which objectives may name; a row may be without.
        teacher: False leaves rationales and teacher labels out.

    Raises:
        InputError: no such file, a name in `more` that is none, or a map of a field that we do not
            have. While rows are read: a field that is mapped or in `more` and not there, a wrong type, an id that stands twice, an empty label
            or input, broken JSON; names file, line and field.
    """
    field_map = dict(field_map or {})
    more = _check_more(more)
    _check_map(field_map, (*FIELDS, *more))
    notes: list[str] = []
    files = _files(source, notes)
    one_file = not os.path.isdir(source)
    if one_file:
        notes.append(
            f"{source}: one file, so it is cut by the hashed ids: validation and test are a tenth"
            " each, train is the rest"
        )
    elif "train" in files and "validation" not in files:
        notes.append(
            f"{source / 'validation.jsonl'}: no such file, so validation is the tenth of train"
            " whose hashed id falls there"
        )

    def rows() -> Iterator[tuple[str, Row]]:
        unread: set[str] = set()
        found: set[str] = set()
        unanswered: list[str] = []
        having = dict.fromkeys(more, 0)
        count = 0
        names = {name: field_map.get(name, name) for name in (*FIELDS, *more)}
        for split, path in files.items():
            for row in _read_file(path, names, field_map, teacher, unread, unanswered):
                count += 1
                for name in row.example.more:
                    having[name] += 1
                target = split
                if one_file:
                    target = _third(row)
                elif split == "train" and "validation" not in files:
                    target = train_or_validation(row)
                found.add(target)
                yield target, row
        told = []
        if unread:
            told = [f"fields that were not read: {printable(', '.join(sorted(unread)))}"]
        wanted = SPLITS if one_file else ("train", "validation") if "train" in files else ()
        told += [
            f"the split {split} is left out: of so few rows none falls into it"
            for split in wanted
            if split not in found
        ]
        if unanswered:
            told.append(
                f"{len(unanswered)} rows that a teacher was asked about and that nobody has labelled"
                f" are left out, the first at {unanswered[0]}"
            )
        told += [f"the field {name} is in {n} of {count} rows" for name, n in having.items()]
        if absent := next((name for name, n in having.items() if not n), None):
            raise InputError(
                f"--fields {absent}: no row of {source} has a text in the field {names[absent]!r}"
                f" (not read: {printable(', '.join(sorted(unread))) or 'none'})"
                f"{nearest(names[absent], unread)}"
            )
        notes.extend(note for note in told if note not in notes)

    return Reading(
        "jsonl",
        VERSION,
        "text_match",
        rows,
        {path.name: sha256(path) for path in files.values()},
        {
            "field_map": field_map,
            "teacher": teacher,
            "cut": one_file,
            **({"fields": list(more)} if more else {}),
        },
        notes,
        more,
    )


def _check_map(field_map: Mapping[str, str], known: Sequence[str]) -> None:
    for name in field_map:
        if name not in known:
            raise InputError(
                f"--map {name}={field_map[name]}: there is no field {name!r} to fill"
                f" (known: {', '.join(known)}){nearest(name, known)}"
            )


def _check_more(more: Sequence[str]) -> tuple[str, ...]:
    for name in more:
        if not FIELD_NAME.fullmatch(name):
            raise InputError(
                f"--fields {name}: a name in lower_snake_case is wanted; `--fields my_name --map"
                f" my_name={name}` reads a field that is called otherwise"
            )
        if name in (*FIELDS, PROVENANCE):
            raise InputError(f"--fields {name}: it has a meaning of its own and is read anyway")
    if len(set(more)) < len(more):
        raise InputError(f"--fields {','.join(more)}: name each once")
    return tuple(more)


def _files(source: pathlib.Path, notes: list[str]) -> dict[str, pathlib.Path]:
    if not os.path.isdir(source):  # pathlib's own raises for a name that is too long
        if not os.path.exists(source):
            raise InputError(f"--source {source}: no such file or folder")
        check_file(source)
        return {"train": source}
    files = {s: p for s in SPLITS if (p := source / f"{s}.jsonl").exists()}
    others = sorted(p.name for p in source.glob("*.jsonl") if p not in files.values())
    if not files:
        raise InputError(
            f"--source {source}: none of {', '.join(f'{s}.jsonl' for s in SPLITS)} is in it"
            + (f" (found: {', '.join(others)})" if others else "")
        )
    for split in ("train", "test"):
        if split not in files:
            notes.append(f"{source / split}.jsonl: no such file, so the split {split} is left out")
    for path in files.values():
        check_file(path, "a JSON-lines file")
    if others:
        notes.append(f"{source}: files that were not read: {', '.join(others)}")
    return files


def _third(row: Row) -> str:
    return {0: "validation", 1: "test"}.get(tenth(row.example.id), "train")


def _read_file(
    path: pathlib.Path,
    names: Mapping[str, str],
    field_map: Mapping[str, str],
    teacher: bool,
    unread: set[str],
    unanswered: list[str],
) -> Iterator[Row]:
    dropped = set() if teacher else {names[name] for name in TEACHER_FIELDS}
    ids = fields.UniqueIds()
    count = 0
    for line, source_row in read_jsonl(path):
        where = f"{path}:{line}"
        if not count:
            _check_mapped_fields(field_map, source_row, where)
        unread |= source_row.keys() - set(names.values())
        if dropped:
            source_row = {k: v for k, v in source_row.items() if k not in dropped}
        count += 1
        # `annotate` leaves a row without an answer as it was
        if PROVENANCE in source_row and not any(
            source_row.get(names[name]) for name in ("label", "llm_label")
        ):
            unanswered.append(where)
            continue
        yield _row(source_row, names, path.name, line, where, ids, str(count))
    if not count:
        raise InputError(f"{path}: no rows in it")


def _check_mapped_fields(field_map: Mapping[str, str], row: Mapping[str, Any], where: str) -> None:
    for name, theirs in field_map.items():
        if theirs not in row:
            raise InputError(
                f"--map {name}={theirs}: {where} has no field {theirs!r}"
                f" (found: {fields.names_of(row)}){nearest(theirs, row)}"
            )


def _row(
    row: Mapping[str, Any],
    names: Mapping[str, str],
    file: str,
    line: int,
    where: str,
    ids: fields.UniqueIds,
    number: str,
) -> Row:
    llm_label = fields.optional_text(row, names["llm_label"], where)
    # a row that only the teacher has labelled is trained on under LABEL_SOURCE=llm
    for name in ("input",) if llm_label else ("input", "label"):
        if names[name] not in row:
            raise InputError(
                f"{where}: no field {names[name]!r} (found: {fields.names_of(row)});"
                f" --map {name}=FIELD says which is meant"
            )
    example_id = fields.optional_text(row, names["id"], where) or number
    rationale = fields.optional_text(row, names["rationale"], where)
    rationales = _rationales(row, names["rationales"], where)
    if rationales and not rationale:
        rationale = rationales[0].text
    elif rationales and rationale not in (r.text for r in rationales):
        rationales = (Rationale(rationale, label=llm_label), *rationales)
    example = Example(
        id=ids.add(example_id, where),
        input=fields.text(row, names["input"], where, strip=False),
        label=(fields.optional_text if llm_label else fields.text)(row, names["label"], where),
        rationale=rationale,
        rationales=rationales,
        llm_label=llm_label,
        weight=fields.weight(row, names["weight"], where),
        choices=fields.texts(row, names["choices"], where),
        more={
            name: text
            for name, theirs in names.items()
            if name not in FIELDS and (text := fields.optional_text(row, theirs, where))
        },
    )
    defects: list[Defect] = []
    if example.choices and example.label and example.label not in example.choices:
        defects.append(defect("gold_not_a_choice", file, line, example.label))
    if example.choices and llm_label and llm_label not in example.choices:
        defects.append(defect("label_not_a_choice", file, line, llm_label))
    right = {}
    if llm_label and example.label:
        right = {"teacher_accuracy": text_match(llm_label, example.label)}
    return Row(example, tuple(defects), right)


def _rationales(row: Mapping[str, Any], name: str, where: str) -> tuple[Rationale, ...]:
    values = row.get(name)
    if values is None:
        return ()
    if not isinstance(values, list) or not all(isinstance(value, dict) for value in values):
        raise InputError(f"{where}: the field {name!r} must be a list of objects")
    found = []
    for i, value in enumerate(values):
        inside = f"{where}: in {name}[{i}]"
        if unknown := sorted(set(value) - set(RATIONALE_FIELDS)):
            raise InputError(
                f"{inside}: unknown field {unknown[0]!r} (known: {', '.join(RATIONALE_FIELDS)})"
            )
        found.append(
            Rationale(
                fields.text(value, "text", inside),
                fields.optional_text(value, "source", inside),
                fields.optional_text(value, "label", inside),
            )
        )
    return tuple(found)
