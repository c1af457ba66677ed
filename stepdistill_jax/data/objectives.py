"""What a model is trained on: N objectives over one example, and the paper's arms by name."""

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

MAX_PREFIX = 200  # characters: a prefix is a few words, and model directories bring their own


@dataclasses.dataclass(frozen=True)
class Objective:
    """One (input, target) pair made of an example's fields, and what its loss is worth.

    Hsieh et al. 2023 (arXiv:2305.02301, section 3.2): `predict: x -> label`, `explain: x -> rationale`.

    Example: `Objective("label", "predict: {input}", "{label}", 0.5)`.

    Attributes:
        name: key of its metrics (`loss/<name>`) and of its SeqIO task (`TASK_<name>`).
        input_template: text with `{field}` of an example: input, label, rationale, llm_label, or
            another that the dataset keeps (`fields` of `prepare`).
        target_template: the same. A row that names an absent (empty) field on either side is left
            out of training; an empty `input` is absent only as a target. Of the first objective the
            label is parsed out of what is decoded, by the words between the fields.
        weight: factor of its mean cross-entropy in the loss; at least 0, or a `Schedule` of it
            over the steps.
        decoder_prefix: text that the decoder reads before the target; no loss counts its tokens.
            It tells apart objectives that share one encoding of an input.

    Raises:
        InputError: a weight that is no number from 0, a name that is not lower_snake, a template that
            is no text, or has anything in its braces but a field's lower_snake name, a decoder prefix
            that is no text, is blank or very long, or has braces.
    """

    name: str
    input_template: str
    target_template: str
    weight: Weight = 1.0
    decoder_prefix: str = ""

    # of every dataset; a dataset of JSON lines may keep more
    FIELDS: ClassVar[tuple[str, ...]] = ("input", "label", "rationale", "llm_label")

    def __post_init__(self):
        name = self.name
        snake_case("Objective.name", name)
        check_weight(f"{name}.weight", self.weight)
        for template in (self.input_template, self.target_template):
            if not isinstance(template, str):
                raise InputError(f"Objective {name}: a template is text, got {template!r}")
            for field in fields_of(template):
                if not FIELD_NAME.fullmatch(field):
                    raise InputError(
                        f"Objective {name}: unknown field {{{field}}} in {template!r}: a name in"
                        f" lower_snake_case is wanted, as {', '.join(self.FIELDS)} have"
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

    def render(self, fields: Mapping[str, str], *, keep_empty: bool = False) -> tuple[str, str]:
        """Returns the (input, target) text of an example.

        The target is empty where a field of either is absent, unless `keep_empty` writes it then, too.
        """
        values = {name: fields.get(name, "") for name in self.fields}
        absent = not keep_empty and not all(values[name] for name in self.needed)
        target = "" if absent else self.target_template.format_map(values)
        return self.input_template.format_map(values), target

    @functools.cached_property
    def fields(self) -> tuple[str, ...]:
        """Names of the fields of both templates."""
        return tuple(
            dict.fromkeys(fields_of(self.input_template) + fields_of(self.target_template))
        )

    @functools.cached_property
    def needed(self) -> tuple[str, ...]:
        """Fields without which an example has no such row."""
        return tuple(dict.fromkeys(fields_of(self.target_template) + self.read_beside_input))

    @functools.cached_property
    def read_beside_input(self) -> tuple[str, ...]:
        """Fields but the question itself that the model is shown: it needs them when it is asked, too."""
        return tuple(name for name in fields_of(self.input_template) if name != "input")

    @property
    def label_field(self) -> str | None:
        """Where its target has the label from: `label`, `llm_label` (the teacher's), or nowhere."""
        named = fields_of(self.target_template)
        return next((name for name in ("label", "llm_label") if name in named), None)

    @property
    def is_plain(self) -> bool:
        """Whether its target is the field `label` and nothing else, and no row is left out for its input."""
        return self.target_template == "{label}" and not self.read_beside_input

    @property
    def writes_more(self) -> bool:
        """Whether its target is more than a label, which then has to be parsed out of an answer."""
        alone = self.target_template == f"{{{self.label_field}}}"
        return self.label_field is not None and not alone and self.is_separable

    @property
    def is_separable(self) -> bool:
        """Whether its target has words between any two fields."""
        return all(words for words, _ in templates.words_and_fields(self.target_template)[1:-1])

    @property
    def words(self) -> tuple[str, ...]:
        """What its target has beside fields, in order."""
        return tuple(
            words for words, _ in templates.words_and_fields(self.target_template) if words
        )

    def parse(self, text: str) -> dict[str, str] | None:
        """The fields of a decoded answer, of which `label` is one; None where the label is not in it.

        `"it rains so the answer is no"` after `{rationale} so the answer is {label}` is
        `{"label": "no", "rationale": "it rains"}`. Of the places where the words before the label
        stand the last one counts, of those behind it the first. A target that is a label alone, has
        none, or has nothing between fields, is the label as it stands.
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
# as in chain-of-thought prompts (Wei et al. 2022); in small letters, which any English vocabulary has
RATIONALE_THEN_LABEL = "{rationale} so the answer is {label}"


def label_only(
    label_weight: Weight = 1.0, input_template: str = LABEL_INPUT
) -> tuple[Objective, ...]:
    """Standard fine-tuning: the label alone. The paper's code asks without a prefix, by `{input}`."""
    return (Objective("label", input_template, "{label}", label_weight),)


def step_by_step(
    label_weight: Weight = 0.5, rationale_weight: Weight = 0.5
) -> tuple[Objective, ...]:
    """The paper's method. Its code weighs alpha and 1 - alpha with alpha 0.5, hence (0.5, 0.5)."""
    return (
        Objective("label", LABEL_INPUT, "{label}", label_weight),
        Objective("rationale", RATIONALE_INPUT, "{rationale}", rationale_weight),
    )


def label_only_llm(
    label_weight: Weight = 1.0, input_template: str = LABEL_INPUT
) -> tuple[Objective, ...]:
    """Standard distillation: the teacher's label alone; answers are compared with the gold label."""
    return (Objective("label", input_template, "{llm_label}", label_weight),)


def step_by_step_llm(
    label_weight: Weight = 0.5, rationale_weight: Weight = 0.5
) -> tuple[Objective, ...]:
    """Step-by-step with the teacher's labels, too: no gold label is trained on."""
    return (
        Objective("label", LABEL_INPUT, "{llm_label}", label_weight),
        Objective("rationale", RATIONALE_INPUT, "{rationale}", rationale_weight),
    )


def single_task(label_weight: Weight = 1.0) -> tuple[Objective, ...]:
    """The paper's ablation: one target, first the rationale and then the label, as in [r, y]."""
    return (Objective("label", LABEL_INPUT, RATIONALE_THEN_LABEL, label_weight),)


def rationale_input(label_weight: Weight = 1.0) -> tuple[Objective, ...]:
    """The rationale is read, not written: the teacher has to give one at test time, too."""
    return (Objective("label", f"{LABEL_INPUT} rationale: {{rationale}}", "{label}", label_weight),)


def step_by_step_multi(
    label_weight: Weight = 0.5, rationale_weight: Weight = 0.25, why_not_weight: Weight = 0.25
) -> tuple[Objective, ...]:
    """Step-by-step with a third objective: why it is none of the other answers (field `why_not`)."""
    return (
        *step_by_step(label_weight, rationale_weight),
        Objective("why_not", "why not: {input}", "{why_not}", why_not_weight),
    )


def copy_control(label_weight: Weight = 0.5, copy_weight: Weight = 0.5) -> tuple[Objective, ...]:
    """Control: the second target only repeats the input, so it adds compute but no reasons."""
    return (
        Objective("label", LABEL_INPUT, "{label}", label_weight),
        Objective("copy", RATIONALE_INPUT, "{input}", copy_weight),
    )


def shared_encoder(
    label_weight: Weight = 0.5, rationale_weight: Weight = 0.5
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
            prefix of the first objective, or one whose label cannot be told from its other fields.
    """
    if isinstance(objectives, str):
        one_of("objectives", objectives, ARMS)
        return ARMS[objectives]()
    if isinstance(objectives, Objective):
        objectives = (objectives,)
    objectives = tuple(objectives) if isinstance(objectives, Sequence) else ()
    if not objectives or not all(isinstance(o, Objective) for o in objectives):
        raise InputError("`objectives` must be an arm's name, or one or more `Objective`")
    names = [o.name for o in objectives]
    if len(set(names)) < len(names):
        raise InputError(f"`objectives`: each needs a name of its own, got {', '.join(names)}")
    if not any(o.weight for o in objectives):
        raise InputError("`objectives`: all weights are 0, nothing would be learned")
    check_first(objectives)
    if objectives[0].label_field and not objectives[0].is_separable:
        raise InputError(
            f"Objective {objectives[0].name}: target_template {objectives[0].target_template!r}: between"
            " two fields some words are wanted, to tell the label by in an answer, as in"
            f" {RATIONALE_THEN_LABEL!r}"
        )
    return objectives


def gives_rationale(objectives: Sequence[Objective]) -> bool:
    """Whether a rationale can be decoded: by an objective of that name, or as part of the answer."""
    others = any(o.name == "rationale" for o in objectives[1:])
    return others or "rationale" in fields_of(objectives[0].target_template)


def held_out_objectives(objectives: Sequence[Objective]) -> tuple[Objective, ...]:
    """The objectives in validation: what is learned from the teacher's label is measured by `label`."""
    first = objectives[0]
    if first.label_field != "llm_label":
        return tuple(objectives)
    target = first.target_template.replace("{llm_label}", "{label}")
    return (dataclasses.replace(first, target_template=target), *objectives[1:])


def check_first(objectives: Sequence[Objective]) -> None:
    """Raises InputError where the first objective has a decoder prefix.

    Its answers are what is served, by programs that know nothing of prefixes.
    """
    if objectives[0].decoder_prefix:
        raise InputError(
            f"Objective {objectives[0].name}: the first objective is the one that is served, and has"
            f" no decoder_prefix (got {objectives[0].decoder_prefix!r}); give it to the others"
        )
