"""Rows and ids as the code published with the paper makes them, read from the paper's files.

An oracle: written from the behaviour of google-research/distilling-step-by-step at ef94426 (`run.py`,
`data_utils.py`, with the versions of its README) and nothing of this package. Its quirks are kept.
"""

import dataclasses
import json
import math
import pathlib
import re
from collections.abc import Callable, Sequence

import numpy as np

END = "</s>"
# what the public code's parser gives for a text that it cannot read
UNREAD = " "
NLI_LABELS = ("entailment", "neutral", "contradiction")
INPUT_LENGTH, TARGET_LENGTH = 1024, 256


@dataclasses.dataclass(frozen=True)
class Row:
    """A question with its gold label, and what was read from the teacher's text on it."""

    input: str
    label: str
    llm_label: str
    rationale: str


def _before(text: str, mark: str) -> str:
    return text.partition(mark)[0].rstrip()


def _around(text: str, mark: str) -> tuple[str, str] | None:
    """Text before and after `mark`; None unless it holds `mark` once."""
    before, _, after = text.partition(mark)
    return (before.rstrip(), after) if text.count(mark) == 1 else None


def cqa_teacher(text: str) -> tuple[str, str]:
    """Rationale and label of a text on CommonsenseQA: `... So the answer is (c) wooded area.`"""
    parts = _around(_before(text, "Q:"), "So the answer is")
    if parts is None:  # the public code has no answer either: it stops
        raise ValueError(f"no or several answers in {text!r}")
    rationale, answer = parts
    letters = list(re.finditer(r"\(.\)", answer))
    if not letters:
        return rationale, UNREAD
    until = letters[1].start() if len(letters) > 1 else len(answer)
    label = answer[letters[0].end() : until].strip()
    # a full stop alone is read as an empty label, no text at all is not read
    return rationale, label.removesuffix(".") if label else UNREAD


def svamp_teacher(text: str) -> tuple[str, str]:
    """Rationale and label of a text on SVAMP: `... The answer is (84 / 2).`"""
    parts = _around(_before(text, "Q:"), "The answer is")
    if parts is None:
        return UNREAD, UNREAD
    rationale, answer = parts
    for line in answer.split("\n"):
        opened, closed = line.find("("), line.rfind(")")
        if 0 <= opened < closed:
            return rationale, line[opened : closed + 1]
    return rationale, UNREAD


def esnli_teacher(text: str) -> tuple[str, str]:
    """Rationale and label of a text on e-SNLI: `... Answer: neutral`, then a next `Premise: `."""
    answers = text.split("Answer: ")
    label = _before(answers[1], "Premise") if len(answers) > 1 else UNREAD
    return _before(text, "Answer:"), label


def anli_teacher(text: str) -> tuple[str, str]:
    """Rationale and label of a text on ANLI: `... So the answer is neutral.`"""
    parts = _around(_before(text, "Premise:"), "So the answer is")
    if parts is None:
        return "", ""
    rationale, answer = parts
    return rationale, answer.lstrip()[:-1]  # the last character, a full stop or not


def _json_lines(path: pathlib.Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def _rows(
    folder: pathlib.Path,
    split: str,
    files: int,
    question: Callable[[dict], tuple[str, str]],
    teacher: Callable[[str], tuple[str, str]],
) -> list[Row]:
    texts = []
    for number in range(files):
        path = folder / "llm" / f"{split}_CoT_{number}.json"
        texts += json.loads(path.read_text("utf-8"))
    fields = _json_lines(folder / f"{folder.name}_{split}.json")
    rows = []
    for row, text in zip(fields, texts, strict=True):
        (asked, label), (rationale, llm_label) = question(row), teacher(text)
        rows.append(Row(input=asked, label=label, llm_label=llm_label, rationale=rationale))
    return rows


def _cqa_question(row: dict) -> tuple[str, str]:
    choices = [f"({letter}) {text}" for letter, text in zip("abcde", row["choices"], strict=True)]
    return "\n".join([row["question"], "Answer Choices:", *choices]), row["answer"]


def _svamp_question(row: dict) -> tuple[str, str]:
    return row["input"], row["label"]


def _nli_question(row: dict) -> tuple[str, str]:
    return END.join([row["premise"], row["hypothesis"]]), NLI_LABELS[row["label"]]


def hold_out(rows: Sequence, share: float, seed: int) -> tuple[list, list]:
    """What `train_test_split(test_size=share, seed=seed)` of `datasets` leaves and holds out."""
    drawn = np.random.default_rng(seed).permutation(len(rows))
    held = math.ceil(share * len(rows))
    return [rows[i] for i in drawn[held:]], [rows[i] for i in drawn[:held]]


def read(folder: pathlib.Path, *, fraction: float = 1.0, run: int = 0) -> dict[str, list[Row]]:
    """The splits of `folder`, whose name says which of the four datasets it holds.

    `fraction` and `run` are `--subsample` and `--run`: drawn before validation is held out.
    """
    question, teacher, files = {
        "cqa": (_cqa_question, cqa_teacher, {"train": 10, "test": 2}),
        "svamp": (_svamp_question, svamp_teacher, {"train": 2, "test": 1}),
        "esnli": (_nli_question, esnli_teacher, {"train": 100, "valid": 2, "test": 2}),
        "anli1": (_nli_question, anli_teacher, {"train": 4, "valid": 1, "test": 1}),
    }[folder.name]
    splits = {
        # hand-made folders have fewer files
        split: _rows(folder, split, len(_files(folder, split)[:number]), question, teacher)
        for split, number in files.items()
    }
    if fraction < 1:
        splits["train"], _ = hold_out(splits["train"], 1.0 - fraction, run)
    if "valid" not in splits:
        splits["train"], splits["valid"] = hold_out(splits["train"], 0.1, 0)
    return splits


def _files(folder: pathlib.Path, split: str) -> list[pathlib.Path]:
    return list((folder / "llm").glob(f"{split}_CoT_*.json"))


def encode(pieces, text: str, max_length: int) -> list[int]:
    """Ids of `text` as a T5 tokenizer gives them: `</s>` in it is its id, and it ends in `</s>`.

    `pieces` is a `sentencepiece.SentencePieceProcessor`.
    """
    first, *rest = (pieces.encode(part) for part in text.split(END))
    ids = list(first)
    for part in rest:
        ids += [pieces.eos_id(), *part]
    return [*ids[: max_length - 1], pieces.eos_id()]


def columns(
    pieces, row: Row, *, model_type: str = "task_prefix", label_type: str = "gt"
) -> tuple[list[int], ...]:
    """`input_ids`, `labels` and, of `task_prefix`, `expl_input_ids` and `aux_labels` of a row.

    `label_type` is for train: the other splits keep the gold label whatever it is.
    """
    label = row.label if label_type == "gt" else row.llm_label
    labels = encode(pieces, label, TARGET_LENGTH)
    if model_type == "standard":
        return encode(pieces, row.input, INPUT_LENGTH), labels
    return (
        encode(pieces, "predict: " + row.input, INPUT_LENGTH),
        labels,
        encode(pieces, "explain: " + row.input, INPUT_LENGTH),
        encode(pieces, row.rationale, TARGET_LENGTH),
    )
