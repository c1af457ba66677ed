"""Anybody's own rows as JSON lines, without code."""

import dataclasses
import os
import pathlib
from collections.abc import Iterator, Mapping, Sequence

from stepdistill_jax.data.defects import Defect
from stepdistill_jax.data.example import FIELDS, INPUT_PAIR, Rationale
from stepdistill_jax.data.objectives import FIELD_NAME
from stepdistill_jax.data.reading import (
    SPLITS,
    CheckedExample,
    Reading,
    absent_notes,
    split_of,
    tenth,
)
from stepdistill_jax.data.rows import JsonRow, UniqueIds, read_example, read_rows
from stepdistill_jax.data.text_metrics import text_match
from stepdistill_jax.errors import InputError, nearest, printable
from stepdistill_jax.runtime.files import check_file
from stepdistill_jax.runtime.fingerprints import sha256

VERSION = 1
PROVENANCE = "provenance"  # what `annotate` adds to each row
TEACHER_FIELDS = ("rationale", "rationales", "llm_label")
RATIONALE_FIELDS = ("text", "source", "label")
NEEDS = {name: f"; `field_map` {name}=FIELD says which is meant" for name in ("input", "label")}


def read(
    source: pathlib.Path,
    *,
    field_map: Mapping[str, str] | None = None,
    more: Sequence[str] = (),
    teacher: bool = True,
) -> Reading:
    """Reads a file, or the train.jsonl, validation.jsonl and test.jsonl of a folder.

    `data.rows` gives the format of a row; each needs a `label` or an `llm_label`. Of several rationales the
    first is trained on, unless `rationale` names one.

    A file is cut into train (8 tenths), validation and test (a tenth each) by a hash of the id; a
    folder without validation.jsonl takes a tenth of train.

    Args:
        source: file or folder.
        field_map: our field to the source's name for it, e.g. {"input": "question"}.
        more: names of other texts to keep, which objectives may name; a row may be without.
        teacher: False leaves rationales and teacher labels out.

    Raises:
        InputError: no such file, a name in `more` that is none, or a map of a field that we do not
            have. While rows are read: a field that is mapped or in `more` and not there, a wrong
            type, an id that stands twice, an empty label or input, broken JSON; names file, line and
            field.
    """
    field_map = dict(field_map or {})
    more = _check_more(more)
    _check_map(field_map, (*FIELDS, *more))
    names = {name: field_map.get(name, name) for name in (*FIELDS, *more)}
    fields = [name for name in FIELDS if teacher or name not in TEACHER_FIELDS]
    answers = [names[name] for name in ("label", "llm_label") if name in fields]
    notes: list[str] = []
    files = _files(source, notes)
    one_file = not os.path.isdir(source)

    def rows() -> Iterator[tuple[str, CheckedExample]]:
        found: set[str] = set()
        unread: set[str] = set()
        unanswered: list[str] = []
        having = dict.fromkeys(more, 0)
        count = 0
        for split, path in files.items():
            ids = UniqueIds()
            for row in read_rows(path):
                if row.number == 1:
                    _check_mapped_fields(field_map, row)
                unread |= row.fields.keys() - set(names.values())
                # `annotate` leaves a row without an answer as it was
                if PROVENANCE in row.fields and not any(map(row.fields.get, answers)):
                    unanswered.append(row.where)
                    continue
                checked = _checked(row, fields, more, names)
                count += 1
                for name in checked.example.more:
                    having[name] += 1
                number = tenth(ids.add(checked.example.id, row))
                target = split_of(number, split, files)
                if one_file:
                    target = {0: "validation", 1: "test"}.get(number, "train")
                found.add(target)
                yield target, checked
        not_read = printable(", ".join(sorted(unread)))
        told = [f"fields that were not read: {not_read}"] if unread else []
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
                f"`fields` {absent}: no row of {source} has a text in the field {names[absent]!r}"
                f" (not read: {not_read or 'none'}){nearest(names[absent], unread)}"
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
                f"`field_map` {name}={field_map[name]}: there is no field {name!r} to fill"
                f" (known: {', '.join(known)}){nearest(name, known)}"
            )


def _check_more(more: Sequence[str]) -> tuple[str, ...]:
    for name in more:
        if not FIELD_NAME.fullmatch(name):
            raise InputError(
                f"`fields` {name}: expected a name in lower_snake_case; `fields` my_name and"
                f" `field_map` my_name={name} read a field that is called otherwise"
            )
        if name in (*FIELDS, PROVENANCE, INPUT_PAIR):
            raise InputError(
                f"`fields` {name}: it has a meaning of its own; name yours differently"
            )
    if len(set(more)) < len(more):
        raise InputError(f"`fields` {','.join(more)}: name each once")
    return tuple(more)


def _files(source: pathlib.Path, notes: list[str]) -> dict[str, pathlib.Path]:
    """The file of each split; `train` for a single one."""
    if not os.path.isdir(source):  # pathlib's own raises for a name that is too long
        if not os.path.exists(source):
            raise InputError(f"`source` {source}: no such file or folder")
        check_file(source)
        notes.append(
            f"{source}: one file, so it is cut by the hashed ids: validation and test are a tenth"
            " each, train is the rest"
        )
        return {"train": source}
    paths = {split: source / f"{split}.jsonl" for split in SPLITS}
    files = {split: path for split, path in paths.items() if path.exists()}
    others = sorted(p.name for p in source.glob("*.jsonl") if p not in files.values())
    if not files:
        raise InputError(
            f"`source` {source}: none of {', '.join(p.name for p in paths.values())} is in it"
            + (f" (found: {', '.join(others)})" if others else "")
        )
    notes += absent_notes(paths, files)
    for path in files.values():
        check_file(path, "a JSON-lines file")
    if others:
        notes.append(f"{source}: files that were not read: {', '.join(others)}")
    return files


def _check_mapped_fields(field_map: Mapping[str, str], row: JsonRow) -> None:
    for name, theirs in field_map.items():
        if theirs not in row.fields:
            raise InputError(
                f"`field_map` {name}={theirs}: {row.where} has no field {theirs!r}"
                f" (found: {row.names}){nearest(theirs, row.fields)}"
            )


def _checked(
    row: JsonRow, fields: Sequence[str], more: Sequence[str], names: Mapping[str, str]
) -> CheckedExample:
    for said in row.objects(names["rationales"]) if "rationales" in fields else ():
        if unknown := sorted(said.fields.keys() - set(RATIONALE_FIELDS)):
            raise InputError(
                f"{said.where}: unknown field {unknown[0]!r} (known: {', '.join(RATIONALE_FIELDS)})"
            )
    # a row that only the teacher has labelled is trained on under LABEL_SOURCE=llm
    taught = "llm_label" in fields and row.optional_text(names["llm_label"])
    needs = {"input": NEEDS["input"]} if taught else NEEDS
    example = read_example(row, needs=needs, fields=fields, more=more, names=names)
    label, llm_label = example.label, example.llm_label
    if rationales := example.rationales:
        rationale = example.rationale or rationales[0].text
        if rationale not in (r.text for r in rationales):
            rationales = (Rationale(rationale, label=llm_label), *rationales)
        example = dataclasses.replace(example, rationale=rationale, rationales=rationales)
    defects = tuple(
        Defect(kind, row.file, row.line, answer)
        for kind, answer in (("gold_not_a_choice", label), ("label_not_a_choice", llm_label))
        if example.choices and answer and answer not in example.choices
    )
    right = {"teacher_accuracy": text_match(llm_label, label)} if llm_label and label else {}
    return CheckedExample(example, defects, right)
