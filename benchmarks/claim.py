"""Tests the paper's claim and its controls on the built-in dataset, and writes docs/lab/experiments.md.

    python benchmarks/claim.py --workdir runs/claim

It trains small runs from scratch (each arm with 5 seeds, on all labels and on shares of them), one process
per CPU core, compares them by `report`, and writes which claims hold and which do not, with the plots. A
stopped run continues when it is started again. The numbers in the page come from the run that wrote it; no
sentence assumes a result.
"""

from collections.abc import Sequence

from arms import Arm, Claim, labels_needed, options, results, shown, size_of, write_page

from stepdistill_jax.data.corpora.delivery import ROWS, every_example
from stepdistill_jax.data.example import Example
from stepdistill_jax.experiments.comparison import Comparison

TASK = "delivery"
CURVE, TWO, FULL = (0.125, 0.25, 0.5, 1.0), (0.5, 1.0), (1.0,)


def more_labels(examples: Sequence[Example]) -> list[dict]:
    """Returns all possible examples that are neither in validation nor in test."""
    before = sum(ROWS.values()) // 2  # examples of each label in the three splits
    others = [e for same in every_example().values() for e in same[before:]]
    return [e.to_json() | {"id": f"more-{i}"} for i, e in enumerate([*examples, *others])]


def why_not(examples: Sequence[Example]) -> list[dict]:
    """Returns rows with the field `why_not`: `trouble needs a fast pace on a narrow road .`"""
    rows = []
    for e in examples:
        pace, _, _, _, road, *_ = e.rationale.split()  # slow pace on a narrow road , since ...
        other = {"smooth": "trouble", "trouble": "smooth"}[e.label]
        needed = {"fast": "slow", "slow": "fast"}[pace]
        rows.append(e.to_json() | {"why_not": f"{other} needs a {needed} pace on a {road} road ."})
    return rows


EQUAL = ["step_by_step.label_weight=0.5", "step_by_step.rationale_weight=0.5"]
# Except where EQUAL is set, weights are the demo's: 1 for the label and 3 for the other objectives together.
# Lengths are large enough for every text of an arm.
ARMS = {
    "label_only": Arm("the label alone: standard fine-tuning", CURVE, config="demo_label_only"),
    "step_by_step": Arm("label and rationale, two objectives: the paper's method", CURVE),
    "step_by_step_equal": Arm(
        "the same with the paper's weights, 0.5 and 0.5",
        CURVE,
        settings=EQUAL,
    ),
    "step_by_step_mi": Arm(
        "the same, and the mutual-information loss of Chen et al. 2024 with their weight, 0.1",
        FULL,
        part="losses/mutual_information",
        settings=EQUAL,
    ),
    "single_task": Arm(
        "rationale, then label, in one target: the paper's ablation; decodes both",
        CURVE,
        part="objectives/single_task",
        settings=["single_task.label_weight=1.0", "INPUT_LENGTH=32", "TARGET_LENGTH=60"],
    ),
    "rationale_input": Arm(
        "the model reads the rationale, also at test time: a bound, not a method",
        CURVE,
        part="objectives/rationale_input",
        settings=["rationale_input.label_weight=1.0", "INPUT_LENGTH=40", "TARGET_LENGTH=8"],
    ),
    "shared_encoder": Arm(
        "step by step with one encoding for both targets: ours, not the paper's",
        CURVE,
        config="demo_shared_encoder",
    ),
    "step_by_step_multi": Arm(
        "a third objective: what the other label would need",
        FULL,
        part="objectives/step_by_step_multi",
        settings=[
            "step_by_step_multi.label_weight=1.0",
            "step_by_step_multi.rationale_weight=1.5",
            "step_by_step_multi.why_not_weight=1.5",
        ],
        train=why_not,
        fields=["why_not"],
    ),
    "label_only_llm": Arm(
        "the teacher's labels alone, 20% of them wrong: standard distillation",
        TWO,
        part="objectives/label_only_llm",
        settings=["label_only_llm.label_weight=1.0"],
        train=("teacher_errs", 0.2),
    ),
    "step_by_step_llm": Arm(
        "the same labels, and the rationales that led the teacher to them",
        TWO,
        part="objectives/step_by_step_llm",
        settings=["step_by_step_llm.label_weight=1.0", "step_by_step_llm.rationale_weight=3.0"],
        train=("teacher_errs", 0.2),
    ),
    "copy_control": Arm(
        "the second objective repeats the input: as much to write, no reasons",
        FULL,
        config="demo_copy_control",
    ),
    "shuffled": Arm("step by step, each rationale from another row", FULL, train=("shuffled", 1.0)),
    "missing_50": Arm(
        "step by step, half of the rows without a rationale", TWO, train=("missing", 0.5)
    ),
    "wrong_10": Arm(
        "step by step, 10% of the rationales from a row with the other label",
        FULL,
        train=("wrong", 0.1),
    ),
    "wrong_30": Arm("the same, 30%", FULL, train=("wrong", 0.3)),
    "wrong_50": Arm("the same, 50%", FULL, train=("wrong", 0.5)),
}
# Separate from ARMS: all of its labels are more than all labels of the other arms.
MORE_LABELS = "label_only_more"
MORE = Arm(
    "label_only with all possible labels",
    FULL,
    config="demo_label_only",
    settings=["TRAIN_STEPS=4000"],
    train=more_labels,
)
CLAIMS = [
    Claim("Rationales help: step_by_step beats label_only", "step_by_step", "label_only"),
    Claim("They help with the paper's weights, too", "step_by_step_equal", "label_only"),
    Claim("The demo's weights beat the paper's", "step_by_step", "step_by_step_equal"),
    Claim(
        "Reasons help, more text does not: it beats copy_control", "step_by_step", "copy_control"
    ),
    Claim("The reasons must be the row's own: it beats shuffled", "step_by_step", "shuffled"),
    Claim("10% wrong reasons cost accuracy", "step_by_step", "wrong_10"),
    Claim("30% wrong reasons cost accuracy", "step_by_step", "wrong_30"),
    Claim("50% wrong reasons cost accuracy", "step_by_step", "wrong_50"),
    Claim("50% wrong reasons are still better than none", "wrong_50", "label_only"),
    Claim("Reasons for half of the rows cost accuracy", "step_by_step", "missing_50"),
    Claim("Reasons for half of the rows are better than none", "missing_50", "label_only"),
    Claim(
        "Two tasks beat one target: step_by_step beats single_task", "step_by_step", "single_task"
    ),
    Claim("Reading the teacher's reasons beats writing them", "rationale_input", "step_by_step"),
    Claim("One encoding for both targets costs accuracy", "step_by_step", "shared_encoder"),
    Claim("A third objective helps", "step_by_step_multi", "step_by_step"),
    Claim("Rationales help without gold labels, too", "step_by_step_llm", "label_only_llm"),
    Claim(
        "Mutual information helps: step_by_step_mi beats step_by_step_equal",
        "step_by_step_mi",
        "step_by_step_equal",
    ),
]


