"""Makes the tables of a report."""

import csv
import dataclasses
import io
import math
import pathlib
from collections import defaultdict
from collections.abc import Sequence

from stepdistill_jax.errors import escaped
from stepdistill_jax.experiments.comparison import Comparison, flat_settings, short_value
from stepdistill_jax.experiments.paper import paper_accuracy
from stepdistill_jax.experiments.results import RunResult
from stepdistill_jax.inference.rationale_quality import VERDICTS
from stepdistill_jax.runtime.files import atomic_write
from stepdistill_jax.training.provenance import with_defaults

# listed in every table of settings, even at their defaults
USUAL_SETTINGS = ("TASK", "MODEL_SIZE", "INIT_FROM", "parameters", "TRAIN_STEPS", "BATCH_SIZE")
USUAL_SETTINGS += ("LEARNING_RATE", "optimizer.name", "optimizer.schedule", "train.dropout_rate")
USUAL_SETTINGS += ("INPUT_LENGTH", "TARGET_LENGTH", "DTYPE", "DATA_FRACTION", "SEED")


@dataclasses.dataclass(frozen=True)
class Table:
    """A table of strings.

    Attributes:
        name: name of the CSV file, without `.csv`.
        rows: cells of each row; "" for an unknown value.
        numbers: indices of the columns with numbers, which are right-aligned.
    """

    name: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    numbers: Sequence[int]

    def write(self, folder: pathlib.Path) -> pathlib.Path:
        """Writes NAME.csv and returns its path."""
        path = folder / f"{self.name}.csv"
        with atomic_write(path) as f:
            f.write(self.csv())
        return path

    def csv(self) -> str:
        """Returns the table as CSV with a header.

        A cell that a spreadsheet would read as a formula gets an apostrophe before it.
        """
        out = io.StringIO()
        writer = csv.writer(out, lineterminator="\n")
        writer.writerows([map(_no_formula, row) for row in (self.head, *self.rows)])
        return out.getvalue()


def _no_formula(cell: str) -> str:
    """Returns `cell`, with an apostrophe before it if a spreadsheet would read it as a formula."""
    cell = escaped(cell)  # csv does not quote a carriage return, which would begin a new row
    try:
        float(cell)
    except ValueError:
        return f"'{cell}" if cell.startswith(("=", "+", "-", "@", "\t")) else cell
    return cell


def accuracy_table(comparison: Comparison, name: str) -> Table:
    """Returns accuracies, with a row for each arm and fraction, and a column for the paper's accuracies if any."""
    head = ("arm", "fraction", "labels", "runs", "accuracy", "95% low", "95% high", "collapsed")
    head += ("accuracy without these",)
    rows = [
        (
            p.arm,
            f"{p.fraction:g}",
            f"{p.labels:.0f}",
            str(len(p.runs)),
            _share(p.accuracy),
            _share(p.low),
            _share(p.high),
            str(p.collapsed),
            _share(p.accuracy_of_others),
        )
        for p in comparison.points
    ]
    paper = [_share(paper_accuracy(p)) for p in comparison.points]
    if any(paper):
        head += ("paper, T5 base",)
        rows = [(*row, figure) for row, figure in zip(rows, paper, strict=True)]
    return Table(name, head, rows, range(1, len(head)))


def tests_table(comparison: Comparison, name: str) -> Table:
    """Returns the significance tests, with a row for each pair of arms at each fraction."""
    head = ("fraction", "first", "second", "second - first", "95% low", "95% high", "p", "p (Holm)")
    head += ("only first right", "only second right")
    rows = [
        (
            f"{t.fraction:g}",
            t.first,
            t.second,
            f"{t.difference:+.4f}",
            f"{t.low:+.4f}",
            f"{t.high:+.4f}",
            _p(t.p),
            _p(t.p_holm),
            str(t.only_first),
            str(t.only_second),
        )
        for t in comparison.tests
    ]
    return Table(name, head, rows, (0, *range(3, len(head))))


def rationale_table(comparison: Comparison, name: str) -> Table:
    """Returns the quality of decoded rationales, with a row for each arm and fraction.

    Values are means over the runs. Counts of rationales are shown as shares of the rows. The last row,
    `teacher`, shows the verdicts on the dataset's own rationales, if there are such verdicts.
    """
    head = ("arm", "fraction", "runs", "ROUGE-L", "chrF", "token accuracy", "words")
    counts = ("empty", "unfinished", *VERDICTS)
    rows, teacher = [], None
    for point in comparison.points:
        runs = [r for r in point.runs if r.explained]
        quality = [r.explained for r in runs if r.explained]
        if not quality:
            continue
        teacher = teacher or quality[0]["teacher"]
        rows.append(
            (
                point.arm,
                f"{point.fraction:g}",
                str(len(runs)),
                _mean([t["rouge_l"] for t in quality]),
                _mean([t["chrf"] for t in quality], ".1f"),
                _mean([r.rationale_token_accuracy for r in runs]),
                _mean([t["mean_words"] for t in quality], ".1f"),
                *(
                    _mean([t[c] if t[c] is None else t[c] / t["rows"] for t in quality])
                    for c in counts
                ),
            )
        )
    if teacher:
        shares = [_share(teacher[verdict] / sum(teacher.values())) for verdict in VERDICTS]
        rows.append(("teacher", *[""] * (len(head) + 1), *shares))
    head += tuple(c.replace("_", " ") for c in counts)
    return Table(name, head, rows, range(1, len(head)))


