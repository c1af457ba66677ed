"""What a model is trained on: N objectives over one example, and the paper's arms by name."""

import dataclasses
import re
import string
from collections.abc import Callable, Mapping, Sequence
from typing import ClassVar

from stepdistill_jax.errors import InputError, nearest

MAX_PREFIX = 200  # characters: a prefix is a few words, and model directories bring their own


@dataclasses.dataclass(frozen=True)
class Objective:
    """One (input, target) pair made of an example's fields, and what its loss is worth.

    Hsieh et al. 2023 (arXiv:2305.02301, section 3.2): `predict: x -> label`, `explain: x -> rationale`.

    Example: `Objective("label", "predict: {input}", "{label}", 0.5)`.

    Attributes:
        name: key of its metrics (`loss/<name>`) and of its SeqIO task (`TASK_<name>`).
        input_template: text with `{field}` of an example: input, label, rationale, llm_label.
        target_template: the same. A row whose target names an absent (empty) field is left out.
        weight: factor of its mean cross-entropy in the loss; at least 0.
        decoder_prefix: text that the decoder is given before the target, which then goes on from
            there; its tokens are in no loss. For objectives that read one encoding of the same
            input, and are told apart by it.

    Raises:
        InputError: a weight that is no number from 0, a name that is not lower_snake, a template that
            is no text, or has an unknown field or anything in its braces but the field's name, a
            decoder prefix that is no text, is blank or very long, or has braces.
    """

    name: str
    input_template: str
    target_template: str
    weight: float = 1.0
    decoder_prefix: str = ""

    FIELDS: ClassVar[tuple[str, ...]] = ("input", "label", "rationale", "llm_label")

    def __post_init__(self):
        name, weight = self.name, self.weight
        if not isinstance(name, str) or not re.fullmatch(r"[a-z][a-z0-9_]*", name):
            raise InputError(f"Objective.name: lower_snake_case is wanted, got {name!r}")
        # float32 holds it
        number = isinstance(weight, int | float) and not isinstance(weight, bool)
        if not number or not 0 <= weight <= 3.4e38:
            raise InputError(f"Objective {name}: weight must be at least 0, got {weight!r}")
        for template in (self.input_template, self.target_template):
            if not isinstance(template, str):
                raise InputError(f"Objective {name}: a template is text, got {template!r}")
            for field in fields_of(template):
                if field not in self.FIELDS:
                    raise InputError(
                        f"Objective {name}: unknown field {{{field}}} in {template!r}"
                        f" (known: {', '.join(self.FIELDS)}){nearest(field, self.FIELDS)}"
                    )
        self._check_decoder_prefix()

    def _check_decoder_prefix(self) -> None:
        prefix, wanted = self.decoder_prefix, None
        if not isinstance(prefix, str):
            wanted = "a text is wanted"
        elif prefix and not prefix.strip():
            wanted = "it is blank, some word is wanted"
        elif len(prefix) > MAX_PREFIX:
            wanted = f"at most {MAX_PREFIX} characters are wanted"
        elif set("{}") & set(prefix):
            wanted = "it is the same for all rows and has no {fields}"
        if wanted:
            raise InputError(f"Objective {self.name}: decoder_prefix: {wanted}, got {prefix!r:.80}")

    def render(self, fields: Mapping[str, str]) -> tuple[str, str]:
        """(input, target) text of an example; the target is empty where a field of it is absent."""
        absent = any(not fields.get(name) for name in fields_of(self.target_template))
        values = {name: fields.get(name, "") for name in self.FIELDS}
        target = "" if absent else self.target_template.format_map(values)
        return self.input_template.format_map(values), target


def fields_of(template: str) -> tuple[str, ...]:
    """Names of the `{fields}` of a template, in order.

    Raises:
        InputError: a brace without its pair, or a field that is more than a name. Templates come with
            model directories: `{input:>9999999999}` would fill the memory, and a field inside a
            format would read attributes (`{input:{label.__class__}}`).
    """
    try:
        parsed = list(string.Formatter().parse(template))
    except ValueError as error:
        raise InputError(f"template {template!r}: {error}") from None
    for _, name, spec, conversion in parsed:
        if spec or conversion:
            raise InputError(
                f"template {template!r}: in braces a field's name alone is wanted, at {name!r}"
            )
    return tuple(name for _, name, _, _ in parsed if name is not None)


