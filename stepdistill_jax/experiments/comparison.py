"""Compares runs: the accuracy of each arm, the data it needs, and which differences are significant."""

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

# fields of a config that distinguish arms, fractions and seeds, or do not affect the model
NO_SETTING = ("objectives", "data_fraction", "seed", "task_module", *FREE_FIELDS)
# a config binds fields of `train` as macros in capitals and nested fields as paths, with these exceptions
NO_MACRO = ("model_family", "dropout_rate", "max_decode_len", "remat_policy", "loss_mean")
NO_MACRO += ("token_weights", "lora")
MACROS = {"supervision.label_source": "LABEL_SOURCE", "supervision.rationales": "RATIONALES"}
BASELINE = "label_only"


@dataclasses.dataclass(frozen=True)
class Point:
    """The runs of an arm that were trained on the same share of the data.

    Attributes:
        labels: mean number of labelled training examples.
        runs: one per seed.
        accuracy: mean accuracy of the runs.
        low, high: 95 % interval of `accuracy` (Student's t); None for a single run.
        collapsed: number of collapsed runs, which always give the same answer.
        accuracy_of_others: mean accuracy of the runs that did not collapse; None if all or none collapsed.
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
    """A significance test between two arms that were trained on the same share of the data.

    Attributes:
        difference: the second arm's mean accuracy minus the first's.
        low, high: 95 % interval of `difference`; see `paired_difference`.
        p: two-sided p value.
        p_holm: `p` corrected for all tests of the comparison.
        seeds: the seeds that both arms have.
        only_first: number of rows that only the first arm answers correctly, summed over `seeds`.
        only_second: number of rows that only the second arm answers correctly, summed over `seeds`.
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
    """How much data an arm needs to reach the baseline's full accuracy.

    An arm's full accuracy is its mean accuracy at the largest fraction.

    Attributes:
        target: the baseline's full accuracy.
        fraction: smallest fraction at which the arm reaches `target`, or None.
        labels: mean number of labelled examples at `fraction`, or None.
        surely: smallest fraction such that the 95 % interval of accuracy - `target` is above 0 at this fraction
            and at all larger ones, or None.
        tested: whether answers could be compared row by row. If False, `surely` is meaningless.
        baseline_labels: mean number of labelled examples at the baseline's largest fraction.
        reverse: smallest fraction at which the baseline reaches the arm's full accuracy, or None.
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
    """A group of runs that answered the same rows and differ only in arm, fraction and seed.

    Attributes:
        name: the task, and the settings that distinguish the group.
        baseline: arm with which the others are compared.
        points: a `Point` for each arm and fraction, sorted by arm (the baseline first) and then by fraction.
        enough: an `Enough` for each arm except the baseline.
        teacher: accuracy of the teacher's labels, or None.
        majority: accuracy of always answering the commonest label, or None.
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
        """Names of the arms, the baseline first."""
        return list(dict.fromkeys(p.arm for p in self.points))

    def is_chance(self, point: Point) -> bool:
        """Returns whether the runs of a point may be no better than chance.

        This is so if the lower end of the accuracy's 95 % interval is at most `majority`. A point with only one run
        has no interval, so its accuracy is compared with `majority`.
        """
        low = point.accuracy if point.low is None else point.low
        return self.majority is not None and low <= self.majority

    def of_arm(self, arm: str) -> list[Point]:
        """Returns the points of an arm, the smallest fraction first."""
        return [p for p in self.points if p.arm == arm]


