"""Makes word problems (question, solution, answer) with the package `reasoning-gym`.

Its templates follow GSM-Symbolic (Mirzadeh et al. 2024, arXiv 2410.05229): fixed sentences with varying names
and numbers.
"""

import hashlib
import importlib.metadata
import pathlib
import random
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from stepdistill_jax.data import arithmetic
from stepdistill_jax.data.defects import Defect
from stepdistill_jax.data.example import Example
from stepdistill_jax.data.reading import UNSEEN, CheckedExample, Reading, tenth
from stepdistill_jax.data.written_sums import wrong_sums
from stepdistill_jax.errors import InputError, how_to_install
from stepdistill_jax.runtime.checks import whole
from stepdistill_jax.runtime.fingerprints import hash64, sha256

VERSION = 2
PACKAGE = "reasoning-gym"
SITE = "https://github.com/open-thought/reasoning-gym"
ROWS = 20_000  # of train, by default
HELD_OUT_ROWS = {"test": 1000, UNSEEN: 500, "validation": 500}  # for any number of train rows
UNSEEN_TEMPLATES = 10
MAX_REPEATS = 500  # after this many draws in a row without a new question, a template is exhausted
ANSWER = "####"  # before the answer, on a solution's last line

_Template = Callable[[random.Random, float], dict[str, Any]]
_POINT_ZERO = re.compile(r"(?<![\d.])(\d+)\.0+(?![\d.])")
_NUMBER = re.compile(r"-?\d+(?:\.\d+)?")
_UNROUNDED = re.compile(r"\d\.\d{6,}")
_LIST_MARK = re.compile(r"^(?:\d+\.|[-•])\s+")


def read(
    *,
    rows: int | None = None,
    seed: int | None = None,
    held_out_rows: Mapping[str, int] = HELD_OUT_ROWS,
) -> Reading:
    """Makes `rows` examples for train, 500 for validation, 1,000 for test and 500 for unseen.

    Ten templates are used only in `unseen`. The other splits share templates, but with different numbers. No
    question occurs twice. Only train depends on `rows`.

    The id `t17-3` means template 17 of the package, third example of the split.

    Args:
        rows: number of train rows; None means 20,000.
        seed: seed of all names and numbers; None means 0.
        held_out_rows: {split: number of its rows}, without train. A missing split is not made.

    Raises:
        InputError: the package is not installed, or `rows` or `seed` is out of range. Iterating over the rows
            also raises it, if the templates give too few different questions.
    """
    rows = whole("rows", ROWS if rows is None else rows, 1)
    seed = whole("seed", 0 if seed is None else seed, 0)
    templates, version, folder = _templates()
    held_out = set(sorted(templates, key=lambda k: hash64(f"template {k}"))[:UNSEEN_TEMPLATES])
    counts = {**held_out_rows, "train": rows}
    notes = [
        f"made by {PACKAGE} {version} ({SITE}; licence: Apache-2.0) after GSM-Symbolic (arXiv 2410.05229)",
        f"templates {', '.join(map(str, sorted(held_out)))} are only in the split {UNSEEN}",
    ]

    def each() -> Iterator[tuple[str, CheckedExample]]:
        seen: set[bytes] = set()
        for split, count in counts.items():
            chosen = {k: t for k, t in templates.items() if (k in held_out) == (split == UNSEEN)}
            made = dict.fromkeys(chosen, 0)
            drawn = _draws(chosen, split, count, f"{seed} {split}", seen)
            for number, (template, draw) in enumerate(drawn, 1):
                made[template] += 1
                yield split, _checked(draw, f"t{template}-{number}", number)
            notes.extend(note for note in _used_up(split, made) if note not in notes)

    return Reading(
        "gsm_symbolic",
        VERSION,
        "text_match",
        each,
        sources={
            path.relative_to(folder).as_posix(): sha256(path)
            for path in sorted(folder.glob("*.py"))
        },
        options={"rows": rows, "seed": seed, "package": f"{PACKAGE} {version}"},
        notes=notes,
    )


def _templates() -> tuple[dict[int, _Template], str, pathlib.Path]:
    """Returns {index: template} of the templates that work, the package's version, and the folder of its code."""
    try:
        from reasoning_gym.arithmetic.gsm_symbolic import gsm_symbolic  # imports the whole package
    except ImportError as error:
        raise InputError(
            f"prepare gsm_symbolic: the package {PACKAGE} makes its rows and cannot be imported ({error});"
            f" {how_to_install('gsm')}"
        ) from None
    config = gsm_symbolic.GSMSymbolicDatasetConfig(seed=0, size=1)
    generators = gsm_symbolic.GSMSymbolicDataset(config).generators
    found = {number: generators[number] for number in gsm_symbolic.tasks_ok}
    return found, importlib.metadata.version(PACKAGE), pathlib.Path(gsm_symbolic.__file__).parent


