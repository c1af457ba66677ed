"""Models that write more than a label, or read more than the input, through `predict`, `evaluate` and `serve`.

The model is a list of texts: what is tested is what is made of them.
"""

import importlib
import json

import numpy as np
import pytest

from stepdistill_jax.data.objectives import Objective, rationale_input, resolve, single_task
from stepdistill_jax.data.prepare import prepare
from stepdistill_jax.data.vocabulary import ByteVocabulary
from stepdistill_jax.decoding.greedy import Decoded
from stepdistill_jax.errors import InputError
from stepdistill_jax.formats.directory import TaskInfo
from stepdistill_jax.inference import predict
from stepdistill_jax.inference.accuracy import in_words
from stepdistill_jax.inference.evaluate import evaluate, evaluate_tokens
from stepdistill_jax.inference.prompting import prompting_for
from stepdistill_jax.serving.answerer import Answerer

WRITTEN = ["it rains so the answer is no", "who knows", "sand so the answer is yes"]
GOLD = [("wet ?", "no", "it rains"), ("old ?", "no", ""), ("dry ?", "yes", "sand")]


class Texts:
    """An engine that answers the i-th row of a call with the i-th text, and keeps the prompts."""

    path = identity = device = "texts"
    step, batch_size = None, 8

    def __init__(self, objectives, texts):
        self.vocabulary, self.texts, self.prompts = ByteVocabulary(), texts, []
        self.task_info = TaskInfo("mine", objectives, 64, 64, 64, labels=("no", "yes"))

    def decode(self, inputs, max_decode_len, update=None):
        self.prompts += [self.vocabulary.decode(ids) for ids in inputs]
        ids = [[*self.vocabulary.encode(t), 1] for t in self.texts[: len(inputs)]]
        scores = np.full(len(ids), -0.5)
        return Decoded(ids, scores, np.ones(len(ids), bool))


@pytest.fixture
def opened(monkeypatch):
    """Makes `predict` and `evaluate` open such an engine."""

    def open_(objectives, texts):
        engine = Texts(objectives, texts)
        for module in ("predict", "evaluate"):
            found = importlib.import_module(f"stepdistill_jax.inference.{module}")
            monkeypatch.setattr(found, "open_engine", lambda *_: engine)
        monkeypatch.setattr(found, "read_model_files", lambda _: engine)
        return engine

    return open_


@pytest.fixture
def source(write_rows):
    rows = [{"input": i, "label": y, "rationale": r, "id": i} for i, y, r in GOLD]
    return write_rows(rows)


def test_the_label_is_parsed_out_of_an_answer(opened, source, tmp_path, read_rows_of):
    opened(single_task(), WRITTEN)
    result = predict("m", source, tmp_path / "out.jsonl")
    assert read_rows_of(tmp_path / "out.jsonl") == [
        {"id": "wet ?", "label": "no", "score": -0.5, "rationale": "it rains"},
        {"id": "old ?", "label": "", "score": -0.5, "rationale": "who knows"},
        {"id": "dry ?", "label": "yes", "score": -0.5, "rationale": "sand"},
    ]
    assert list(json.loads((tmp_path / "out.jsonl").read_text().splitlines()[0]))[:3] == [
        *("id", "label", "score")
    ]
    assert (result["accuracy"], result["unparsed"], result["invalid_labels"]) == (2 / 3, 1, 1)
    assert "answers without a label 1 (33.3%)" in in_words(result)


def test_what_is_no_rationale_is_kept_as_text(opened, source, tmp_path, read_rows_of):
    opened(
        (Objective("label", "{input}", "The answer is {label}."),), ["The answer is no.", "no", ""]
    )
    assert predict("m", source, tmp_path / "out.jsonl")["unparsed"] == 2
    assert [(r["label"], r.get("text")) for r in read_rows_of(tmp_path / "out.jsonl")] == [
        *(("no", None), ("", "no"), ("", ""))
    ]


def test_a_field_of_a_template_takes_no_place_in_an_answer(opened, source, tmp_path, read_rows_of):
    odd = Objective("label", "{input}", "{id} {score} - {choices} , {label}")
    with pytest.raises(InputError, match="expected words between any two fields"):
        resolve(odd)
    opened((Objective("label", "{input}", "{id} : {choices} , {label}"),), ["7 : x , no"] * 3)
    assert predict("m", source, tmp_path / "out.jsonl")["accuracy"] == 2 / 3
    assert read_rows_of(tmp_path / "out.jsonl")[0] == {"id": "wet ?", "label": "no", "score": -0.5}


