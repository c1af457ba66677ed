"""The paper's claim and a control on word problems with worked solutions: writes docs/experiments_gsm.md.

    python benchmarks/claim_gsm.py --workdir runs/claim_gsm

The rows are short problems of `prepare gsm_symbolic` (the extra [gsm]), the model a tiny T5 from scratch,
one process a CPU core. Stopped, it continues where it was. The text of the page holds whatever the runs give.
"""

import collections
import os
import pathlib
import time

from arms import Arm, accuracy_table, cells, claim_table, options, pictures, train_all

from stepdistill_jax.data.corpora import gsm_symbolic
from stepdistill_jax.data.prepare import prepare
from stepdistill_jax.data.prepared import data_folder, is_prepared
from stepdistill_jax.data.reading import CheckedExample
from stepdistill_jax.experiments.comparison import Comparison
from stepdistill_jax.experiments.report import headline, report
from stepdistill_jax.versions import version_block

TASK, CONFIG = "gsm_short", "gsm_short_cpu_tiny"
DRAWN = 90_000  # rows of gsm_symbolic, of which about one in six is short
HELD_OUT = {"test": 1000, "validation": 500}  # the rest is train
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
]


def is_short(row: CheckedExample) -> bool:
    """Whether question, solution and answer are short, and nothing is wrong with them."""
    example = row.example
    words = {name: len(getattr(example, name).split()) for name in MOST_WORDS}
    short = all(words[name] <= most for name, most in MOST_WORDS.items())
    return short and not row.defects and len(example.label) <= MOST_DIGITS


def prepare_short(data_dir: pathlib.Path | None) -> None:
    """Prepares `gsm_short`, once: the short rows of gsm_symbolic's train split, of the same templates in all splits."""
    if is_prepared(TASK, data_folder(data_dir)):
        return
    drawn = gsm_symbolic.read(rows=DRAWN).rows()
    rows = [r.example.to_json() for split, r in drawn if split == "train" and is_short(r)]
    source = collections.defaultdict(list)
    for split, count in HELD_OUT.items():
        source[split], rows = rows[:count], rows[count:]
    prepare("jsonl", source=source | {"train": rows}, new_name=TASK, data_dir=data_dir)


def page(comparison: Comparison, seconds: float | None) -> str:
    """docs/experiments_gsm.md."""
    versions, runs = version_block(), comparison.runs
    recipe = runs[0].config
    took = "" if seconds is None else f" It took {seconds / 60:.0f} minutes."
    lines = [
        "# The claim on word problems",
        "",
        "Written by `make experiments-gsm` (`benchmarks/claim_gsm.py`), from nothing. Word problems of GSM-Symbolic's templates"
        f" ([datasets.md](datasets.md#word-problems-gsm_symbolic)): questions of at most {MOST_WORDS['input']} words, worked solutions of at most"
        f" {MOST_WORDS['rationale']}, answers of at most {MOST_DIGITS} digits. A tiny T5 from scratch; {len(ARMS)} arms,"
        f" {max(len(p.runs) for p in comparison.points)} seeds, {recipe['train_steps']} steps of {recipe['batch_size']} examples:"
        f" {len(runs)} runs, {os.cpu_count()} CPU cores, jax {versions['jax']},"
        f" {time.strftime('%Y-%m-%d', time.gmtime())}.{took}",
        "",
        f"Dropout {recipe['dropout_rate']:g}, a learning rate of {recipe['learning_rate']:g}. Each share is trained for the same number of"
        " steps. The test rows are new questions of the templates that training sees.",
        "",
        "![Accuracy of label_only and step_by_step against the share of the labels](images/claim_gsm.png)",
        "",
        "![Accuracy of every arm with all labels](images/controls_gsm.png)",
        "",
        "## What holds",
        "",
        *claim_table(comparison, CLAIMS, SHARES),
        "",
        "## How many labels",
        "",
        " ".join(headline(comparison)),
        "",
        "## Accuracy",
        "",
        *accuracy_table(comparison, ARMS),
        "",
        f"Runs that gave every row the same answer: {sum(r.collapsed for r in runs)} of {len(runs)}.",
        "",
    ]
    return "\n".join(lines)


def main() -> None:
    """Prepares, trains what is left, compares, writes."""
    args = options(__doc__.splitlines()[0], "runs/claim_gsm", seeds=3).parse_args()
    began, fresh = time.monotonic(), not args.workdir.exists()
    prepare_short(args.data_dir)
    parts = train_all(cells(TASK, ARMS, args), args)
    written = report(parts, output=args.workdir / "report", data_dir=args.data_dir)
    (comparison,) = written.comparisons
    curves = [name for name, arm in ARMS.items() if arm.shares == SHARES]
    stems = [args.docs / "images" / name for name in ("claim_gsm", "controls_gsm")]
    pictures(comparison, ARMS, curves, stems)
    seconds = time.monotonic() - began if fresh else None
    out = args.docs / "experiments_gsm.md"
    out.write_text(page(comparison, seconds), encoding="utf-8")
    print(f"{out}; all figures: {written.page}")


if __name__ == "__main__":
    main()
