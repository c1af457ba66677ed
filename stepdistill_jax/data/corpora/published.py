"""Reads the paper's files as its published code does: `prepare(NAME, paper_exact=True)`."""

import dataclasses
import itertools
import os
import pathlib
from collections.abc import Callable, Iterator

from stepdistill_jax.data import published_rules as rules
from stepdistill_jax.data.corpora import nli, paper_layout, svamp
from stepdistill_jax.data.corpora.cqa import question_with_choices
from stepdistill_jax.data.example import INPUT_PAIR, Example
from stepdistill_jax.data.published_split import drawn_splits
from stepdistill_jax.data.reading import CheckedExample, Reading, absent_notes
from stepdistill_jax.data.rows import JsonRow, UniqueIds
from stepdistill_jax.data.text_metrics import value_match
from stepdistill_jax.errors import InputError

VERSION = 1
NEOX = "gpt-neox"  # folder of GPT-NeoX's texts: gpt-neox/NAME/SPLIT.json, next to the datasets' folders
ASDIV = svamp.EXTRA  # in the published code, the dataset of that name also has SVAMP's rows


def _cqa(row: JsonRow, ids: UniqueIds) -> Example:
    choices = row.texts("choices")
    written = tuple(map(str, row.fields.get("choices") or ()))
    question = question_with_choices(row.text("question", strip=False), written)
    return Example(ids.of(row), question, row.text("answer", strip=False), choices=choices)


def _svamp(row: JsonRow, ids: UniqueIds) -> Example:
    return Example(ids.of(row, "ID"), svamp.question(row), row.text("label", strip=False))


def _asdiv(row: JsonRow, _: UniqueIds) -> Example:
    answer = row.text("Answer", strip=False).split(" ")[0]  # `9 (apples)`
    return Example(f"{ASDIV}-{row.number}", svamp.question(row), answer)


def _nli(row: JsonRow, ids: UniqueIds) -> Example:
    if not (label := nli.gold(row)):
        raise InputError(
            f"{row.where}: the row has no gold label, which the published code requires"
        )
    premise, hypothesis = (row.text(name, strip=False) for name in ("premise", "hypothesis"))
    return Example(ids.of(row, "uid"), premise, label, more={INPUT_PAIR: hypothesis})


@dataclasses.dataclass(frozen=True)
class _Corpus:
    """How the published code reads one dataset.

    Attributes:
        prefix: start of the file names, and name of the dataset's folder in `gpt-neox`.
        drawn: whether validation is drawn from train.
    """

    to_example: Callable[[JsonRow, UniqueIds], Example]
    rule: Callable[..., tuple[str, str]]
    prefix: str
    drawn: bool


_CORPORA = {
    "cqa": _Corpus(_cqa, rules.cqa, "cqa", True),
    "svamp": _Corpus(_svamp, rules.svamp, "svamp", True),
    "esnli": _Corpus(_nli, rules.esnli, "esnli", False),
    "anli": _Corpus(_nli, rules.anli, "anli1", False),
    ASDIV: _Corpus(_svamp, rules.svamp, "svamp", True),
}


def read(name: str, source: pathlib.Path) -> Reading:
    """Reads a dataset's files and the teacher's texts without repairs or stripping.

    For e-SNLI and ANLI, `input` is the premise, and `input_pair` the hypothesis. The other datasets draw
    validation from train.

    Args:
        name: one of `prepared.PUBLISHED`.
        source: see `paper_layout.input_files`. The folder `gpt-neox` gives GPT-NeoX's texts instead of PaLM's.

    Raises:
        InputError: a required file is missing. Also raised during iteration, for the reasons that
            `paper_layout.read` lists, or if the published code could not parse a teacher's text.
    """
    corpus, neox = _CORPORA[name], source.name == NEOX
    notes: list[str] = []
    of_split = _files(name, source, notes)
    more = [_asdiv_file(of_split["train"].folder, neox)] if name == ASDIV else []
    sources = {
        os.path.relpath(path, file.folder): paper_layout.digest_of(path)
        for file in (*of_split.values(), *more)
        for path in (*file.teachers, file.path)
    }

    def rows() -> Iterator[tuple[str, CheckedExample]]:
        train = itertools.chain(*(file.rows() for file in (of_split["train"], *more)))
        if corpus.drawn:
            found = list(train)
            parts = zip(("train", "validation"), drawn_splits(len(found)), strict=True)
            yield from ((split, found[i]) for split, numbers in parts for i in numbers)
        else:
            yield from (("train", row) for row in train)
        for split in [split for split in of_split if split != "train"]:
            yield from ((split, row) for row in of_split[split].rows())

    options: dict[str, object] = {
        "paper_exact": True,
        "validation": "drawn" if corpus.drawn else "file",
        "teacher": "GPT-NeoX" if neox else "PaLM",
    }
    fields = (INPUT_PAIR,) if corpus.to_example is _nli else ()
    if fields:
        options["fields"] = list(fields)
    metric = "value_match" if corpus.rule is rules.svamp else "text_match"
    return Reading(name, VERSION, metric, rows, sources, options, notes, fields)


