"""Reads the settings, answers, metrics and cost of runs, without weights or devices."""

import dataclasses
import functools
import os
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from stepdistill_jax.data.example import Example
from stepdistill_jax.data.objectives import ARMS, LABEL_INPUT
from stepdistill_jax.data.prepared import data_folder, is_prepared, open_prepared
from stepdistill_jax.data.text_metrics import metric_fn
from stepdistill_jax.errors import InputError
from stepdistill_jax.experiments.sweep import EVALUATION, SWEEP
from stepdistill_jax.formats.tensors import read_object
from stepdistill_jax.inference.answer_files import PREDICTIONS, WITH_RATIONALE
from stepdistill_jax.inference.prompting import RATIONALE
from stepdistill_jax.inference.rationale_quality import named_answer
from stepdistill_jax.runtime.checkpoints.manager import resolve_step
from stepdistill_jax.runtime.files import read_jsonl
from stepdistill_jax.runtime.fingerprints import digest
from stepdistill_jax.runtime.metrics import METRICS, read_metrics
from stepdistill_jax.runtime.stores import existing_folder, local_path
from stepdistill_jax.training.workdir import RUN, read_run

DEPTH = 5  # levels of folders searched for runs: ARM/NAME=VALUE/FRACTION/SEED below a sweep's


@dataclasses.dataclass(frozen=True, eq=False)
class Gold:
    """A split of a prepared dataset.

    Attributes:
        key: digest of the rows' ids, inputs and labels.
        metric: name of the metric that compares labels.
        labels: the task's labels if they are a closed set; else empty.
    """

    key: str
    examples: Sequence[Example]
    metric: str
    fingerprint: str
    labels: Sequence[str] = ()

    def right(self, labels: Sequence[str]) -> np.ndarray:
        """Returns whether each label is right, as a bool array [rows]."""
        matches = metric_fn(self.metric)
        return np.array(
            [matches(got, e.label) for got, e in zip(labels, self.examples, strict=True)], bool
        )

    @functools.cached_property
    def teacher(self) -> float | None:
        """Accuracy of the teacher's labels over all rows; None if no row has one.

        As in the paper, a row without a teacher's label counts as wrong.
        """
        if not any(e.llm_label for e in self.examples):
            return None
        return float(self.right([e.llm_label for e in self.examples]).mean())


@dataclasses.dataclass(frozen=True, eq=False)
class RunResult:
    """A run that has answers on the split.

    Attributes:
        arm: name in `sweep.json`; outside a sweep, the result of `arm_of`.
        fraction: share of the train split used in training.
        grid: {setting: value} of the sweep's grid; {} outside a sweep.
        config: the config in `run.json`.
        gold: the split with its gold labels; None if the dataset is not prepared here.
        labels: number of labelled training examples.
        step: step of the checkpoint that gave the answers.
        majority: accuracy of always answering the commonest label; None if not saved.
        collapsed: whether all answers are the same.
        answers: the labels that the model predicted, in row order; None if `gold` is None.
        right: whether each answer is right, bool [rows]; None if `gold` is None.
        rationales: the model's rationales, in row order; None if not decoded.
        explained: quality of the rationales (`RationaleCounts.summary`); None if not saved.
        lines: lines of `metrics.jsonl`.
    """

    workdir: pathlib.Path
    arm: str
    fraction: float
    seed: int
    grid: Mapping[str, str]
    config: Mapping[str, Any]
    gold: Gold | None
    labels: int
    parameters: int
    step: int | None
    accuracy: float
    rows: int
    majority: float | None
    collapsed: bool
    answers: Sequence[str] | None
    right: np.ndarray | None
    rationales: Sequence[str] | None
    explained: Mapping[str, Any] | None
    lines: Sequence[Mapping[str, Any]]

    @property
    def task(self) -> str:
        """Name of the task."""
        return self.config["task"]

    @property
    def gold_key(self) -> str:
        """Key that identifies the answered rows. Only runs with the same key can be compared."""
        return self.task if self.gold is None else self.gold.key

    @property
    def rationale_token_accuracy(self) -> float | None:
        """Teacher-forced token accuracy of the rationale in the validation at `step`; None if not measured."""
        key = f"eval/validation/accuracy/{RATIONALE}"
        found = [line[key] for line in self.lines if line["step"] == self.step and key in line]
        return found[-1] if found else None

    def verdict(self, row: int) -> tuple[str | None, str | None]:
        """Returns the answer that a row's rationale names, and whether this answer agrees with the label.

        See `named_answer`. The result is (None, None) if the run has no rationales, or if its dataset is not
        prepared on this machine.
        """
        if self.gold is None or self.answers is None or self.rationales is None:
            return None, None
        return named_answer(
            self.rationales[row],
            self.answers[row],
            metric=self.gold.metric,
            labels=self.gold.examples[row].choices or self.gold.labels,
        )

    @functools.cached_property
    def cost(self) -> tuple[float, float]:
        """Seconds and FLOPs of all training steps, including compilation, but not validation or saving.

        The time of a step is the batch size divided by the examples per second that the step logged.
        """
        seconds = flops = 0.0
        for line in self.lines:
            rate = line.get("timing/examples_per_second")
            if rate:
                took = self.config["batch_size"] / rate
                seconds += took
                flops += (line.get("timing/tflops_per_second") or 0.0) * 1e12 * took
        return seconds, flops


