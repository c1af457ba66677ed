"""Each arm's targets, labels to compare with, and rows left out, for the rows of one dataset."""

import json

import pytest

from stepdistill_jax.batches.batch import Batches
from stepdistill_jax.data.objectives import ARMS, Objective, step_by_step, step_by_step_multi
from stepdistill_jax.data.prepare import prepare
from stepdistill_jax.data.prepared import open_prepared
from stepdistill_jax.data.vocabulary import ByteVocabulary
from stepdistill_jax.errors import InputError
from stepdistill_jax.tasks import add_task
from stepdistill_jax.tasks.load import load_task
from stepdistill_jax.tasks.supervision import Supervision
from stepdistill_jax.training import TrainConfig, inspect
from stepdistill_jax.training.run import assemble

ROWS = [
    {"input": "wet ?", "label": "no", "rationale": "sun", "llm_label": "no", "why_not": "no rain"},
    {"input": "dry ?", "label": "yes", "rationale": "sand", "llm_label": "no", "again": "arid ?"},
    {"input": "old ?", "label": "no"},
    {"input": "new ?", "llm_label": "yes", "rationale": "shiny"},
]
FIELDS = ("why_not", "again")
HELD_OUT = [
    {"input": "hot ?", "label": "no", "llm_label": "yes", "rationale": "snow"},
    {"input": "big ?", "label": "yes"},
]


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("arms")
    for split, rows in (("train", ROWS), ("validation", HELD_OUT), ("test", ROWS[:1])):
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"{split}.jsonl").write_text(text)
    prepare("jsonl", source=folder, new_name="mine", fields=FIELDS, data_dir=folder)
    return folder


def texts(data):
    """Returns (input, target) of each example's present rows."""
    decode, (store,) = ByteVocabulary().decode, data.stores
    rows = []
    for i in range(store.num_examples):
        pairs = [
            [decode(r[side][i].tolist()) for side in ("inputs", "targets")] for r in store.rows
        ]
        rows.append([tuple(pair) for pair in pairs if pair[1]])
    return rows


def load(data_dir, objectives, split="train", supervision=Supervision()):  # noqa: B008 (frozen)
    return load_task(
        "mine",
        split=split,
        objectives=objectives,
        vocabulary="bytes",
        data_dir=data_dir,
        supervision=supervision,
    )


WANTED = {
    "label_only": [["no"], ["yes"], ["no"]],
    "label_only_llm": [["no"], ["no"], ["yes"]],
    "step_by_step_llm": [["no", "sun"], ["no", "sand"], ["yes", "shiny"]],
    "single_task": [["sun so the answer is no"], ["sand so the answer is yes"], []],
    "rationale_input": [["no"], ["yes"], []],
    "step_by_step_multi": [["no", "sun", "no rain"], ["yes", "sand"], ["no"]],
}


@pytest.mark.parametrize("arm", WANTED)
def test_the_targets_of_an_arm(data_dir, arm):
    data = load(data_dir, arm)
    assert [[target for _, target in row] for row in texts(data)] == WANTED[arm]
    trained_on = Batches(data, 2, 64, 64, seed=0).num_examples
    assert trained_on == sum(map(bool, WANTED[arm]))  # the others are in no step


@pytest.mark.parametrize("arm", ["single_task", "rationale_input", "step_by_step_multi"])
def test_seqio_gives_the_same_rows_and_labels(data_dir, tmp_path, monkeypatch, arm):
    from stepdistill_jax.tasks.prepared_rows import PreparedRows

    ours = load(data_dir, arm)
    (tmp_path / "mine").symlink_to(data_dir / "mine")
    monkeypatch.setattr(PreparedRows, "can_read", lambda supervision: False)
    theirs = load(tmp_path, arm)
    assert texts(ours) == texts(theirs)
    assert ours.stores[0].label_texts == theirs.stores[0].label_texts == ["no", "yes", "no"]
    assert ours.fingerprint == theirs.fingerprint


