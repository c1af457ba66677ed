"""Runs compared: curves over data, what fraction is enough, tests between arms."""

import dataclasses
import itertools
import pathlib
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from stepdistill_jax.data.text_metrics import majority_baseline
from stepdistill_jax.errors import InputError, nearest
from stepdistill_jax.experiments.results import RunResult, arm_of
from stepdistill_jax.experiments.stats import holm, mean_interval, paired_difference, resample
from stepdistill_jax.training.provenance import FREE_FIELDS, with_defaults

# of a run's config, what tells arms, fractions and seeds apart, or says nothing of the model
NO_SETTING = ("objectives", "data_fraction", "seed", "task_module", *FREE_FIELDS)
BASELINE = "label_only"


@dataclasses.dataclass(frozen=True)
class Point:
    """An arm at a fraction, over its seeds.

    Attributes:
        arm, fraction: where.
        labels: mean number of labelled examples trained on.
        runs: one a seed.
        accuracy: mean over all of them.
        low, high: its 95 % interval by Student's t; None for one seed.
        collapsed: how many of the runs give every row the same answer.
        accuracy_of_others: mean without these; None where none or all collapsed.
    """

    arm: str
    fraction: float
    labels: float
    runs: Sequence[RunResult]
    accuracy: float
    low: float | None
    high: float | None
    collapsed: int
    accuracy_of_others: float | None


@dataclasses.dataclass(frozen=True)
class PairTest:
    """Two arms at one fraction, on the same rows.

    Attributes:
        fraction, first, second: which.
        difference: mean accuracy of the second less that of the first.
        low, high, p: of `paired_difference`.
        p_holm: corrected over all tests of the comparison.
        seeds: those that both arms have.
        only_first, only_second: rows that one alone gets right, over these seeds.
    """

    fraction: float
    first: str
    second: str
    difference: float
    low: float
    high: float
    p: float
    p_holm: float
    seeds: Sequence[int]
    only_first: int
    only_second: int


