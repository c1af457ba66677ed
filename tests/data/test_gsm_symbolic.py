"""`prepare gsm_symbolic` with a stub of the package `reasoning-gym`, and with the package if installed."""

import collections
import hashlib
import importlib.util
import itertools
import json
import pathlib
import re
import subprocess
import sys

import pytest

from stepdistill_jax.data.corpora import gsm_symbolic
from stepdistill_jax.data.prepare import prepare
from stepdistill_jax.data.prepared import open_prepared
from stepdistill_jax.errors import InputError

# Template k asks for a + b + k. 30 has only three questions; 31 to 35 have the forms of the real
# package's solutions; 41 has 40 numbers and many names.
STUB = """
tasks_ok = [*range(12), 30, 31, 32, 33, 34, 35, 41]

class GSMSymbolicDatasetConfig:
    def __init__(self, seed, size): pass

def template(k):
    def draw(rng, difficulty):
        assert difficulty == 1.0
        a, b = rng.randint(1, 3) if k == 30 else rng.randint(1, 10**6), rng.randint(1, 10**6)
        if k == 30:
            b = 0
        name = "Ann"
        if k == 41:
            a, b, name = rng.randint(1, 40), 0, "".join(rng.choices("AEINS", k=5))
        total, kind = a + b + k, k
        answer, end = str(total), f"#### {total}"
        solution = f"First {a} + {b} + {k} = {total}"
        if kind == 31:
            solution = f"Let's solve this step by step:\\n\\n1. Sum:\\n   - {a} + {b} + {k} = {total}\\n   \\u2022 So {total} in all\\n"
        if kind == 32:
            answer, solution, end = f"{total}.0", f"It is {total}.0 eggs", f"#### {total}.0"
        if kind == 33:
            solution, end = f"{a} + 1 = {a + 2}. So it is ${total:,} of 12 boxes.", "#### 0"
        if kind == 34:
            end = ""
        if kind == 35:
            solution = f"Of 0.3333333333333333 {solution}"
        question = f"Template {k}: {name} has {a} and {b}."
        return {"question": question, "answer": answer, "metadata": {"answer_cot": solution + "\\n" + end}}
    return draw

class GSMSymbolicDataset:
    def __init__(self, config): self.generators = {k: template(k) for k in [*tasks_ok, 99]}
"""
DIGEST = "0de464333d15ecca657107deffdfa66c269803dc85f2698ab73d31818d5f010b"
ODD = {30, 31, 32, 33, 34, 35, 41}


@pytest.fixture
def package(tmp_path, monkeypatch):
    """Installs a package `reasoning_gym` 0.1.25 with the stub's templates."""
    for name in [m for m in sys.modules if m.partition(".")[0] == "reasoning_gym"]:
        monkeypatch.delitem(sys.modules, name)
    folder = tmp_path / "site"
    code = folder / "reasoning_gym" / "arithmetic" / "gsm_symbolic"
    code.mkdir(parents=True)
    for parent in (code, code.parent, code.parent.parent):
        (parent / "__init__.py").touch()
    (code / "gsm_symbolic.py").write_text(STUB)
    about = folder / "reasoning_gym-0.1.25.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: reasoning_gym\nVersion: 0.1.25\n")
    monkeypatch.syspath_prepend(folder)
    yield
    for name in [m for m in sys.modules if m.partition(".")[0] == "reasoning_gym"]:
        del sys.modules[name]


def examples(reading):
    found = collections.defaultdict(list)
    for split, row in reading.rows():
        found[split].append(row.example)
    return found


def template_of(example):
    return int(re.match(r"Template (\d+):", example.input)[1])


def test_templates_of_unseen_are_in_no_other_split_and_no_question_stands_twice(package):
    splits = examples(gsm_symbolic.read(rows=300))
    assert {split: len(rows) for split, rows in splits.items()} == {
        "test": 1000, "unseen": 500, "validation": 500, "train": 300,
    }  # fmt: skip
    everything = [e for rows in splits.values() for e in rows]
    assert len({e.input for e in everything}) == len(everything)
    kinds = {split: {template_of(e) for e in rows} for split, rows in splits.items()}
    assert len(kinds["unseen"]) == 10 and len(kinds["test"]) == 9
    for split in ("train", "validation", "test"):
        assert not kinds[split] & kinds["unseen"]
    assert kinds["train"] | kinds["test"] | kinds["unseen"] == {*range(12), *ODD}
    for rows in splits.values():
        assert len({e.id for e in rows}) == len(rows)
        assert all(e.id.startswith(f"t{template_of(e)}-") for e in rows)