@pytest.mark.parametrize("arm", ARMS)
def test_validation_compares_with_the_gold_label(data_dir, tmp_path, arm):
    config = TrainConfig(
        task="mine", objectives=arm, input_length=64, target_length=64, model_family="byt5"
    )
    validation = assemble(config, tmp_path, data_dir).validator.data
    assert validation.stores[0].label_texts == ["no", "yes"]
    prompts = [row[0][0] for row in texts(validation)[:1]]
    assert prompts == ["predict: hot ?" + " rationale: snow" * (arm == "rationale_input")]
    first = validation.objectives[0]
    assert "llm_label" not in first.target_template


def test_inspect_reads_validation_as_training_does(data_dir):
    config = TrainConfig(
        "mine",
        objectives="label_only_llm",
        model_family="byt5",
        batch_size=2,
        input_length=64,
        target_length=64,
    )
    found = inspect(config, split="validation", data_dir=data_dir)
    assert found["objectives"]["label"]["rows"] == 2  # one of them without a teacher's label


def test_answers_to_a_target_without_a_label_are_compared_with_the_target(data_dir, tmp_path):
    tell = Objective("label", "{input}", "because {rationale}")
    wanted = ["because sun", "because sand", ""]
    assert list(load(data_dir, tell).stores[0].label_texts) == wanted
    several = load(data_dir, tell, supervision=Supervision(rationales="all"))
    assert list(several.stores[0].label_texts) == wanted


def test_each_rationale_that_a_prompt_reads_is_a_row(tmp_path):
    rows = [{"input": "wet ?", "label": "no", "rationales": [{"text": "sun"}, {"text": "sand"}]}]
    (tmp_path / "rows.jsonl").write_text(json.dumps(rows[0]) + "\n")
    prepare("jsonl", source=tmp_path / "rows.jsonl", new_name="mine", data_dir=tmp_path)
    data = load(tmp_path, "rationale_input", supervision=Supervision(rationales="all"))
    assert texts(data) == [[(f"predict: wet ? rationale: {r}", "no") for r in ("sun", "sand")]]


def test_a_field_that_the_dataset_has_not_is_named(data_dir):
    objectives = (*step_by_step(), Objective("other", "rewrite: {input}", "{agian}"))
    with pytest.raises(
        InputError, match=r"objective other names the field \{agian\}, but"
    ) as error:
        load(data_dir, objectives)
    assert "input, label, rationale, llm_label, why_not, again; did you mean 'again'?" in str(
        error.value
    )
    with pytest.raises(InputError, match=r"names the field \{why_not\}.* --fields why_not"):
        load_task("delivery", split="train", objectives=step_by_step_multi(), data_dir=data_dir)


def test_words_that_the_vocabulary_cannot_write_are_refused(data_dir):
    odd = Objective("label", "{input}", "{rationale} ¶ {label}")
    with pytest.raises(
        InputError, match=r"`objectives`: the words ' ¶ ' .* choose different words"
    ):
        load_task("mine", split="train", objectives=odd, data_dir=data_dir)


def test_more_fields_come_back_from_a_prepared_dataset(data_dir):
    dataset = open_prepared("mine", data_dir)
    assert dataset.fields == FIELDS
    first, second, *_ = dataset.examples("train")
    assert (first.more, second.more) == ({"why_not": "no rain"}, {"again": "arid ?"})
    assert first.to_json()["why_not"] == "no rain"


@pytest.mark.slow
def test_rows_of_a_function_have_the_fields_that_objectives_name(tmp_path):
    def rows(split):
        yield ROWS[0]
        yield {"input": "dry ?", "label": "yes", "why_not": None}

    add_task("why", source=rows, splits=["train"], objectives=step_by_step_multi())
    data = load_task("why", split="train", objectives=step_by_step_multi(), data_dir=tmp_path)
    assert [[target for _, target in row] for row in texts(data)] == [
        ["no", "sun", "no rain"],
        ["yes"],
    ]
    with pytest.raises(InputError, match="row 1: field 'why_not' is missing; the row has input"):
        add_task(
            "why_else",
            source=lambda split: [{"input": "dry ?", "label": "yes"}],
            splits=["train"],
            objectives=step_by_step_multi(),
        )
