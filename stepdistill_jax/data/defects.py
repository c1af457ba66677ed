"""The defects of rows: the name of each, and how `prepare` handles it."""

import dataclasses

from stepdistill_jax.data.rows import place

TEXT_LENGTH = 200  # characters of a defect's text
BAD_ROW = "bad_row"
# kind -> what it means and, where that is not "nothing", what is done
KINDS = {
    BAD_ROW: "a row that cannot be used, for the reason in its text; left out where that is asked for",
    "blanks_around_label": "blanks before or after the label; stripped",
    "runs_on": "text goes on with an invented question; cut there",
    "empty": "no text before the next question",
    "no_answer": "no answer in the text: neither rationale nor answer; the row keeps its label",
    "several_answers": "more than one answer before the next question; the first is taken",
    "no_rationale": "an answer with nothing before it; the row keeps its label",
    "truncated": "the text breaks off: no full stop, and no whole answer",
    "no_letter": "no `(x)` in the answer; its text is taken where it is a choice",
    "letter_not_a_choice": "a letter beyond the choices",
    "label_not_a_choice": "the answer is, letter by letter, none of the choices or labels",
    "label_disagrees_with_letter": "letter and text name different choices; the text is taken",
    "no_parentheses": "no `( ... )` in the answer; read whole where it has a value",
    "no_value": "an equation that cannot be computed",
    "equation_goes_on": "the equation goes on after its parentheses; read whole",
    "arithmetic_wrong": "a sum in the rationale does not add up, as 3 + 4 = 8",
    "point_zero": "a whole number with decimals, as 36.0; written 36",
    "no_answer_line": "no last line `#### N` with the answer; the row keeps its label",
    "ends_elsewhere": "the last number of the worked solution is not the answer",
    "repeated_choices": "a choice stands twice in the question",
    "gold_not_a_choice": "the gold label is none of the choices",
    "gold_has_no_value": "the gold label cannot be computed",
}

# nothing is lost by it: what follows the answer is cut off
HARMLESS = ("runs_on",)


@dataclasses.dataclass(frozen=True)
class Defect:
    """One thing that is wrong with a row, and where it stands.

    Attributes:
        kind: a name in KINDS.
        file: the file in which it was found; empty of a list in Python.
        row: its position there (line number, or index in a list, both from 1).
        text: the text concerned, cut to TEXT_LENGTH.
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
        """`file:row`, or `row 3` where there is no file."""
        return place(self.file, self.row)
