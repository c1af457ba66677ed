"""The paper's claim and its controls on the embedded dataset, from nothing: writes docs/experiments.md.

    python benchmarks/claim.py --workdir runs/claim

Trains 110 small runs (5 seeds; shares of 1/16 to 1 of the labels), compares them by `report`, and writes
what holds and what does not, with the plot. Stopped, it goes on where it was. The figures in the page
are those of the run that wrote it; nothing in its text is decided beforehand.
"""

import argparse
import pathlib
import shutil

from stepdistill_jax import compile_cache
from stepdistill_jax.commands.gin_config import load_config
from stepdistill_jax.experiments.comparison import Comparison, PairTest
from stepdistill_jax.experiments.controls import prepare_control
from stepdistill_jax.experiments.report import headline, report
from stepdistill_jax.experiments.sweep import Cell, sweep
from stepdistill_jax.versions import version_block

DOCS = pathlib.Path(__file__).parents[1] / "docs"
CURVE = (0.0625, 0.125, 0.25, 0.5, 1.0)
TWO = (0.25, 1.0)
# arm -> (config, how the rationales are spoilt, shares of the labels)
ARMS = {
    "label_only": ("demo_label_only", None, CURVE),
    "step_by_step": ("demo_step_by_step", None, CURVE),
    "copy_control": ("demo_copy_control", None, TWO),
    "shuffled": ("demo_step_by_step", ("shuffled", 1.0), TWO),
    "wrong_10": ("demo_step_by_step", ("wrong", 0.1), TWO),
    "wrong_30": ("demo_step_by_step", ("wrong", 0.3), TWO),
    "wrong_50": ("demo_step_by_step", ("wrong", 0.5), TWO),
    "missing_50": ("demo_step_by_step", ("missing", 0.5), TWO),
}
WHAT = {
    "label_only": "the label alone: standard fine-tuning",
    "step_by_step": "label and rationale, two objectives: the paper's method",
    "copy_control": "the second objective repeats the input: as much to write, no reasons",
    "shuffled": "step by step, each rationale that of another row",
    "wrong_10": "step by step, 10% of the rationales from a row with the other label",
    "wrong_30": "the same, 30%",
    "wrong_50": "the same, 50%",
    "missing_50": "step by step, half of the rows without a rationale",
}


def cells(args: argparse.Namespace) -> list[Cell]:
    """All runs; a control is an arm that trains on another dataset with the same test rows."""
    found = []
    for arm, (config, spoilt, shares) in ARMS.items():
        task = "delivery"
        if spoilt:
            task = prepare_control(task, *spoilt, data_dir=args.data_dir).name
        for share in [s for s in shares if s >= args.least_share]:
            for seed in range(args.seeds):
                overrides = [f"TASK={task}", f"DATA_FRACTION={share}", f"SEED={seed}"]
                if args.steps:
                    overrides.append(f"TRAIN_STEPS={args.steps}")
                found.append(Cell(arm, share, seed, {}, *load_config(config, overrides)))
    return found


def verdicts(comparison: Comparison) -> list[tuple[str, str, str]]:
    """(claim, whether it holds, figures) on all data, by the 95% interval of the difference."""
    full = max(p.fraction for p in comparison.points)
    tests = {(t.first, t.second): t for t in comparison.tests if t.fraction == full}

    def better(first: str, second: str) -> tuple[str, str]:
        test = tests[first, second]
        holds = "holds" if test.low > 0 else "does not hold" if test.high < 0 else "is not shown"
        return holds, figures(test)

    said = [
        (f"{arm} is better than label_only", *better("label_only", arm))
        for arm in comparison.arms
        if arm != "label_only"
    ]
    enough = next(e for e in comparison.enough if e.arm == "step_by_step")
    words = next(s for s in headline(comparison) if "step_by_step" in s)
    saved = enough.surely is not None and enough.surely < full
    said.insert(1, ("step_by_step needs fewer labels", "holds" if saved else "is not shown", words))
    for arm in (a for a in comparison.arms if a not in ("label_only", "step_by_step")):
        holds, shown = better("step_by_step", arm)
        lost = {"does not hold": "holds", "holds": "does not hold"}.get(holds, holds)
        said.append((f"{arm} is worse than step_by_step", lost, shown))
    return said


