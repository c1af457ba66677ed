"""Anybody's own rows as JSON lines, without code."""

import dataclasses
import os
import pathlib
from collections.abc import Iterator, Mapping, Sequence

from stepdistill_jax.data.example import FIELDS, Defect, Rationale
from stepdistill_jax.data.objectives import FIELD_NAME
from stepdistill_jax.data.reading import (
    SPLITS,
    Reading,
    Row,
    defect,
    tenth,
    train_or_validation,
)
from stepdistill_jax.data.rows import JsonRow, UniqueIds, read_example, read_rows
from stepdistill_jax.data.text_metrics import text_match
from stepdistill_jax.errors import InputError, nearest, printable
from stepdistill_jax.runtime.files import check_file, sha256

VERSION = 1
PROVENANCE = "provenance"  # what `annotate` adds to each row
UNTAUGHT = tuple(n for n in FIELDS if n not in ("rationale", "rationales", "llm_label"))
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

    Rows are those of `data.rows`; each needs a `label`, or an `llm_label`. Of several rationales the
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
        names = {name: field_map.get(name, name) for name in (*FIELDS, *more)}
        reader = _RowReader(names, field_map, more, FIELDS if teacher else UNTAUGHT)
        found: set[str] = set()
        having = dict.fromkeys(more, 0)
        count = 0
        for split, path in files.items():
            for row in reader.rows(path):
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
        unread, unanswered = printable(", ".join(sorted(reader.unread))), reader.unanswered
        told = [f"fields that were not read: {unread}"] if unread else []
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
                f" (not read: {unread or 'none'}){nearest(names[absent], reader.unread)}"
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
        if name in (*FIELDS, PROVENANCE):
            raise InputError(f"`fields` {name}: it has a meaning of its own and is read anyway")
    if len(set(more)) < len(more):
        raise InputError(f"`fields` {','.join(more)}: name each once")
    return tuple(more)


def _files(source: pathlib.Path, notes: list[str]) -> dict[str, pathlib.Path]:
    if not os.path.isdir(source):  # pathlib's own raises for a name that is too long
        if not os.path.exists(source):
            raise InputError(f"`source` {source}: no such file or folder")
        check_file(source)
        return {"train": source}
    files = {s: p for s in SPLITS if (p := source / f"{s}.jsonl").exists()}
    others = sorted(p.name for p in source.glob("*.jsonl") if p not in files.values())
    if not files:
        raise InputError(
            f"`source` {source}: none of {', '.join(f'{s}.jsonl' for s in SPLITS)} is in it"
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


class _RowReader:
    """Reads files of one source.

    Attributes:
        unread: names of the fields that were not read.
        unanswered: `file:line` of each row that `annotate` got no answer for.
    """

    def __init__(
        self,
        names: Mapping[str, str],
        field_map: Mapping[str, str],
        more: Sequence[str],
        fields: Sequence[str],
    ):
        self._names, self._field_map, self._more, self._fields = names, field_map, more, fields
        self._answers = [names[n] for n in ("label", "llm_label") if n in fields]
        self.unread: set[str] = set()
        self.unanswered: list[str] = []

    def rows(self, path: pathlib.Path) -> Iterator[Row]:
        ids = UniqueIds()
        for row in read_rows(path):
            if row.number == 1:
                self._check_mapped_fields(row)
            self.unread |= row.fields.keys() - set(self._names.values())
            # `annotate` leaves a row without an answer as it was
            if PROVENANCE in row.fields and not any(map(row.fields.get, self._answers)):
                self.unanswered.append(row.where)
                continue
            yield self._checked(row, ids)

    def _check_mapped_fields(self, row: JsonRow) -> None:
        for name, theirs in self._field_map.items():
            if theirs not in row.fields:
                raise InputError(
                    f"`field_map` {name}={theirs}: {row.where} has no field {theirs!r}"
                    f" (found: {row.names}){nearest(theirs, row.fields)}"
                )

    def _checked(self, row: JsonRow, ids: UniqueIds) -> Row:
        names = self._names
        if "rationales" in self._fields:
            for said in row.objects(names["rationales"]):
                if unknown := sorted(said.fields.keys() - set(RATIONALE_FIELDS)):
                    raise InputError(
                        f"{said.where}: unknown field {unknown[0]!r}"
                        f" (known: {', '.join(RATIONALE_FIELDS)})"
                    )
        # a row that only the teacher has labelled is trained on under LABEL_SOURCE=llm
        taught = "llm_label" in self._fields and row.optional_text(names["llm_label"])
        example = read_example(
            row,
            needs={"input": NEEDS["input"]} if taught else NEEDS,
            fields=self._fields,
            more=self._more,
            names=names,
        )
        ids.add(example.id, row)
        label, llm_label = example.label, example.llm_label
        if example.rationales:
            rationale, rationales = example.rationale, example.rationales
            rationale = rationale or rationales[0].text
            if rationale not in (r.text for r in rationales):
                rationales = (Rationale(rationale, label=llm_label), *rationales)
            example = dataclasses.replace(example, rationale=rationale, rationales=rationales)
        defects: list[Defect] = []
        if example.choices and label and label not in example.choices:
            defects.append(defect("gold_not_a_choice", row.file, row.line, label))
        if example.choices and llm_label and llm_label not in example.choices:
            defects.append(defect("label_not_a_choice", row.file, row.line, llm_label))
        right = {}
        if llm_label and label:
            right = {"teacher_accuracy": text_match(llm_label, label)}
        return Row(example, tuple(defects), right)
