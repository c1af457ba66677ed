"""Input rows of `predict`: they hold what `prepare jsonl` and `annotate` take."""

import dataclasses
import json
import os
import pathlib
import subprocess
import sys
import tempfile

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stepdistill_jax.data.corpora import jsonl
from stepdistill_jax.errors import InputError
from stepdistill_jax.inference import predict
from stepdistill_jax.inference.input_rows import read_questions
from stepdistill_jax.teacher import questions as rows


def test_ids_come_back_as_they_were_given_and_a_blank_one_is_the_rows_number(
    model_dir, write_rows, read_rows_of, tmp_path
):
    ids = [7, "8", " a ", "", " ", None]
    source = write_rows([{"input": "a", "id": given} for given in ids] + [{"input": "a"}])
    predict(model_dir, source, tmp_path / "out.jsonl")
    found = [row["id"] for row in read_rows_of(tmp_path / "out.jsonl")]
    assert found == [7, "8", " a ", "4", "5", "6", "7"]


def test_integers_are_texts_as_they_are_for_prepare(model_dir, write_rows, read_rows_of, tmp_path):
    rows = [{"input": 12, "label": 3, "choices": [3, 4]}, {"input": 13, "label": 4}]
    result = predict(model_dir, write_rows(rows), tmp_path / "numbers.jsonl")
    rows = [{"input": "12", "label": "3", "choices": ["3", "4"]}, {"input": "13", "label": " 4"}]
    texts = predict(model_dir, write_rows(rows), tmp_path / "texts.jsonl")
    del result["rows_per_second"], texts["rows_per_second"]
    assert result == texts and texts["rows"] == 2
    assert read_rows_of(tmp_path / "numbers.jsonl") == read_rows_of(tmp_path / "texts.jsonl")


def test_mapped_fields_give_the_answers_of_rows_with_our_names(
    model_dir, write_rows, read_rows_of, tmp_path
):
    theirs = [{"no": 7, "q": "a", "team": "x"}, {"no": "8", "q": "b", "team": ""}]
    ours = [{"id": 7, "input": "a", "label": "x"}, {"id": "8", "input": "b"}]
    names = {"input": "q", "label": "team", "id": "no"}
    mapped = predict(model_dir, write_rows(theirs), tmp_path / "mapped.jsonl", field_map=names)
    plain = predict(model_dir, write_rows(ours), tmp_path / "plain.jsonl")
    assert mapped["rows_with_label"] == plain["rows_with_label"] == 1
    assert read_rows_of(tmp_path / "mapped.jsonl") == read_rows_of(tmp_path / "plain.jsonl")


@pytest.mark.parametrize(
    ("field_map", "message"),
    [
        (
            {"input": "question"},
            r"no field 'question' \(found: q, team\)",
        ),
        (
            {"input": "q", "label": "tem"},
            "`field_map` label=tem: this field is missing or empty in all",
        ),
        ({"input": "q", "lable": "team"}, "`field_map` lable=team: unknown field 'lable'"),
        ({}, "no field 'input' .*; rows need .*, or pass `field_map` input=FIELD"),
    ],
)
def test_a_wrong_map_is_refused(model_dir, write_rows, tmp_path, field_map, message):
    source = write_rows([{"q": "a", "team": "x"}])
    with pytest.raises(InputError, match=message):
        predict(model_dir, source, tmp_path / "out.jsonl", field_map=field_map)
    assert not (tmp_path / "out.jsonl").exists()


VALUES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 3),
    st.floats(allow_nan=False),
    st.text(alphabet="ab \n\ud800", max_size=3),
    st.lists(st.sampled_from(["a", " b", "", 1, None]), max_size=2),
)
NAMES = ("id", "input", "label", "rationale", "llm_label", "choices")


@given(st.dictionaries(st.sampled_from(NAMES), VALUES))
def test_any_row_means_the_same_to_prepare_predict_and_annotate(row):
    row = {"input": "q", "label": "l", **row}
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder) / "test.jsonl"
        path.write_text(json.dumps(row) + "\n")
        (found,) = read_questions(path)
        try:
            example = jsonl.read(path.parent).splits["test"][0].example
        except InputError as error:
            if "'input' is empty" in str(error) or "'label' is empty" in str(error):
                return  # a question may be blank, and an answer unknown
            assert isinstance(found, InputError) and f"{path}:1: the field " in str(found)
            with pytest.raises(InputError) as refused:
                next(rows.read_questions(path))
            # of two faults a prompt's comes first: its question is missing
            blank = f"{path}:1: the field 'input' is empty"
            assert str(refused.value) == str(found) or (
                not str(row["input"] or "").strip() and str(refused.value) == blank
            )
            return
        asked = next(rows.read_questions(path))
    assert asked == example == dataclasses.replace(found, id=example.id)
    assert str(found.id).strip() == example.id


def test_a_pipe_is_refused_and_not_waited_for(model_dir, tmp_path):
    pipe, out = tmp_path / "pipe.jsonl", tmp_path / "out.jsonl"
    os.mkfifo(pipe)
    with pytest.raises(InputError, match=r"pipe\.jsonl: is a pipe or device; .*save it to a file"):
        predict(model_dir, pipe, out)
    assert not out.exists()
    command = ["predict", str(model_dir), "/dev/stdin", str(out)]
    done = subprocess.run(
        [sys.executable, "-m", "stepdistill_jax", *command],
        input=b'{"input": "a"}\n',
        capture_output=True,
    )
    assert done.returncode == 2 and b"/dev/stdin: is a pipe or device" in done.stderr
    assert not out.exists()
