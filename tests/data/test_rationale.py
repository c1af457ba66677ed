"""The parser on hand-made completions with the forms of the original files."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stepdistill_jax.data.rationale import parse_choice, parse_equation

CHOICES = ("zoo", "lake", "old barn", "pond")


def test_a_choice_is_split_from_its_rationale_and_cut_at_the_next_question():
    parsed = parse_choice(
        "Ducks swim. Of these, only ponds fit. So the answer is (d) pond.\n\n"
        "Q: And now? A: So the answer is (a) zoo.\n\nQ: And then? A: So the answer is",
        CHOICES,
    )
    assert parsed.rationale == "Ducks swim. Of these, only ponds fit."
    assert (parsed.answer, parsed.answer_text, parsed.repaired) == ("pond", "pond", "pond")
    assert parsed.problems == ("runs_on",)


@pytest.mark.parametrize(
    ("text", "answer", "answer_text", "repaired", "problems"),
    [
        ("R. So the answer is (b) lake.", "lake", "lake", "lake", ()),
        ("R. So the answer is (b) lake or (d) pond.", "lake", "lake or (d) pond", "lake", ("label_not_a_choice",)),
        ("R. So the answer is (c) Old  Barn.", "old barn", "Old  Barn", "old barn", ("label_not_a_choice",)),
        ("R. So the answer is (b) pond.", "lake", "pond", "pond", ("label_disagrees_with_letter",)),
        ("R. So the answer is lake.", "", "", "lake", ("no_letter",)),
        ("R. So the answer is one of these.", "", "", "", ("no_letter", "label_not_a_choice")),
        ("R. So the answer is (e) lake.", "", "lake", "lake", ("letter_not_a_choice",)),
        ("R. So the answer is (B) lake", "lake", "lake", "lake", ()),
        ("So the answer is (a) zoo.", "zoo", "zoo", "zoo", ("no_rationale",)),
        ("R. So the answer is", "", "", "", ("no_letter", "label_not_a_choice", "truncated")),
        ("Ducks swim and swim and", "", "", "", ("no_answer", "truncated")),
        ('Ducks swim, "and swim."', "", "", "", ("no_answer",)),
        ("R. So the answer is (d) po", "pond", "po", "pond", ("label_not_a_choice", "truncated")),
        ("  \n", "", "", "", ("empty",)),
        ("Q: what?", "", "", "", ("runs_on", "empty")),
        (
            "R. So the answer is (a) zoo. So the answer is (b) lake.",
            "", "", "zoo", ("several_answers",),
        ),
    ],
    ids=lambda value: value[:40] if isinstance(value, str) else None,
)  # fmt: skip
def test_each_way_of_failing_to_choose_has_a_name(text, answer, answer_text, repaired, problems):
    parsed = parse_choice(text, CHOICES)
    assert (parsed.answer, parsed.answer_text, parsed.repaired) == (answer, answer_text, repaired)
    assert parsed.problems == problems


@pytest.mark.parametrize(
    ("text", "answer", "repaired", "problems"),
    [
        ("Half. The answer is (84 / 2).", "(84 / 2)", "(84 / 2)", ()),
        ("R. The answer is (16 * 17) * 4.", "(16 * 17)", "(16 * 17) * 4", ("equation_goes_on",)),
        ("R. The answer is ((1 + 2) * 3).\n\nQ", "((1 + 2) * 3)", "((1 + 2) * 3)", ()),
        ("R. The answer is (some - 8).", "(some - 8)", "", ("no_value",)),
        ("R. The answer is (8 / 4) and (6 / 4).", "(8 / 4) and (6 / 4)", "", ("no_value",)),
        ("R. The answer is (3 + 4) apples.", "(3 + 4)", "(3 + 4)", ()),
        ("R. The answer is 42.", "", "42", ("no_parentheses",)),
        ("R. The answer is ((491 - 21", "", "", ("no_parentheses", "truncated")),
        ("R. The answer is (84 / 2)", "(84 / 2)", "(84 / 2)", ()),
        ("3 + 4 = 8. The answer is (3 + 4).", "(3 + 4)", "(3 + 4)", ("arithmetic_wrong",)),
        ("The answer is (2).", "(2)", "(2)", ("no_rationale",)),
        ("32 sacks. 32 sacks. 32", "", "", ("no_answer", "truncated")),
        ("R. The answer is (1). The answer is (2).", "", "(1)", ("several_answers",)),
    ],
    ids=lambda value: value[:40] if isinstance(value, str) else None,
)
def test_each_way_of_failing_to_compute_has_a_name(text, answer, repaired, problems):
    parsed = parse_equation(text)
    assert (parsed.answer, parsed.repaired, parsed.problems) == (answer, repaired, problems)


def test_a_text_without_an_answer_has_no_rationale():
    # a truncated text may argue for any answer, so it is not trained on
    assert parse_choice("Ducks swim and swim and", CHOICES).rationale == ""
    assert parse_equation("32 sacks. 32 sacks.").rationale == ""


pieces = st.lists(
    st.sampled_from(["Q:", "So the answer is", "The answer is", " (a) ", "(b)", "(z)", "zoo", "(1 + 2)", "(", ".", "\n", "Q", ":", "A:", " x "]),
    max_size=12,
).map("".join)  # fmt: skip


@given(pieces, pieces)
def test_what_follows_the_next_question_changes_nothing(text, more):
    own = text.split("Q:")[0]
    for parse in (lambda t: parse_choice(t, CHOICES), parse_equation):
        alone, runs_on = parse(own), parse(f"{own}Q:{more}")
        # if the text runs on, only the invented question is truncated
        kept = (kind for kind in alone.problems if kind != "truncated")
        assert runs_on.problems == ("runs_on", *kept)
        assert (alone.rationale, alone.answer, alone.repaired) == (
            runs_on.rationale,
            runs_on.answer,
            runs_on.repaired,
        )


@given(st.one_of(pieces, st.text()))
def test_any_text_is_parsed_into_parts_of_itself_or_choices(text):
    choice, equation = parse_choice(text, CHOICES), parse_equation(text)
    for parsed in (choice, equation):
        assert parsed.rationale in text
        assert "Q:" not in parsed.rationale
        assert "answer is" not in parsed.rationale or parsed.rationale.count("answer is") < text.count("answer is")  # fmt: skip
    assert choice.answer in ("", *CHOICES)
    assert choice.repaired in ("", *CHOICES)
    assert equation.answer in text
    assert equation.repaired in text
