"""Reads the user's own rows: JSON lines, CSV, TSV, or lists of dicts."""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence

from stepdistill_jax.data.corpora.row_sources import RowSource, Source, find_sources
from stepdistill_jax.data.csv_rows import is_csv
from stepdistill_jax.data.defects import Defect
from stepdistill_jax.data.example import FIELDS, INPUT_PAIR, Rationale
from stepdistill_jax.data.objectives import FIELD_NAME
from stepdistill_jax.data.reading import (
    SPLITS,
    CheckedExample,
    Reading,
    split_of,
    tenth,
)
from stepdistill_jax.data.rows import (
    MOST_NAMES,
    BadRow,
    JsonRow,
    UniqueIds,
    check_field_map,
    read_example,
)
from stepdistill_jax.data.text_metrics import text_match
from stepdistill_jax.errors import InputError, nearest, printable

VERSION = 2
PROVENANCE = "provenance"  # field that `annotate` adds to each row
TEACHER_FIELDS = ("rationale", "rationales", "llm_label")
RATIONALE_FIELDS = ("text", "source", "label")
NEEDS = {name: f"; `field_map` {name}=FIELD names the field to use" for name in ("input", "label")}


def read(
    source: Source,
    *,
    field_map: Mapping[str, str] | None = None,
    more: Sequence[str] = (),
    teacher: bool = True,
) -> Reading:
    """Reads a file, the files of a folder (one for each split), or lists of dicts.

    Files with the suffix .csv or .tsv are tables, and all others JSON lines. Each row needs a `label` or an
    `llm_label`. Training uses `rationale`, or else the first of `rationales`.

    A hash of the id splits a single file or list: 80 % train, 10 % validation, 10 % test. Without a validation
    split, a tenth of train becomes validation.

    Args:
        source: file or folder, a list of dicts, or {split: list of dicts}.
        field_map: {name in Example: name in the source}, e.g. {"input": "question"}.
        more: names of further text fields to keep. Rows may lack these fields.
        teacher: whether to keep rationales and the teacher's labels.

    Raises:
        InputError: a file is missing, or `more` or `field_map` has an invalid name. Reading the rows raises it if a
            field named in `more` or `field_map` is in no row, or if a file has no good row.
    """
    field_map = dict(field_map or {})
    more = _check_more(more)
    check_field_map(field_map, (*FIELDS, *more))
    names = {name: field_map.get(name, name) for name in (*FIELDS, *more)}
    notes: list[str] = []
    sources, cut = find_sources(source, notes, [names["weight"]])
    fields = [name for name in FIELDS if teacher or name not in TEACHER_FIELDS]
    return Reading(
        "jsonl",
        VERSION,
        "text_match",
        lambda: _Rows(sources, cut, field_map, names, fields, more, notes).read(),
        {file.key: file.digest for file in sources.values()},
        {
            "field_map": field_map,
            "teacher": teacher,
            "cut": cut,
            **({"fields": list(more)} if more else {}),
        },
        notes,
        more,
    )


