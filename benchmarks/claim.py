"""The paper's claim and its controls on the embedded dataset, from nothing: writes docs/experiments.md.

    python benchmarks/claim.py --workdir runs/claim

Trains small runs (each arm with 5 seeds, on all labels and on shares of them), one process a CPU core,
compares them by `report`, and writes what holds and what does not, with the plots. Stopped, it goes on
where it was. The figures in the page are those of the run that wrote it; nothing in its text is decided
beforehand.
"""

import argparse
import dataclasses
import multiprocessing
import os
import pathlib
import re
import signal
import sys
import time
from collections.abc import Callable, Iterable, Sequence

from stepdistill_jax.commands.gin_config import load_config
from stepdistill_jax.data.corpora.delivery import ROWS, every_example
from stepdistill_jax.data.example import Example
from stepdistill_jax.errors import EXIT_STOPPED
from stepdistill_jax.experiments import plots
from stepdistill_jax.experiments.comparison import Comparison, PairTest, Point
from stepdistill_jax.experiments.controls import prepare_control, prepare_variant
from stepdistill_jax.experiments.figures import accuracy_figure
from stepdistill_jax.experiments.report import headline, report
from stepdistill_jax.experiments.sweep import DONE, SWEEP, Cell, sweep
from stepdistill_jax.models.cpu_speed import keep_pages
from stepdistill_jax.runtime import compile_cache
from stepdistill_jax.runtime.files import read_json
from stepdistill_jax.runtime.progress import log
from stepdistill_jax.versions import version_block

DOCS = pathlib.Path(__file__).parents[1] / "docs"
TASK = "delivery"
CURVE, TWO, FULL = (0.125, 0.25, 0.5, 1.0), (0.5, 1.0), (1.0,)


@dataclasses.dataclass(frozen=True)
class Arm:
    """What is trained, and on which shares of the labels.

    Attributes:
        what: in words, for the page.
        shares: of the train split.
        config: a demo config.
        part: of `gin/`, over it.
        settings: NAME=VALUE.
        train: its train split: of `spoil` (kind, share), or a function of this file's; None is `delivery`'s.
    """

    what: str
    shares: Sequence[float]
    config: str = "demo_step_by_step"
    part: str | None = None
    settings: Sequence[str] = ()
    train: tuple[str, float] | Callable[[Sequence[Example]], list[dict]] | None = None


def more_labels(examples: Sequence[Example]) -> list[dict]:
    """All examples that can be made and are neither in validation nor in test."""
    before = sum(ROWS.values()) // 2  # of each label, in the three splits
    others = [e for same in every_example().values() for e in same[before:]]
    return [e.to_json() | {"id": f"more-{i}"} for i, e in enumerate([*examples, *others])]


def why_not(examples: Sequence[Example]) -> list[dict]:
    """A field with what the other label would need: `trouble needs a fast pace on a narrow road .`"""
    rows = []
    for e in examples:
        pace, _, _, _, road, *_ = e.rationale.split()  # slow pace on a narrow road , since ...
        other = {"smooth": "trouble", "trouble": "smooth"}[e.label]
        needed = {"fast": "slow", "slow": "fast"}[pace]
        rows.append(e.to_json() | {"why_not": f"{other} needs a {needed} pace on a {road} road ."})
    return rows


