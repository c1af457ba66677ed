"""`prepare --paper-exact`: rows, labels and splits of the paper's published code."""

import json

import pytest

from stepdistill_jax.data import published_rules as rules
from stepdistill_jax.data.corpora import published
from stepdistill_jax.data.prepare import prepare
from stepdistill_jax.data.prepared import open_prepared
from stepdistill_jax.data.published_split import drawn_splits, train_test_split
from stepdistill_jax.errors import InputError


def write_lines(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_texts(folder, split, texts):
    (folder / "llm").mkdir(exist_ok=True)
    for i in (0, 1):
        half = texts[i * (len(texts) // 2) : (i + 1) * (len(texts) // 2)]
        (folder / "llm" / f"{split}_CoT_{i}.json").write_text(json.dumps(half))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Ducks. So the answer is (b) pond.\n\nQ: Where?", ("Ducks.", "pond")),
        ("Ducks. So the answer is (b) pond", ("Ducks.", "pond")),
        (" Ducks. So the answer is (a) lake or (d) pond.", (" Ducks.", "lake or")),
        ("Ducks. So the answer is pond.", ("Ducks.", " ")),
        ("Ducks. So the answer is (b)", ("Ducks.", " ")),
        ("Ducks. So the answer is (b).", ("Ducks.", "")),
        ("So the answer is (b) Pond..", ("", "Pond.")),
    ],
)  # fmt: skip
def test_the_rule_of_cqa_takes_the_text_after_the_letter(text, expected):
    assert rules.cqa(text) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Half. The answer is (84 / 2).\nQ: Next", ("Half.", "(84 / 2)")),
        ("Half. The answer is (2 * 3) * 4.", ("Half.", "(2 * 3)")),
        ("Half. The answer is (2 * 3) * (4 + 1).", ("Half.", "(2 * 3) * (4 + 1)")),
        ("Half. The answer is 42.", ("Half.", " ")),
        ("Half. The answer is (4. The answer is (5).", (" ", " ")),
        ("Half and", (" ", " ")),
    ],
)
def test_the_rule_of_svamp_takes_the_parentheses(text, expected):
    assert rules.svamp(text) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("A dog.\nAnswer: neutral\n\nPremise: B", ("A dog.", "neutral")),
        ("A dog.", ("A dog.", " ")),
        ("A dog.\nAnswer:neutral", ("A dog.", " ")),
        ("A dog.\nPremise: B\nAnswer: neutral", ("A dog.\nPremise: B", "neutral")),
        ("A dog. Answer: Neutral. ", ("A dog.", "Neutral.")),
    ],
)
def test_the_rule_of_esnli_takes_the_first_answer_anywhere(text, expected):
    assert rules.esnli(text) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("He was. So the answer is neutral.\n\nPremise: B", ("He was.", "neutral")),
        ("He was. So the answer is neutral", ("He was.", "neutra")),
        ("He was. So the answer is a. So the answer is b.", ("", "")),
        ("He was. The answer is neutral.", ("", "")),
    ],
)
def test_the_rule_of_anli_drops_the_last_character(text, expected):
    assert rules.anli(text) == expected


def test_gpt_neox_may_leave_out_the_answer():
    assert rules.cqa("\nDucks.", neox=True) == (" ", " ")
    with pytest.raises(ValueError):
        rules.cqa("\nDucks.")
    assert rules.cqa("\nDucks. So the answer is (a) x.", neox=True) == ("Ducks.", "x")
    assert rules.svamp("\nHalf. The answer is (1).", neox=True) == ("Half.", "(1)")
    assert rules.esnli("\nA dog.\nAnswer: x", neox=True) == ("A dog.", "x")
    assert rules.anli("\nHe. The answer is neutral.", neox=True) == ("He.", "neutral")


def test_a_split_is_that_of_hugging_face_datasets():
    """The first ceil(0.1 x 20) rows of `default_rng(0).permutation(20)` are the second part.

    Literal numbers, since NumPy may change the stream of a `Generator` (NEP 19).
    """
    train, test = train_test_split(20, 0.1, 0)
    assert test.tolist() == [4, 19]
    assert train.tolist() == [6, 2, 13, 16, 3, 11, 10, 8, 0, 12, 7, 5, 18, 17, 14, 9, 1, 15]
    assert len(train_test_split(9741, 0.1, 0)[1]) == 975  # 974.1, rounded up
    assert len(train_test_split(800, 0.1, 0)[1]) == 80


