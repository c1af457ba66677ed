"""Reads the paper's file layout: NAME_SPLIT.json has the rows, llm/SPLIT_CoT_I.json the teacher's texts.

The rows are JSON lines, and the texts are JSON lists. If NAME_SPLIT.json is missing for all splits, SPLIT.jsonl or
SPLIT.json is read instead: an export of the same corpus.
"""

import dataclasses
import itertools
import os
import pathlib
from collections.abc import Callable, Iterator

from stepdistill_jax.data.corpora.json_list import read_texts
from stepdistill_jax.data.defects import TEXT_LENGTH, Defect
from stepdistill_jax.data.example import Example, Rationale
from stepdistill_jax.data.rationale import Parsed
from stepdistill_jax.data.reading import (
    CheckedExample,
    Reading,
    absent_notes,
    split_of,
    tenth,
)
from stepdistill_jax.data.rows import JsonRow, UniqueIds, read_rows
from stepdistill_jax.errors import InputError
from stepdistill_jax.runtime.files import check_file
from stepdistill_jax.runtime.fingerprints import sha256

FILE_SPLITS = {"train": "train", "valid": "validation", "test": "test"}
EXPORT_STEMS = {  # of SPLIT.jsonl, or .json; the last are Hugging Face's names for ANLI's rounds
    "train": ("train", "train_r1"),
    "validation": ("validation", "valid", "dev", "dev_r1"),
    "test": ("test", "test_r1"),
}
TEACHER, HUMAN = "llm", "human"  # sources of rationales


@dataclasses.dataclass(frozen=True)
class TeacherText:
    """A completion by the teacher.

    Attributes:
        text: the raw completion.
        file: name of the file within the source.
        row: 1-based index in the file.
    """

    text: str
    file: str
    row: int


Completion = TeacherText | None  # None without a teacher
# checks a row and its teacher text; returns None for a row without a gold label, which is left out
ToRow = Callable[[JsonRow, Completion, UniqueIds], CheckedExample | None]


def read(
    name: str,
    version: int,
    metric: str,
    source: pathlib.Path,
    *,
    teacher: bool,
    to_row: ToRow,
    prefix: str | None = None,
) -> Reading:
    """Finds the files of all splits, and reads each row with its teacher text.

    With `teacher`, the first split found must have teacher texts. Other splits may lack them.

    Args:
        source: see `input_files`.
        prefix: prefix of the file names, such as `cqa` for cqa_train.json; None means `name`.

    Raises:
        InputError: required files are missing. Iterating over the rows raises InputError if a file is not valid
            JSON, or if the numbers of rows and of teacher texts differ.
    """
    prefix = prefix or name
    source, inputs = input_files(source, prefix, name)
    sources: dict[str, str] = {}
    paths = {split: source / f"{prefix}_{part}.json" for part, split in FILE_SPLITS.items()}
    notes = absent_notes(paths, inputs)
    teachers: dict[str, list[pathlib.Path]] = {}
    for part, split in FILE_SPLITS.items():
        if (path := inputs.get(split)) is None:
            continue
        if teacher:
            teachers[split] = teacher_files(source, part, required=split == next(iter(inputs)))
            if not teachers[split]:
                notes.append(
                    f"{source / 'llm' / part}_CoT_0.json: no such file, so the split {split} has"
                    " labels only"
                )
        for file in (*teachers.get(split, ()), path):
            sources[str(file.relative_to(source))] = digest_of(file)
    if not teacher:
        notes.append("no teacher texts were read, so rows have no teacher rationale")

    def rows() -> Iterator[tuple[str, CheckedExample]]:
        for split, path in inputs.items():
            for row in file_rows(source, path, teachers.get(split), to_row, notes):
                yield split_of(tenth(row.example.id), split, inputs), row

    return Reading(name, version, metric, rows, sources, {"teacher": teacher}, notes)


def digest_of(path: pathlib.Path) -> str:
    """Returns the digest of a file. Raises InputError if the path is not a regular file."""
    check_file(path, "a JSON file")
    return sha256(path)


def file_rows(
    source: pathlib.Path,
    path: pathlib.Path,
    teachers: list[pathlib.Path] | None,
    to_row: ToRow,
    notes: list[str],
) -> Iterator[CheckedExample]:
    """Yields the checked rows of one file, each with its teacher text if there is one."""
    ids, absent = UniqueIds(), 0
    for row, completion in paired(source, path, teachers):
        found = to_row(row, completion, ids)
        if found is None:
            absent += 1
        else:
            yield dataclasses.replace(found, file=row.file, line=row.line)
    note = f"{path}: {absent} rows without a gold label are left out"
    if absent and note not in notes:
        notes.append(note)


