"""Defines training objectives over the fields of an example, and named sets of objectives (arms)."""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import ClassVar

from stepdistill_jax.data import templates
from stepdistill_jax.data.schedules import Weight, check_weight
from stepdistill_jax.data.templates import fields_of
from stepdistill_jax.errors import InputError
from stepdistill_jax.runtime.checks import SNAKE_CASE as FIELD_NAME
from stepdistill_jax.runtime.checks import one_of, snake_case

MAX_PREFIX = 200  # characters; a prefix may come from a model directory, which is not trusted


@dataclasses.dataclass(frozen=True)
class Objective:
    """How to make an (input, target) pair from an example's fields, and how to weight its loss.

    Hsieh et al. 2023 (arXiv:2305.02301, section 3.2): `predict: x -> label`, `explain: x -> rationale`.

    Example: `Objective("label", "predict: {input}", "{label}", 0.5)`.

    An example is skipped if a field that a template names is empty. Only `input` in the input template may be
    empty.

    Attributes:
        name: lower_snake_case name in metrics (`loss/<name>`) and in the SeqIO task (`TASK_<name>`).
        input_template: text with `{field}` for input, label, rationale, llm_label, or a further field of
            the rows (`stepdistill prepare NAME --fields`).
        target_template: text of the same form. If the first objective's target has several fields, the words
            between them are used to find the label in decoded text.
        weight: factor of this objective's mean cross-entropy in the loss: a number of at least 0, or a
            `Schedule`, such as @linear_schedule().
        decoder_prefix: text that the decoder reads before the target, without loss. It distinguishes objectives
            that share one encoding of the input. At most 200 characters, no braces.

    Raises:
        InputError: a field is invalid.
    """

    name: str
    input_template: str
    target_template: str
    weight: Weight = 1.0
    decoder_prefix: str = ""

    # every dataset has these; a dataset of JSON lines may keep more
    FIELDS: ClassVar[tuple[str, ...]] = ("input", "label", "rationale", "llm_label")

    def __post_init__(self):
        name = self.name
        snake_case("Objective.name", name)
        check_weight(f"{name}.weight", self.weight)
        for template in (self.input_template, self.target_template):
            if not isinstance(template, str):
                raise InputError(f"Objective {name}: a template must be text, got {template!r}")
            for field in fields_of(template):
                if not FIELD_NAME.fullmatch(field):
                    raise InputError(
                        f"Objective {name}: unknown field {{{field}}} in {template!r}: expected a"
                        f" name in lower_snake_case, such as {', '.join(self.FIELDS)}"
                    )
        self._check_decoder_prefix()

    def _check_decoder_prefix(self) -> None:
        prefix, expected = self.decoder_prefix, None
        if not isinstance(prefix, str):
            expected = "text"
        elif prefix and not prefix.strip():
            expected = "text that is not blank"
        elif len(prefix) > MAX_PREFIX:
            expected = f"at most {MAX_PREFIX} characters"
        elif set("{}") & set(prefix):
            expected = "text without braces, since a prefix has no fields"
        if expected:
            raise InputError(
                f"Objective {self.name}: decoder_prefix: expected {expected}, got {prefix!r:.80}"
            )

    def render(self, fields: Mapping[str, str], *, keep_empty: bool = False) -> tuple[str, str]:
        """Returns the input and the target text of an example.

        The target is "" if a field in `needed` is empty, unless `keep_empty` is set.
        """
        values = {name: fields.get(name, "") for name in self.fields}
        absent = not keep_empty and not all(values[name] for name in self.needed)
        target = "" if absent else self.target_template.format_map(values)
        return self.input_template.format_map(values), target

    @functools.cached_property
    def fields(self) -> tuple[str, ...]:
        """Names of the fields in either template, without duplicates."""
        return tuple(
            dict.fromkeys(fields_of(self.input_template) + fields_of(self.target_template))
        )

    @functools.cached_property
    def needed(self) -> tuple[str, ...]:
        """Names of the fields that must not be empty. If one is empty, the example is skipped."""
        return tuple(dict.fromkeys(fields_of(self.target_template) + self.read_beside_input))

    @functools.cached_property
    def read_beside_input(self) -> tuple[str, ...]:
        """Names of the fields in the input template other than `input`. Inference needs these fields, too."""
        return tuple(name for name in fields_of(self.input_template) if name != "input")

    @property
    def label_field(self) -> str | None:
        """Name of the label field in the target template, `label` or `llm_label`; None if the template has neither."""
        named = fields_of(self.target_template)
        return next((name for name in ("label", "llm_label") if name in named), None)

    @property
    def is_plain(self) -> bool:
        """Whether the target is the label alone, and the input template has no field but `input`."""
        return self.target_template == "{label}" and not self.read_beside_input

    @property
    def writes_more(self) -> bool:
        """True if the target contains more than the label, and `parse` can find the label in an answer."""
        alone = self.target_template == f"{{{self.label_field}}}"
        return self.label_field is not None and not alone and self.is_separable

    @property
    def is_separable(self) -> bool:
        """True if the target template has words between all neighbouring fields."""
        return all(words for words, _ in templates.words_and_fields(self.target_template)[1:-1])

    @property
    def words(self) -> tuple[str, ...]:
        """Words between and around the fields of the target template, in order."""
        return tuple(
            words for words, _ in templates.words_and_fields(self.target_template) if words
        )

    def parse(self, text: str) -> dict[str, str] | None:
        """Returns the fields of a decoded answer, including `label`, or None if the answer has no label.

        Example: with the target template `{rationale} so the answer is {label}`, the answer `"it rains so the
        answer is no"` gives `{"label": "no", "rationale": "it rains"}`.

        In the answer, the label begins after the last occurrence of the words that precede the label field in
        the template. It ends at the next occurrence of the words that follow the field. If `writes_more` is
        False, the whole answer is the label.
        """
        if not self.writes_more:
            return {"label": text}
        found = templates.parse(self.target_template, text, field := str(self.label_field))
        if found is None or not (label := found.pop(field)):
            return None
        return {"label": label, **found}


