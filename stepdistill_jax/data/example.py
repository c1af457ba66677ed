"""The fields of one row of a dataset, whatever its source."""

import dataclasses
from collections.abc import Mapping
from typing import Any

FIELDS = ("id", "input", "label", "rationale", "rationales", "llm_label", "weight", "choices")
INPUT_PAIR = "input_pair"  # key of `Example.more`
_AS_THEY_STAND = frozenset(FIELDS) - {"rationales", "choices"}


@dataclasses.dataclass(frozen=True)
class Rationale:
    """One explanation of an example: its text, its author, and the label that it argues for."""

    text: str
    source: str = ""
    label: str = ""


@dataclasses.dataclass(frozen=True)
class Example:
    """A checked row. Texts are UTF-8.

    Attributes:
        id: unique within a split. In `predict`, the user's id: a string or an integer.
        input: the question, without the objective's prefix.
        label: the gold answer; empty if unknown.
        rationale: the teacher's explanation, which is trained on; may be empty.
        rationales: all explanations, including `rationale`; may be empty if there is only `rationale`.
        llm_label: the teacher's answer; may be empty.
        weight: loss weight of each target token; above 0.
        choices: the allowed answers, in order; empty if any answer is allowed.
        more: {field: text} of the fields named in `prepare(fields=...)`. The encoder reads `input_pair` after `input`.
    """

    id: str
    input: str
    label: str = ""
    rationale: str = ""
    rationales: tuple[Rationale, ...] = ()
    llm_label: str = ""
    weight: float = 1.0
    choices: tuple[str, ...] = ()
    more: Mapping[str, str] = dataclasses.field(default_factory=dict)

    @property
    def input_pair(self) -> str:
        """The second text of the input; "" if there is none."""
        return self.more.get(INPUT_PAIR, "")

    @property
    def texts(self) -> dict[str, str]:
        """{field: text} of the fields that a template may name."""
        return {
            "input": self.input,
            "label": self.label,
            "rationale": self.rationale,
            "llm_label": self.llm_label,
            **self.more,
        }

    def to_json(self) -> dict[str, Any]:
        """Returns the row for SPLIT.jsonl. Empty fields are left out, except id, input and label."""
        row: dict[str, Any] = {"id": self.id, "input": self.input, "label": self.label}
        for name in ("rationale", "llm_label"):
            if value := getattr(self, name):
                row[name] = value
        if self.rationales:
            # spelled out: dataclasses.asdict takes ten times as long
            row["rationales"] = [
                {"text": r.text, "source": r.source, "label": r.label} for r in self.rationales
            ]
        if self.weight != 1.0:
            row["weight"] = self.weight
        if self.choices:
            row["choices"] = list(self.choices)
        row |= {name: text for name, text in self.more.items() if text}
        return row

    @classmethod
    def from_json(cls, row: Mapping[str, Any]) -> "Example":
        """Returns the example that `to_json` converted to `row`, without checking the row."""
        return cls(
            **{name: value for name, value in row.items() if name in _AS_THEY_STAND},
            rationales=tuple(Rationale(**r) for r in row.get("rationales", ())),
            choices=tuple(row.get("choices", ())),
            more={name: value for name, value in row.items() if name not in FIELDS},
        )
