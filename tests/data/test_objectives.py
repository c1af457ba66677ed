"""Objectives: labels parsed by templates, arms, decoder prefixes, and their way through stepdistill.json."""

import dataclasses
import json
import pathlib
import re

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from stepdistill_jax.commands.gin_config import load_config
from stepdistill_jax.data.objectives import (
    ARMS,
    RATIONALE_THEN_LABEL,
    Objective,
    held_out_objectives,
    rationale_input,
    resolve,
    share_encoding,
    shared_encoder,
    single_task,
    step_by_step,
    step_by_step_llm,
)
from stepdistill_jax.data.templates import fields_of, parse, words_and_fields
from stepdistill_jax.data.vocabulary import ByteVocabulary
from stepdistill_jax.errors import InputError
from stepdistill_jax.formats.directory import TASK_INFO, TaskInfo, read_task_info, write_model_files
from stepdistill_jax.models.families import model_config
from stepdistill_jax.training.config import TrainConfig
from stepdistill_jax.training.provenance import differences


@pytest.mark.parametrize(
    ("prefix", "message"),
    [
        (7, "expected text, got 7"),
        (" ", "text that is not blank, got"),
        ("w" * 201, "at most 200 characters"),
        ("why {input}: ", "text without braces"),
    ],
)
def test_a_bad_prefix_is_refused(prefix, message):
    with pytest.raises(InputError, match="Objective why: decoder_prefix: ") as caught:
        Objective("why", "{input}", "{rationale}", decoder_prefix=prefix)
    assert message in str(caught.value)


def test_the_objective_that_is_served_has_none():
    label, rationale = shared_encoder()
    assert resolve((label, rationale)) == ARMS["shared_encoder"]()
    with pytest.raises(InputError, match=r"Objective rationale: the first .* 'explain: '"):
        resolve((rationale, label))


def test_the_shared_encoder_asks_for_the_label_as_step_by_step_does():
    assert shared_encoder(1.0, 3.0)[0] == step_by_step(1.0, 3.0)[0]
    fields = {"input": "2 + 2", "label": "4", "rationale": "two and two"}
    inputs = [o.render(fields)[0] for o in shared_encoder()]
    assert inputs == ["predict: 2 + 2"] * 2


@pytest.fixture
def directory(tmp_path):
    info = TaskInfo("sums", shared_encoder(), 40, 24, 8)
    config = model_config("t5_v1_1", "tiny", vocab_size=259)
    write_model_files(tmp_path, config, ByteVocabulary(), info)
    assert read_task_info(tmp_path) == info
    return tmp_path


def rewrite(directory, change):
    raw = json.loads((directory / TASK_INFO).read_text())
    change(raw["objectives"])
    (directory / TASK_INFO).write_text(json.dumps(raw))


def test_a_directory_of_an_older_version_has_no_prefixes(directory):
    def forget(objectives):
        for o in objectives:
            del o["decoder_prefix"]

    rewrite(directory, forget)
    expected = tuple(dataclasses.replace(o, decoder_prefix="") for o in shared_encoder())
    assert read_task_info(directory).objectives == expected


def test_a_directory_whose_target_has_no_words_between_fields_answers_as_it_did(directory):
    def mix(objectives):
        objectives[0]["target_template"] = "{rationale} {label}"

    rewrite(directory, mix)
    objective = read_task_info(directory).objectives[0]
    assert objective.parse("it rains no") == {"label": "it rains no"}
    assert not objective.writes_more


def test_a_directory_whose_label_has_a_prefix_is_refused(directory):
    rewrite(directory, lambda objectives: objectives.reverse())
    with pytest.raises(
        InputError, match=r"stepdistill.json: objectives: Objective rationale: the f"
    ):
        read_task_info(directory)


def test_a_run_of_an_older_version_goes_on():
    now = json.loads(json.dumps(TrainConfig(task="sums").to_json()))
    described = {"config": now, "fingerprint": {}, "model": {}}
    before = json.loads(json.dumps(described))
    for o in before["config"]["objectives"]:
        del o["decoder_prefix"]
    assert differences(before, described) == []
    now["objectives"][1]["decoder_prefix"] = "explain: "
    assert [line.split()[0] for line in differences(before, described)] == ["`objectives`"]