def split_of_numbers(template: int, question: str) -> str:
    """Returns the split of a question, which depends only on its template and numbers.

    About a tenth of each template's combinations of numbers belong to test, and a tenth to validation.
    """
    numbers = " ".join(re.findall(r"\d+", question))
    return {0: "test", 1: "validation"}.get(tenth(f"{template}: {numbers}"), "train")


def _used_up(split: str, made: Mapping[int, int]) -> list[str]:
    """Returns a list with one note on the templates that ran out of questions, or []."""
    most = max(made.values(), default=0)
    fewer = [f"{template} ({count})" for template, count in made.items() if count < most - 1]
    if not fewer:
        return []
    return [
        f"{split}: templates that ran out of questions, with their row counts: {', '.join(fewer)};"
        f" the other templates have up to {most} rows each"
    ]


def _draws(
    templates: dict[int, _Template], split: str, count: int, seed: str, seen: set[bytes]
) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yields `count` pairs (template index, row), cycling through the templates that still have new questions.

    Adds the digest of each question to `seen`.
    """
    left, made = dict(templates), 0
    streams = {k: random.Random(f"{seed} {k}") for k in templates}
    while made < count:
        if not left:
            raise InputError(
                f"`rows`: expected at most {made}, got {count}: the templates cannot make"
                " more distinct questions"
            )
        for number, template in list(left.items()):
            for _ in range(MAX_REPEATS):
                draw = template(streams[number], 1.0)  # difficulty; the package has no other
                question = draw["question"]
                key = hashlib.blake2b(question.encode(), digest_size=16).digest()
                is_own = split == UNSEEN or split_of_numbers(number, question) == split
                if is_own and key not in seen:
                    break
            else:
                del left[number]
                continue
            seen.add(key)
            yield number, draw
            made += 1
            if made == count:
                return


def _checked(draw: dict[str, Any], example_id: str, number: int) -> CheckedExample:
    """Returns a row with its solution cleaned, and the defects of the row.

    The question leaves out reasoning-gym's instruction to chat models ("Give the result as your final
    answer. ...").
    """
    given, solution = draw["answer"], draw["metadata"]["answer_cot"]
    label = _short(given)
    text, mark, last = solution.rpartition(ANSWER)
    text = text if mark else solution
    rationale = _prose(text)
    found = _NUMBER.findall(rationale.replace(",", ""))
    problems = []
    if not rationale:
        problems.append(("no_rationale", solution))
    if not mark or not _same(last, label):
        problems.append(("no_answer_line", solution[-60:]))
    if _POINT_ZERO.search(f"{given} {solution}"):
        problems.append(("point_zero", given))
    if unrounded := _UNROUNDED.search(f"{draw['question']} {given} {solution}"):
        start = max(0, unrounded.start() - 20)
        problems.append(("unrounded", unrounded.string[start : unrounded.end() + 20]))
    if rationale and not (found and _same(found[-1], label)):
        problems.append(("ends_elsewhere", f"{rationale[-60:]} ({label})"))
    problems += [("arithmetic_wrong", sums) for sums in wrong_sums(rationale)]
    defects = tuple(Defect(kind, "", number, text) for kind, text in problems)
    return CheckedExample(Example(example_id, draw["question"], label, rationale), defects)


def _short(text: str) -> str:
    """Returns `text` with whole numbers such as `36.0` written as `36`.

    Example: `_short("26.0 - 4 = 22.0")` is "26 - 4 = 22"; `0.5` and `12.00.3` are left unchanged.
    """
    return _POINT_ZERO.sub(r"\1", text.strip())


def _prose(text: str) -> str:
    r"""Returns the lines of a solution as sentences, without headings and list marks.

    Example: `_prose("1. Cost:\n   - 2 x 3 = 6")` is "2 x 3 = 6.".
    """
    lines = [_LIST_MARK.sub("", line.strip()) for line in _short(text).splitlines()]
    kept = [line for line in lines if line and not line.endswith(":")]
    return " ".join(line if line[-1] in ".!?" else f"{line}." for line in kept)


def _same(left: str, right: str) -> bool:
    """Returns whether two numbers are equal, ignoring currency signs and commas between thousands."""
    a, b = (
        arithmetic.evaluate(text.strip().strip("$€£").replace(",", "")) for text in (left, right)
    )
    return a is not None and b is not None and arithmetic.equal(a, b)
