"""Names the kinds of defect of a row, and says how `prepare` handles each."""

import dataclasses

from stepdistill_jax.data.rows import place

TEXT_LENGTH = 200  # characters of a defect's text
BAD_ROW = "bad_row"
# {kind: its meaning, and what `prepare` does about it, if anything}
KINDS = {
    BAD_ROW: "the row cannot be used (the field `text` says why); `on_error=skip` leaves it out",
    "blanks_around_label": "the label has blanks before or after it, which are stripped",
    "runs_on": "the text continues with an invented question, and is truncated there",
    "empty": "there is no text before the next question",
    "no_answer": "the text has no answer, so its rationale is not used; the row keeps its label",
    "several_answers": "there is more than one answer before the next question; the first is taken",
    "no_rationale": "there is nothing before the answer; the row keeps its label",
    "truncated": "the text breaks off: it has no complete answer and does not end like a sentence",
    "no_letter": "the answer has no letter `(x)`; if its text is one of the choices, that choice is the answer",
    "letter_not_a_choice": "the question has no choice with this letter",
    "label_not_a_choice": "the answer does not exactly match any choice or label",
    "label_disagrees_with_letter": "letter and text name different choices; the text is taken",
    "no_parentheses": "the answer has no `( ... )`; the whole answer is the equation if it can be computed",
    "no_value": "the equation cannot be computed",
    "equation_goes_on": "the equation continues after the `)`; the complete equation is read",
    "arithmetic_wrong": "an equation in the rationale is wrong, such as 3 + 4 = 8",
    "point_zero": "a whole number has decimals, such as 36.0; it is rewritten as 36",
    "no_answer_line": "the last line is not `#### N` with the answer; the row keeps its label",
    "ends_elsewhere": "the last number of the worked solution is not the answer",
    "repeated_choices": "the question has the same choice twice",
    "gold_not_a_choice": "the gold label is none of the choices",
    "gold_has_no_value": "the gold label cannot be computed",
}

# harmless: only text after the answer is truncated
HARMLESS = ("runs_on",)


@dataclasses.dataclass(frozen=True)
class Defect:
    """One defect of a row, and its place.

    Attributes:
        kind: a key of `KINDS`.
        file: name of the file; "" for a list in Python.
        line: line of the file, or number of the item in a list or a JSON array, from 1.
        text: the affected text, truncated.
    """

    kind: str
    file: str
    line: int
    text: str = ""

    def __post_init__(self):
        if len(self.text) > TEXT_LENGTH:
            object.__setattr__(self, "text", self.text[: TEXT_LENGTH - 1] + "…")

    @property
    def where(self) -> str:
        """Place of the defect: `file:line`, or `row 3` if there is no file."""
        return place(self.file, self.line)
