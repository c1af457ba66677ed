"""The cqa and svamp readers on small sources, whole and broken."""

import collections
import json
import pathlib

import pytest

from stepdistill_jax.data.corpora import cqa, svamp
from stepdistill_jax.data.example import Rationale
from stepdistill_jax.errors import InputError


def defect_counts(rows):
    return collections.Counter(d.kind for row in rows for d in row.defects)


def _edit(path, line, **changes):
    rows = path.read_text().splitlines()
    rows[line - 1] = json.dumps(json.loads(rows[line - 1]) | changes)
    path.write_text("\n".join(rows) + "\n")


def test_a_question_is_read_with_its_lettered_choices(cqa_source):
    example = cqa.read(cqa_source).splits["test"][0].example
    assert example.input == "Where do ducks swim?\nAnswer Choices:\n(a) zoo\n(b) pond\n(c) barn"
    assert (example.label, example.rationale, example.llm_label, example.choices) == (
        "pond",
        "Ducks like water.",
        "pond",
        ("zoo", "pond", "barn"),
    )


def test_a_row_without_a_parsed_rationale_keeps_its_label(cqa_source):
    row = cqa.read(cqa_source).splits["test"][3]
    assert (row.example.label, row.example.rationale, row.example.llm_label) == ("pond", "", "")
    assert [(d.kind, d.file, d.line) for d in row.defects] == [
        ("no_answer", "llm/test_CoT_0.json", 4),
        ("truncated", "llm/test_CoT_0.json", 4),
    ]


def test_teacher_figures_of_cqa_go_by_letter_by_text_and_after_repairs(cqa_source):
    rows = cqa.read(cqa_source).splits["test"][:4]
    # by row: right; right by the letter, "Barn" is not "barn"; right; no answer
    assert [row.right["teacher_accuracy"] for row in rows] == [True, True, True, False]
    assert [row.right["teacher_accuracy_by_text"] for row in rows] == [True, False, True, False]
    assert [row.right["teacher_accuracy_repaired"] for row in rows] == [True, True, True, False]


def test_defects_name_the_file_and_row_of_the_source(cqa_source):
    rows = cqa.read(cqa_source).splits["test"]
    assert defect_counts(rows) == {
        "runs_on": 3,
        "label_not_a_choice": 3,
        "repeated_choices": 3,
        "no_answer": 3,
        "truncated": 3,
    }
    repeated = [d for row in rows for d in row.defects if d.kind == "repeated_choices"]
    assert [(d.file, d.line) for d in repeated] == [("cqa_test.json", 3 + 4 * i) for i in range(3)]
    # the third copy's teacher text is the third of the second file
    assert [d.file for row in rows[8:9] for d in row.defects] == ["llm/test_CoT_1.json"]
    assert rows[8].defects[0].line == 4


def test_validation_comes_out_of_train_unless_it_has_a_file(cqa_source):
    reading = cqa.read(cqa_source)
    ids = {s: {row.example.id for row in rows} for s, rows in reading.splits.items()}
    assert ids["train"] | ids["validation"] == {f"train-{i}" for i in range(12)}
    assert not ids["train"] & ids["validation"]
    assert any("cqa_valid.json" in note for note in reading.notes)

    for name in ("cqa_{}.json", "llm/{}_CoT_0.json", "llm/{}_CoT_1.json", "llm/{}_CoT_2.json"):
        (cqa_source / name.format("test")).rename(cqa_source / name.format("valid"))
    reading = cqa.read(cqa_source)
    assert {s: len(rows) for s, rows in reading.splits.items()} == {"train": 12, "validation": 12}
    assert [note for note in reading.notes if "test is left out" in note]


def test_an_equation_is_judged_by_its_value(svamp_source):
    rows = svamp.read(svamp_source).splits["test"][:3]
    assert [row.right["teacher_accuracy"] for row in rows] == [True, False, False]
    assert [row.right["teacher_accuracy_repaired"] for row in rows] == [True, True, False]
    assert [row.example.llm_label for row in rows] == ["(6 / 2)", "(2 * 3) * 4", ""]
    assert [row.example.id for row in rows] == ["1", "2", "3"]
    assert rows[2].example.rationale == "Some more."  # the answer fails, not the rationale


def test_without_teacher_rows_have_labels_only(svamp_source):
    reading = svamp.read(svamp_source, teacher=False)
    rows = reading.splits["train"]
    assert not any(row.example.rationale or row.example.llm_label or row.right for row in rows)
    assert not any(name.startswith("llm") for name in reading.sources)


