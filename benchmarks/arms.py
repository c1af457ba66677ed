"""Trains the arms of an experiment, one process per core, and writes its page.

claim.py and claim_gsm.py use it.
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
from typing import NamedTuple

from stepdistill_jax.commands.gin_config import load_config
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


@dataclasses.dataclass(frozen=True)
class Arm:
    """An arm of the experiment: its training, and the shares of the labels that it trains on.

    Attributes:
        what: description of the arm, for the page.
        shares: shares of the train split.
        config: name of a shipped config.
        part: part of `gin/` that overrides the config; None for none.
        settings: further settings, NAME=VALUE.
        train: source of the train split: (kind, share) of `spoil`, a function of the task's rows, or None
            for the task's own rows.
        fields: fields that this function adds to rows.
    """

    what: str
    shares: Sequence[float]
    config: str = "demo_step_by_step"
    part: str | None = None
    settings: Sequence[str] = ()
    train: tuple[str, float] | Callable[[Sequence[Example]], list[dict]] | None = None
    fields: Sequence[str] = ()


class Claim(NamedTuple):
    """A claim of the page, and the two arms that decide it: `better` must be more accurate than `other`."""

    sentence: str
    better: str
    other: str


def prepared(task: str, arm: Arm, data_dir: pathlib.Path | None) -> str:
    """Returns the dataset that an arm trains on; the test rows always come from `task`."""
    if arm.train is None:
        return task
    if isinstance(arm.train, tuple):
        return prepare_control(task, *arm.train, data_dir=data_dir).name
    new = f"{task}_{arm.train.__name__}"
    return prepare_variant(task, new, arm.train, fields=arm.fields, data_dir=data_dir).name


def cells(task: str, arms: dict[str, Arm], args: argparse.Namespace) -> list[Cell]:
    """Returns all runs of these arms, one arm after another."""
    found = []
    for name, arm in arms.items():
        dataset = prepared(task, arm, args.data_dir)
        parts = [f"{arm.part}.gin"] if arm.part else []
        for share in [s for s in arm.shares if s >= args.least_share]:
            for seed in range(args.seeds):
                overrides = [*arm.settings, f"TASK={dataset}", f"DATA_FRACTION={share}"]
                overrides += [f"SEED={seed}"]
                overrides += [f"TRAIN_STEPS={args.steps}"] if args.steps else []
                config = load_config(arm.config, overrides, parts)
                found.append(Cell(name, share, seed, {}, *config))
    return found


def work(folder: pathlib.Path, part: Sequence[Cell], core: int, args: argparse.Namespace) -> None:
    """Trains and evaluates the cells of one process, on one core; logs to FOLDER.log and exits."""
    with open(folder.with_suffix(".log"), "a", buffering=1) as log_file:
        os.dup2(log_file.fileno(), sys.stderr.fileno())
        keep_pages()
        if hasattr(os, "sched_setaffinity"):
            os.sched_setaffinity(0, {core})
        compile_cache.enable(compile_cache.folder_for(args.workdir / "cell"))
        done = sweep(part, workdir=folder, data_dir=args.data_dir, with_rationale=True)
        sys.exit(1 if done["failed_cells"] else 0)


def train_all(every: Sequence[Cell], args: argparse.Namespace) -> list[pathlib.Path]:
    """Trains and evaluates the remaining cells, one process per core; returns the folders of the sweeps.

    A model as small as this gains little from a second thread: two processes are nearly twice as fast.
    """
    args.workdir.mkdir(parents=True, exist_ok=True)
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
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(EXIT_STOPPED))  # ends the daemons, too
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
    """Returns the number of runs that are trained and evaluated."""
    files = [folder / SWEEP for folder in folders if (folder / SWEEP).is_file()]
    return sum(c["state"] == DONE for file in files for c in read_json(file)["cells"].values())


def of_arms(comparison: Comparison, arms: Sequence[str]) -> Comparison:
    """Returns the comparison with only the points of these arms, for a plot."""
    return dataclasses.replace(comparison, points=[p for p in comparison.points if p.arm in arms])


def pictures(
    comparison: Comparison,
    arms: dict[str, Arm],
    curves: Sequence[str],
    stems: Sequence[pathlib.Path],
) -> None:
    """Draws two PNG files: the curves of the arms in `curves`, and every arm's accuracy on all labels."""
    stems[0].parent.mkdir(parents=True, exist_ok=True)
    accuracy_figure(of_arms(comparison, curves), "test", stems[0])
    figure, axis = plots.figure()
    points = [comparison.of_arm(name)[-1] for name in arms]
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
    """Returns the verdict by the difference's 95% interval, as `**holds** +0.512 [+0.480, +0.543]`."""
    sign = 1 if test.second == better else -1
    low, high = sorted((sign * test.low + 0.0, sign * test.high + 0.0))  # + 0.0: no -0.000
    word = "holds" if low > 0 else "does not hold" if high < 0 else "is not shown"
    return f"**{word}** {sign * test.difference + 0.0:+.3f} [{low:+.3f}, {high:+.3f}]"


def labels_of(comparison: Comparison) -> dict[float, str]:
    """Returns texts such as `1500 labels` by share of the train split, from the arm `step_by_step`."""
    return {p.fraction: f"{p.labels:.0f} labels" for p in comparison.of_arm("step_by_step")}