@dataclasses.dataclass(frozen=True)
class _File:
    """The rows of one file, with their teacher texts. Names of teacher files are relative to `folder`."""

    folder: pathlib.Path
    path: pathlib.Path
    corpus: _Corpus
    teachers: list[pathlib.Path]
    neox: bool = False

    def rows(self) -> Iterator[CheckedExample]:
        """Yields the rows in order."""
        ids = UniqueIds()
        for row, completion in paper_layout.paired(self.folder, self.path, self.teachers):
            example = self.corpus.to_example(row, ids)
            if completion is None:
                yield CheckedExample(example, file=row.file, line=row.line)
                continue
            try:
                rationale, label = self.corpus.rule(completion.text, neox=self.neox)
            except ValueError:
                raise InputError(
                    f"{self.folder / completion.file}: item {completion.row}: the paper's published code cannot"
                    " read a label from this text, which does not have exactly one answer; leave out `paper_exact`"
                ) from None
            example = dataclasses.replace(example, rationale=rationale, llm_label=label)
            equal = value_match if self.corpus.rule is rules.svamp else str.__eq__
            right = {"teacher_accuracy": equal(label, example.label)}
            yield CheckedExample(example, right=right, file=row.file, line=row.line)


def _files(name: str, source: pathlib.Path, notes: list[str]) -> dict[str, _File]:
    """Returns {split: file}. The split `validation` is left out if the published code reads no file for it."""
    corpus, neox = _CORPORA[name], source.name == NEOX
    folder, inputs = paper_layout.input_files(
        source.parent if neox else source, corpus.prefix, name
    )
    needed = ("train",) if corpus.drawn else ("train", "validation")
    if corpus.drawn and (path := inputs.pop("validation", None)):
        notes.append(f"{path}: not read, since the published code draws validation from train")
    found = {}
    for part, split in paper_layout.FILE_SPLITS.items():
        path = folder / f"{corpus.prefix}_{part}.json"
        if split in inputs:
            teachers = _teachers(source if neox else folder, corpus, part, split in needed)
            found[split] = _File(folder, inputs[split], corpus, teachers, neox)
        elif split in needed:
            raise InputError(f"{path}: no such file, which the published code requires")
        elif split == "test":
            notes += absent_notes({split: path}, inputs)
    return found


def _teachers(
    folder: pathlib.Path, corpus: _Corpus, part: str, required: bool
) -> list[pathlib.Path]:
    """Returns the files with the teacher's texts. The teacher is GPT-NeoX for a folder `gpt-neox`, otherwise PaLM."""
    if folder.name != NEOX:
        return paper_layout.teacher_files(folder, part, required=required)
    path = folder / corpus.prefix / f"{part}.json"
    if path.exists():
        return [path]
    if required:
        raise InputError(f"{path}: no such file; GPT-NeoX's texts are expected there")
    return []


def _asdiv_file(folder: pathlib.Path, neox: bool) -> _File:
    if neox:
        raise InputError(
            f"`source`: {NEOX} has no texts for {ASDIV}; for PaLM's texts, pass the folder that contains {NEOX}"
        )
    found = svamp.extra_folder(folder, folder)
    if found is None:
        raise InputError(
            f"{folder.resolve().parent / ASDIV / f'{ASDIV}_train.json'}: no such file; ASDiv's rows"
            " are expected next to SVAMP's folder"
        )
    corpus = dataclasses.replace(_CORPORA[ASDIV], to_example=_asdiv)
    teachers = paper_layout.teacher_files(found, "train")
    return _File(folder, found / f"{ASDIV}_train.json", corpus, teachers)