LABEL_INPUT = "predict: {input}"
RATIONALE_INPUT = "explain: {input}"
RATIONALE_DECODER_PREFIX = "explain: "
# from chain-of-thought prompts (Wei et al. 2022); lower case, which any English vocabulary has
RATIONALE_THEN_LABEL = "{rationale} so the answer is {label}"


def label_only(
    label_weight: Weight = 1.0, input_template: str = LABEL_INPUT
) -> tuple[Objective, ...]:
    """Standard fine-tuning: trains on the label only. The paper's code uses the template `{input}`."""
    return (Objective("label", input_template, "{label}", label_weight),)


def step_by_step(
    label_weight: Weight = 0.5, rationale_weight: Weight = 0.5
) -> tuple[Objective, ...]:
    """The paper's method. The weights in its code are alpha and 1 - alpha, with alpha = 0.5."""
    return (
        Objective("label", LABEL_INPUT, "{label}", label_weight),
        Objective("rationale", RATIONALE_INPUT, "{rationale}", rationale_weight),
    )


def label_only_llm(
    label_weight: Weight = 1.0, input_template: str = LABEL_INPUT
) -> tuple[Objective, ...]:
    """Standard distillation: trains on the teacher's label only, but is evaluated with the gold label."""
    return (Objective("label", input_template, "{llm_label}", label_weight),)


def step_by_step_llm(
    label_weight: Weight = 0.5, rationale_weight: Weight = 0.5
) -> tuple[Objective, ...]:
    """Step-by-step with the teacher's labels in place of gold labels."""
    return (
        Objective("label", LABEL_INPUT, "{llm_label}", label_weight),
        Objective("rationale", RATIONALE_INPUT, "{rationale}", rationale_weight),
    )


def single_task(label_weight: Weight = 1.0) -> tuple[Objective, ...]:
    """The paper's ablation: a single target, the rationale followed by the label."""
    return (Objective("label", LABEL_INPUT, RATIONALE_THEN_LABEL, label_weight),)


def rationale_input(label_weight: Weight = 1.0) -> tuple[Objective, ...]:
    """Prediction of the label from the input and a rationale. The teacher must write rationales for test rows, too."""
    return (Objective("label", f"{LABEL_INPUT} rationale: {{rationale}}", "{label}", label_weight),)


def step_by_step_multi(
    label_weight: Weight = 0.5, rationale_weight: Weight = 0.25, why_not_weight: Weight = 0.25
) -> tuple[Objective, ...]:
    """Step-by-step with a third objective: why the other answers are wrong (`why_not`)."""
    return (
        *step_by_step(label_weight, rationale_weight),
        Objective("why_not", "why not: {input}", "{why_not}", why_not_weight),
    )