@dataclasses.dataclass(frozen=True)
class Enough:
    """How little data an arm needs for what the baseline reaches with all of it.

    Attributes:
        arm: not the baseline.
        target: the baseline's mean accuracy at its largest fraction.
        fraction, labels: the smallest fraction tried at which the arm's mean is at least `target`;
            None where there is none.
        surely: the smallest from which on the 95 % interval of the difference is above 0; None where
            it is so at none.
        tested: whether there are answers to compare row by row; without them `surely` says nothing.
        baseline_labels: labels behind `target`.
        reverse: the smallest fraction at which the baseline reaches the arm's accuracy at the
            arm's largest fraction; None where it never does.
    """

    arm: str
    target: float
    fraction: float | None
    labels: float | None
    surely: float | None
    tested: bool
    baseline_labels: float
    reverse: float | None


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Runs that differ in arm, fraction and seed alone, and have answered the same rows.

    Attributes:
        name: task, and the settings in which it differs from the report's other comparisons.
        baseline: arm that the others are held against.
        runs, points, tests, enough: see their classes; points by arm, then fraction.
        teacher: accuracy of the teacher on these rows, where it has answered them.
        majority: accuracy of always giving the commonest label.
    """

    name: str
    baseline: str
    runs: Sequence[RunResult]
    points: Sequence[Point]
    tests: Sequence[PairTest]
    enough: Sequence[Enough]
    teacher: float | None
    majority: float | None

    @property
    def arms(self) -> list[str]:
        """The baseline first."""
        return list(dict.fromkeys(p.arm for p in self.points))

    def is_chance(self, point: Point) -> bool:
        """Whether always giving the commonest label is not shown to be worse than an arm at a fraction."""
        low = point.accuracy if point.low is None else point.low
        return self.majority is not None and low <= self.majority

    def of_arm(self, arm: str) -> list[Point]:
        """Its points, smallest fraction first."""
        return [p for p in self.points if p.arm == arm]


def compare(
    runs: Sequence[RunResult], baseline: str | None = None
) -> tuple[list[Comparison], list[dict[str, str]]]:
    """One comparison for each group of runs that may be compared; and runs left out, with `run` and `why`.

    Runs are in one group where they have answered the same rows and no setting differs that differs
    within an arm, too (a learning rate of a grid; what an arm alone sets is the arm's).

    Args:
        runs: all.
        baseline: arm that others are held against; None is `label_only`, or else the first arm with
            its objectives, or else the first arm.

    Raises:
        InputError: no run is of that arm; names those there are.
    """
    arms = list(dict.fromkeys(r.arm for r in runs))
    if baseline is not None and baseline not in arms:
        raise InputError(
            f"`baseline`: no run of {baseline!r} (arms: {', '.join(arms)}){nearest(baseline, arms)}"
        )
    groups: dict[tuple, dict[tuple, RunResult]] = defaultdict(dict)
    left_out, settings = [], _settings(runs)
    for run, setting in zip(runs, settings, strict=True):
        group = groups[run.gold_key, tuple(setting.items())]
        first = group.setdefault((run.arm, run.fraction, run.seed), run)
        if first is not run:
            why = f"has the arm, fraction, seed and settings of {first.workdir}"
            left_out.append({"run": str(run.workdir), "why": why})
    found = []
    for (_, setting), group in groups.items():
        members = list(group.values())
        words = [f"{k}={v}" for k, v in setting if k != "TASK"]
        name = ", ".join([min((r.task for r in members), key=len), *words])
        found.append(_comparison(name, members, _baseline(members, baseline)))
    return found, left_out


def _baseline(runs: Sequence[RunResult], asked: str | None) -> str:
    alike = [r.arm for r in runs if arm_of(r.config["objectives"]) == BASELINE]
    arms = [r.arm for r in runs]
    return next(arm for arm in (asked, BASELINE, *alike, *arms) if arm in arms)


def _settings(runs: Sequence[RunResult]) -> list[dict[str, str]]:
    """What tells the groups apart: the grid, and settings that differ between runs of one arm."""
    flat = [flat_settings(with_defaults(r.config)) for r in runs]
    differing: dict[str, None] = {}
    by_arm = defaultdict(list)
    for run, config in zip(runs, flat, strict=True):
        by_arm[run.arm, run.gold_key, tuple(run.grid.items())].append(config)
    for configs in by_arm.values():
        for name in dict.fromkeys(n for c in configs for n in c):
            if len({c.get(name, "None") for c in configs}) > 1:
                differing[name] = None
    return [
        dict(run.grid)
        | {n: short_value(config.get(n, "None")) for n in differing if n not in run.grid}
        for run, config in zip(runs, flat, strict=True)
    ]


def flat_settings(config: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Returns a run's settings as texts by name: macros in capitals, nested ones as `optimizer.name`.

    Without those of `NO_SETTING`, but for INIT_FROM, and the objectives' weights and prompts.
    """
    found = {}
    for name, value in config.items():
        if prefix or name not in NO_SETTING:
            if isinstance(value, Mapping):
                found |= flat_settings(value, f"{prefix}{name}.")
            else:
                found[f"{prefix}{name}" if prefix else name.upper()] = str(value)
    if not prefix:
        # it may have moved, and what is in it decides
        found["INIT_FROM"] = str(config.get("init_from"))
        # an arm is the same whatever they are (`arm_of`)
        for o in config["objectives"]:
            found |= {f"{o['name']}.{n}": str(o.get(n)) for n in ("weight", "input_template")}
    return found


def short_value(value: str) -> str:
    """Returns a setting's text, of a path the last part."""
    # INIT_RULES is a list of names with slashes
    is_path = "/" in value and not value.startswith("[")
    return pathlib.PurePath(value).name if is_path else value


def _comparison(name: str, runs: Sequence[RunResult], baseline: str) -> Comparison:
    by_point = defaultdict(list)
    for run in sorted(runs, key=lambda r: (r.arm != baseline, r.fraction, r.seed)):
        by_point[run.arm, run.fraction].append(run)
    order = [baseline, *dict.fromkeys(r.arm for r in runs)]
    points = [
        _point(*by_point[key]) for key in sorted(by_point, key=lambda k: (order.index(k[0]), k[1]))
    ]
    drawn = _drawn(runs)
    tests = _tests(points, drawn)
    enough = [
        _enough(arm, baseline, points, drawn)
        for arm in dict.fromkeys(p.arm for p in points)
        if arm != baseline
    ]
    gold = runs[0].gold
    teachers = [r.gold.teacher for r in runs if r.gold and r.gold.teacher is not None]
    majority = next((r.majority for r in runs if r.majority is not None), None)
    if majority is None and gold is not None:
        majority = majority_baseline([e.label for e in gold.examples], gold.metric)
    return Comparison(
        name, baseline, runs, points, tests, enough, max(teachers, default=None), majority
    )


def _point(*runs: RunResult) -> Point:
    mean, low, high = mean_interval([r.accuracy for r in runs])
    others = [r.accuracy for r in runs if not r.collapsed]
    collapsed = len(runs) - len(others)
    return Point(
        arm=runs[0].arm,
        fraction=runs[0].fraction,
        labels=float(np.mean([r.labels for r in runs])),
        runs=runs,
        accuracy=mean,
        low=low,
        high=high,
        collapsed=collapsed,
        accuracy_of_others=float(np.mean(others)) if collapsed and others else None,
    )


def _drawn(runs: Sequence[RunResult]) -> dict[RunResult, np.ndarray]:
    """[draws] accuracy of each run that has its answers, on the same draws of rows."""
    known = [r for r in runs if r.right is not None and len(r.right)]
    if not known:
        return {}
    columns = resample(np.stack([r.right for r in known if r.right is not None]))
    return {run: columns[:, i] for i, run in enumerate(known)}


def _difference(
    first: Point, second: Point, drawn: Mapping[RunResult, np.ndarray]
) -> tuple[float, float, float] | None:
    if not all(r in drawn for r in (*first.runs, *second.runs)):
        return None
    columns = [np.stack([drawn[r] for r in p.runs], 1) for p in (first, second)]
    return paired_difference(*columns)


def _tests(points: Sequence[Point], drawn: Mapping[RunResult, np.ndarray]) -> list[PairTest]:
    found = []
    for first, second in itertools.combinations(points, 2):
        if first.fraction != second.fraction:
            continue
        interval = _difference(first, second, drawn)
        if interval is None:
            continue
        of_first, of_second = ({r.seed: r.right for r in p.runs} for p in (first, second))
        seeds = [s for s in of_first if s in of_second]
        low, high, p = interval
        found.append(
            PairTest(
                fraction=first.fraction,
                first=first.arm,
                second=second.arm,
                difference=second.accuracy - first.accuracy,
                low=low,
                high=high,
                p=p,
                p_holm=p,
                seeds=seeds,
                only_first=sum(int((of_first[s] & ~of_second[s]).sum()) for s in seeds),
                only_second=sum(int((of_second[s] & ~of_first[s]).sum()) for s in seeds),
            )
        )
    found.sort(key=lambda t: t.fraction)
    corrected = holm([t.p for t in found])
    return [dataclasses.replace(t, p_holm=p) for t, p in zip(found, corrected, strict=True)]


def _enough(
    arm: str, baseline: str, points: Sequence[Point], drawn: Mapping[RunResult, np.ndarray]
) -> Enough:
    mine = [p for p in points if p.arm == arm]
    theirs = [p for p in points if p.arm == baseline]
    full = theirs[-1]
    reached = next((p for p in mine if p.accuracy >= full.accuracy), None)
    intervals = [(p.fraction, _difference(full, p, drawn)) for p in mine]
    surely = None
    for fraction, found in reversed(intervals):
        if found is None or found[0] <= 0:
            break
        surely = fraction
    reverse = next((p.fraction for p in theirs if p.accuracy >= mine[-1].accuracy), None)
    return Enough(
        arm=arm,
        target=full.accuracy,
        fraction=None if reached is None else reached.fraction,
        labels=None if reached is None else reached.labels,
        surely=surely,
        tested=all(found is not None for _, found in intervals),
        baseline_labels=full.labels,
        reverse=reverse,
    )