@pytest.mark.parametrize("teacher", [True, False])
def test_absent_teacher_files_are_an_error_unless_told(svamp_source, teacher):
    for path in (svamp_source / "llm").iterdir():
        path.unlink()
    if not teacher:
        assert svamp.read(svamp_source, teacher=False).splits["test"]
        return
    with pytest.raises(InputError, match=r"llm/train_CoT_0\.json: no such file.*`teacher=False`"):
        svamp.read(svamp_source).splits  # noqa: B018


def test_a_missing_text_names_the_first_row_without_one(cqa_source):
    path = cqa_source / "llm" / "train_CoT_2.json"
    path.write_text(json.dumps(json.loads(path.read_text())[:-1]))
    with pytest.raises(InputError, match=r"cqa_train\.json:12: no teacher text.*12 rows, but 11"):
        cqa.read(cqa_source).splits  # noqa: B018


def test_a_text_too_many_is_named(cqa_source):
    path = cqa_source / "llm" / "train_CoT_2.json"
    path.write_text(json.dumps([*json.loads(path.read_text()), "more"]))
    with pytest.raises(InputError, match=r"train_CoT_2\.json: item 3 belongs to no row"):
        cqa.read(cqa_source).splits  # noqa: B018


def test_a_gap_in_the_numbers_of_teacher_files_is_named(cqa_source):
    (cqa_source / "llm" / "train_CoT_1.json").unlink()
    with pytest.raises(InputError, match=r"train_CoT_1\.json: no such file.*train_CoT_2"):
        cqa.read(cqa_source).splits  # noqa: B018


def test_teacher_files_are_read_in_the_order_of_their_numbers(cqa_source):
    """`_2` comes before `_10`."""
    for path in (cqa_source / "llm").glob("test_CoT_*.json"):
        path.unlink()
    for i in range(12):
        text = f"Reason {i}. So the answer is (b) pond."
        (cqa_source / "llm" / f"test_CoT_{i}.json").write_text(json.dumps([text]))
    rows = cqa.read(cqa_source).splits["test"]
    assert [row.example.rationale for row in rows] == [f"Reason {i}." for i in range(12)]


def test_broken_json_names_file_and_line(cqa_source):
    lines = (cqa_source / "cqa_test.json").read_text().splitlines()
    lines[6] = lines[6][:-5]
    (cqa_source / "cqa_test.json").write_text("\n".join(lines))
    with pytest.raises(InputError, match=r"cqa_test\.json:7: broken JSON"):
        cqa.read(cqa_source).splits  # noqa: B018


def test_broken_json_of_a_teacher_file_names_file_and_line(cqa_source):
    path = cqa_source / "llm" / "test_CoT_0.json"
    path.write_text(path.read_text().replace("pond.", 'pond."', 1))
    with pytest.raises(InputError, match=r"test_CoT_0\.json:2: broken JSON"):
        cqa.read(cqa_source).splits  # noqa: B018


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"answer": "  "}, r"cqa_train\.json:7: the field 'answer' is empty"),
        ({"answer": None}, r"cqa_train\.json:7: the field 'answer' is empty"),
        ({"answer": ["pond"]}, r"cqa_train\.json:7: the field 'answer' must be text.*got a list"),
        ({"choices": "pond"}, r"cqa_train\.json:7: the field 'choices' must be a list"),
        ({"choices": ["pond", ""]}, r"cqa_train\.json:7: the field 'choices\[1\]' is empty"),
        ({"id": "train-0"}, r"cqa_train\.json:7: the id 'train-0' is also at .*cqa_train\.json:1"),
        ({"question": "\ud800"}, r"cqa_train\.json:7: .*surrogate"),
    ],
)
def test_a_bad_field_names_file_and_line(cqa_source, changes, message):
    _edit(cqa_source / "cqa_train.json", 7, **changes)
    with pytest.raises(InputError, match=message):
        cqa.read(cqa_source).splits  # noqa: B018


def test_a_gold_label_that_is_no_choice_is_a_defect_of_the_source(cqa_source):
    _edit(cqa_source / "cqa_test.json", 1, answer="moon")
    row = cqa.read(cqa_source).splits["test"][0]
    assert next((d.kind, d.file, d.line) for d in row.defects) == (
        "gold_not_a_choice",
        "cqa_test.json",
        1,
    )


def test_the_folder_above_is_a_source_too(cqa_source):
    assert cqa.read(cqa_source.parent).splits.keys() == cqa.read(cqa_source).splits.keys()


def test_a_folder_without_files_says_what_is_wanted(tmp_path):
    with pytest.raises(InputError, match=r"found no cqa_train\.json or cqa_test\.json"):
        cqa.read(tmp_path).splits  # noqa: B018
    with pytest.raises(InputError, match="no such folder"):
        cqa.read(tmp_path / "absent").splits  # noqa: B018


