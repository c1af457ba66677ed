"""Tests the paper's claim and a control on word problems, and writes docs/lab/experiments_gsm.md.

    python benchmarks/claim_gsm.py --workdir runs/claim_gsm

The rows are short problems of `prepare gsm_symbolic` (the extra [gsm]), with worked solutions. The model is
a tiny T5 from scratch; each CPU core has its own process. A stopped run continues when it is started again.
No sentence of the page assumes a result, except TRIED, which describes separate, dated runs. With
`--prepare-only`, it makes the dataset `gsm_short` and trains nothing.
"""

import collections
import functools
import pathlib
import re
import statistics

from arms import Arm, Claim, labels_needed, options, results, size_of, verdict, write_page

from stepdistill_jax.data import arithmetic
from stepdistill_jax.data.corpora import gsm_symbolic
from stepdistill_jax.data.prepare import prepare
from stepdistill_jax.data.prepared import data_folder, is_prepared, open_prepared
from stepdistill_jax.data.reading import CheckedExample
from stepdistill_jax.experiments.comparison import Comparison
from stepdistill_jax.experiments.results import RunResult

TASK, CONFIG = "gsm_short", "gsm_short_cpu_tiny"
# rows drawn from gsm_symbolic, for train and for the other splits; about one in fourteen is short
DRAWN, DRAWN_HELD_OUT = 150_000, {"test": 30_000, "validation": 15_000}
MOST_WORDS = {"input": 50, "rationale": 36}
LARGEST = 50  # largest number in a question, its solution and its answer, in which all are whole
MOST_WORDINGS = 4  # wordings of a problem in test or validation: the same numbers with other names
STEP = re.compile(r"(\d+) ([-+*/x÷]) (\d+) = (\d+)")
CHOSEN = (
    "The recipe (rows, steps, batch, learning rate, dropout) was chosen by only the validation accuracy of label_only, in ten short runs of"
    " one seed: clearly above the commonest answer and clearly below 1, on any rows that allow it. Nobody looked at another arm's accuracy."
)
TRIED = (  # not made by this command
    "Separate, longer runs (2026-11-29, only seed 0, all labels, 3,000 steps instead of 1,000) reach a test accuracy of 0.143 with"
    " label_only and 0.155 with step_by_step. So 1,000 steps are too few for both, and one seed each does not show a gain either. The validation"
    " loss on solutions still falls (0.63 nats per token at step 1,000, 0.49 at 2,000, 0.45 at 3,000). One explanation is that this model can"
    " neither copy a question's numbers nor compute with them yet, and that solutions that it cannot write teach it little about answers. A larger"
    " weight of solutions (`step_by_step_3`) gives more right first steps, but no more right answers. We have not run more seeds of the long runs,"
    " a larger model, shorter solutions, or a pretraining by span corruption."
)
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
        "step_by_step, each solution from another row", FULL, CONFIG, train=("shuffled", 1.0)
    ),
    "step_by_step_mi": Arm(
        "step_by_step, and the mutual-information loss of Chen et al. 2024 with their weight, 0.1",
        FULL,
        CONFIG,
        "losses/mutual_information",
    ),
}
CLAIMS = [
    Claim("Solutions help: step_by_step beats label_only", "step_by_step", "label_only"),
    Claim("They help with λ = 3, too", "step_by_step_3", "label_only"),
    Claim("λ = 3 beats λ = 1", "step_by_step_3", "step_by_step"),
    Claim(
        "The solutions must be the row's own: step_by_step beats shuffled",
        "step_by_step",
        "shuffled",
    ),
    Claim("Solutions of other rows do harm: label_only beats shuffled", "label_only", "shuffled"),
    Claim("Mutual information helps: it beats step_by_step", "step_by_step_mi", "step_by_step"),
]


def is_short(row: CheckedExample) -> bool:
    """Returns whether question and solution are short, all numbers are small, and the row has no defect."""
    example = row.example
    short = all(len(getattr(example, n).split()) <= most for n, most in MOST_WORDS.items())
    text = f"{example.input} {example.rationale} {example.label}"
    numbers = [float(n) for n in re.findall(r"\d+(?:\.\d+)?", text)]
    small = all(n <= LARGEST and n.is_integer() for n in numbers)
    return short and small and example.label.isdigit() and not row.defects


def spaced(text: str) -> str:
    """Returns `text` with spaces around operators and without currency signs, so each number is a word.

    Example: `spaced("It costs 5*£9=£45.")` is "It costs 5 * 9 = 45.".
    """
    text = re.sub("[$€£]", "", text)
    text = re.sub(r"(?<=[\d\s])([-+*/=x÷])(?=[\d\s])", r" \1 ", text)
    return " ".join(text.split())


def problem(example_id: str, question: str) -> str:
    """Returns the template and the numbers of a question, which all of its wordings share."""
    return " ".join([example_id.split("-")[0], *re.findall(r"\d+", question)])


def prepare_short(data_dir: pathlib.Path | None) -> None:
    """Prepares `gsm_short`, once: the short rows of the splits of gsm_symbolic that share templates."""
    if is_prepared(TASK, data_folder(data_dir)):
        return
    source = collections.defaultdict(list)
    wordings = collections.Counter()
    drawn = gsm_symbolic.read(rows=DRAWN, held_out_rows=DRAWN_HELD_OUT)
    for split, row in drawn.rows():
        if not is_short(row):
            continue
        example = row.example
        same = problem(example.id, example.input)
        wordings[same] += 1
        if split == "train" or wordings[same] <= MOST_WORDINGS:
            texts = {n: spaced(getattr(example, n)) for n in MOST_WORDS}
            source[split].append(example.to_json() | texts)
    origin = drawn.notes[:1]  # package, version, licence; the other notes are about all drawn rows
    prepare("jsonl", source=source, new_name=TASK, notes=origin, data_dir=data_dir)