def test_the_objectives_of_the_page_share_an_encoding(tmp_path):
    page = pathlib.Path(__file__).parents[2] / "docs" / "lab" / "shared_encoder.md"
    (block,) = re.findall(r"```gin\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)
    parts = ("train.gin", "models/t5_v1_1.gin", "optimizers/adamw.gin")
    text = "".join(f'include "{part}"\n' for part in parts)
    (tmp_path / "own.gin").write_text(f'{text}TASK = "mine"\nTRAIN_STEPS = 1\n{block}')
    config, _ = load_config(str(tmp_path / "own.gin"))
    assert [o.name for o in config.objectives] == ["label", "rationale", "teacher"]
    assert [o.decoder_prefix for o in config.objectives] == ["", "explain: ", "the teacher says: "]
    assert share_encoding(config.objectives)


@pytest.mark.parametrize(
    ("template", "text", "fields"),
    [
        ("{label}", " as it stands ", {"label": " as it stands "}),
        ("{input}", "no label in it", {"label": "no label in it"}),
        (
            RATIONALE_THEN_LABEL,
            "it rains so the answer is no",
            {"label": "no", "rationale": "it rains"},
        ),
        (RATIONALE_THEN_LABEL, "so the answer is no", {"label": "no", "rationale": ""}),
        (
            RATIONALE_THEN_LABEL,
            "a  so the\nanswer is b so the answer is c d",
            {"label": "c d", "rationale": "a so the answer is b"},
        ),
        (RATIONALE_THEN_LABEL, "no", None),
        (RATIONALE_THEN_LABEL, "it rains so the answer is", None),
        (RATIONALE_THEN_LABEL, "it rains so the answer isolates", None),
        (
            "{llm_label}, since {rationale}.",
            "no, since it rains, since June.",
            {"label": "no", "rationale": "it rains, since June"},
        ),
        ("{llm_label}, since {rationale}.", "no, since it rains", None),
        (
            "The answer is {label}. {rationale}",
            "The answer is yes. They have wings. They are light.",
            {"label": "yes", "rationale": "They have wings. They are light."},
        ),
        (
            "{rationale} so {label} and not {why_not}",
            "it rains so so no and not dry and not warm",
            {"rationale": "it rains so", "label": "no", "why_not": "dry and not warm"},
        ),
        ("{label} because {rationale}", "no because", {"label": "no", "rationale": ""}),
        ("{label} because {rationale}", "no for it rains", None),
        ("{rationale}{label}", "told by nothing", {"label": "told by nothing"}),
        ("It is {label}", "It is {wet}", {"label": "{wet}"}),
        ("It is {label}", "Is it wet", None),
        ("{{{label}}}", "{ wet }", {"label": "wet"}),
        (
            "{rationale} not {why_not} but {label}",
            "it rains not but no",
            {"rationale": "it rains", "why_not": "", "label": "no"},
        ),
    ],
)
def test_a_label_is_parsed_by_the_words_of_its_template(template, text, fields):
    assert Objective("label", "{input}", template).parse(text) == fields


@given(
    rationale=st.text(), label=st.text(), words=st.sampled_from([" so the answer is ", "; ", "→"])
)
def test_what_is_rendered_is_parsed_again(rationale, label, words):
    label = " ".join(label.split())
    assume(label and f" {words.strip()} " not in f" {label} " and words.strip() not in label)
    objective = Objective("label", "{input}", f"{{rationale}}{words}{{label}}")
    _, target = objective.render({"rationale": rationale or "since", "label": label})
    assert objective.parse(target) == {
        "rationale": " ".join((rationale or "since").split()),
        "label": label,
    }


@given(label=st.text(), rationale=st.text())
def test_a_label_that_comes_first_is_parsed_again(label, rationale):
    label, rationale = " ".join(label.split()), " ".join(rationale.split()) or "since"
    assume(label and "because" not in label)
    objective = Objective("label", "{input}", "{label} because {rationale}")
    _, target = objective.render({"rationale": rationale, "label": label})
    assert objective.parse(target) == {"label": label, "rationale": rationale}


def test_a_first_target_without_words_between_its_fields_is_refused():
    mixed = Objective("label", "{input}", "{rationale} {label}")
    with pytest.raises(
        InputError, match=r"'\{rationale\} \{label\}': expected words between any two fields"
    ):
        resolve(mixed)
    assert resolve((*step_by_step(), Objective("other", "{input}", "{rationale} {label}")))


def test_a_row_that_lacks_a_field_of_its_prompt_is_left_out():
    (objective,) = rationale_input()
    row = {"input": "wet ?", "label": "no", "rationale": "it rains"}
    assert objective.render(row) == ("predict: wet ? rationale: it rains", "no")
    assert objective.render(row | {"rationale": ""}) == ("predict: wet ? rationale: ", "")
    assert objective.render(row | {"input": ""})[1] == "no"
    assert objective.read_beside_input == ("rationale",)


def test_validation_measures_the_teachers_label_by_the_gold_one():
    label, rationale = held_out_objectives(step_by_step_llm(1.0, 3.0))
    assert (label, rationale) == step_by_step(1.0, 3.0)
    assert held_out_objectives(single_task()) == single_task()


# the paper's alpha is 0.5; a single objective has all of the weight
WEIGHTS = {
    "label_only": (1.0,),
    "label_only_llm": (1.0,),
    "single_task": (1.0,),
    "rationale_input": (1.0,),
    "step_by_step": (0.5, 0.5),
    "step_by_step_llm": (0.5, 0.5),
    "copy_control": (0.5, 0.5),
    "shared_encoder": (0.5, 0.5),
    "step_by_step_multi": (0.5, 0.25, 0.25),
}


@pytest.mark.parametrize("arm", ARMS)
def test_an_arm_has_a_part_with_its_own_weights(arm, tmp_path):
    config, _ = load_config("demo_step_by_step", gin_files=[f"objectives/{arm}.gin"])
    assert config.objectives == ARMS[arm]()
    assert tuple(o.weight for o in config.objectives) == WEIGHTS[arm]
    assert load_config("demo_step_by_step", [f"OBJECTIVES={arm}"])[0].objectives[0].name == "label"


def test_templates_docstrings():
    template = "{rationale} so {label}"
    assert fields_of(template) == ("rationale", "label")
    assert words_and_fields(f"{template}.") == (("", "rationale"), (" so ", "label"), (". ", None))
    found = parse(template, "wet so slow so no", "label")
    assert found == {"rationale": "wet so slow", "label": "no"}
    # what the comments in `parse` promise of empty fields
    assert parse(template, "so no", "label") == {"rationale": "", "label": "no"}
    assert parse(template, "wet so", "label") == {"rationale": "wet", "label": ""}
