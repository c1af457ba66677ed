"""A user's own rows: which are read, which are refused, and the messages.

tests/bad_inputs/data/jsonl.jsonl has every kind of bad row, for each command that reads rows.
"""

import json

import numpy as np
import pytest

from stepdistill_jax.data.corpora import jsonl
from stepdistill_jax.data.example import Rationale
from stepdistill_jax.errors import InputError

ROW = {"input": "is it wet ?", "label": "yes", "rationale": "it rains ."}


def _write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def _only(reading):
    (rows,) = reading.splits.values()
    return rows


def _read_rows(tmp_path, *rows, **options):
    """Reads `rows` as the test split of a folder, so that no hash moves a row."""
    _write(tmp_path / "test.jsonl", rows)
    return _only(jsonl.read(tmp_path, **options))


def test_every_field_is_read(tmp_path):
    (row,) = _read_rows(
        tmp_path,
        ROW | {"id": "a", "llm_label": "no", "weight": 2, "choices": ["yes", "no"]},
    )
    example = row.example
    assert (example.id, example.label, example.llm_label, example.weight, example.choices) == (
        "a",
        "yes",
        "no",
        2.0,
        ("yes", "no"),
    )
    assert row.right == {"teacher_accuracy": False}


def test_an_input_keeps_its_whitespace_and_other_texts_are_stripped(tmp_path):
    (row,) = _read_rows(tmp_path, {"input": " a\n b ", "label": " yes\n", "rationale": " r "})
    assert (row.example.input, row.example.label, row.example.rationale) == (" a\n b ", "yes", "r")


def test_a_missing_id_is_the_rows_number_and_blank_lines_are_no_rows(tmp_path):
    (tmp_path / "test.jsonl").write_text(f"{json.dumps(ROW)}\n\n{json.dumps(ROW)}\n")
    assert [row.example.id for row in _only(jsonl.read(tmp_path))] == ["1", "2"]


def test_an_integer_is_taken_as_its_digits(tmp_path):
    (row,) = _read_rows(tmp_path, {"id": 7, "input": 12, "label": 0})
    assert (row.example.id, row.example.input, row.example.label) == ("7", "12", "0")


def test_the_first_of_several_rationales_is_trained_on_unless_one_is_named(tmp_path):
    several = [{"text": "because", "source": "m"}, {"text": "since", "label": "yes"}]
    first, named, other = _read_rows(
        tmp_path,
        {"input": "q", "label": "yes", "rationales": several},
        {"input": "q", "label": "yes", "rationales": several, "rationale": "since"},
        ROW | {"rationales": several, "llm_label": "yes"},
    )
    assert first.example.rationale == "because"
    assert first.example.rationales == (Rationale("because", "m"), Rationale("since", "", "yes"))
    assert named.example.rationale == "since" and len(named.example.rationales) == 2
    assert other.example.rationales[0] == Rationale("it rains .", "", "yes")
    assert len(other.example.rationales) == 3


def test_fields_are_mapped(tmp_path):
    (row,) = _read_rows(
        tmp_path,
        {"question": "q", "answer": "a", "input": "not this"},
        field_map={"input": "question", "label": "answer"},
    )
    assert (row.example.input, row.example.label) == ("q", "a")


@pytest.mark.parametrize(
    ("field_map", "message"),
    [
        ({"input": "qestion"}, r"no row of .*test\.jsonl has a field 'qestion' \(found: question, answer\); did you mean 'question'"),
        ({"question": "input"}, r"unknown field 'question' .*; the known field comes first: `field_map` input=question"),
        ({"lable": "answer"}, r"unknown field 'lable' \(known: id, input.*did you mean 'label'"),
    ],
)  # fmt: skip
def test_a_wrong_map_lists_the_fields(tmp_path, field_map, message):
    with pytest.raises(InputError, match=message):
        _read_rows(tmp_path, {"question": "q", "answer": "a"}, field_map=field_map)