EQUAL = ["step_by_step.label_weight=0.5", "step_by_step.rationale_weight=0.5"]
# Weights are the demo's, 1 for the label and 3 for all others together, but where they are EQUAL.
# The lengths hold every text of an arm.
ARMS = {
    "label_only": Arm("the label alone: standard fine-tuning", CURVE, config="demo_label_only"),
    "step_by_step": Arm("label and rationale, two objectives: the paper's method", CURVE),
    "step_by_step_equal": Arm(
        "the same with the paper's weights, 0.5 and 0.5",
        FULL,
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
        "the rationale is read, at test time, too: a bound, not a method",
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
    "shuffled": Arm(
        "step by step, each rationale that of another row", FULL, train=("shuffled", 1.0)
    ),
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
# Apart: its "all" are more labels than the others' are.
MORE_LABELS = "label_only_more"
MORE = Arm(
    "label_only with every label that can be made",
    FULL,
    config="demo_label_only",
    settings=["TRAIN_STEPS=4000"],
    train=more_labels,
)
# (sentence, the arm that it says is better, the other one)
CLAIMS = [
    ("Rationales help: step_by_step beats label_only", "step_by_step", "label_only"),
    ("Reasons help, more text does not: it beats copy_control", "step_by_step", "copy_control"),
    ("The reasons must be the row's own: it beats shuffled", "step_by_step", "shuffled"),
    ("10% wrong reasons cost accuracy", "step_by_step", "wrong_10"),
    ("30% wrong reasons cost accuracy", "step_by_step", "wrong_30"),
    ("50% wrong reasons cost accuracy", "step_by_step", "wrong_50"),
    ("50% wrong reasons are still better than none", "wrong_50", "label_only"),
    ("Reasons for half of the rows cost accuracy", "step_by_step", "missing_50"),
    ("Reasons for half of the rows are better than none", "missing_50", "label_only"),
    ("Two tasks beat one target: step_by_step beats single_task", "step_by_step", "single_task"),
    ("Reading the teacher's reasons beats writing them", "rationale_input", "step_by_step"),
    ("One encoding for both targets costs accuracy", "step_by_step", "shared_encoder"),
    ("A third objective helps", "step_by_step_multi", "step_by_step"),
    ("Rationales help without gold labels, too", "step_by_step_llm", "label_only_llm"),
    (
        "Mutual information helps: step_by_step_mi beats step_by_step_equal",
        "step_by_step_mi",
        "step_by_step_equal",
    ),
]


def prepared(arm: Arm, data_dir: pathlib.Path | None) -> str:
    """Name of the dataset that an arm trains on; its test rows are `delivery`'s."""
    if arm.train is None:
        return TASK
    if isinstance(arm.train, tuple):
        return prepare_control(TASK, *arm.train, data_dir=data_dir).name
    name = arm.train.__name__
    fields = [name] if arm.train is why_not else []
    return prepare_variant(TASK, f"{TASK}_{name}", arm.train, fields=fields, data_dir=data_dir).name


def cells(arms: dict[str, Arm], args: argparse.Namespace) -> list[Cell]:
    """All runs of these arms."""
    found = []
    for name, arm in arms.items():
        task = prepared(arm, args.data_dir)
        parts = [f"{arm.part}.gin"] if arm.part else []
        for share in [s for s in arm.shares if s >= args.least_share]:
            for seed in range(args.seeds):
                overrides = [*arm.settings, f"TASK={task}", f"DATA_FRACTION={share}"]
                overrides += [f"SEED={seed}"]
                overrides += [f"TRAIN_STEPS={args.steps}"] if args.steps else []
                config = load_config(arm.config, overrides, parts)
                found.append(Cell(name, share, seed, {}, *config))
    return found


def work(folder: pathlib.Path, part: Sequence[Cell], core: int, args: argparse.Namespace) -> None:
    """One process: its share of the cells, on one core, told to FOLDER.log."""
    with open(folder.with_suffix(".log"), "a", buffering=1) as told:
        os.dup2(told.fileno(), sys.stderr.fileno())
        keep_pages()
        if hasattr(os, "sched_setaffinity"):
            os.sched_setaffinity(0, {core})
        compile_cache.enable(compile_cache.beside(args.workdir / "cell"))
        done = sweep(part, workdir=folder, data_dir=args.data_dir, with_rationale=True)
        sys.exit(1 if done["failed_cells"] else 0)


def train_all(args: argparse.Namespace) -> list[pathlib.Path]:
    """Trains and evaluates what is left, one process a core; the folders of their sweeps.

    A model as small as this gains little from a second thread: two processes are nearly twice as fast.
    """
    args.workdir.mkdir(parents=True, exist_ok=True)
    every = cells(ARMS | {MORE_LABELS: MORE}, args)
    cores = range(os.cpu_count() or 1)
    if hasattr(os, "sched_getaffinity"):
        cores = sorted(os.sched_getaffinity(0))
    parts = {args.workdir / f"part_{i}": every[i :: len(cores)] for i in range(len(cores))}
    spawn = multiprocessing.get_context("spawn")
    workers = [
        spawn.Process(target=work, args=(folder, part, core, args), daemon=True)
        for (folder, part), core in zip(parts.items(), cores, strict=True)
        if part
    ]
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(EXIT_STOPPED))  # takes the workers along
    for worker in workers:
        worker.start()
    began, before, last = time.monotonic(), number_done(parts), None
    while any(worker.is_alive() for worker in workers):
        time.sleep(1)
        if (done := number_done(parts)) != last and done > before:
            left = (time.monotonic() - began) / (done - before) * (len(every) - done)
            log(f"{done} of {len(every)} runs are done, {left / 60:.0f} minutes left")
        last = done
    if any(worker.exitcode for worker in workers):
        raise SystemExit(f"a run failed, or was stopped: {args.workdir}/part_*.log")
    return list(parts)


def number_done(folders: Iterable[pathlib.Path]) -> int:
    """Runs that are trained and evaluated."""
    files = [folder / SWEEP for folder in folders if (folder / SWEEP).is_file()]
    return sum(c["state"] == DONE for file in files for c in read_json(file)["cells"].values())


def of_arms(comparison: Comparison, arms: Sequence[str]) -> Comparison:
    """The points of these arms, to be drawn."""
    return dataclasses.replace(comparison, points=[p for p in comparison.points if p.arm in arms])


def pictures(comparison: Comparison, folder: pathlib.Path) -> None:
    """claim.png: curves. controls.png: every arm with all labels."""
    folder.mkdir(parents=True, exist_ok=True)
    curves = [name for name, arm in ARMS.items() if arm.shares == CURVE]
    stems = [folder / "claim", folder / "controls"]
    accuracy_figure(of_arms(comparison, curves), "test", stems[0])
    figure, axis = plots.figure()
    points = [comparison.of_arm(name)[-1] for name in ARMS]
    for i, p in enumerate(points):
        look = plots.look_of(0 if p.arm in curves else 1) | {"ls": ""}
        axis.plot([p.accuracy], [i], ms=7, **look)
        if p.low is not None and p.high is not None:
            axis.plot([max(0, p.low), min(1, p.high)], [i, i], color=look["color"], lw=1.6)
    axis.axvline(comparison.majority, color="0.6", lw=0.9, zorder=0)
    axis.set_yticks(range(len(points)), [p.arm for p in points])
    axis.invert_yaxis()
    axis.set(xlabel="label accuracy on test, all labels; the line: always the commonest label")
    plots.save(figure, stems[1])
    for stem in stems:
        stem.with_suffix(".svg").unlink()


def verdict(test: PairTest, better: str) -> str:
    """`**holds** +0.512 [+0.480, +0.543]`: by the 95% interval of the difference."""
    sign = 1 if test.second == better else -1
    low, high = sorted((sign * test.low + 0.0, sign * test.high + 0.0))  # + 0.0: no -0.000
    word = "holds" if low > 0 else "does not hold" if high < 0 else "is not shown"
    return f"**{word}** {sign * test.difference + 0.0:+.3f} [{low:+.3f}, {high:+.3f}]"


def claim_rows(comparison: Comparison, shares: Sequence[float]) -> list[str]:
    """A row for each of CLAIMS: its verdict at each share that both arms were trained on."""
    tests = {(frozenset((t.first, t.second)), t.fraction): t for t in comparison.tests}
    rows = []
    for sentence, better, other in CLAIMS:
        found = [tests.get((frozenset((better, other)), share)) for share in shares]
        shown = [verdict(t, better) if t else "" for t in found]
        rows.append(f"| {sentence} | {' | '.join(shown)} |")
    return rows


def fewer_labels(comparison: Comparison) -> list[str]:
    """Paragraphs: what step_by_step needs, and whether more labels make up for its rationales."""
    words = [s for s in headline(comparison) if re.match(r"label_only\b|.*\bstep_by_step\b", s)]
    (more,), last = comparison.of_arm(MORE_LABELS), comparison.of_arm("step_by_step")[-1]
    reached = "reaches" if more.accuracy >= last.accuracy else "does not reach"
    return [
        " ".join(words),
        "",
        f"With {more.labels:.0f} labels, every one that can be made ({more.labels / last.labels:.1f} times as many), and"
        f" {more.runs[0].config['train_steps']} steps, label_only {reached} it: {shown(more)}.",
    ]


def page(comparison: Comparison, seconds: float | None) -> str:
    """docs/experiments.md."""
    versions = version_block()
    points = {(p.arm, p.fraction): p for p in comparison.points}
    shares = sorted({p.fraction for p in comparison.points})
    labels = {p.fraction: f"{p.labels:.0f}" for p in comparison.of_arm("step_by_step")}
    ends = [s for s in shares if s in TWO]
    runs = comparison.runs
    recipe = runs[0].config
    steps = recipe["train_steps"]
    took = "" if seconds is None else f" It took {seconds / 60:.0f} minutes."
    lines = [
        "# The claim, and what controls make of it",
        "",
        "Written by `make experiments` (`benchmarks/claim.py`), from nothing. The embedded dataset `delivery`, a tiny T5 from"
        f" scratch; {len(ARMS)} arms, {max(len(p.runs) for p in comparison.points)} seeds,"
        f" {steps} steps: {len(runs)} runs, {os.cpu_count()} CPU cores, jax"
        f" {versions['jax']}, {time.strftime('%Y-%m-%d', time.gmtime())}.{took}",
        "",
        "The recipe is the demo's and not the paper's: weight 1 for the label and 3 for the other objectives together (the paper: 0.5"
        f" and 0.5, λ = 1; here the arm `step_by_step_equal`), dropout {recipe['dropout_rate']:g}, a learning rate of"
        f" {recipe['learning_rate']:g}, {recipe['batch_size']} examples a step.",
        "",
        "![Accuracy of each arm against the share of the labels](images/claim.png)",
        "",
        "![Accuracy of every arm with all labels](images/controls.png)",
        "",
        "## What holds",
        "",
        "By the 95% interval of the difference in test accuracy (paired bootstrap over rows and seeds). *Is not shown*: the interval"
        " holds 0.",
        "",
        f"| claim | {' | '.join(f'{labels[s]} labels' for s in ends)} |",
        f"|---|{'---|' * len(ends)}",
        *claim_rows(comparison, ends),
        "",
        "## How many labels",
        "",
        *fewer_labels(comparison),
        "",
        "## Accuracy",
        "",
        f"Mean over the seeds, ± the 95% interval (Student's t). Always giving the commonest label: {comparison.majority:.3f}.",
        "",
        "| arm | " + " | ".join(f"{labels[s]} labels" for s in shares) + " | what it is |",
        "|---|" + "---|" * (len(shares) + 1),
    ]
    for name, arm in ARMS.items():
        row = [shown(points.get((name, s))) for s in shares]
        lines.append(f"| {name} | {' | '.join(row)} | {arm.what} |")
    lines += [
        "",
        f"Runs that gave every row the same answer: {sum(r.collapsed for r in runs)} of {len(runs)}.",
        "",
        f"This is a made-up task that a tiny model can learn by way of its reasons, and by {steps:,} steps it has either seen through it"
        " or not: between chance and all right lies little. It shows that the method, this code and the"
        " controls do what they say; how much the method gains on other data, only runs on that data say"
        " ([docs/experimenting.md](experimenting.md)).",
        "",
    ]
    return "\n".join(lines)


def shown(point: Point | None) -> str:
    """`0.795 ± 0.303`."""
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
    began, fresh = time.monotonic(), not args.workdir.exists()
    parts = train_all(args)
    written = report(parts, output=args.workdir / "report", data_dir=args.data_dir)
    (comparison,) = written.comparisons
    pictures(comparison, args.docs / "images")
    seconds = time.monotonic() - began if fresh else None
    (args.docs / "experiments.md").write_text(page(comparison, seconds), encoding="utf-8")
    print(f"{args.docs / 'experiments.md'}; all figures: {written.page}")


if __name__ == "__main__":
    main()