LABEL_INPUT = "predict: {input}"
RATIONALE_INPUT = "explain: {input}"
RATIONALE_DECODER_PREFIX = "explain: "


def label_only(label_weight: float = 1.0) -> tuple[Objective, ...]:
    """Standard fine-tuning: the label alone."""
    return (Objective("label", LABEL_INPUT, "{label}", label_weight),)


def step_by_step(label_weight: float = 0.5, rationale_weight: float = 0.5) -> tuple[Objective, ...]:
    """The paper's method. Its code weighs alpha and 1 - alpha with alpha 0.5, hence (0.5, 0.5)."""
    return (
        Objective("label", LABEL_INPUT, "{label}", label_weight),
        Objective("rationale", RATIONALE_INPUT, "{rationale}", rationale_weight),
    )


def copy_control(label_weight: float = 0.5, copy_weight: float = 0.5) -> tuple[Objective, ...]:
    """Control: the second target only repeats the input, so it adds compute but no reasons."""
    return (
        Objective("label", LABEL_INPUT, "{label}", label_weight),
        Objective("copy", RATIONALE_INPUT, "{input}", copy_weight),
    )


def shared_encoder(
    label_weight: float = 0.5, rationale_weight: float = 0.5
) -> tuple[Objective, ...]:
    """Step-by-step, with one encoding for both targets; ours, not the paper's.

    The rationale is told from the label by the decoder's first tokens instead of the input's, so an
    example's input is read once. The label is asked as in `step_by_step`.
    """
    return (
        Objective("label", LABEL_INPUT, "{label}", label_weight),
        Objective(
            "rationale", LABEL_INPUT, "{rationale}", rationale_weight, RATIONALE_DECODER_PREFIX
        ),
    )


ARMS: dict[str, Callable[..., tuple[Objective, ...]]] = {
    arm.__name__: arm for arm in (label_only, step_by_step, copy_control, shared_encoder)
}


def share_encoding(objectives: Sequence[Objective]) -> bool:
    """Whether the objectives ask with one and the same input, so that it is encoded once for all.

    Not where the input shows the rationale: an example may have several.
    """
    templates = {o.input_template for o in objectives}
    return (
        len(objectives) > 1
        and len(templates) == 1
        and "rationale" not in fields_of(objectives[0].input_template)
    )


def resolve(objectives: str | Sequence[Objective]) -> tuple[Objective, ...]:
    """The objectives of an arm's name, or the given ones, checked.

    Raises:
        InputError: an unknown arm, no objective, a doubled name, only weights of 0, or a decoder
            prefix of the first objective.
    """
    if isinstance(objectives, str):
        if objectives not in ARMS:
            raise InputError(
                f"OBJECTIVES: unknown arm {objectives!r} (known: {', '.join(ARMS)})"
                f"{nearest(objectives, ARMS)}"
            )
        return ARMS[objectives]()
    if isinstance(objectives, Objective):
        objectives = (objectives,)
    objectives = tuple(objectives) if isinstance(objectives, Sequence) else ()
    if not objectives or not all(isinstance(o, Objective) for o in objectives):
        raise InputError("OBJECTIVES: an arm's name or one or more Objective(...) are wanted")
    names = [o.name for o in objectives]
    if len(set(names)) < len(names):
        raise InputError(f"OBJECTIVES: each needs a name of its own, got {', '.join(names)}")
    if not any(o.weight for o in objectives):
        raise InputError("OBJECTIVES: all weights are 0, nothing would be learned")
    check_first(objectives)
    return objectives


def check_first(objectives: Sequence[Objective]) -> None:
    """Raises InputError where the first objective has a decoder prefix.

    Its answers are what is served, by programs that know nothing of prefixes.
    """
    if objectives[0].decoder_prefix:
        raise InputError(
            f"Objective {objectives[0].name}: the first objective is the one that is served, and has"
            f" no decoder_prefix (got {objectives[0].decoder_prefix!r}); give it to the others"
        )