def test_fields_that_were_not_read_are_told(tmp_path):
    _write(tmp_path / "test.jsonl", [ROW, ROW | {"rational": "typo", "topic": 1}])
    reading = jsonl.read(tmp_path)
    assert len(_only(reading)) == 2  # the notes are complete once the rows are read
    assert any("not read: rational, topic" in note for note in reading.notes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"label": ""}, r"test\.jsonl:2: the field 'label' is empty"),
        ({"label": 1.5}, r"test\.jsonl:2: the field 'label' must be text \(or an integer\), got a number"),
        ({"weight": 0}, r"test\.jsonl:2: the field 'weight' must be above 0, got 0"),
        ({"choices": ["yes", None]}, r"test\.jsonl:2: the field 'choices\[1\]' must be text .*got null"),
        ({"rationales": [{"txt": "r"}]}, r"test\.jsonl:2: in rationales\[0\]: unknown field 'txt'"),
        ({"id": "one"}, r"test\.jsonl:2: the id 'one' is also at .*test\.jsonl:1"),
        ({"rationale": "\udc80"}, r"test\.jsonl:2: the field 'rationale' contains half of a surrogate"),
    ],
)  # fmt: skip
def test_a_bad_field_names_file_line_and_field(tmp_path, changes, message):
    with pytest.raises(InputError, match=message):
        _read_rows(tmp_path, ROW | {"id": "one"}, ROW | changes)


def test_a_missing_field_lists_those_found(tmp_path):
    with pytest.raises(InputError, match=r"test\.jsonl:1: no field 'input' \(found: text, label\)"):
        _read_rows(tmp_path, {"text": "q", "label": "a"})


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"input": "q",', r":7: broken JSON"),
        (b'{"input": "\xff", "label": "a"}', r":7: not UTF-8"),
    ],
    ids=["cut", "bytes"],
)
def test_a_line_that_is_no_row_is_named(tmp_path, line, message):
    (tmp_path / "mine.jsonl").write_bytes((json.dumps(ROW).encode() + b"\n") * 6 + line + b"\n")
    with pytest.raises(InputError, match=r"mine\.jsonl" + message):
        jsonl.read(tmp_path / "mine.jsonl").splits  # noqa: B018


def test_a_byte_order_mark_is_no_part_of_the_first_row(tmp_path):
    (tmp_path / "test.jsonl").write_bytes(b"\xef\xbb\xbf" + json.dumps(ROW).encode())
    assert len(_only(jsonl.read(tmp_path))) == 1


def test_one_file_is_cut_into_three_by_the_hashed_ids(tmp_path):
    path = _write(tmp_path / "mine.jsonl", [ROW | {"id": f"r{i}"} for i in range(400)])
    reading = jsonl.read(path)
    sizes = {split: len(rows) for split, rows in reading.splits.items()}
    assert list(sizes) == ["train", "validation", "test"]
    assert sum(sizes.values()) == 400
    assert 270 < sizes["train"] < 360
    assert any("split by hashed ids" in note for note in reading.notes)


def test_a_folder_without_validation_takes_a_tenth_of_train(tmp_path):
    _write(tmp_path / "train.jsonl", [ROW | {"id": f"r{i}"} for i in range(200)])
    _write(tmp_path / "test.jsonl", [ROW])
    _write(tmp_path / "dev.jsonl", [ROW])
    reading = jsonl.read(tmp_path)
    assert sum(len(reading.splits[s]) for s in ("train", "validation")) == 200
    assert 5 < len(reading.splits["validation"]) < 40
    assert any("not read: dev.jsonl" in note for note in reading.notes)


def test_of_few_rows_an_empty_split_is_left_out_and_told(tmp_path):
    _write(tmp_path / "train.jsonl", [ROW | {"id": "1"}])
    reading = jsonl.read(tmp_path)
    assert list(reading.splits) == ["train"]
    assert any("validation is left out" in note for note in reading.notes)
    assert any("test is left out" in note for note in reading.notes)