@dataclasses.dataclass(frozen=True)
class Found:
    """A workdir that was found.

    Attributes:
        cell: the run's entry in `sweep.json`; {} if the run was not found through a `sweep.json`.
    """

    workdir: pathlib.Path
    cell: Mapping[str, Any] = dataclasses.field(default_factory=dict)


def read_runs(
    paths: Sequence[os.PathLike | str],
    *,
    split: str,
    data_dir: os.PathLike | str | None = None,
) -> tuple[list[RunResult], list[dict[str, str]]]:
    """Reads all runs in the folders `paths`.

    Args:
        paths: workdirs, folders of `sweep`, or folders that contain such folders.

    Returns:
        The runs that have answers on the split.
        {`run`: folder, `why`: reason} of each run that is left out.

    Raises:
        InputError: a path contains no run, a file is damaged, or no run has answers on the split.
    """
    folder = data_folder(data_dir)

    @functools.cache
    def gold(task: str) -> Gold | None:
        if not is_prepared(task, folder):
            return None
        dataset = open_prepared(task, folder)
        if split not in dataset.splits:
            return None
        examples = list(dataset.examples(split))
        key = digest([[e.id, e.input, e.label] for e in examples])
        return Gold(key, examples, dataset.metric, dataset.fingerprint, dataset.labels)

    runs, left_out = [], []
    for found in find_runs(paths):
        read = _read(found, split, gold)
        if isinstance(read, str):
            left_out.append({"run": str(found.workdir), "why": read})
        else:
            runs.append(read)
    if not runs:
        first = left_out[0]
        raise InputError(f"{first['run']}: {first['why']}; no other run has answers on {split}")
    return runs, left_out


def find_runs(paths: Sequence[os.PathLike | str]) -> list[Found]:
    """Returns all workdirs in the folders `paths`, each once, in the order of `paths`.

    Raises:
        InputError: a folder is missing or contains no workdir.
    """
    found: dict[pathlib.Path, Found] = {}
    for given in paths:
        path = existing_folder(local_path(given, "report"))
        here = list(_below(path, DEPTH))
        if not here:
            raise InputError(
                f"{path}: the folder is neither a run nor a sweep, and contains no run"
            )
        for run in here:
            found.setdefault(run.workdir.resolve(), run)
    return list(found.values())


def _below(path: pathlib.Path, depth: int) -> Iterator[Found]:
    if (path / RUN).is_file():
        yield Found(path)
    elif (path / SWEEP).is_file():  # it has each cell's arm and grid, which folders do not
        cells = read_object(path / SWEEP).get("cells")
        if not isinstance(cells, dict) or not all(isinstance(x, dict) for x in cells.values()):
            raise InputError(f"{path / SWEEP}: the file was not written by `sweep`; move it away")
        for name, cell in cells.items():
            if (path / name / RUN).is_file():
                yield Found(path / name, cell)
    elif depth:
        for child in sorted(p for p in path.iterdir() if p.is_dir()):
            yield from _below(child, depth - 1)


