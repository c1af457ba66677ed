import pytest

from stepdistill_jax.data.example import Example, Rationale
from stepdistill_jax.teacher.answers import Answer, Reading
from stepdistill_jax.teacher.vote import output_row, vote


@pytest.mark.parametrize(
    ("labels", "metric", "wanted"),
    [
        (["a"], "text_match", ("a", 1.0)),
        (["a", "b", "b"], "text_match", ("b", 2 / 3)),
        (["b", "a", "a", "b"], "text_match", ("b", 0.5)),  # a tie: the first
        (["a  b", "c", "a b"], "text_match", ("a  b", 2 / 3)),
        (["(84 / 2)", "(4 * 2)", "(40 + 2)"], "value_match", ("(84 / 2)", 2 / 3)),
        (["(1 / 0)", "3"], "value_match", ("(1 / 0)", 0.5)),
    ],
)
def test_the_vote_goes_to_the_commonest_label_and_a_tie_to_the_first(labels, metric, wanted):
    assert vote(labels, metric) == wanted


def row(texts, label_given=False, **fields):
    samples = [
        (Answer(t), Reading(t, label, (), True) if label else Reading(problems=("no_answer",)))
        for t, label in texts
    ]
    return output_row(
        Example("q3", "in", "gold", **fields),
        samples,
        task="generic",
        source="m",
        label_given=label_given,
        provenance={"model": "m"},
    )


def test_the_rationale_is_the_first_that_argues_for_the_voted_label():
    out = row([("r1", "x"), ("r2", "y"), ("r3", "y"), ("r4", "")])
    assert (out["llm_label"], out["rationale"], out["weight"]) == ("y", "r2", 0.666667)
    assert [(r["text"], r["label"]) for r in out["rationales"]] == [
        ("r1", "x"),
        ("r2", "y"),
        ("r3", "y"),
    ]
    assert {r["source"] for r in out["rationales"]} == {"m"}
    assert out["provenance"]["answers"][3]["problems"] == ["no_answer"]


def test_the_share_multiplies_a_weight_that_was_there():
    assert row([("r1", "x"), ("r2", "y")], weight=4.0)["weight"] == 2.0
    assert "weight" not in row([("r1", "x")])


def test_a_teacher_that_knew_the_label_has_no_label_of_its_own():
    out = row([("r1", "gold"), ("r2", "gold")], label_given=True)
    assert "llm_label" not in out and "weight" not in out
    assert out["rationale"] == "r1"
    assert {r["label"] for r in out["rationales"]} == {"gold"}


def test_rationales_that_were_there_stay_behind_the_teachers():
    human = {"text": "h", "source": "human", "label": "gold"}
    assert row([("r1", "x")], rationales=(Rationale(**human),))["rationales"][1] == human
    nothing = row([("r1", "")], rationales=(Rationale(**human),))
    assert nothing["rationales"] == [human]
    assert "llm_label" not in nothing and "rationale" not in nothing


def test_a_label_of_an_earlier_teacher_stays_until_there_is_a_new_one():
    assert row([("r1", "gold")], label_given=True, llm_label="old")["llm_label"] == "old"
    assert row([("r1", "")], llm_label="old")["llm_label"] == "old"
    assert row([("r1", "x")], llm_label="old")["llm_label"] == "x"