def test_no_two_splits_have_one_template_with_the_same_numbers(package):
    """With the same numbers, training would have seen the question and its solution."""
    first, other = (examples(gsm_symbolic.read(rows=1000, seed=seed)) for seed in range(2))
    numbers = {
        split: {(template_of(e), *re.findall(r"\d+", e.input)) for e in first[split] + other[split]}
        for split in ("train", "validation", "test")
    }
    for one, two in itertools.combinations(numbers.values(), 2):
        assert not one & two
    few = [sum(key[0] == 41 for key in keys) for keys in numbers.values()]
    assert sum(few) == 40 and few[0] >= 25 and min(few) >= 1


def test_rows_and_seed_say_all_and_more_rows_change_no_other_split(package):
    first, again = (examples(gsm_symbolic.read(rows=50, seed=3)) for _ in range(2))
    assert first == again
    more = examples(gsm_symbolic.read(rows=80, seed=3))
    assert more["train"][:50] == first["train"]
    assert all(more[split] == first[split] for split in ("validation", "test", "unseen"))
    other = examples(gsm_symbolic.read(rows=50, seed=4))
    same = [
        {e.input for rows in of.values() for e in rows if template_of(e) != 41}
        for of in (first, other)
    ]
    assert {template_of(e) for e in other["unseen"]} == {template_of(e) for e in first["unseen"]}
    assert len(same[0] & same[1]) <= 3, (
        "template 30 has three questions; the others are drawn again"
    )


def test_solutions_are_cleaned_and_their_defects_named(package):
    found = {}
    for _, row in gsm_symbolic.read(rows=10).rows():
        found[template_of(row.example)] = row
    kinds = {k: sorted(d.kind for d in row.defects) for k, row in found.items()}
    assert kinds == {k: [] for k in [*range(12), 30, 31, 41]} | {
        32: ["point_zero"],
        33: ["arithmetic_wrong", "ends_elsewhere", "no_answer_line"],
        34: ["no_answer_line"],
        35: ["unrounded"],
    }
    for k, row in found.items():
        example = row.example
        a, b = map(int, re.findall(r"\d+", example.input)[1:])
        total = a + b + k
        assert example.label == str(total)
        assert example.rationale == {
            31: f"{a} + {b} + {k} = {total}. So {total} in all.",
            32: f"It is {total} eggs.",
            33: f"{a} + 1 = {a + 2}. So it is ${total:,} of 12 boxes.",
            35: f"Of 0.3333333333333333 First {a} + {b} + {k} = {total}.",
        }.get(k, f"First {a} + {b} + {k} = {total}.")
        assert all(d.where == f"row {example.id.partition('-')[2]}" for d in row.defects)


def test_templates_without_further_questions_leave_their_turns_to_others(package, monkeypatch):
    splits = examples(gsm_symbolic.read(rows=400))
    asked = [e.input for rows in splits.values() for e in rows if template_of(e) == 30]
    assert len(asked) == 3
    templates, *rest = gsm_symbolic._templates()
    monkeypatch.setattr(gsm_symbolic, "_templates", lambda: ({30: templates[30]}, *rest))
    with pytest.raises(
        InputError, match=r"`rows`: expected at most 0, got 1000: .* distinct questions"
    ):
        examples(gsm_symbolic.read(rows=4))


def test_what_is_missing_or_cannot_be_is_said(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)
    with pytest.raises(
        InputError,
        match=r"reasoning-gym .* run pip install -c constraints\.txt -e '\.\[gsm\]' in the source folder",
    ):
        prepare("gsm_symbolic", data_dir=tmp_path)
    with pytest.raises(InputError, match="`rows`"):
        prepare("gsm_symbolic", rows=0, data_dir=tmp_path)
    with pytest.raises(InputError, match="`seed`: only `prepare gsm_symbolic`"):
        prepare("delivery", seed=1, data_dir=tmp_path)
    for name in ("gsm_symbolic", "delivery"):
        with pytest.raises(InputError, match="leave `source` out"):
            prepare(name, source=tmp_path, data_dir=tmp_path)
    with pytest.raises(
        InputError,
        match=r"`field_map`: `prepare gsm_symbolic` cannot map fields; only `prepare jsonl` can",
    ):
        prepare("gsm_symbolic", field_map={"input": "question"}, data_dir=tmp_path)
    with pytest.raises(InputError, match="`fields`: only `prepare jsonl`"):
        prepare("gsm_symbolic", fields=["question"], data_dir=tmp_path)
    assert not any(tmp_path.iterdir())