def _lines(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def _add_asdiv(source):
    """Writes three questions to source/asdiv, the last without a teacher's answer."""
    texts = ["1 + 1 = 2. The answer is (1 + 1).", "1 + 1 = 3. The answer is (2 + 2).", "Who knows"]
    rows = [{"input": f"question {i}?", "label": "not read"} for i in range(3)]
    _lines(source / "asdiv" / "asdiv_train.json", rows)
    (source / "asdiv" / "llm").mkdir()
    (source / "asdiv" / "llm" / "train_CoT_0.json").write_text(json.dumps(texts))


def test_asdiv_gives_inputs_that_have_the_teachers_labels_only(svamp_source):
    before = svamp.read(svamp_source).splits
    _add_asdiv(svamp_source)
    reading = svamp.read(svamp_source)
    rows = reading.splits["unlabelled"]
    assert [(r.example.id, r.example.label, r.example.llm_label) for r in rows] == [
        ("asdiv-1", "", "(1 + 1)"),
        ("asdiv-2", "", "(2 + 2)"),
        ("asdiv-3", "", ""),
    ]
    assert [r.example.rationale for r in rows] == ["1 + 1 = 2.", "1 + 1 = 3.", ""]
    assert not any(row.right for row in rows)
    assert defect_counts(rows) == {"arithmetic_wrong": 1, "no_answer": 1, "truncated": 1}
    assert [d.text for d in rows[1].defects] == ["1 + 1 = 3"]
    # nothing else changes: training on gold labels reads the same rows
    assert {s: reading.splits[s] for s in before} == before
    assert {"asdiv/asdiv_train.json", "asdiv/llm/train_CoT_0.json"} <= set(reading.sources)
    assert any("the split unlabelled, with the teacher's labels" in note for note in reading.notes)


def test_asdiv_next_to_svamp_is_found_and_needs_its_teacher_files(svamp_source):
    _add_asdiv(svamp_source.parent)
    for source in (svamp_source, svamp_source.parent):
        assert len(svamp.read(source).splits["unlabelled"]) == 3
    (svamp_source.parent / "asdiv" / "llm" / "train_CoT_0.json").unlink()
    with pytest.raises(InputError, match=r"asdiv/llm/train_CoT_0\.json: no such file"):
        svamp.read(svamp_source)
    rows = svamp.read(svamp_source, teacher=False).splits["unlabelled"]
    assert [row.example.llm_label for row in rows] == ["", "", ""]


def test_a_missing_asdiv_is_noted(svamp_source, monkeypatch):
    monkeypatch.chdir(svamp_source)
    for source in (svamp_source, svamp_source.parent, pathlib.Path()):
        reading = svamp.read(source)
        assert "unlabelled" not in reading.splits
        (note,) = [note for note in reading.notes if "ASDiv" in note]
        assert note.startswith(f"{svamp_source.parent}/asdiv/asdiv_train.json: no such file, so")


@pytest.mark.parametrize("inside", [True, False])
def test_a_misplaced_asdiv_says_where_it_belongs(svamp_source, inside):
    folder = svamp_source if inside else svamp_source.parent
    _lines(folder / "asdiv_train.json", [{"input": "q"}])
    with pytest.raises(InputError, match=rf"move this file to {folder}/asdiv/asdiv_train\.json"):
        svamp.read(folder)


def test_cos_es_explanations_are_kept_as_peoples(cqa_source):
    example = cqa.read(cqa_source).splits["test"][0].example
    assert example.rationale == "Ducks like water."
    assert example.rationales == (
        Rationale("Ducks like water.", "llm", "pond"),
        Rationale("not read", "human", "pond"),
    )


CQA_EXPORT = {
    "id": "a",
    "question": "Where do ducks swim?",
    "choices": {"label": ["A", "B", "C"], "text": ["zoo", "pond", "barn"]},
    "answerKey": "B",
}


def test_an_export_of_commonsense_qa_gives_the_papers_rows(tmp_path, cqa_source):
    _lines(tmp_path / "hf" / "train.jsonl", [CQA_EXPORT])
    _lines(tmp_path / "hf" / "validation.jsonl", [CQA_EXPORT])
    _lines(tmp_path / "hf" / "test.jsonl", [CQA_EXPORT | {"answerKey": ""}])
    reading = cqa.read(tmp_path / "hf", teacher=False)
    assert list(reading.splits) == ["train", "validation"]
    example = reading.splits["train"][0].example
    paper = cqa.read(cqa_source, teacher=False).splits["test"][0].example
    assert (example.input, example.label, example.choices) == (
        paper.input,
        paper.label,
        paper.choices,
    )
    # the export's test split has no answers
    assert any("1 rows without a gold label are left out" in note for note in reading.notes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"answerKey": "E"}, r"test\.jsonl:1: the field 'answerKey' is 'E', but the choices are A, B, C"),
        ({"choices": ["zoo"]}, r"test\.jsonl:1: in a row with 'answerKey', the field 'choices' must be an object"),
        ({"choices": {"label": ["A"], "text": []}}, r"test\.jsonl:1: in choices: 1 labels, but 0 texts"),
    ],
)  # fmt: skip
def test_a_bad_export_names_file_line_and_field(tmp_path, changes, message):
    _lines(tmp_path / "test.jsonl", [CQA_EXPORT | changes])
    with pytest.raises(InputError, match=message):
        cqa.read(tmp_path, teacher=False).splits  # noqa: B018


