import json

import pytest

from stepdistill_jax.data.example import Example
from stepdistill_jax.data.nli_rationale import LABELS
from stepdistill_jax.errors import InputError
from stepdistill_jax.teacher.answers import Answer, read_answer
from stepdistill_jax.teacher.prompts import load_prompter, with_choices

ROWS = {
    "cqa": Example("1", "Where do fish live?", "sea", choices=("sky", "sea", "desk")),
    "svamp": Example("1", "There are 3 cats and 4 dogs. How many animals?", "(3 + 4)"),
    "esnli": Example("1", "Premise: A dog runs.\nHypothesis: An animal runs.", "entailment"),
    "anli": Example("1", "Premise: A dog runs.\nHypothesis: An animal runs.", "entailment"),
}
# where the teacher goes on: after it a well-formed answer is wanted
ENDS = {"cqa": "A:", "svamp": "A:", "esnli": "Explanation:", "anli": "Explanation:"}


@pytest.mark.parametrize("task", ROWS)
def test_each_exemplar_is_an_answer_that_our_parser_reads_as_its_label(task):
    """The prompt is cut into its shown answers, and each is read as a teacher's would be."""
    prompter = load_prompter(task)
    assert 4 <= len(prompter.exemplars) <= 7
    *shown, last = prompter.prompt(ROWS[task]).split(f"\n{ENDS[task]}")
    assert last == ""
    answers = [part.split("\n\n")[0] for part in shown[1:]]
    assert len(answers) == len(prompter.exemplars)
    for text, exemplar in zip(answers, prompter.exemplars, strict=True):
        reading = read_answer(task, Answer(text), exemplar)
        assert (reading.rationale, reading.label) == (exemplar.rationale, exemplar.label)
        assert reading.problems == ()


@pytest.mark.parametrize("task", ROWS)
def test_the_question_stands_once_at_the_end_of_the_prompt(task):
    prompt = load_prompter(task).prompt(ROWS[task])
    assert prompt.count(ROWS[task].input) == 1
    assert prompt.index(ROWS[task].input) > 0.8 * len(prompt)
    assert prompt.endswith(ENDS[task])
    assert "Right" not in prompt  # the gold label is not told unless it is asked for


@pytest.mark.parametrize("task", ROWS)
def test_a_given_label_is_told_for_the_question_and_for_each_exemplar(task):
    prompter = load_prompter(task, label_given=True)
    prompt = prompter.prompt(ROWS[task])
    lines = [line for line in prompt.splitlines() if line.startswith("Right ")]
    assert len(lines) == len(prompter.exemplars) + 1
    assert lines[-1].endswith("(b) sea" if task == "cqa" else ROWS[task].label)


def test_exemplars_of_pairs_show_every_label():
    for task in ("esnli", "anli"):
        assert {e.label for e in load_prompter(task).exemplars} == set(LABELS)


def test_the_letters_of_the_right_answers_differ():
    letters = [e.choices.index(e.label) for e in load_prompter("cqa").exemplars]
    assert len(set(letters)) >= 4


def test_choices_are_not_listed_twice():
    listed = "Where?\nAnswer Choices:\n(a) sky\n(b) sea"
    assert with_choices(Example("1", listed, choices=("sky", "sea")), lettered=True) == listed
    assert with_choices(Example("1", "Where?", choices=("sky", "sea")), lettered=True) == listed


def test_a_generic_prompt_shows_instructions_exemplars_and_choices(tmp_path):
    exemplars = tmp_path / "shown.jsonl"
    exemplars.write_text(json.dumps({"input": "card broke", "rationale": "Pay.", "label": "pay"}))
    prompter = load_prompter(
        "generic", exemplars=exemplars, instructions="Route the ticket.", choices=("pay", "post")
    )
    prompt = prompter.prompt(Example("1", "parcel {{ 7 * 7 }} late", choices=("pay", "post")))
    assert prompt.startswith("Route the ticket.\n")
    assert "Q: card broke\nChoices:\n- pay\n- post\nA: Pay. So the answer is pay.\n" in prompt
    # a user's text is data, whatever it looks like
    assert prompt.endswith("Q: parcel {{ 7 * 7 }} late\nChoices:\n- pay\n- post\nA:")


@pytest.mark.parametrize(
    ("task", "exemplars", "says"),
    [
        ("esnly", None, "did you mean 'esnli'"),
        (
            "generic",
            '{"input": "a", "label": "b"}',
            "no field .rationale. .*an exemplar .* shows a complete answer",
        ),
        ("generic", "", "no rows in it"),
    ],
)
def test_what_cannot_be_a_prompt_is_refused(tmp_path, task, exemplars, says):
    path = None
    if exemplars is not None:
        path = tmp_path / "e.jsonl"
        path.write_text(exemplars)
    with pytest.raises(InputError, match=says):
        load_prompter(task, exemplars=path)