@pytest.mark.slow
def test_prepared_it_names_its_source_and_licence_and_is_the_same_byte_for_byte(package, tmp_path):
    made = [prepare("gsm_symbolic", rows=200, data_dir=tmp_path / str(i)) for i in range(2)]
    assert made[0]["splits"].keys() == {"train", "validation", "test", "unseen"}
    folders = [tmp_path / str(i) / "gsm_symbolic" for i in range(2)]
    for name in ("train.jsonl", "unseen.jsonl", "spiece.model", "dataset.json", "defects.jsonl"):
        assert (folders[0] / name).read_bytes() == (folders[1] / name).read_bytes(), name
    about = json.loads((folders[0] / "dataset.json").read_text())
    assert about["options"] == {"rows": 200, "seed": 0, "package": "reasoning-gym 0.1.25"}
    assert "open-thought/reasoning-gym" in about["notes"][0]
    assert "Apache-2.0" in about["notes"][0]
    assert about["sources"].keys() == {"__init__.py", "gsm_symbolic.py"}


needs_package = pytest.mark.skipif(
    importlib.util.find_spec("reasoning_gym") is None, reason="the extra [gsm] is not installed"
)


@needs_package
def test_rows_of_the_real_package():
    """Version 0.1.25. If the rows change, check templates and defects, then update the digest."""
    reading = gsm_symbolic.read(rows=2000)
    assert (
        "templates 3, 5, 19, 28, 29, 42, 53, 55, 62, 85 are only in the split unseen"
        in reading.notes
    )
    if reading.options["package"] != "reasoning-gym 0.1.25":
        pytest.skip(f"the digest is of 0.1.25, not {reading.options['package']}")
    rows = list(reading.rows())
    named = collections.defaultdict(set)
    for _, row in rows:
        assert row.example.rationale and row.example.label.lstrip("-").replace(".", "").isdigit()
        for defect in row.defects:
            named[defect.kind].add(row.example.id.partition("-")[0])
    assert named["ends_elsewhere"] == {"t46"} and "no_answer_line" not in named
    assert {"t25", "t27", "t84", "t89"} <= named["point_zero"]
    assert named["unrounded"] == {"t46", "t52", "t66"}
    assert "t2" in named["arithmetic_wrong"] and not {"t36", "t69"} & named["arithmetic_wrong"]
    text = "".join(json.dumps(row.example.to_json()) + "\n" for _, row in rows)
    assert hashlib.sha256(text.encode()).hexdigest() == DIGEST


@needs_package
@pytest.mark.slow
def test_the_short_rows_of_the_experiment_are_tested_on_numbers_that_training_does_not_see(
    tmp_path,
):
    script = pathlib.Path(__file__).parents[2] / "benchmarks/claim_gsm.py"
    flags = ["--prepare-only", "--data-dir", tmp_path / "data", "--workdir", tmp_path / "runs"]
    subprocess.run([sys.executable, script, *flags], check=True)
    dataset = open_prepared("gsm_short", tmp_path / "data")
    rows = {split: list(dataset.examples(split)) for split in dataset.splits}
    assert len(rows["test"]) > 800 and len(rows["validation"]) > 500 and len(rows["train"]) > 10_000
    seen = {numbers_of(e) for e in rows["train"]}
    held_out = collections.Counter(map(numbers_of, rows["test"] + rows["validation"]))
    assert not held_out.keys() & seen and max(held_out.values()) == 4
    assert all(len(e.input.split()) <= 50 for of in rows.values() for e in of)
    texts = " ".join(f"{e.input} {e.rationale} {e.label}" for of in rows.values() for e in of)
    assert max(map(int, re.findall(r"\d+", texts))) == 50
    assert not re.search(r"[$€£]|\d[-+*/=x÷]|[-+*/=x÷]\d", texts.replace("-page", " page"))
    (origin,) = json.loads(dataset.file("train").with_name("dataset.json").read_text())["notes"][:1]
    assert "reasoning-gym" in origin and "Apache-2.0" in origin and "2410.05229" in origin
    assert not (tmp_path / "runs").exists()


def numbers_of(example):
    return (example.id.partition("-")[0], *re.findall(r"\d+(?:[.,]\d+)*", example.input))