def copy_control(label_weight: Weight = 0.5, copy_weight: Weight = 0.5) -> tuple[Objective, ...]:
    """A control experiment: the second target repeats the input, which adds compute but no reasons."""
    return (
        Objective("label", LABEL_INPUT, "{label}", label_weight),
        Objective("copy", RATIONALE_INPUT, "{input}", copy_weight),
    )


def shared_encoder(
    label_weight: Weight = 0.5, rationale_weight: Weight = 0.5
) -> tuple[Objective, ...]:
    """Step-by-step with one encoding of the input for both targets: our variant, not in the paper.

    Both objectives use the label's input template of `step_by_step`. The decoder gets a prefix if it is to write
    the rationale instead of the label.
    """
    return (
        Objective("label", LABEL_INPUT, "{label}", label_weight),
        Objective(
            "rationale", LABEL_INPUT, "{rationale}", rationale_weight, RATIONALE_DECODER_PREFIX
        ),
    )


ARMS: dict[str, Callable[..., tuple[Objective, ...]]] = {
    arm.__name__: arm
    for arm in (
        label_only,
        label_only_llm,
        step_by_step,
        step_by_step_llm,
        step_by_step_multi,
        single_task,
        rationale_input,
        copy_control,
        shared_encoder,
    )
}


def share_encoding(objectives: Sequence[Objective]) -> bool:
    """Returns whether the objectives can share one encoding of an example's input.

    They can if there are at least two, and all have the same input template without the field `rationale`. With
    this field, each rationale of an example gives a different input.
    """
    templates = {o.input_template for o in objectives}
    return (
        len(objectives) > 1
        and len(templates) == 1
        and "rationale" not in fields_of(objectives[0].input_template)
    )


def resolve(objectives: str | Sequence[Objective]) -> tuple[Objective, ...]:
    """Returns the arm with the given name, or checks and returns the given objectives.

    Raises:
        InputError: the arm is unknown; there is no objective; two names are equal; all weights are 0; the first
            objective has a decoder prefix, or a target with two fields and no words between them.
    """
    if isinstance(objectives, str):
        one_of("objectives", objectives, ARMS)
        return ARMS[objectives]()
    if isinstance(objectives, Objective):
        objectives = (objectives,)
    objectives = tuple(objectives) if isinstance(objectives, Sequence) else ()
    if not objectives or not all(isinstance(o, Objective) for o in objectives):
        raise InputError("`objectives`: expected an arm's name, or one or more `Objective`")
    names = [o.name for o in objectives]
    if len(set(names)) < len(names):
        raise InputError(
            f"`objectives`: each objective needs a different name, got {', '.join(names)}"
        )
    if not any(o.weight for o in objectives):
        raise InputError("`objectives`: all weights are 0, so nothing would be learned")
    check_first(objectives)
    if objectives[0].label_field and not objectives[0].is_separable:
        raise InputError(
            f"Objective {objectives[0].name}: target_template {objectives[0].target_template!r}: expected"
            " words between any two fields, so that the label can be found in an answer, as in"
            f" {RATIONALE_THEN_LABEL!r}"
        )
    return objectives


def gives_rationale(objectives: Sequence[Objective]) -> bool:
    """Returns whether the model can write a rationale, as a separate target or as part of the answer."""
    others = any(o.name == "rationale" for o in objectives[1:])
    return others or "rationale" in fields_of(objectives[0].target_template)


def held_out_objectives(objectives: Sequence[Objective]) -> tuple[Objective, ...]:
    """Returns the objectives for validation: in the first target, `label` replaces `llm_label`."""
    first = objectives[0]
    if first.label_field != "llm_label":
        return tuple(objectives)
    target = first.target_template.replace("{llm_label}", "{label}")
    return (dataclasses.replace(first, target_template=target), *objectives[1:])


def check_first(objectives: Sequence[Objective]) -> None:
    """Raises InputError if the first objective has a decoder prefix.

    The first objective is used for inference, and other software that runs the exported model may not support
    decoder prefixes.
    """
    if objectives[0].decoder_prefix:
        raise InputError(
            f"Objective {objectives[0].name}: the first objective is used for inference, so its"
            f" decoder_prefix must be empty, got {objectives[0].decoder_prefix!r}; only other"
            " objectives may have one"
        )
