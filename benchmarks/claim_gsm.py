"""The paper's claim and a control on word problems with worked solutions: writes docs/lab/experiments_gsm.md.

    python benchmarks/claim_gsm.py --workdir runs/claim_gsm

The rows are short problems of `prepare gsm_symbolic` (the extra [gsm]), the model a tiny T5 from scratch,
one process a CPU core. Stopped, it continues where it was. No sentence of the page assumes a result.
With `--prepare-only` it makes the dataset `gsm_short` and trains nothing.
"""

import collections
import pathlib

from arms import Arm, options, results, size_of, write_page

from stepdistill_jax.data.corpora import gsm_symbolic
from stepdistill_jax.data.prepare import prepare
from stepdistill_jax.data.prepared import data_folder, is_prepared
from stepdistill_jax.data.reading import CheckedExample
from stepdistill_jax.experiments.comparison import Comparison
from stepdistill_jax.experiments.report import headline

TASK, CONFIG = "gsm_short", "gsm_short_cpu_tiny"
# rows of gsm_symbolic, of train and of the others; nearly one in five is short
DRAWN, DRAWN_HELD_OUT = 72_000, {"test": 6500, "validation": 3500}
HELD_OUT = {"test": 1000, "validation": 500}  # of the short ones
MOST_WORDS = {"input": 50, "rationale": 36}
MOST_DIGITS = 2  # of an answer
SHARES, FULL = (0.25, 0.5, 1.0), (1.0,)
ARMS = {
    "label_only": Arm(
        "the answer alone: standard fine-tuning", SHARES, CONFIG, "objectives/label_only"
    ),
    "step_by_step": Arm(
        "answer and worked solution with the paper's weights, 0.5 and 0.5 (λ = 1)", SHARES, CONFIG
    ),
    "step_by_step_3": Arm(
        "the same with the demo's weights, 1 and 3 (λ = 3)",
        FULL,
        CONFIG,
        settings=["step_by_step.label_weight=1.0", "step_by_step.rationale_weight=3.0"],
    ),
    "step_by_step_mi": Arm(
        "step_by_step, and the mutual-information loss of Chen et al. 2024 with their weight, 0.1",
        FULL,
        CONFIG,
        "losses/mutual_information",
    ),
    "shuffled": Arm(
        "step_by_step, each solution that of another row", FULL, CONFIG, train=("shuffled", 1.0)
    ),
    "single_task": Arm(
        "solution, then answer, in one target: the paper's ablation; decodes both",
        FULL,
        CONFIG,
        "objectives/single_task",
        settings=["single_task.label_weight=1.0"],
    ),
}
# (sentence, the arm that it says is better, the other one)
CLAIMS = [
    ("Solutions help: step_by_step beats label_only", "step_by_step", "label_only"),
    ("They help with λ = 3, too", "step_by_step_3", "label_only"),
    ("λ = 3 beats λ = 1", "step_by_step_3", "step_by_step"),
    (
        "The solutions must be the row's own: step_by_step beats shuffled",
        "step_by_step",
        "shuffled",
    ),
    ("Solutions of other rows do harm: label_only beats shuffled", "label_only", "shuffled"),
    ("Writing the solution first beats both tasks", "single_task", "step_by_step"),
    ("Mutual information helps: it beats step_by_step", "step_by_step_mi", "step_by_step"),
]


def is_short(row: CheckedExample) -> bool:
    """Returns whether question, solution and answer are short and free of defects."""
    example = row.example
    words = {name: len(getattr(example, name).split()) for name in MOST_WORDS}
    short = all(words[name] <= most for name, most in MOST_WORDS.items())
    return short and not row.defects and len(example.label) <= MOST_DIGITS


def prepare_short(data_dir: pathlib.Path | None) -> None:
    """Prepares `gsm_short`, once: the short rows of gsm_symbolic's splits of the same templates."""
    if is_prepared(TASK, data_folder(data_dir)):
        return
    source = collections.defaultdict(list)
    for split, row in gsm_symbolic.read(rows=DRAWN, held_out_rows=DRAWN_HELD_OUT).rows():
        if is_short(row) and len(source[split]) < HELD_OUT.get(split, DRAWN):
            source[split].append(row.example.to_json())
    prepare("jsonl", source=source, new_name=TASK, data_dir=data_dir)


def page(comparison: Comparison, took: str) -> str:
    """docs/lab/experiments_gsm.md."""
    recipe = comparison.runs[0].config
    lines = [
        "# The claim on word problems",
        "",
        "Written by `make experiments-gsm` (`benchmarks/claim_gsm.py`), from nothing. Word problems of GSM-Symbolic's templates"
        f" ([datasets.md](../reference/datasets.md#word-problems-gsm_symbolic)): questions of at most {MOST_WORDS['input']} words, worked solutions of at most"
        f" {MOST_WORDS['rationale']}, answers of at most {MOST_DIGITS} digits. A tiny T5 from scratch;"
        f" {size_of(comparison, ARMS, took)}",
        "",
        f"Dropout {recipe['dropout_rate']:g}, a learning rate of {recipe['learning_rate']:g}. Each share is trained for the same number of"
        " steps. The test rows are of the templates that training sees, with numbers that it does not see: no test row has the template"
        " and the numbers of a train row.",
        "",
        "![Accuracy of label_only and step_by_step against the share of the labels](../images/claim_gsm.png)",
        "",
        "![Accuracy of every arm with all labels](../images/controls_gsm.png)",
        "",
        *results(comparison, ARMS, CLAIMS, SHARES, [" ".join(headline(comparison))]),
    ]
    return "\n".join(lines)


def main() -> None:
    """Prepares, trains what is left, compares, writes."""
    parser = options(__doc__.splitlines()[0], "runs/claim_gsm", seeds=3)
    parser.add_argument("--prepare-only", action="store_true", help=f"make {TASK}, train nothing")
    args = parser.parse_args()
    prepare_short(args.data_dir)
    if args.prepare_only:
        return
    write_page(TASK, ARMS, args, page, curve=SHARES, suffix="_gsm")


if __name__ == "__main__":
    main()