def written(comparison: Comparison) -> list[str]:
    """Returns a table of the arms that write solutions: how many are right, and where they go wrong."""
    lines = [
        "Solutions to test rows, after training on all labels (mean over the seeds): the share of solutions that begin with the row's own first"
        " step (`9 - 2 =`, its numbers and operator), of steps that are true (`9 - 2 = 7`), and of solutions that end in the right answer.",
        "",
        "| arm | first step is the row's | steps are true | ends in the answer |",
        "|---|---|---|---|",
    ]
    for arm in ARMS:
        runs = [run for run in comparison.of_arm(arm)[-1].runs if run.rationales]
        if runs:
            shares = [
                statistics.mean(share) for share in zip(*map(shares_right, runs), strict=True)
            ]
            lines.append(f"| {arm} | {' | '.join(f'{share:.3f}' for share in shares)} |")
    return lines


def shares_right(run: RunResult) -> list[float]:
    """Returns the three shares of `written` for one run; the first is over rows whose solution has a step."""
    first, true, ended = [], [], []
    for text, example in zip(run.rationales, run.gold.examples, strict=True):
        steps, own = STEP.findall(text), STEP.findall(example.rationale)
        if own:
            first.append(bool(steps) and steps[0][:3] == own[0][:3])
        true += [is_true(*step) for step in steps]
        ended.append(re.findall(r"\d+", text)[-1:] == [example.label])
    return [statistics.mean(found or [0]) for found in (first, true, ended)]


def is_true(left: str, operator: str, right: str, result: str) -> bool:
    """Returns whether a step is true, e.g. 9 - 2 = 7."""
    plain = {"x": "*", "÷": "/"}.get(operator, operator)
    return arithmetic.evaluate(f"{left} {plain} {right}") == int(result)


def outcome(comparison: Comparison) -> str:
    """Returns the first sentences of the page: at how many shares step_by_step beats label_only."""
    pair = {"label_only", "step_by_step"}
    verdicts = [verdict(t, "step_by_step") for t in comparison.tests if {t.first, t.second} == pair]
    won = sum(words.startswith("**holds**") for words in verdicts)
    none = "" if won else " These runs show no gain from worked solutions."
    return f"**step_by_step is significantly better than label_only (95%) at {won} of {len(verdicts)} shares.**{none}"


def problems(data_dir: pathlib.Path | None) -> dict[str, int]:
    """Returns the number of different problems in each split of `gsm_short`."""
    dataset = open_prepared(TASK, data_folder(data_dir))
    return {s: len({problem(e.id, e.input) for e in dataset.examples(s)}) for s in dataset.splits}


def page(different: dict[str, int], comparison: Comparison, took: str) -> str:
    """Returns docs/lab/experiments_gsm.md; `different` is the number of problems in each split."""
    recipe = comparison.runs[0].config
    lines = [
        "# The claim on word problems",
        "",
        outcome(comparison),
        "",
        "`make experiments-gsm` (`benchmarks/claim_gsm.py`) writes this page. Each run trains a tiny T5 from scratch:"
        f" {size_of(comparison, ARMS, took)} Dropout is {recipe['dropout_rate']:g}, and the learning rate is"
        f" {recipe['learning_rate']:g}. Runs on all shares have the same number of steps.",
        "",
        "The rows are word problems that the package reasoning-gym (Apache-2.0) makes from templates after GSM-Symbolic (Mirzadeh et al."
        " 2024, arXiv 2410.05229): [datasets.md](../reference/datasets.md#word-problems-gsm_symbolic). Only questions of at most"
        f" {MOST_WORDS['input']} words with worked solutions of at most {MOST_WORDS['rationale']} are kept, and only whole numbers of at most"
        f" {LARGEST}. Operators have spaces around them, and currency signs are left out, so that the vocabulary has a piece for each number.",
        "",
        "Test rows have the same templates as train rows, but numbers that no train row of that template has. A problem is a template with its"
        f" numbers, and has several wordings. There are {different['train']:,} problems in train, and {different['test']:,} in test with at most"
        f" {MOST_WORDINGS} wordings each. The intervals treat rows as independent, so they are too narrow for conclusions about other problems.",
        "",
        CHOSEN,
        "",
        "![Accuracy of label_only and step_by_step against the share of the labels](../images/claim_gsm.png)",
        "",
        "![Accuracy of every arm with all labels](../images/controls_gsm.png)",
        "",
        *results(comparison, ARMS, CLAIMS, SHARES, [labels_needed(comparison)]),
        "## What the models write",
        "",
        *written(comparison),
        "",
        "## What was tried to understand it",
        "",
        TRIED,
        "",
    ]
    return "\n".join(lines)


def main() -> None:
    """Prepares the data, trains the remaining runs, compares them, and writes the page."""
    parser = options(__doc__.splitlines()[0], "runs/claim_gsm", seeds=3)
    parser.add_argument("--prepare-only", action="store_true", help=f"make {TASK}, train nothing")
    args = parser.parse_args()
    prepare_short(args.data_dir)
    if args.prepare_only:
        return
    text = functools.partial(page, problems(args.data_dir))
    write_page(TASK, ARMS, args, text, curve=SHARES, suffix="_gsm")


if __name__ == "__main__":
    main()