def test_a_rationale_in_the_answer_needs_no_second_one(opened, source, tmp_path):
    engine = opened(single_task(), WRITTEN)
    predict("m", source, tmp_path / "out.jsonl", with_rationale=True)
    assert engine.prompts == [f"predict: {question}" for question, _, _ in GOLD]


def test_choices_of_an_answer_with_reasons_are_refused(opened, source, tmp_path):
    opened(single_task(), WRITTEN)
    with pytest.raises(InputError, match="a label alone has no probability"):
        predict("m", source, tmp_path / "out.jsonl", choices="labels")


def test_evaluation_counts_parsed_labels(opened, source, tmp_path):
    prepare(
        "jsonl",
        source=source.rename(tmp_path / "test.jsonl").parent,
        new_name="mine",
        data_dir=tmp_path,
    )
    opened(single_task(), WRITTEN)
    result = evaluate("m", task="mine", data_dir=tmp_path, with_rationale=True)
    assert (result["accuracy"], result["unparsed"]) == (2 / 3, 1)
    assert result["rationale"]["rows"] == 3
    labels = [label for _, label, _ in GOLD]
    of_ids = evaluate_tokens("m", [[5, 1]] * 3, labels, metric="text_match")
    assert (of_ids["accuracy"], of_ids["unparsed"]) == (2 / 3, 1)


def test_a_model_that_reads_rationales_is_shown_those_of_the_rows(opened, source, tmp_path):
    engine = opened(rationale_input(), ["no", "no", "yes"])
    result = predict("m", source, tmp_path / "out.jsonl")
    assert engine.prompts == [f"predict: {q} rationale: {r}" for q, _, r in GOLD]
    assert (result["accuracy"], result["incomplete_inputs"], result["reads"]) == (
        1,
        1,
        ["rationale"],
    )
    told = in_words(result)
    assert "inputs that lack a field that the model reads 1 (33.3%)" in told
    assert (
        "in addition to the input, the model reads each row's rationale, so a teacher must write"
        in told
    )


def test_rows_that_all_lack_what_the_model_reads_are_refused(opened, write_rows, tmp_path):
    opened(rationale_input(), ["no"])
    bare = write_rows([{"input": "wet ?"}])
    with pytest.raises(
        InputError, match=r"in\.jsonl: the field 'rationale' is missing or empty in all"
    ):
        predict("m", bare, tmp_path / "out.jsonl")
    assert predict("m", bare, tmp_path / "out.jsonl", prefix="predict: ")["rows"] == 1


def test_any_field_may_be_read(opened, write_rows, tmp_path):
    engine = opened((Objective("label", "{page} {input}", "{label}"),), ["no", "yes"])
    rows = write_rows([{"input": "wet ?", "page": " sun "}, {"input": "dry ?", "page": "sand"}])
    assert predict("m", rows, tmp_path / "out.jsonl")["incomplete_inputs"] == 0
    assert engine.prompts == ["sun wet ?", "sand dry ?"]
    bad = write_rows([{"input": "wet ?", "page": ["sun"]}])
    with pytest.raises(InputError, match=r"in\.jsonl:1: the field 'page' must be text"):
        predict("m", bad, tmp_path / "out.jsonl")


def test_a_service_parses_labels_and_refuses_rows_without_what_is_read():
    engine = Texts(single_task(), WRITTEN)
    answerer = Answerer(engine, prompting_for(engine))
    questions = [answerer.question({"input": q}, i) for i, (q, _, _) in enumerate(GOLD)]
    assert [a["label"] for a in answerer.answers(questions)] == ["no", "", "yes"]
    assert answerer.answers(questions[:1])[0]["rationale"] == "it rains"
    engine = Texts(rationale_input(), ["no"])
    answerer = Answerer(engine, prompting_for(engine))
    assert answerer.question({"input": "wet ?", "rationale": "sun"}, 1)
    with pytest.raises(InputError, match="row 1: the field 'rationale' is missing or empty"):
        answerer.question({"input": "wet ?"}, 1)