def cost_table(comparison: Comparison, name: str) -> Table:
    """Returns each arm's mean training cost per run, at its largest fraction of the training data."""
    head = ("arm", "fraction", "parameters", "steps", "seconds of steps", "TFLOP of steps")
    rows = []
    for arm in comparison.arms:
        point = comparison.of_arm(arm)[-1]
        costs = [r.cost for r in point.runs]
        rows.append(
            (
                arm,
                f"{point.fraction:g}",
                str(point.runs[0].parameters),
                str(point.runs[0].config["train_steps"]),
                f"{sum(s for s, _ in costs) / len(costs):.1f}",
                f"{sum(f for _, f in costs) / len(costs) / 1e12:.4g}",
            )
        )
    return Table(name, head, rows, range(1, len(head)))


def settings_table(comparison: Comparison, name: str) -> Table:
    """Returns a table of the settings of a comparison's runs.

    It lists `USUAL_SETTINGS`, the objectives' weights, and each setting that is not at its default or is not the
    same in all arms.
    """
    default = flat_settings(with_defaults({}))
    by_arm: dict[str, list[dict[str, str]]] = defaultdict(list)
    for run in comparison.runs:
        settings = flat_settings(with_defaults(run.config))
        settings |= {"DATA_FRACTION": f"{run.fraction:g}", "SEED": str(run.seed)}
        by_arm[run.arm].append(settings | {"parameters": str(run.parameters)})
    names = dict.fromkeys(
        [*USUAL_SETTINGS, *(n for runs in by_arm.values() for settings in runs for n in settings)]
    )
    usual = {*USUAL_SETTINGS}
    usual |= {f"{o['name']}.weight" for run in comparison.runs for o in run.config["objectives"]}
    rows = []
    for setting in names:
        # one text per arm, such as "0, 1, 2" for SEED; none for an arm without the setting
        values = {
            arm: ", ".join(sorted({short_value(s.get(setting, "")) for s in runs}, key=_sort_key))
            for arm, runs in by_arm.items()
        }
        values = {arm: value for arm, value in values.items() if value}
        # "1e-3" if all arms agree, else "label_only: 1e-3; step_by_step: 5e-4"
        alike = len(set(values.values())) == 1
        at_default = alike and set(values.values()) == {default.get(setting)}
        if setting in usual or not at_default:
            each = [f"{arm}: {value}" for arm, value in values.items()]
            rows.append((setting, next(iter(values.values())) if alike else "; ".join(each)))
    return Table(name, ("setting", "value"), rows, ())


def _sort_key(value: str) -> tuple[float, str]:
    """Returns a sort key that puts numbers first, ordered by size."""
    try:
        return float(value), value
    except ValueError:
        return math.inf, value


def runs_table(comparisons: Sequence[Comparison], split: str) -> Table:
    """Returns a row for each run, for readers who compute other statistics."""
    head = ("comparison", "arm", "fraction", "seed", "labels", "parameters", "best step")
    head += (f"accuracy on {split}", "rows", "collapsed", "seconds", "TFLOP", "workdir")
    rows = [(c.name, *_run(run)) for c in comparisons for p in c.points for run in p.runs]
    return Table("runs", head, rows, range(2, len(head) - 1))


def _run(run: RunResult) -> tuple[str, ...]:
    seconds, flops = run.cost
    return (
        run.arm,
        f"{run.fraction:g}",
        str(run.seed),
        str(run.labels),
        str(run.parameters),
        str(run.step),
        _share(run.accuracy),
        str(run.rows),
        "yes" if run.collapsed else "no",
        f"{seconds:.1f}",
        f"{flops / 1e12:.4g}",
        str(run.workdir),
    )


def _mean(values: Sequence[float | None], form: str = ".4f") -> str:
    """Returns the mean as a formatted string, or "" if a value is unknown."""
    known = [value for value in values if value is not None]
    return format(sum(known) / len(known), form) if len(known) == len(values) else ""


def _share(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"


def _p(value: float) -> str:
    return "<0.0001" if value < 1e-4 else f"{value:.4f}"
