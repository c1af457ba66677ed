import pytest

from stepdistill_jax.data.example import Example
from stepdistill_jax.teacher.answers import KINDS, Answer, read_answer

CQA = Example("1", "Where?", "sea", choices=("sky", "sea"))
PAIR = Example("1", "Premise: p\nHypothesis: h", "neutral")
FREE = Example("1", "Capital of Italy?", "Rome")
TICKET = Example("1", "late", "post", choices=("pay", "post"))

GOOD = {
    "cqa": ("cqa", CQA, "Fish swim. So the answer is (b) sea.", "Fish swim.", "sea"),
    "svamp": ("svamp", FREE, "Add. The answer is (3 + 4).", "Add.", "(3 + 4)"),
    "esnli": ("esnli", PAIR, "Unclear. Answer: neutral", "Unclear.", "neutral"),
    "esnli folded": ("esnli", PAIR, "Unclear. Answer: Neutral.", "Unclear.", "neutral"),
    "anli": ("anli", PAIR, "Unclear. So the answer is neutral.", "Unclear.", "neutral"),
    "free": ("generic", FREE, "It is Rome. So the answer is Rome.", "It is Rome.", "Rome"),
    "choices": ("generic", TICKET, "Late. So the answer is post.", "Late.", "post"),
    "thinking": ("generic", FREE, "<think>So the answer is X.</think>\nA: Old. So the answer is Rome.",
                 "Old.", "Rome"),
    "opening": ("esnli", PAIR, "Explanation: Unclear. Answer: neutral", "Unclear.", "neutral"),
}  # fmt: skip
BAD = {
    "empty": ("generic", FREE, "  "),
    "no_answer": ("anli", PAIR, "It is neutral."),
    "no_rationale": ("esnli", PAIR, "Answer: neutral"),
    "label_not_a_choice": ("esnli", PAIR, "Hm. Answer: perhaps"),
    "no_parentheses": ("svamp", FREE, "Add. The answer is seven."),
}


@pytest.mark.parametrize("case", GOOD)
def test_a_well_formed_answer_gives_its_rationale_and_label(case):
    task, row, text, rationale, label = GOOD[case]
    reading = read_answer(task, Answer(text), row)
    assert (reading.rationale, reading.label, reading.usable) == (rationale, label, True)
    # what `prepare` would repair is said to be so
    assert reading.problems == (("label_not_a_choice",) if case == "esnli folded" else ())


@pytest.mark.parametrize("kind", BAD)
def test_an_answer_that_cannot_be_read_has_a_name_and_is_not_usable(kind):
    task, row, text = BAD[kind]
    reading = read_answer(task, Answer(text), row)
    assert kind in reading.problems
    assert not reading.usable
    assert set(reading.problems) <= set(KINDS)


@pytest.mark.parametrize(
    ("task", "row", "text"),
    [
        ("esnli", PAIR, "Unclear. Answer: neutral\n\nPremise: x\nHypothesis: y\nAnswer: entail"),
        ("generic", FREE, "Old. So the answer is Rome.\n\nQ: And of France?\nA: Paris. So the"),
        ("cqa", CQA, "Fish. So the answer is (b) sea.\n\nQ: x\nA: So the answer is (a) sky."),
    ],
    ids=["pair", "free", "cqa"],
)
def test_an_answer_that_runs_on_is_cut_at_the_next_question_and_is_whole(task, row, text):
    """Also at the token limit: what was asked for stood before the invented question."""
    reading = read_answer(task, Answer(text, "length"), row)
    assert reading.problems == ("runs_on",)
    assert reading.label in (row.label, "neutral")
    assert reading.usable


def test_an_answer_cut_at_the_limit_is_truncated_even_if_a_label_can_be_read():
    reading = read_answer("anli", Answer("Hm. So the answer is neutral", "length"), PAIR)
    assert reading.problems == ("truncated",)
    assert not reading.usable


@pytest.mark.parametrize(
    ("task", "row", "kind"),
    [("generic", TICKET, "no_answer"), ("esnli", PAIR, "no_answer"), ("cqa", CQA, "no_answer")],
)
def test_only_the_finish_reason_makes_an_answer_truncated(task, row, kind):
    text = "**Reason** transport.\n\n**Label:** delivery"
    assert read_answer(task, Answer(text), row).problems == (kind,)
    assert read_answer(task, Answer(text, "length"), row).problems == ("truncated",)


def test_a_filtered_answer_is_named():
    assert read_answer("generic", Answer("", "content_filter"), FREE).problems == ("filtered",)


def test_under_a_given_label_an_argument_for_another_one_is_of_no_use():
    text = "Hm. So the answer is {}."
    given = read_answer("anli", Answer(text.format("neutral")), PAIR, label_given=True)
    other = read_answer("anli", Answer(text.format("entailment")), PAIR, label_given=True)
    assert given.usable
    assert not other.usable
    assert other.problems == ("label_not_the_given_one",)