def judged(
    example: Example,
    completion: Completion,
    parse: Callable[[str], Parsed],
    *,
    right: Callable[[str], bool],
    defects: tuple = (),
    by_text: bool = False,
    human: tuple[str, ...] = (),
) -> CheckedExample:
    """Adds the teacher's text and people's explanations to `example`, and judges the teacher's answer.

    Args:
        right: function that returns whether an answer is the gold label.
        by_text: whether to judge `Parsed.answer_text`, too.
        human: people's explanations of the gold label.
    """
    explained = tuple(Rationale(text, HUMAN, example.label) for text in human)
    if completion is None:
        return CheckedExample(dataclasses.replace(example, rationales=explained), defects)
    parsed = parse(completion.text)
    label = parsed.repaired.strip()
    if explained and parsed.rationale:
        explained = (Rationale(parsed.rationale, TEACHER, label), *explained)
    judgement: dict[str, bool] = {}
    if example.label:
        judgement["teacher_accuracy"] = right(parsed.answer)
        if by_text:
            judgement["teacher_accuracy_by_text"] = right(parsed.answer_text)
        judgement["teacher_accuracy_repaired"] = right(parsed.repaired)
    return CheckedExample(
        dataclasses.replace(
            example, rationale=parsed.rationale, llm_label=label, rationales=explained
        ),
        (*defects, *(_defect_of(kind, parsed, completion) for kind in parsed.problems)),
        judgement,
    )


def _defect_of(kind: str, parsed: Parsed, completion: TeacherText) -> Defect:
    """Returns a `Defect` of a teacher's text.

    `Defect.text` contains the wrong equations for `arithmetic_wrong`, the end of the teacher's text for
    `truncated`, and the teacher's text for other kinds.
    """
    text = completion.text
    if kind == "arithmetic_wrong":
        text = "; ".join(parsed.wrong_sums)
    elif kind == "truncated" and len(text) > TEXT_LENGTH:
        text = "…" + text[1 - TEXT_LENGTH :]
    return Defect(kind, completion.file, completion.row, text)


def teacher_files(source: pathlib.Path, part: str, *, required: bool = True) -> list[pathlib.Path]:
    """Returns the paths of llm/PART_CoT_0.json, _1, ...; [] if there are none and `required` is False.

    Raises:
        InputError: required files are missing, or the indices in the file names have a gap.
    """
    files = []
    for i in itertools.count():
        path = source / "llm" / f"{part}_CoT_{i}.json"
        if not path.exists():
            break
        files.append(path)
    beyond = set((source / "llm").glob(f"{part}_CoT_*.json")) - set(files)
    if beyond:
        raise InputError(
            f"{source / 'llm' / f'{part}_CoT_{len(files)}.json'}: no such file, but"
            f" {min(beyond).name} is there: the numbers in the file names must have no gap"
        )
    if not files and required:
        raise InputError(
            f"{source / 'llm' / f'{part}_CoT_0.json'}: no such file; to prepare labels"
            " without teacher texts, pass `teacher=False`"
        )
    return files


def input_files(
    source: pathlib.Path, prefix: str, name: str
) -> tuple[pathlib.Path, dict[str, pathlib.Path]]:
    """Returns the folder of a dataset's files, and {split: file}.

    The files are the paper's or, if there are none, exports such as `train.jsonl` (see `EXPORT_STEMS`).

    Args:
        source: the folder of the files, or its parent if the folder is called `prefix` or `name`.

    Raises:
        InputError: none of the files is found.
    """
    if not os.path.isdir(source):  # pathlib's `is_dir` raises for a name that is too long
        raise InputError(f"`source` {source}: no such folder")
    papers = {split: [f"{prefix}_{part}.json"] for part, split in FILE_SPLITS.items()}
    exports = {
        split: [f"{stem}{suffix}" for stem in stems for suffix in (".jsonl", ".json")]
        for split, stems in EXPORT_STEMS.items()
    }
    folders = dict.fromkeys((source, source / prefix, source / name))
    for layout, folder in itertools.product((papers, exports), folders):
        files = {
            split: path
            for split, names in layout.items()
            if (path := next(filter(pathlib.Path.exists, map(folder.joinpath, names)), None))
        }
        if files:
            return folder, files
    raise InputError(
        f"`source` {source}: found no {prefix}_train.json or {prefix}_test.json (the paper's files), and no"
        " train.jsonl (an export)"
    )


def paired(
    source: pathlib.Path, path: pathlib.Path, teachers: list[pathlib.Path] | None
) -> Iterator[tuple[JsonRow, Completion]]:
    """Yields each row with its teacher text.

    Args:
        source: folder to which `TeacherText.file` is relative.
        teachers: files that together have one text for each row, in order. Without files, all texts are None.

    Raises:
        InputError: the counts of rows and texts differ.
    """
    rows = read_rows(path)
    if not teachers:
        yield from ((row, None) for row in rows)
        return
    texts = (
        TeacherText(text, name, i)
        for file, name in [(file, os.path.relpath(file, source)) for file in teachers]
        for i, text in enumerate(read_texts(file), 1)
    )
    pairs = itertools.zip_longest(rows, texts)
    for count, (row, completion) in enumerate(pairs):
        if row and completion:
            yield row, completion
            continue
        total = count + 1 + sum(1 for _ in pairs)
        if row:
            wrong = (
                f"{row.where}: no teacher text for this row: there are {total} rows, but {count}"
            )
        else:
            assert completion
            place = f"{source / completion.file}: item {completion.row}"
            wrong = f"{place} belongs to no row: there are {count} rows, but {total}"
        raise InputError(f"{wrong} teacher texts in {_span(teachers)}")


def _span(files: list[pathlib.Path]) -> str:
    names = dict.fromkeys((files[0].name, files[-1].name))
    return f"{files[0].parent}/ ({' to '.join(names)})"