def test_a_share_is_drawn_before_validation():
    train, validation = drawn_splits(12, fraction=0.5, seed=7)
    own_file = drawn_splits(12, fraction=0.5, seed=7, validation=False)
    assert own_file[0].tolist() == [8, 7, 2, 5, 9, 11] and not len(own_file[1])
    assert train.tolist() == [2, 11, 9, 8, 7] and validation.tolist() == [5]


def cqa_rows(folder):
    for split in ("train", "test"):
        rows = [
            {"id": f"{split}-{i}", "question": f"Where {i}?", "choices": ["zoo", "pond", "barn"]}
            | {"answer": "pond", "abstractive_explanation": "not read"}
            for i in range(20)
        ]
        texts = [
            f" Why {i}. So the answer is (b) {'Pond' if i % 2 else 'pond'}." for i in range(20)
        ]
        write_lines(folder / "cqa" / f"cqa_{split}.json", rows)
        write_texts(folder / "cqa", split, texts)
    return folder / "cqa"


def test_cqa_is_prepared_in_the_order_of_the_published_split(tmp_path):
    source = cqa_rows(tmp_path)
    result = prepare("cqa", source=source, data_dir=tmp_path / "data", paper_exact=True)
    assert result["name"] == "cqa_paper"
    dataset = open_prepared("cqa_paper", tmp_path / "data")
    assert dataset.splits == {"train": 18, "validation": 2, "test": 20}
    train, validation = train_test_split(20, 0.1, 0)
    found = [e.id for split in ("train", "validation") for e in dataset.examples(split)]
    assert found == [f"train-{i}" for i in (*train, *validation)]
    first = next(dataset.examples("train"))
    assert (first.rationale, first.llm_label) == (
        f" Why {train[0]}.",
        "Pond" if train[0] % 2 else "pond",
    )
    assert not first.rationales  # people's explanations are not read
    assert (
        result["splits"]["test"]["teacher_accuracy"]
        == sum(e.llm_label == e.label for e in dataset.examples("test")) / 20
    )
    again = prepare("cqa", source=source, data_dir=tmp_path / "data", paper_exact=True)
    assert again["reused"]
    ours = prepare("cqa", source=source, data_dir=tmp_path / "data")
    assert ours["fingerprint"] != result["fingerprint"]


def test_a_text_that_stops_the_published_code_is_named(cqa_source):
    with pytest.raises(
        InputError, match=r"train_CoT_0\.json: item 4: the paper's published code cannot read"
    ):
        published.read("cqa", cqa_source).splits  # noqa: B018


def nli_source(folder, name="anli1", splits=("train", "valid", "test")):
    for split in splits:
        rows = [
            {
                "uid": f"u{i}",
                "premise": f"It rains {i}. ",
                "hypothesis": f" It is wet {i}.",
                "label": i % 3,
            }
            for i in range(8)
        ]
        write_lines(folder / name / f"{name}_{split}.json", rows)
        texts = [f"Rain {i}. So the answer is entailment." if i else "Rain and" for i in range(8)]
        write_texts(folder / name, split, texts)
    return folder / name


def test_the_two_texts_of_nli_stay_apart(tmp_path):
    prepare("anli", source=nli_source(tmp_path), data_dir=tmp_path / "data", paper_exact=True)
    dataset = open_prepared("anli_paper", tmp_path / "data")
    assert dataset.splits == {"train": 8, "validation": 8, "test": 8}
    first, second, *_ = dataset.examples("train")
    assert (first.input, first.input_pair) == ("It rains 0. ", " It is wet 0.")
    assert (first.label, first.llm_label, first.rationale) == ("entailment", "", "")
    assert (second.label, second.llm_label, second.rationale) == (
        "neutral",
        "entailment",
        "Rain 1.",
    )


def test_files_that_the_published_code_needs_are_named(tmp_path):
    source = nli_source(tmp_path, splits=("train", "test"))
    with pytest.raises(InputError, match=r"anli1_valid\.json: no such file, which the published"):
        published.read("anli", source)
    source = nli_source(tmp_path / "more", splits=("train", "valid"))
    (note,) = published.read("anli", source).notes
    assert note.endswith("anli1_test.json: no such file, so the split test is left out")
    (source / "llm" / "valid_CoT_0.json").unlink()
    (source / "llm" / "valid_CoT_1.json").unlink()
    with pytest.raises(InputError, match=r"llm/valid_CoT_0\.json: no such file"):
        published.read("anli", source)