def claim_table(
    comparison: Comparison, claims: Iterable[Claim], shares: Sequence[float]
) -> list[str]:
    """Returns lines that say how a claim is judged, and a table of the verdicts.

    Args:
        comparison: comparison of all runs.
        claims: rows of the table.
        shares: shares of the train split, the columns of the table; untrained ones are left out.
    """
    labels = {s: name for s, name in labels_of(comparison).items() if s in shares}
    tests = {(frozenset((t.first, t.second)), t.fraction): t for t in comparison.tests}
    lines = [
        "The 95% interval of the difference in test accuracy decides (paired bootstrap over rows and seeds). *Is not shown*: the interval"
        " contains 0.",
        "",
        f"| claim | {' | '.join(labels.values())} |",
        f"|---|{'---|' * len(labels)}",
    ]
    for sentence, better, other in claims:
        found = [tests.get((frozenset((better, other)), share)) for share in labels]
        verdicts = [verdict(t, better) if t else "" for t in found]
        lines.append(f"| {sentence} | {' | '.join(verdicts)} |")
    return lines


def accuracy_table(comparison: Comparison, arms: dict[str, Arm]) -> list[str]:
    """Returns a table with the accuracy of each arm at each share, and the arm's description."""
    points = {(p.arm, p.fraction): p for p in comparison.points}
    labels = labels_of(comparison)
    lines = [
        f"Mean over the seeds, ± the 95% interval (Student's t). Always answering the commonest label: {comparison.majority:.3f}.",
        "",
        f"| arm | {' | '.join(labels.values())} | description |",
        "|---|" + "---|" * (len(labels) + 1),
    ]
    for name, arm in arms.items():
        row = [shown(points.get((name, share))) for share in labels]
        lines.append(f"| {name} | {' | '.join(row)} | {arm.what} |")
    return lines


def labels_needed(comparison: Comparison) -> str:
    """Returns a paragraph that says with how many labels label_only and step_by_step reach each other."""
    ours = re.compile(r"label_only\b|.*\bstep_by_step\b")
    return " ".join(words for words in headline(comparison) if ours.match(words))


def shown(point: Point | None) -> str:
    """Returns the mean over seeds and half of its 95% interval, as `0.795 ± 0.303`."""
    if point is None:
        return ""
    half = "" if point.high is None else f" ± {point.high - point.accuracy:.3f}"
    return f"{point.accuracy:.3f}{half}"


def size_of(comparison: Comparison, arms: dict[str, Arm], took: str) -> str:
    """Returns `16 arms, 5 seeds, 1000 steps of 32 examples: 190 runs, ..., 2026-11-29.` and then `took`."""
    recipe, seeds = comparison.runs[0].config, max(len(p.runs) for p in comparison.points)
    return (
        f"{len(arms)} arms, {seeds} seed{'' if seeds == 1 else 's'}, {recipe['train_steps']} steps of"
        f" {recipe['batch_size']} examples: {len(comparison.runs)} runs, {os.cpu_count()} CPU cores,"
        f" jax {version_block()['jax']}, {time.strftime('%Y-%m-%d', time.gmtime())}.{took}"
    )


def results(
    comparison: Comparison,
    arms: dict[str, Arm],
    claims: Iterable[Claim],
    shares: Sequence[float],
    labels: Sequence[str],
) -> list[str]:
    """Returns lines of a page: the claims at `shares`, how many labels are needed, and all accuracies."""
    runs = comparison.runs
    return [
        "## What holds",
        "",
        *claim_table(comparison, claims, shares),
        "",
        "## How many labels",
        "",
        *labels,
        "",
        "## Accuracy",
        "",
        *accuracy_table(comparison, arms),
        "",
        f"Runs that gave every row the same answer: {sum(r.collapsed for r in runs)} of {len(runs)}.",
        "",
    ]


def write_page(
    task: str,
    arms: dict[str, Arm],
    args: argparse.Namespace,
    page: Callable[[Comparison, str], str],
    *,
    curve: Sequence[float],
    apart: dict[str, Arm] | None = None,
    suffix: str = "",
) -> None:
    """Trains the remaining runs, compares all, and writes experimentsSUFFIX.md with its two plots.

    `page` makes the text from the comparison and a sentence on the time it took. Arms with the shares
    `curve` are drawn as curves. Arms in `apart` are trained, but no table or plot shows them.
    """
    began, fresh = time.monotonic(), not args.workdir.exists()
    parts = train_all(cells(task, arms | (apart or {}), args), args)
    written = report(parts, output=args.workdir / "report", data_dir=args.data_dir)
    (comparison,) = written.comparisons
    curves = [name for name, arm in arms.items() if arm.shares == curve]
    stems = [args.docs / "images" / f"{name}{suffix}" for name in ("claim", "controls")]
    pictures(comparison, arms, curves, stems)
    took = f" It took {(time.monotonic() - began) / 60:.0f} minutes." if fresh else ""
    out = args.docs / "lab" / f"experiments{suffix}.md"
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(page(comparison, took), encoding="utf-8")
    print(f"{out}; all numbers: {written.page}")


def options(description: str, workdir: str, *, seeds: int) -> argparse.ArgumentParser:
    """Returns the flags that these commands share; `seeds` and `workdir` are their defaults."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--workdir", type=pathlib.Path, default=pathlib.Path(workdir))
    parser.add_argument("--data-dir", type=pathlib.Path)
    parser.add_argument("--docs", type=pathlib.Path, default=DOCS, help="folder of the page")
    parser.add_argument("--seeds", type=int, default=seeds)
    parser.add_argument("--least-share", type=float, default=0.0, help="leave smaller shares out")
    parser.add_argument("--steps", type=int, help="steps of each run, for a trial")
    return parser