def _read(found: Found, split: str, gold_of) -> RunResult | str:
    """Returns the results of a run, or the reason to leave it out."""
    workdir, cell = found.workdir, found.cell
    described = read_run(workdir)
    config = described["config"]
    task = config["task"]
    evaluation = workdir / EVALUATION / f"{split}.json"
    kept = read_object(evaluation) if evaluation.is_file() else {}
    if "tasks" in kept:
        return f"it answers several tasks, and such runs cannot be compared; {evaluation} has the results of each task"
    gold = gold_of(task)
    if kept.get("dataset") and gold and kept["dataset"] != gold.fingerprint:
        return f"it was evaluated before {task} was prepared again; evaluate it again"
    step = kept.get("step")
    if step is None:  # not evaluated by `sweep`; `evaluate` uses the best step
        try:
            step = resolve_step(workdir, "best")
        except InputError as error:
            return str(error).removeprefix(f"{workdir}: ")
    file = workdir / PREDICTIONS / f"{task}-{split}-{step}.jsonl"
    explained = file.with_name(f"{file.stem}{WITH_RATIONALE}.jsonl")
    if not file.is_file():
        file = explained  # has the same labels
    answers = rationales = right = None
    if gold is not None:
        if not file.is_file():
            return (
                f"it has no answers on {split}:"
                f" run `stepdistill evaluate {workdir} --task {task} --split {split}`"
            )
        answers = _column(file, gold, "label")
        if answers is None:
            return f"{file.name} does not have the rows of {task}'s split {split}; evaluate the run again"
        right = gold.right(answers)
        rationales = _column(explained, gold, "rationale") if explained.is_file() else None
    elif not {"accuracy", "rows", "collapsed"} <= kept.keys():
        return (
            f"there is no prepared dataset {task} with a split {split} here; prepare it, or pass the"
            " `data_dir` of the run"
        )
    return RunResult(
        workdir=workdir,
        arm=str(cell.get("arm") or arm_of(config["objectives"])),
        fraction=float(config["data_fraction"]),
        seed=config["seed"],
        grid={str(k): str(v) for k, v in cell.get("grid", {}).items()},
        config=config,
        gold=gold,
        labels=described["examples"],
        parameters=described["parameters"],
        step=step,
        accuracy=float(kept["accuracy"] if right is None else right.mean()),
        rows=int(kept["rows"] if right is None else len(right)),
        majority=kept.get("majority_baseline"),
        collapsed=(
            bool(kept["collapsed"]) if answers is None else len(answers) > 1 == len(set(answers))
        ),
        answers=answers,
        right=right,
        rationales=rationales,
        explained=kept.get(RATIONALE),
        lines=read_metrics(workdir) if (workdir / METRICS).is_file() else [],
    )


def _column(file: pathlib.Path, gold: Gold, name: str) -> list[str] | None:
    """Returns the field `name` of each row in a file, or None if the rows' ids differ from those in `gold`."""
    rows = [row for _, row in read_jsonl(file)]
    if [row.get("id") for row in rows] != [e.id for e in gold.examples]:
        return None
    return [str(row.get(name, "")) for row in rows]


def arm_of(objectives: Sequence[Mapping[str, Any]]) -> str:
    """Returns the name of the arm with these objectives, whatever their weights.

    If no arm has these objectives and templates, the name is the objectives' names, joined by `+`.

    Example: `label` and `rationale` give `step_by_step`; with a changed template, they give `label+rationale`.
    """

    def shape(items) -> list[tuple]:
        fields = ("name", "input_template", "target_template", "decoder_prefix")
        # a label without a prompt prefix, as in `paper/exact.gin`, counts as the usual label objective
        prefixed = (
            {**o, "input_template": LABEL_INPUT} if o.get("input_template") == "{input}" else o
            for o in items
        )
        return [tuple(o.get(f, "") for f in fields) for o in prefixed]

    for name, arm in ARMS.items():
        if shape(map(dataclasses.asdict, arm())) == shape(objectives):
            return name
    return "+".join(str(o.get("name")) for o in objectives)
