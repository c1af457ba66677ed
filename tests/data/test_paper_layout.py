"""The cqa and svamp readers on small sources, whole and broken."""

import json

import pytest

from stepdistill_jax.data.readers import cqa, svamp
from stepdistill_jax.data.reading import defect_counts
from stepdistill_jax.errors import InputError


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
    assert [(d.kind, d.file, d.row) for d in row.defects] == [
        ("no_answer", "llm/test_CoT_0.json", 4)
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
    }
    repeated = [d for row in rows for d in row.defects if d.kind == "repeated_choices"]
    assert [(d.file, d.row) for d in repeated] == [("cqa_test.json", 3 + 4 * i) for i in range(3)]
    # the third copy's teacher text is the third of the second file
    assert [d.file for row in rows[8:9] for d in row.defects] == ["llm/test_CoT_1.json"]
    assert rows[8].defects[0].row == 4


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
    with pytest.raises(InputError, match=r"llm/train_CoT_0\.json: no such file.*--no-teacher"):
        svamp.read(svamp_source)


def test_a_missing_text_names_the_first_row_without_one(cqa_source):
    path = cqa_source / "llm" / "train_CoT_2.json"
    path.write_text(json.dumps(json.loads(path.read_text())[:-1]))
    with pytest.raises(InputError, match=r"cqa_train\.json:12: no teacher text.*12 rows, but 11"):
        cqa.read(cqa_source)


def test_a_text_too_many_is_named(cqa_source):
    path = cqa_source / "llm" / "train_CoT_2.json"
    path.write_text(json.dumps([*json.loads(path.read_text()), "more"]))
    with pytest.raises(InputError, match=r"train_CoT_2\.json: item 3 belongs to no row"):
        cqa.read(cqa_source)


def test_a_gap_in_the_numbers_of_teacher_files_is_named(cqa_source):
    (cqa_source / "llm" / "train_CoT_1.json").unlink()
    with pytest.raises(InputError, match=r"train_CoT_1\.json: no such file.*train_CoT_2"):
        cqa.read(cqa_source)


def test_broken_json_names_file_and_line(cqa_source):
    lines = (cqa_source / "cqa_test.json").read_text().splitlines()
    lines[6] = lines[6][:-5]
    (cqa_source / "cqa_test.json").write_text("\n".join(lines))
    with pytest.raises(InputError, match=r"cqa_test\.json:7: broken JSON"):
        cqa.read(cqa_source)


def test_broken_json_of_a_teacher_file_names_file_and_line(cqa_source):
    path = cqa_source / "llm" / "test_CoT_0.json"
    path.write_text(path.read_text().replace("pond.", 'pond."', 1))
    with pytest.raises(InputError, match=r"test_CoT_0\.json:2: broken JSON"):
        cqa.read(cqa_source)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"answer": "  "}, r"cqa_train\.json:7: the field 'answer' is empty"),
        ({"answer": None}, r"cqa_train\.json:7: the field 'answer' is empty"),
        ({"answer": ["pond"]}, r"cqa_train\.json:7: the field 'answer' must be text.*got a list"),
        ({"choices": "pond"}, r"cqa_train\.json:7: the field 'choices' must be a list"),
        ({"choices": ["pond", ""]}, r"cqa_train\.json:7: the field 'choices\[1\]' is empty"),
        ({"id": "train-0"}, r"cqa_train\.json:7: the id 'train-0' stands at .*cqa_train\.json:1"),
        ({"question": "\ud800"}, r"cqa_train\.json:7: .*surrogate"),
    ],
)
def test_a_bad_field_names_file_and_line(cqa_source, changes, message):
    _edit(cqa_source / "cqa_train.json", 7, **changes)
    with pytest.raises(InputError, match=message):
        cqa.read(cqa_source)


def test_a_gold_label_that_is_no_choice_is_a_defect_of_the_source(cqa_source):
    _edit(cqa_source / "cqa_test.json", 1, answer="moon")
    row = cqa.read(cqa_source).splits["test"][0]
    assert next((d.kind, d.file, d.row) for d in row.defects) == (
        "gold_not_a_choice",
        "cqa_test.json",
        1,
    )


def test_the_folder_above_is_a_source_too(cqa_source):
    assert cqa.read(cqa_source.parent).splits.keys() == cqa.read(cqa_source).splits.keys()


def test_a_folder_without_files_says_what_is_wanted(tmp_path):
    with pytest.raises(InputError, match=r"neither cqa_train\.json nor cqa_test\.json"):
        cqa.read(tmp_path)
    with pytest.raises(InputError, match="no such folder"):
        cqa.read(tmp_path / "absent")


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
    train = defect_counts(splits["train"] + splits["validation"])
    assert len(splits["train"]) + len(splits["validation"]) == 9741
    assert train["label_not_a_choice"] == 448
    assert train["repeated_choices"] == 122
    assert defect_counts(splits["test"])["repeated_choices"] == 24
    equations = svamp.read(paper_data / "svamp").splits
    assert defect_counts(equations["train"] + equations["validation"])["no_answer"] == 11
    assert not any(
        row.example.rationale
        for row in equations["train"]
        if "no_answer" in {d.kind for d in row.defects}
    )