def test_an_export_has_no_teacher_texts(tmp_path):
    _lines(tmp_path / "train.jsonl", [CQA_EXPORT])
    with pytest.raises(InputError, match=r"train_CoT_0\.json: no such file.*`teacher=False`"):
        cqa.read(tmp_path)


def test_a_split_without_teacher_texts_is_told(cqa_source):
    for path in cqa_source.glob("llm/test*"):
        path.unlink()
    reading = cqa.read(cqa_source)
    assert not any(row.example.rationale or row.right for row in reading.splits["test"])
    assert any("test_CoT_0.json: no such file, so the split test" in n for n in reading.notes)


def test_teacher_accuracy_of_the_paper_is_reproduced(paper_data):
    """Hsieh et al. 2023, table of teacher accuracies; counts over all rows, before any repair."""
    test = cqa.read(paper_data / "cqa").splits["test"]
    assert len(test) == 1221
    by_letter = sum(row.right["teacher_accuracy"] for row in test)
    by_text = sum(row.right["teacher_accuracy_by_text"] for row in test)
    assert f"{by_letter / 1221:.2%}" == "79.28%"
    assert f"{by_text / 1221:.2%}" == "77.23%"
    equations = svamp.read(paper_data / "svamp").splits["test"]
    assert len(equations) == 200
    assert sum(row.right["teacher_accuracy"] for row in equations) / 200 == 0.74


def test_known_defects_of_the_original_files_are_counted(paper_data):
    splits = cqa.read(paper_data / "cqa").splits
    assert len(splits["train"]) + len(splits["validation"]) == 9741
    assert defect_counts(splits["train"] + splits["validation"]) == {
        "runs_on": 9741,
        "label_not_a_choice": 448,
        "repeated_choices": 122,
        "no_letter": 3,
        "label_disagrees_with_letter": 1,
    }
    assert defect_counts(splits["test"]) == {
        "runs_on": 1221,
        "label_not_a_choice": 46,
        "repeated_choices": 24,
        "label_disagrees_with_letter": 1,
    }
    assert (
        round(sum(r.right["teacher_accuracy_repaired"] for r in splits["test"]) / 12.21, 2) == 79.36
    )
    # CoS-E explains every row
    assert all(row.example.rationales[-1].source == "human" for row in splits["test"])


def test_known_defects_of_the_original_equations_are_counted(paper_data):
    splits = svamp.read(paper_data / "svamp").splits
    assert defect_counts(splits["train"] + splits["validation"]) == {
        "runs_on": 784,
        "arithmetic_wrong": 28,
        "no_value": 21,
        "equation_goes_on": 16,
        "truncated": 12,
        "no_answer": 11,
        "no_parentheses": 2,
    }
    assert defect_counts(splits["test"]) == {
        "runs_on": 199,
        "equation_goes_on": 10,
        "arithmetic_wrong": 8,
        "no_value": 5,
        "no_answer": 2,
    }
    assert sum(row.right["teacher_accuracy_repaired"] for row in splits["test"]) == 155
    assert not any(
        row.example.rationale
        for row in splits["train"]
        if "no_answer" in {d.kind for d in row.defects}
    )


def test_the_rows_of_svamps_original_file_are_those_of_the_papers(paper_data, tmp_path):
    records = json.loads((paper_data / "svamp" / "SVAMP.json").read_text())
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    original = svamp.read(tmp_path, teacher=False).splits
    paper = svamp.read(paper_data / "svamp").splits

    def pairs(splits):
        return sorted((r.example.input, r.example.label) for rows in splits.values() for r in rows)

    assert pairs(original) == pairs(paper) and len(pairs(paper)) == 1000