def test_without_teacher_its_fields_are_left_out(tmp_path):
    (row,) = _read_rows(
        tmp_path,
        ROW | {"llm_label": "no", "rationales": [{"text": "r"}], "why": "because"},
        teacher=False,
        field_map={"rationale": "why"},
    )
    assert (row.example.rationale, row.example.rationales, row.example.llm_label) == ("", (), "")
    assert row.right == {}


def test_an_answer_outside_the_choices_is_a_defect(tmp_path):
    rows = _read_rows(tmp_path, ROW | {"choices": ["no"], "llm_label": "maybe"})
    kinds = [d.kind for row in rows for d in row.defects]
    assert sorted(kinds) == ["gold_not_a_choice", "label_not_a_choice"]


def test_values_of_a_table_are_read_as_json_has_them():
    table = ROW | {
        "id": np.int64(7),
        "label": np.str_("yes"),
        "rationale": float("nan"),
        "weight": np.float64("nan"),
        "choices": ("yes", np.str_("no")),
    }
    plain = ROW | {"id": 7, "rationale": None, "weight": None, "choices": ["yes", "no"]}
    tables, plains = jsonl.read({"test": [table]}), jsonl.read({"test": [plain]})
    assert _only(tables) == _only(plains)
    assert tables.sources == plains.sources
    assert jsonl.read({"test": [table | {"id": np.int64(8)}]}).sources != tables.sources


def test_a_row_that_contains_itself_is_named():
    row = ROW | {"rationales": []}
    row["rationales"].append(row)
    with pytest.raises(InputError, match=r"^the list 'test': row 2 cannot be written as JSON \("):
        jsonl.read({"test": [ROW, row]})


@pytest.mark.parametrize("files", [(), ("dev.jsonl",)])
def test_a_folder_without_splits_says_what_is_wanted(tmp_path, files):
    for name in files:
        _write(tmp_path / name, [ROW])
    with pytest.raises(InputError, match="the folder has no file train, validation or test"):
        jsonl.read(tmp_path).splits  # noqa: B018
    with pytest.raises(InputError, match="no such file or folder"):
        jsonl.read(tmp_path / "absent.jsonl").splits  # noqa: B018


def test_an_empty_file_is_named(tmp_path):
    (tmp_path / "train.jsonl").write_text("\n\n")
    with pytest.raises(InputError, match=r"train\.jsonl: no rows in it"):
        jsonl.read(tmp_path).splits  # noqa: B018


def test_a_row_that_only_the_teacher_has_labelled_is_kept_without_a_gold_label(tmp_path):
    rows = _read_rows(tmp_path, {"input": "a", "llm_label": "yes"}, ROW | {"llm_label": "no"})
    assert [(r.example.label, r.example.llm_label) for r in rows] == [("", "yes"), ("yes", "no")]
    assert [r.right for r in rows] == [{}, {"teacher_accuracy": False}]


def test_a_row_that_annotate_got_no_answer_for_is_left_out_and_told(tmp_path):
    unanswered = {"input": "b", "provenance": {"model": "m"}}
    _write(tmp_path / "test.jsonl", [ROW, unanswered, ROW | {"provenance": {}}, unanswered])
    reading = jsonl.read(tmp_path)
    assert len(_only(reading)) == 2
    (note,) = [n for n in reading.notes if "left out, the first at" in n]
    assert note.startswith("2 rows ") and note.endswith("test.jsonl:2")
    _write(tmp_path / "test.jsonl", [{"input": "b"}])
    with pytest.raises(InputError, match="no field 'label'"):
        _only(jsonl.read(tmp_path))


