"""Names the kinds of defect of a row, and says how `prepare` handles each."""

import dataclasses

from stepdistill_jax.data.rows import place

TEXT_LENGTH = 200  # characters of a defect's text
BAD_ROW = "bad_row"
# kind -> its meaning; then what `prepare` does about it, if anything
KINDS = {
    BAD_ROW: "a row that cannot be used, for the reason in its text; left out under `on_error=skip`",
    "blanks_around_label": "blanks before or after the label; stripped",
    "runs_on": "the text continues with an invented question; truncated there",
    "empty": "no text before the next question",
    "no_answer": "no answer in the text: neither rationale nor answer; the row keeps its label",
    "several_answers": "more than one answer before the next question; the first is taken",
    "no_rationale": "an answer with nothing before it; the row keeps its label",
    "truncated": "the text breaks off: no full stop and no complete answer",
    "no_letter": "no `(x)` in the answer; its text is taken if it is a choice",
    "letter_not_a_choice": "a letter beyond the choices",
    "label_not_a_choice": "the answer is not exactly one of the choices or labels",
    "label_disagrees_with_letter": "letter and text name different choices; the text is taken",
    "no_parentheses": "no `( ... )` in the answer; all of it is read if it has a value",
    "no_value": "an equation that cannot be computed",
    "equation_goes_on": "the equation continues after its parentheses; all of it is read",
    "arithmetic_wrong": "a wrong sum in the rationale, such as 3 + 4 = 8",
    "point_zero": "a whole number with decimals, such as 36.0; written 36",
    "no_answer_line": "no last line `#### N` with the answer; the row keeps its label",
    "ends_elsewhere": "the last number of the worked solution is not the answer",
    "repeated_choices": "the question has a choice twice",
    "gold_not_a_choice": "the gold label is none of the choices",
    "gold_has_no_value": "the gold label cannot be computed",
}

# harmless: only text after the answer is truncated
HARMLESS = ("runs_on",)


@dataclasses.dataclass(frozen=True)
class Defect:
    """One defect of a row, and its place.

    Attributes:
        kind: a name in KINDS.
        file: name of the row's file; "" for a list in Python.
        row: line number, or position in a list, from 1.
        text: the affected text, truncated to 200 characters.
    """

    kind: str
    file: str
    row: int
    text: str = ""

    def __post_init__(self):
        if len(self.text) > TEXT_LENGTH:
            object.__setattr__(self, "text", self.text[: TEXT_LENGTH - 1] + "…")

    @property
    def where(self) -> str:
        """`file:row`; `row 3` if there is no file."""
        return place(self.file, self.row)
