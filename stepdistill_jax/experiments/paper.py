"""What the paper measured, to stand beside what is measured here; and its table of runs as configs."""

import itertools

from stepdistill_jax.experiments.comparison import Point

BASE_PARAMETERS = 247_577_856  # T5 v1.1 base

# Hsieh et al. 2023 (arXiv:2305.02301): T5 v1.1 base from the published weights, all of the gold labels,
# accuracy on test; rationales by PaLM
ACCURACY = {
    "esnli": {"label_only": 0.8838, "single_task": 0.8888, "step_by_step": 0.8951},
    "anli": {"label_only": 0.4358, "single_task": 0.4350, "step_by_step": 0.4958},
    "cqa": {"label_only": 0.6219, "single_task": 0.6137, "step_by_step": 0.6329},
    "svamp": {"label_only": 0.6263, "single_task": 0.6300, "step_by_step": 0.6550},
}
# the same with rationales by GPT-NeoX 20B, which are not among the public files
GPT_NEOX = {"esnli": 0.8912, "anli": 0.4815, "cqa": 0.6325, "svamp": 0.6300}

DATASETS = {"esnli": "e-SNLI", "anli": "ANLI", "cqa": "CommonsenseQA", "svamp": "SVAMP"}
SIZES = ("small", "base", "large", "xl", "xxl")
ARMS = ("label_only", "single_task", "step_by_step", "label_only_llm", "step_by_step_llm")
FRACTIONS = (0.125, 0.25, 0.5, 0.75, 1.0)


def paper_accuracy(point: Point) -> float | None:
    """The paper's figure for a point of its kind: its dataset, arm and size of model, all of the data."""
    run = point.runs[0]
    if point.fraction != 1 or run.parameters != BASE_PARAMETERS:
        return None
    return ACCURACY.get(run.task, {}).get(point.arm)


def cells() -> list[tuple[str, str, str, float]]:
    """(dataset, size, arm, fraction) of each cell of the table."""
    return list(itertools.product(DATASETS, SIZES, ARMS, FRACTIONS))


def flags(size: str, arm: str, fraction: float) -> list[str]:
    """What follows `paper_DATASET` in the command of a cell, for `train`, `plan` and `inspect`."""
    parts = [f"paper/{size}.gin", f"objectives/{arm}.gin"]
    return [*(x for p in parts for x in ("--gin_file", p)), "--set", f"DATA_FRACTION={fraction}"]


def accuracy_markdown() -> str:
    """The paper's accuracies as a table, in percent."""
    head = ("T5 v1.1 base, all gold labels", *ACCURACY["cqa"], "step_by_step, by GPT-NeoX")
    lines = [f"| {' | '.join(head)} |", "|---" + "|---:" * (len(head) - 1) + "|"]
    for name, title in DATASETS.items():
        figures = [*ACCURACY[name].values(), GPT_NEOX[name]]
        shown = " | ".join(f"{100 * figure:.2f}" for figure in figures)
        lines.append(f"| {title} (`paper_{name}`) | {shown} |")
    return "\n".join(lines) + "\n"