def test_more_fields_are_kept_where_they_are_named(tmp_path):
    rows = [ROW | {"contrast": " no sun ", "page": 3}, ROW | {"page": None}]
    _write(tmp_path / "test.jsonl", rows)
    options = {"more": ["why_not", "page"], "field_map": {"why_not": "contrast"}}
    reading = jsonl.read(tmp_path, **options)
    assert [row.example.more for row in _only(reading)] == [{"why_not": "no sun", "page": "3"}, {}]
    assert "the field why_not is in 1 of 2 rows" in reading.notes
    assert not any("not read" in note for note in reading.notes)
    (left_out, _) = _only(jsonl.read(tmp_path))
    assert left_out.example.more == {}


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (
            ["Why"],
            "`fields` Why: expected a name in lower_snake_case; to read a field with another name",
        ),
        (
            ["rationale"],
            "`fields` rationale: this name is reserved; choose a different one",
        ),
        (["input_pair"], "`fields` input_pair: this name is reserved"),
        (["page", "page"], "`fields` page,page: list each name once"),
        (
            ["pages"],
            r"no row of .* has a text in the field 'pages' \(fields that were not read: page\); did you mean 'page'",
        ),
    ],
)
def test_more_fields_that_cannot_be_kept_are_refused(tmp_path, more, message):
    _write(tmp_path / "test.jsonl", [ROW | {"page": "3"}])
    with pytest.raises(InputError, match=message):
        _only(jsonl.read(tmp_path, more=more))


def test_a_field_that_is_kept_is_text(tmp_path):
    _write(tmp_path / "test.jsonl", [ROW | {"page": ["3"]}])
    with pytest.raises(InputError, match=r"test\.jsonl:1: the field 'page' must be text"):
        _only(jsonl.read(tmp_path, more=["page"]))


def test_csv_files_are_read_by_the_same_rules(tmp_path):
    (tmp_path / "train.csv").write_text(
        'question,label,weight,why\n"wet, or dry ?",yes,2,rain\nq,no,,\n'
    )
    (tmp_path / "test.tsv").write_text("question\tlabel\nwet ?\tyes\n")
    reading = jsonl.read(tmp_path, field_map={"input": "question", "rationale": "why"})
    found = {split: [row.example for row in rows] for split, rows in reading.splits.items()}
    (first,) = [e for rows in found.values() for e in rows if e.id == "1" and e.weight == 2.0]
    assert (first.input, first.label, first.rationale) == ("wet, or dry ?", "yes", "rain")
    assert [e.input for e in found["test"]] == ["wet ?"]
    assert set(reading.sources) == {"train.csv", "test.tsv"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("wet ?,yes\ndry ?,no\n", r"rows\.csv:2: no field 'input' \(found: wet \?, yes\).*; its first line names the columns$"),
        ("input,label\na,\nb,\n", r"rows\.csv:2: the field 'label' is empty; .*; none of its 2 rows can be used"),
        ("input,label\n", r"rows\.csv: no rows in it"),
        ("", r"rows\.csv: no rows in it"),
    ],
)  # fmt: skip
def test_a_csv_file_without_a_good_row_is_one_line(tmp_path, text, message):
    (tmp_path / "rows.csv").write_text(text)
    with pytest.raises(InputError, match=message):
        list(jsonl.read(tmp_path / "rows.csv").rows())


def test_two_files_of_one_split_are_refused(tmp_path):
    for name in ("train.jsonl", "train.csv"):
        (tmp_path / name).write_text("")
    with pytest.raises(InputError, match=r"it has both train\.jsonl and train\.csv"):
        jsonl.read(tmp_path)


def test_blanks_around_a_label_are_a_defect(tmp_path):
    rows = _read_rows(tmp_path, ROW | {"label": "Sound "}, ROW)
    assert [row.example.label for row in rows] == ["Sound", "yes"]
    (defect,) = [d for row in rows for d in row.defects]
    assert (defect.kind, defect.where, defect.text) == (
        "blanks_around_label",
        "test.jsonl:1",
        "Sound ",
    )