def fewer_labels(comparison: Comparison) -> list[str]:
    """Returns paragraphs: how many labels step_by_step needs, and whether more labels replace rationales."""
    (more,), last = comparison.of_arm(MORE_LABELS), comparison.of_arm("step_by_step")[-1]
    reached = "reaches" if more.accuracy >= last.accuracy else "does not reach"
    return [
        labels_needed(comparison),
        "",
        f"With all {more.labels:.0f} possible labels ({more.labels / last.labels:.1f} times as many) and"
        f" {more.runs[0].config['train_steps']} steps, label_only {reached} step_by_step: {shown(more)}.",
    ]


def page(comparison: Comparison, took: str) -> str:
    """Returns docs/lab/experiments.md."""
    recipe = comparison.runs[0].config
    lines = [
        "# The claim, and what controls make of it",
        "",
        "`make experiments` (`benchmarks/claim.py`) writes this page. Each run trains a tiny T5 from scratch on the built-in dataset"
        f" `delivery`: {size_of(comparison, ARMS, took)}",
        "",
        "The recipe is the demo's, not the paper's: weight 1 for the label and 3 for the other objectives together (the paper has 0.5"
        f" and 0.5, λ = 1, as the arm `step_by_step_equal` here), dropout {recipe['dropout_rate']:g}, and a learning rate of"
        f" {recipe['learning_rate']:g}.",
        "",
        "![Accuracy of each arm against the share of the labels](../images/claim.png)",
        "",
        "![Accuracy of every arm with all labels](../images/controls.png)",
        "",
        *results(comparison, ARMS, CLAIMS, TWO, fewer_labels(comparison)),
        "This is a made-up task that a tiny model can learn through its reasons. After"
        f" {recipe['train_steps']:,} steps, a model has either understood the task or not,"
        " so few accuracies are between chance and 1. The page shows that the method, this code and the"
        " controls work as intended. Only runs on other data show how much the method gains there"
        " ([sweeps.md](../how-to/sweeps.md)).",
        "",
    ]
    return "\n".join(lines)


def main() -> None:
    """Prepares the data, trains the remaining runs, compares them, and writes the page."""
    args = options(__doc__.splitlines()[0], "runs/claim", seeds=5).parse_args()
    write_page(TASK, ARMS, args, page, curve=CURVE, apart={MORE_LABELS: MORE})


if __name__ == "__main__":
    main()