def figures(test: PairTest) -> str:
    """`+0.512 [+0.480, +0.543]`."""
    return f"{test.difference:+.3f} [{test.low:+.3f}, {test.high:+.3f}]"


def page(comparison: Comparison) -> str:
    """docs/experiments.md."""
    versions = version_block()
    points = {(p.arm, p.fraction): p for p in comparison.points}
    shares = sorted({p.fraction for p in comparison.points})
    labels = {p.fraction: f"{p.labels:.0f}" for p in comparison.points}
    lines = [
        "# The claim, and what controls make of it",
        "",
        "Written by `make experiments` (`benchmarks/claim.py`), from nothing. The embedded dataset `delivery`, a tiny T5 from"
        f" scratch, {max(len(p.runs) for p in comparison.points)} seeds, the same recipe and"
        f" {comparison.runs[0].config['train_steps']} steps for every arm; jax {versions['jax']},"
        f" {versions['devices']}.",
        "",
        "![Accuracy of each arm against the share of the labels](images/claim.png)",
        "",
        "## What holds",
        "",
        "With all labels, by the 95% interval of the difference in test accuracy (paired bootstrap over rows and seeds).",
        "",
        "| claim | | difference, or what was found |",
        "|---|---|---|",
        *(f"| {claim} | **{holds}** | {shown} |" for claim, holds, shown in verdicts(comparison)),
        "",
        "## Accuracy",
        "",
        f"Mean over the seeds, ± the 95% interval (Student's t). Always giving the commonest label: {comparison.majority:.3f}.",
        "",
        "| arm | " + " | ".join(f"{labels[s]} labels" for s in shares) + " | what it is |",
        "|---|" + "---|" * (len(shares) + 1),
    ]
    for arm in comparison.arms:
        row = [_shown(points.get((arm, s))) for s in shares]
        lines.append(f"| {arm} | {' | '.join(row)} | {WHAT[arm]} |")
    lines += [
        "",
        f"Runs that gave every row the same answer: {sum(p.collapsed for p in comparison.points)} of {len(comparison.runs)}.",
        "",
        "This is a made-up task that a tiny model can learn by way of its reasons. It shows that the method, this code and the"
        " controls do what they say; how much the method gains on other data, only runs on that data say"
        " ([docs/experimenting.md](experimenting.md)).",
        "",
    ]
    return "\n".join(lines)


def _shown(point) -> str:
    if point is None:
        return ""
    half = "" if point.high is None else f" ± {point.high - point.accuracy:.3f}"
    return f"{point.accuracy:.3f}{half}"


def main() -> None:
    """Prepares, trains what is left, compares, writes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workdir", type=pathlib.Path, default=pathlib.Path("runs/claim"))
    parser.add_argument("--data-dir", type=pathlib.Path)
    parser.add_argument("--docs", type=pathlib.Path, default=DOCS, help="where the page goes")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--least-share", type=float, default=0.0, help="leave smaller shares out")
    parser.add_argument("--steps", type=int, help="of each run, to try this out")
    args = parser.parse_args()
    compile_cache.enable(compile_cache.beside(args.workdir / "cell"))
    done = sweep(cells(args), workdir=args.workdir, data_dir=args.data_dir, with_rationale=True)
    if done["failed_cells"]:
        raise SystemExit(1)
    written = report([args.workdir], output=args.workdir / "report", data_dir=args.data_dir)
    (comparison,) = written.comparisons
    (args.docs / "images").mkdir(parents=True, exist_ok=True)
    shutil.copy(args.workdir / "report" / "accuracy.png", args.docs / "images" / "claim.png")
    (args.docs / "experiments.md").write_text(page(comparison), encoding="utf-8")
    print(f"{args.docs / 'experiments.md'}; all figures: {written.page}")


if __name__ == "__main__":
    main()
