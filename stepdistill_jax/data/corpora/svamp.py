"""Reads SVAMP with PaLM rationales, in the paper's layout; answers are equations, compared by value.

ASDiv's questions, if found, become a split that has only the teacher's labels.
"""

import dataclasses
import pathlib
from collections.abc import Iterator

from stepdistill_jax.data import arithmetic
from stepdistill_jax.data.corpora import paper_layout
from stepdistill_jax.data.defects import Defect
from stepdistill_jax.data.example import Example
from stepdistill_jax.data.rationale import parse_equation
from stepdistill_jax.data.reading import UNLABELLED, CheckedExample, Reading
from stepdistill_jax.data.rows import BadRow, JsonRow, UniqueIds
from stepdistill_jax.data.text_metrics import value_match
from stepdistill_jax.errors import InputError

VERSION = 2
EXTRA = "asdiv"


def read(source: pathlib.Path, *, teacher: bool = True) -> Reading:
    """Reads svamp_{train,valid,test}.json and llm/; see `paper_layout.read`.

    A row is {"input", "label"} in the paper's files, and {"ID", "Body", "Question", "Equation"} in others.

    The questions in asdiv/asdiv_train.json (see `extra_folder`) become the split `unlabelled`. The teacher's texts
    for this split are read from asdiv/llm/.
    """
    reading = paper_layout.read(
        "svamp", VERSION, "value_match", source, teacher=teacher, to_row=_row
    )
    own_folder, _ = paper_layout.input_files(source, "svamp", "svamp")
    folder = extra_folder(own_folder, source)
    if folder is None:
        expected = own_folder.resolve().parent / EXTRA / f"{EXTRA}_train.json"
        reading.notes.append(
            f"{expected}: no such file, so there is no split {UNLABELLED} (ASDiv's questions)"
        )
        return reading
    path = folder / f"{EXTRA}_train.json"
    teachers = paper_layout.teacher_files(folder, "train") if teacher else []
    digests = {
        f"{EXTRA}/{f.relative_to(folder)}": paper_layout.digest_of(f) for f in (path, *teachers)
    }
    reading.sources.update(digests)
    reading.notes.append(
        f"{path}: its rows become the split {UNLABELLED}, with the teacher's labels in place of gold labels"
    )
    own_rows = reading.rows

    def rows() -> Iterator[tuple[str, CheckedExample | BadRow]]:
        yield from own_rows()
        extra = paper_layout.file_rows(folder, path, teachers, _extra_row, reading.notes)
        yield from ((UNLABELLED, row) for row in extra)

    return dataclasses.replace(reading, rows=rows)


def extra_folder(folder: pathlib.Path, source: pathlib.Path) -> pathlib.Path | None:
    """Returns the folder `asdiv` with ASDiv's rows, which is inside `folder` or next to it; None if there is none.

    Args:
        folder: folder of SVAMP's files.
        source: the folder that the user named, which is `folder` or its parent.

    Raises:
        InputError: ASDiv's rows are directly in `folder` or `source`; they must be in a folder `asdiv`.
    """
    name = f"{EXTRA}_train.json"
    for found in (folder / EXTRA, folder.resolve().parent / EXTRA):
        if (found / name).exists():
            return found
    for misplaced in dict.fromkeys((folder, source)):
        if (misplaced / name).exists():
            right = misplaced / EXTRA
            raise InputError(
                f"{misplaced / name}: ASDiv's teacher files have the same names as SVAMP's; move this file"
                f" to {right / name}, and ASDiv's teacher files to {right / 'llm'}/"
            )
    return None


def _row(row: JsonRow, completion: paper_layout.Completion, ids: UniqueIds) -> CheckedExample:
    label = row.text("Equation" if "Equation" in row.fields else "label")
    defects: tuple[Defect, ...] = ()
    if arithmetic.evaluate(label) is None:
        defects = (Defect("gold_has_no_value", row.file, row.line, label),)
    return _judged(Example(ids.of(row, "ID"), question(row), label), completion, defects)


def _extra_row(row: JsonRow, completion: paper_layout.Completion, _: UniqueIds) -> CheckedExample:
    """Returns the example of an ASDiv row. It has no label, even if the row has one."""
    return _judged(Example(f"{EXTRA}-{row.number}", question(row)), completion)


def question(row: JsonRow) -> str:
    """Returns the input: the field `input`, or the fields `Body` and `Question` on separate lines."""
    if "Body" not in row.fields:
        return row.text("input", strip=False)
    # joined as in the paper's files
    return "\n".join(row.text(name, strip=False) for name in ("Body", "Question"))


def _judged(
    example: Example, completion: paper_layout.Completion, defects: tuple[Defect, ...] = ()
) -> CheckedExample:
    return paper_layout.judged(
        example,
        completion,
        parse_equation,
        right=lambda answer: value_match(answer, example.label),
        defects=defects,
    )