class _Rows:
    """Reads all rows once, and adds notes about them to `notes`."""

    def __init__(
        self,
        sources: Mapping[str, RowSource],
        cut: bool,
        field_map: Mapping[str, str],
        names: Mapping[str, str],
        fields: Sequence[str],
        more: Sequence[str],
        notes: list[str],
    ):
        self._sources, self._cut, self._map, self._names = sources, cut, field_map, names
        self._fields, self._more, self._notes = fields, more, notes
        self._answers = [names[name] for name in ("label", "llm_label") if name in fields]
        self._seen: dict[str, None] = {}  # names of fields, in order of appearance
        self._having = dict.fromkeys(more, 0)
        self._good = 0
        self._unanswered: list[str] = []

    def read(self) -> Iterator[tuple[str, CheckedExample | BadRow]]:
        """Yields (split, row). If ids decide the split, as in a single file, a bad row has the split ""."""
        found: set[str] = set()
        for split, file in self._sources.items():
            for checked in self._of(file):
                if isinstance(checked, BadRow):
                    yield "" if self._cut else split, checked
                    continue
                number = tenth(checked.example.id)
                target = split_of(number, split, self._sources)
                if self._cut:
                    target = {0: "validation", 1: "test"}.get(number, "train")
                found.add(target)
                yield target, checked
        self._check_mapped()
        self._add_notes(found)

    def _of(self, file: RowSource) -> Iterator[CheckedExample | BadRow]:
        """Yields the rows of a file. Raises InputError if the file has no good row."""
        ids = UniqueIds()
        first_bad, bad, before = None, 0, self._good + len(self._unanswered)
        for row in file.rows():
            checked = row if isinstance(row, BadRow) else self._checked(row, ids)
            if isinstance(checked, BadRow):
                first_bad, bad = first_bad or checked, bad + 1
            if checked is not None:
                yield checked
        if self._good + len(self._unanswered) > before:
            return
        if first_bad is None:
            raise InputError(f"{file.name}: no rows in it")
        # a mistyped field in `field_map` makes every row bad: name it instead of the first row
        self._check_mapped()
        header = "; its first line names the columns" if is_csv(file.name) else ""
        none = f"; none of its {bad:,} rows can be used" if bad > 1 else ""
        raise InputError(f"{first_bad}{header}{none}")

    def _checked(self, row: JsonRow, ids: UniqueIds) -> CheckedExample | BadRow | None:
        """Returns a row's example, or a `BadRow` if the row cannot be used.

        Returns None if `annotate` wrote the row without an answer.
        """
        self._seen |= dict.fromkeys(row.fields)
        # `annotate` leaves a row without an answer unchanged
        if PROVENANCE in row.fields and not any(map(row.fields.get, self._answers)):
            self._unanswered.append(row.where)
            return None
        try:
            checked = _checked(row, self._fields, self._more, self._names)
            ids.add(checked.example.id, row)
        except InputError as error:
            return BadRow.of(row, error)
        self._good += 1
        for name in checked.example.more:
            self._having[name] += 1
        return checked

    def _check_mapped(self) -> None:
        for name, theirs in self._map.items():
            if theirs not in self._seen:
                found = printable(", ".join([*map(str, self._seen)][:MOST_NAMES]))
                raise InputError(
                    f"`field_map` {name}={theirs}: no row of {self._name} has a field {theirs!r}"
                    f" (found: {found or 'none'}){nearest(theirs, map(str, self._seen))}"
                )

    def _add_notes(self, found: set[str]) -> None:
        """Adds notes about fields, splits and omitted rows. Call this method after the last row.

        Raises:
            InputError: a field in `more` is empty in every row.
        """
        unread = {str(name) for name in self._seen} - {*self._names.values(), PROVENANCE}
        not_read = printable(", ".join(sorted(unread)))
        added = [f"fields that were not read: {not_read}"] if unread else []
        expected = SPLITS if self._cut else ("train", "validation")
        added += [
            f"the split {split} is left out: rows are split by their ids, and this split got none"
            for split in (expected if "train" in self._sources else ())
            if split not in found
        ]
        if self._unanswered:
            added.append(
                f"{len(self._unanswered)} rows have no label and no answer from the teacher; they are left"
                f" out, the first at {self._unanswered[0]}"
            )
        added += [
            f"the field {name} is in {n} of {self._good} rows" for name, n in self._having.items()
        ]
        if absent := next((name for name, n in self._having.items() if not n), None):
            theirs = self._names[absent]
            raise InputError(
                f"`fields` {absent}: no row of {self._name} has a text in the field {theirs!r}"
                f" (fields that were not read: {not_read or 'none'}){nearest(theirs, unread)}"
            )
        # the rows may be read again, but a note appears once
        self._notes.extend(note for note in added if note not in self._notes)

    @property
    def _name(self) -> str:
        return " or ".join(file.name for file in self._sources.values())


def _check_more(more: Sequence[str]) -> tuple[str, ...]:
    for name in more:
        if not FIELD_NAME.fullmatch(name):
            raise InputError(
                f"`fields` {name}: expected a name in lower_snake_case; to read a field with another"
                f" name, pass `fields` my_name and `field_map` my_name={name}"
            )
        if name in (*FIELDS, PROVENANCE, INPUT_PAIR):
            raise InputError(f"`fields` {name}: this name is reserved; choose a different one")
    if len(set(more)) < len(more):
        raise InputError(f"`fields` {','.join(more)}: list each name once")
    return tuple(more)


def _checked(
    row: JsonRow, fields: Sequence[str], more: Sequence[str], names: Mapping[str, str]
) -> CheckedExample:
    for one in row.objects(names["rationales"]) if "rationales" in fields else ():
        if unknown := sorted(one.fields.keys() - set(RATIONALE_FIELDS)):
            raise InputError(
                f"{one.where}: unknown field {unknown[0]!r} (known: {', '.join(RATIONALE_FIELDS)})"
            )
    # LABEL_SOURCE=llm trains on rows that only the teacher has labelled
    taught = "llm_label" in fields and row.optional_text(names["llm_label"])
    # a field that the user has mapped needs no hint to map it
    needs = {name: hint if names[name] == name else "" for name, hint in NEEDS.items()}
    if taught:
        del needs["label"]
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
    given = row.fields.get(names["label"])
    if isinstance(given, str) and given.strip() != given:
        defects += (Defect("blanks_around_label", row.file, row.line, given),)
    right = {"teacher_accuracy": text_match(llm_label, label)} if llm_label and label else {}
    return CheckedExample(example, defects, right, row.file, row.line)
