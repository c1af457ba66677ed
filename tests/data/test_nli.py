"""The e-SNLI and ANLI readers and parsers, on hand-made rows with every defect, and on exports."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stepdistill_jax.data.corpora import anli, esnli
from stepdistill_jax.data.defects import KINDS
from stepdistill_jax.data.example import Rationale
from stepdistill_jax.data.nli_rationale import LABELS, parse_anli, parse_esnli
from stepdistill_jax.data.prepare import prepare
from stepdistill_jax.data.prepared import open_prepared
from stepdistill_jax.errors import InputError

# (premise, hypothesis, label, explanations, teacher text): every defect once or more
ESNLI = [
    ("A dog runs.", "An animal runs.", 0, ["A dog is an animal.", "Dogs are animals."],
     "A dog is an animal.\nAnswer: entailment\n\nPremise: A cat"),
    ("A dog runs.", "A dog hunts.", 1, [], "It may only play. Answer: Neutral."),
    ("A dog runs.", "A dog sleeps.", 2, ["It cannot do both.", "", "It runs."], "Answer: contradiction"),
    ("A man eats.", "A man sits.", 1, [], "He may stand. Answer: neutral Answer: entailment"),
    ("A man eats.", "A man drinks.", 1, [], "He may drink. Answer: neutral or contradiction."),
    ("A man eats.", "Nobody eats.", 2, [], "A man is some"),
    ("A man eats.", "He is full.", 1, [], "  "),
    ("A man eats.", "He is old.", 1, [], "We cannot know.\n\nPremise: A man.\nAnswer: neutral"),
    ("A man eats.", "A person eats.", 0, [], "A man is a person. Answer: entail"),
]  # fmt: skip
ANLI = [
    ("u1", "Ann was born in 1950.", "Ann is young.", 2, "1950 is long ago.",
     "She is over 70. So the answer is contradiction.\n\nPremise: Bob"),
    ("u2", "Ann was born in 1950.", "Ann lives.", 1, "", "It is not said. So the answer is neutral"),
    ("u3", "Ann was born in 1950.", "Ann was born.", 0, "", "So the answer is entailment."),
    ("u4", "Ann paints.", "Ann is rich.", 1, "", "So the answer is neutral. So the answer is neutral."),
    ("u5", "Ann paints.", "Ann sings.", 1, "", "It is not said. So the answer is not entailment."),
    ("u6", "Ann paints.", "Ann never paints.", 2, "", "She does paint, so"),
    ("u7", "Ann paints.", "Ann is.", 0, "", "Premise: Bob is."),
    ("u8", "Ann paints.", "Ann eats.", 1, "", "People eat. So the answer is neut"),
]  # fmt: skip


def write_lines(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_texts(folder, split, texts, size=5):
    (folder / "llm").mkdir(exist_ok=True)
    for i in range(0, len(texts), size):
        path = folder / "llm" / f"{split}_CoT_{i // size}.json"
        path.write_text(json.dumps(texts[i : i + size]))


def esnli_rows():
    return [
        {"premise": p, "hypothesis": h, "label": y}
        | {f"explanation_{i + 1}": text for i, text in enumerate(explained)}
        for p, h, y, explained, _ in ESNLI
    ]


def anli_rows():
    names = ("uid", "premise", "hypothesis", "label", "reason")
    return [dict(zip(names, row, strict=False)) for row in ANLI]


@pytest.fixture
def esnli_source(tmp_path):
    """Writes train and valid with teacher texts; valid has one row, and there is no test."""
    folder = tmp_path / "esnli"
    for split, count in (("train", len(ESNLI)), ("valid", 1)):
        write_lines(folder / f"esnli_{split}.json", esnli_rows()[:count])
        write_texts(folder, split, [row[-1] for row in ESNLI[:count]])
    return folder


@pytest.fixture
def anli_source(tmp_path):
    """Writes train and test with teacher texts, and valid without."""
    folder = tmp_path / "anli1"
    for split in ("train", "test"):
        write_lines(folder / f"anli1_{split}.json", anli_rows())
        write_texts(folder, split, [row[-1] for row in ANLI])
    write_lines(folder / "anli1_valid.json", anli_rows()[:2])
    return folder


@pytest.mark.parametrize(
    ("text", "rationale", "answer", "repaired", "problems"),
    [
        ("R.\nAnswer: neutral\n\nPremise: A", "R.", "neutral", "neutral", ("runs_on",)),
        # the label ends at the next premise, wherever it stands
        ("R. Answer: neutral\nPremise: A", "R.", "neutral", "neutral", ("runs_on",)),
        ("R. Answer: neutral Premise: A. Answer: entailment", "R.", "neutral", "neutral", ("runs_on",)),
        ("R. Answer: neutral", "R.", "neutral", "neutral", ()),
        ("R. Answer: Neutral.", "R.", "Neutral.", "neutral", ("label_not_a_choice",)),
        ("R. Answer:neutral", "R.", "", "neutral", ("label_not_a_choice",)),
        ("R. Answer: it is neutral.", "R.", "it is neutral.", "neutral", ("label_not_a_choice",)),
        ("R. Answer: not neutral.", "R.", "not neutral.", "", ("label_not_a_choice",)),
        ("R. Answer: it isn't neutral.", "R.", "it isn't neutral.", "", ("label_not_a_choice",)),
        ("R. Answer: neutral or entailment.", "R.", "neutral or entailment.", "", ("label_not_a_choice",)),
        ("R. Answer: neutral, entailment.", "R.", "neutral, entailment.", "", ("label_not_a_choice",)),
        ("R. Answer: neutrality.", "R.", "neutrality.", "", ("label_not_a_choice",)),
        ("R. Answer: entail", "R.", "entail", "", ("label_not_a_choice", "truncated")),
        ("R. Answer:", "R.", "", "", ("label_not_a_choice", "truncated")),
        ("R. Answer: neutral Answer: entailment", "R.", "neutral ".strip(), "neutral", ("several_answers",)),
        ("Answer: neutral", "", "neutral", "neutral", ("no_rationale",)),
        ("R. and", "", "", "", ("no_answer", "truncated")),
        ("R.", "", "", "", ("no_answer",)),
        (" ", "", "", "", ("empty",)),
        # the published rule takes the invented pair's answer
        ("R.\nPremise: A.\nAnswer: neutral", "", "neutral", "", ("runs_on", "no_answer")),
        ("Premise: A.\nAnswer: neutral", "", "neutral", "", ("runs_on", "empty")),
    ],
)  # fmt: skip
def test_each_way_of_failing_on_esnli_has_a_name(text, rationale, answer, repaired, problems):
    parsed = parse_esnli(text)
    assert (parsed.rationale, parsed.answer, parsed.repaired) == (rationale, answer, repaired)
    assert parsed.problems == problems


@pytest.mark.parametrize(
    ("text", "rationale", "answer", "repaired", "problems"),
    [
        ("R. So the answer is neutral.\n\nPremise: A", "R.", "neutral", "neutral", ("runs_on",)),
        ("R. So the answer is neutral.", "R.", "neutral", "neutral", ()),
        # the published rule drops the last character, whatever it is
        ("R. So the answer is neutral", "R.", "neutra", "neutral", ("label_not_a_choice",)),
        ("R. So the answer is Neutral.", "R.", "Neutral", "neutral", ("label_not_a_choice",)),
        ("R. So the answer is neut", "R.", "neu", "", ("label_not_a_choice", "truncated")),
        ("R. So the answer is neither.", "R.", "neither", "", ("label_not_a_choice",)),
        ("So the answer is neutral.", "", "neutral", "neutral", ("no_rationale",)),
        ("R. So the answer is neutral. So the answer is entailment.", "R.", "", "neutral", ("several_answers",)),
        ("R. and", "", "", "", ("no_answer", "truncated")),
        ("", "", "", "", ("empty",)),
        ("Premise: A. So the answer is neutral.", "", "", "", ("runs_on", "empty")),
    ],
)  # fmt: skip
def test_each_way_of_failing_on_anli_has_a_name(text, rationale, answer, repaired, problems):
    parsed = parse_anli(text)
    assert (parsed.rationale, parsed.answer, parsed.repaired) == (rationale, answer, repaired)
    assert parsed.problems == problems


pieces = st.lists(
    st.sampled_from(["Answer:", "Premise:", "So the answer is", " neutral", "entailment", ".", "\n", " not ", " x ", "Premise"]),
    max_size=12,
).map("".join)  # fmt: skip


@given(st.one_of(pieces, st.text()))
def test_any_text_is_parsed_into_a_label_and_parts_of_itself(text):
    for parse in (parse_esnli, parse_anli):
        parsed = parse(text)
        assert parsed.rationale in text and parsed.answer in text
        assert parsed.repaired in ("", *LABELS)
        assert "\nPremise:" not in parsed.rationale
        assert not parsed.repaired or parsed.repaired in text.casefold()
        assert set(parsed.problems) <= set(KINDS)


def test_a_pair_is_read_with_its_explanations(esnli_source):
    example = esnli.read(esnli_source).splits["train"][0].example
    assert (example.id, example.label, example.llm_label) == ("1", "entailment", "entailment")
    assert example.input == "premise: A dog runs. hypothesis: An animal runs."
    assert example.rationale == "A dog is an animal."
    assert example.rationales == (
        Rationale("A dog is an animal.", "llm", "entailment"),
        Rationale("A dog is an animal.", "human", "entailment"),
        Rationale("Dogs are animals.", "human", "entailment"),
    )


def test_esnli_is_prepared_with_exact_counts(esnli_source, tmp_path):
    result = prepare("esnli", source=esnli_source, data_dir=tmp_path / "data")
    assert list(result["splits"]) == ["train", "validation"]
    train = result["splits"]["train"]
    # right as published: 1, 3, 4, and 8 by the invented pair's answer; 2 once repaired, 8 no more
    assert (train["rows"], train["with_rationale"]) == (9, 5)
    assert (train["teacher_accuracy"], train["teacher_accuracy_repaired"]) == (4 / 9, 4 / 9)
    assert train["teacher_accuracy_by_text"] is None
    assert train["defects"] == {
        "label_not_a_choice": 3,  # 2, 5, 9
        "runs_on": 2,  # 1, 8
        "truncated": 2,  # 6, 9
        "no_answer": 2,  # 6, 8
        "no_rationale": 1,
        "several_answers": 1,
        "empty": 1,
    }
    assert train["first_defects"]["truncated"] == "llm/train_CoT_1.json:1"
    assert any("esnli_test.json: no such file, so the split test" in n for n in result["notes"])
    dataset = open_prepared("esnli", tmp_path / "data")
    assert dataset.labels == ("contradiction", "entailment", "neutral")
    assert [len(e.rationales) for e in dataset.examples("train")] == [3, 0, 2, 0, 0, 0, 0, 0, 0]


def test_anli_is_prepared_with_exact_counts(anli_source, tmp_path):
    result = prepare("anli", source=anli_source, data_dir=tmp_path / "data")
    figures = result["splits"]
    assert {s: f["rows"] for s, f in figures.items()} == {"train": 8, "validation": 2, "test": 8}
    for split in ("train", "test"):
        assert figures[split]["with_rationale"] == 4
        assert figures[split]["teacher_accuracy"] == 2 / 8  # u1, u3
        assert figures[split]["teacher_accuracy_repaired"] == 4 / 8  # u2, and u4's first answer
        assert figures[split]["defects"] == {
            "label_not_a_choice": 3,  # u2, u5, u8
            "no_rationale": 2,  # u3, u4
            "runs_on": 2,  # u1, u7
            "truncated": 2,  # u6, u8
            "several_answers": 1,
            "no_answer": 1,
            "empty": 1,
        }
    # a split without teacher texts is prepared without them, and a note says so
    assert figures["validation"]["teacher_accuracy"] is None
    assert any(
        "valid_CoT_0.json: no such file, so the split validation" in n for n in result["notes"]
    )
    ids = [e.id for e in open_prepared("anli", tmp_path / "data").examples("train")]
    assert ids == [f"u{i}" for i in range(1, 9)]


def test_without_train_texts_it_must_be_said(anli_source):
    for path in anli_source.glob("llm/train*"):
        path.unlink()
    with pytest.raises(InputError, match=r"train_CoT_0\.json: no such file.*`teacher=False`"):
        anli.read(anli_source)
    row = anli.read(anli_source, teacher=False).splits["train"][0]
    assert (row.example.rationale, row.example.llm_label, row.right) == ("", "", {})
    assert row.example.rationales == (Rationale("1950 is long ago.", "human", "contradiction"),)


@pytest.mark.parametrize("suffix", [".json", ".jsonl"])
def test_exports_of_hugging_face_are_read(tmp_path, suffix):
    write_lines(tmp_path / f"train_r1{suffix}", anli_rows())
    write_lines(tmp_path / f"dev_r1{suffix}", anli_rows()[:3])
    splits = anli.read(tmp_path, teacher=False).splits
    assert {split: len(rows) for split, rows in splits.items()} == {"train": 8, "validation": 3}


def test_exports_of_tfds_are_read(tmp_path):
    rows = esnli_rows()
    for row in rows:
        row["gold_label"] = LABELS[row.pop("label")]
    write_lines(tmp_path / "validation.jsonl", rows)
    splits = esnli.read(tmp_path, teacher=False).splits
    assert [row.example.label for row in splits["validation"][:3]] == list(LABELS)


def test_anlis_own_column_names_are_read(tmp_path):
    row = {"uid": "a", "context": "c", "hypothesis": "h", "label": "n"}
    write_lines(tmp_path / "test.jsonl", [row])
    (row,) = anli.read(tmp_path, teacher=False).splits["test"]
    assert (row.example.input, row.example.label) == ("premise: c hypothesis: h", "neutral")


def test_pairs_without_a_gold_label_are_left_out_and_counted(tmp_path):
    rows = esnli_rows()[:4]
    for row, label in zip(rows, (-1, "-", None, "2"), strict=True):
        row["label"] = label
    write_lines(tmp_path / "test.jsonl", rows)
    reading = esnli.read(tmp_path, teacher=False)
    assert [row.example.id for row in reading.splits["test"]] == ["4"]
    assert any(n.endswith("3 rows without a gold label are left out") for n in reading.notes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"label": 3},
            r"esnli_train\.json:2: the field 'label' must be 0, 1, 2 or entail.*got '3'",
        ),
        ({"label": "maybe"}, r"esnli_train\.json:2: the field 'label' must be 0, 1, 2"),
        ({"label": True}, r"esnli_train\.json:2: the field 'label' must be text"),
        ({"premise": ""}, r"esnli_train\.json:2: the field 'premise' is empty"),
        ({"explanation_1": 1.5}, r"esnli_train\.json:2: the field 'explanation_1' must be text"),
    ],
)
def test_a_bad_field_names_file_and_line(esnli_source, changes, message):
    rows = esnli_rows()
    rows[1] |= changes
    write_lines(esnli_source / "esnli_train.json", rows)
    with pytest.raises(InputError, match=message):
        esnli.read(esnli_source).splits  # noqa: B018


def test_a_missing_label_lists_the_fields(esnli_source):
    (esnli_source / "esnli_train.json").write_text(json.dumps({"premise": "p", "hypothesis": "h"}))
    with pytest.raises(InputError, match=r":1: no field 'label' \(found: premise, hypothesis\)"):
        esnli.read(esnli_source).splits  # noqa: B018