def test_gpt_neox_is_read_from_its_own_folder(tmp_path):
    cqa_rows(tmp_path)
    (tmp_path / "gpt-neox" / "cqa").mkdir(parents=True)
    with pytest.raises(InputError, match=r"gpt-neox/cqa/train\.json: no such file"):
        published.read("cqa", tmp_path / "gpt-neox")
    texts = ["\nNeo. So the answer is (c) barn.\nQ: x", "lost", *[""] * 18]
    (tmp_path / "gpt-neox" / "cqa" / "train.json").write_text(json.dumps(texts))
    reading = published.read("cqa", tmp_path / "gpt-neox")
    rows = {
        row.example.id: row.example
        for split in ("train", "validation")
        for row in reading.splits[split]
    }
    assert (rows["train-0"].rationale, rows["train-0"].llm_label) == ("Neo.", "barn")
    assert (rows["train-1"].rationale, rows["train-1"].llm_label) == (" ", " ")
    assert reading.options["teacher"] == "GPT-NeoX"
    assert "../gpt-neox/cqa/train.json" in reading.sources


def add_asdiv(folder):
    rows = [
        {"Body": f"Body {i}.", "Question": "How many?", "Answer": f"{i} (apples)"} for i in range(4)
    ]
    write_lines(folder / "asdiv" / "asdiv_train.json", rows)
    write_texts(folder / "asdiv", "train", [f"So. The answer is ({i} + 0)." for i in range(4)])


def test_asdiv_is_svamp_and_asdiv_with_its_gold_answers(svamp_source):
    with pytest.raises(InputError, match=r"asdiv/asdiv_train\.json: no such file"):
        published.read("asdiv", svamp_source)
    add_asdiv(svamp_source.parent)
    splits = published.read("asdiv", svamp_source).splits
    assert {split: len(rows) for split, rows in splits.items()} == {
        "train": 14,
        "validation": 2,
        "test": 12,
    }
    found = {
        row.example.id: row.example for split in ("train", "validation") for row in splits[split]
    }
    assert (found["asdiv-3"].input, found["asdiv-3"].label) == ("Body 2.\nHow many?", "2")
    assert found["asdiv-3"].llm_label == "(2 + 0)"
    alone = published.read("svamp", svamp_source).splits
    assert len(alone["train"]) + len(alone["validation"]) == 12


@pytest.mark.parametrize(
    ("name", "more", "message"),
    [
        ("delivery", {}, r"`paper_exact`: .delivery. is not one of the paper.s datasets \(cqa, svamp, esnli, anli, asdiv\)"),
        ("jsonl", {"new_name": "mine"}, "`paper_exact`: .jsonl. is not one of the paper.s"),
        ("cqa", {"teacher": False}, "`paper_exact`: cannot be combined with `teacher=False`, since the published code needs the teacher's texts"),
        ("cqa", {"new_name": "cqa"}, "`new_name`: 'cqa' is reserved for `prepare cqa`"),
    ],
)  # fmt: skip
def test_bad_usage_is_one_line(tmp_path, name, more, message):
    with pytest.raises(InputError, match=message):
        prepare(name, source=tmp_path, data_dir=tmp_path / "data", paper_exact=True, **more)
    with pytest.raises(InputError, match="unknown dataset 'asdiv'"):
        prepare("asdiv", source=tmp_path, data_dir=tmp_path / "data")
    with pytest.raises(InputError, match="'cqa_paper' is reserved for `prepare cqa`"):
        prepare("jsonl", source=tmp_path, new_name="cqa_paper", data_dir=tmp_path / "data")


def test_the_papers_files_give_the_teacher_accuracy_of_its_code(paper_data):
    """`run.py --label_type llm` prints 77.23% and 74.00% for the test split."""
    for name, rows, right in (("cqa", 1221, 943), ("svamp", 200, 148)):
        test = published.read(name, paper_data / name).splits["test"]
        assert len(test) == rows
        assert sum(row.right["teacher_accuracy"] for row in test) == right
