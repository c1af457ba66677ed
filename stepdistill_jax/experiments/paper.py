"""Lists accuracies from the paper."""

from stepdistill_jax.data.prepared import PAPER_SUFFIX
from stepdistill_jax.experiments.comparison import Point

BASE_PARAMETERS = 247_577_856  # T5 v1.1 base

# Hsieh et al. 2023 (arXiv:2305.02301): test accuracy of T5 v1.1 base, which started from the published weights
# and was trained on all gold labels; rationales by PaLM
ACCURACY = {
    "esnli": {"label_only": 0.8838, "single_task": 0.8888, "step_by_step": 0.8951},
    "anli": {"label_only": 0.4358, "single_task": 0.4350, "step_by_step": 0.4958},
    "cqa": {"label_only": 0.6219, "single_task": 0.6137, "step_by_step": 0.6329},
    "svamp": {"label_only": 0.6263, "single_task": 0.6300, "step_by_step": 0.6550},
}


def paper_accuracy(point: Point) -> float | None:
    """Returns the paper's accuracy for a point's dataset and arm, or None if the paper reports none.

    Also returns None if the runs used only part of the data, or a model of another size than T5 base.
    """
    run = point.runs[0]
    if point.fraction != 1 or run.parameters != BASE_PARAMETERS:
        return None
    return ACCURACY.get(run.task.removesuffix(PAPER_SUFFIX), {}).get(point.arm)