def compare(
    runs: Sequence[RunResult], baseline: str | None = None
) -> tuple[list[Comparison], list[dict[str, str]]]:
    """Compares the runs within each group of comparable runs.

    The runs of a group answered the same rows. If a sweep's grid varies a setting, or two runs of the same arm
    differ in it, each value of the setting has its own group. A setting that differs only between arms does not
    separate runs.

    Args:
        baseline: arm with which the others are compared; None means `label_only`. A group without this arm uses
            `label_only`, else an arm with the objectives of `label_only`, else its first arm.

    Returns:
        A comparison for each group.
        {"run": folder, "why": reason} for each run that was left out.

    Raises:
        InputError: no run belongs to the arm `baseline`.
    """
    arms = list(dict.fromkeys(r.arm for r in runs))
    if baseline is not None and baseline not in arms:
        raise InputError(
            f"`baseline`: there is no run of the arm {baseline!r} (arms: {', '.join(arms)})"
            f"{nearest(baseline, arms)}"
        )
    groups: dict[tuple, dict[tuple, RunResult]] = defaultdict(dict)
    left_out, settings = [], _settings(runs)
    for run, setting in zip(runs, settings, strict=True):
        group = groups[run.gold_key, tuple(setting.items())]
        first = group.setdefault((run.arm, run.fraction, run.seed), run)
        if first is not run:
            why = f"it has the same arm, fraction, seed and settings as {first.workdir}"
            left_out.append({"run": str(run.workdir), "why": why})
    found = []
    for (_, setting), group in groups.items():
        members = list(group.values())
        words = [f"{k}={v}" for k, v in setting if k != "TASK"]
        name = ", ".join([min((r.task for r in members), key=len), *words])
        found.append(_comparison(name, members, _baseline(members, baseline)))
    return found, left_out


def _baseline(runs: Sequence[RunResult], wanted: str | None) -> str:
    alike = [r.arm for r in runs if arm_of(r.config["objectives"]) == BASELINE]
    arms = [r.arm for r in runs]
    return next(arm for arm in (wanted, BASELINE, *alike, *arms) if arm in arms)


def _settings(runs: Sequence[RunResult]) -> list[dict[str, str]]:
    """Returns the settings that distinguish the runs' groups, as {name: value} for each run.

    These are the settings in the sweep's grid, and all others that differ between runs of the same arm.
    """
    # A setting splits the groups if two runs with the same arm, rows and grid values differ in it. If
    # label_only uses LEARNING_RATE 1e-3 and step_by_step 5e-4, none of them varies within its arm, so
    # the two stay in one group; with a second label_only run at 5e-4, LEARNING_RATE splits the groups.
    flat = [flat_settings(with_defaults(r.config)) for r in runs]
    differing: dict[str, None] = {}  # a dict as an ordered set
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
    """Returns a run's settings as {name: value as a string}.

    Names are as a config binds them, such as `BATCH_SIZE` and `optimizer.name`. Fields in `NO_SETTING` are left out,
    but the result always has `INIT_FROM` and the objectives' weights and input templates.
    """
    found = {}
    for name, value in config.items():
        if prefix or name not in NO_SETTING:
            if isinstance(value, Mapping):
                found |= flat_settings(value, f"{prefix}{name}.")
            else:
                path = f"{prefix}{name}"
                if not prefix:
                    path = f"train.{name}" if name in NO_MACRO else name.upper()
                found[MACROS.get(path, path)] = str(value)
    if not prefix:
        # a free field, since the folder may move, but its weights affect the model
        found["INIT_FROM"] = str(config.get("init_from"))
        # `arm_of` ignores them
        for o in config["objectives"]:
            found |= {f"{o['name']}.{n}": str(o.get(n)) for n in ("weight", "input_template")}
    return found


def short_value(value: str) -> str:
    """Returns the value of a setting for display. A path is shortened to its last part."""
    # INIT_RULES is a list of names with slashes
    is_path = "/" in value and not value.startswith("[")
    return pathlib.PurePath(value).name if is_path else value


def _comparison(name: str, runs: Sequence[RunResult], baseline: str) -> Comparison:
    by_point = defaultdict(list)
    # False sorts before True: the baseline first
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
    """Returns {run: its accuracy on each bootstrap sample of the rows, [samples]}. All runs share the samples."""
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
        # rows that only one arm gets right are counted over runs of the same seed
        of_first, of_second = (
            {r.seed: r.right for r in p.runs if r.right is not None} for p in (first, second)
        )
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
    # points are sorted by fraction: `next` finds the smallest, [-1] is the largest
    mine = [p for p in points if p.arm == arm]
    theirs = [p for p in points if p.arm == baseline]
    full = theirs[-1]
    reached = next((p for p in mine if p.accuracy >= full.accuracy), None)
    intervals = [(p.fraction, _difference(full, p, drawn)) for p in mine]
    # from the largest fraction down, until an interval (low, high, p) first reaches 0
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
