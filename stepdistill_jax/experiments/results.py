"""What runs left behind: settings, answers on a split, curves, cost. Neither weights nor devices are touched."""

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
from stepdistill_jax.runtime.stores import local_path
from stepdistill_jax.training.workdir import RUN, read_run

DEPTH = 5  # folders that are looked through for runs: ARM/NAME=VALUE/FRACTION/SEED below a sweep's


@dataclasses.dataclass(frozen=True, eq=False)
class Gold:
    """A split of a prepared dataset.

    Attributes:
        key: digest of ids, inputs and labels: two datasets that differ in rationales alone share it.
        examples: its rows, in order.
        metric: how labels are compared.
        fingerprint: of the dataset.
        labels: the task's, where they are few.
    """

    key: str
    examples: Sequence[Example]
    metric: str
    fingerprint: str
    labels: Sequence[str] = ()

    def right(self, labels: Sequence[str]) -> np.ndarray:
        """[rows] bool."""
        matches = metric_fn(self.metric)
        return np.array(
            [matches(got, e.label) for got, e in zip(labels, self.examples, strict=True)], bool
        )

    @functools.cached_property
    def teacher(self) -> float | None:
        """The teacher's accuracy over all rows, None where it has answered none.

        A row without an answer counts as wrong, as in the paper.
        """
        if not any(e.llm_label for e in self.examples):
            return None
        return float(self.right([e.llm_label for e in self.examples]).mean())


@dataclasses.dataclass(frozen=True, eq=False)
class RunResult:
    """One run that has answered the split.

    Attributes:
        workdir: its folder.
        arm, fraction, seed: of a sweep, else by its objectives and config.
        grid: VALUE by NAME of a sweep's grid.
        config: of `run.json`.
        gold: the split that it answered; None where its dataset is not prepared here.
        labels: labelled examples trained on.
        parameters: of the model.
        step: the one that answered.
        accuracy, rows: on the split.
        majority: accuracy of always giving the commonest label; None where it was not kept.
        collapsed: all answers are the same.
        answers: the labels given, in the order of the rows; None without `gold`.
        right: [rows] bool, the same.
        rationales: of the model, where they were decoded.
        explained: what these are worth (`RationaleCounts.summary` and `unfinished`), where it was kept.
        lines: of `metrics.jsonl`.
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
        """That it was trained on."""
        return self.config["task"]

    @property
    def gold_key(self) -> str:
        """What runs must share to be compared."""
        return self.task if self.gold is None else self.gold.key

    @property
    def rationale_token_accuracy(self) -> float | None:
        """Share of the validation's rationale tokens that its step finds the likeliest; teacher forcing."""
        key = f"eval/validation/accuracy/{RATIONALE}"
        found = [line[key] for line in self.lines if line["step"] == self.step and key in line]
        return found[-1] if found else None

    def verdict(self, row: int) -> tuple[str | None, str | None]:
        """`named_answer` of its label and its rationale for a row; (None, None) without them."""
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
        """(seconds, FLOPs) of its training steps: compiling included, validation and saving not."""
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
    """A workdir, and what its sweep calls it (empty where it is of none)."""

    workdir: pathlib.Path
    told: Mapping[str, Any] = dataclasses.field(default_factory=dict)


def read_runs(
    paths: Sequence[os.PathLike | str],
    *,
    split: str,
    data_dir: os.PathLike | str | None = None,
) -> tuple[list[RunResult], list[dict[str, str]]]:
    """All runs below `paths` that have answered `split`, and those left out: `run` and `why` each.

    Args:
        paths: workdirs, folders of `sweep`, or folders with some of these inside.
        split: of the datasets.
        data_dir: where they are prepared.

    Raises:
        InputError: a path without a run, a damaged file, or no run that has answered the split.
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
    """Every workdir below `paths`, once, in their order.

    Raises:
        InputError: there is no such folder, or none in it.
    """
    found: dict[pathlib.Path, Found] = {}
    for given in paths:
        path = local_path(given, "report")
        if not path.is_dir():
            raise InputError(f"{path}: no such folder; a workdir or a sweep's folder is wanted")
        here = list(_below(path, DEPTH))
        if not here:
            raise InputError(f"{path}: neither a run nor a sweep, and none in it")
        for run in here:
            found.setdefault(run.workdir.resolve(), run)
    return list(found.values())


def _below(path: pathlib.Path, depth: int) -> Iterator[Found]:
    if (path / RUN).is_file():
        yield Found(path)
    elif (path / SWEEP).is_file():
        cells = read_object(path / SWEEP).get("cells")
        if not isinstance(cells, dict) or not all(isinstance(x, dict) for x in cells.values()):
            raise InputError(f"{path / SWEEP}: is not what `sweep` writes; move it away")
        for name, told in cells.items():
            if (path / name / RUN).is_file():
                yield Found(path / name, told)
    elif depth:
        for child in sorted(p for p in path.iterdir() if p.is_dir()):
            yield from _below(child, depth - 1)


def _read(found: Found, split: str, gold_of) -> RunResult | str:
    """The run, or why it is left out."""
    workdir, told = found.workdir, found.told
    described = read_run(workdir)
    config = described["config"]
    task = config["task"]
    evaluation = workdir / EVALUATION / f"{split}.json"
    kept = read_object(evaluation) if evaluation.is_file() else {}
    if "tasks" in kept:
        return f"answers several tasks, which report does not compare; {evaluation} has each one's"
    gold = gold_of(task)
    if kept.get("dataset") and gold and kept["dataset"] != gold.fingerprint:
        return f"answered {task} before it was prepared anew"
    step = kept.get("step")
    if step is None:
        try:
            step = resolve_step(workdir, "best")
        except InputError as error:
            return str(error).removeprefix(f"{workdir}: ")
    file = workdir / PREDICTIONS / f"{task}-{split}-{step}.jsonl"
    explained = file.with_name(f"{file.stem}{WITH_RATIONALE}.jsonl")
    if not file.is_file():
        file = explained  # the labels are the same
    answers = rationales = right = None
    if gold is not None:
        if not file.is_file():
            return (
                f"has no answers on {split}:"
                f" run `stepdistill evaluate {workdir} --task {task} --split {split}`"
            )
        answers = _column(file, gold, "label")
        if answers is None:
            return f"{file.name} answers other rows than {task}'s {split} has: evaluate it again"
        right = gold.right(answers)
        rationales = _column(explained, gold, "rationale") if explained.is_file() else None
    elif not {"accuracy", "rows", "collapsed"} <= kept.keys():
        return f"the dataset {task} with a split {split} is not prepared here"
    return RunResult(
        workdir=workdir,
        arm=str(told.get("arm") or arm_of(config["objectives"])),
        fraction=float(config["data_fraction"]),
        seed=config["seed"],
        grid={str(k): str(v) for k, v in told.get("grid", {}).items()},
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
    """A field of each row; None where the rows are not those of `gold`."""
    rows = [row for _, row in read_jsonl(file)]
    if [row.get("id") for row in rows] != [e.id for e in gold.examples]:
        return None
    return [str(row.get(name, "")) for row in rows]


def arm_of(objectives: Sequence[Mapping[str, Any]]) -> str:
    """Returns the name of the arm with these objectives, weights aside; else the objectives' own names.

    A label that is asked for without a prefix, as in `paper/exact.gin`, is the same arm.

    Example: `label+rationale` with another template than `step_by_step` stays `label+rationale`.
    """

    def shape(items) -> list[tuple]:
        fields = ("name", "input_template", "target_template", "decoder_prefix")
        prefixed = (
            {**o, "input_template": LABEL_INPUT} if o.get("input_template") == "{input}" else o
            for o in items
        )
        return [tuple(o.get(f, "") for f in fields) for o in prefixed]

    for name, arm in ARMS.items():
        if shape(map(dataclasses.asdict, arm())) == shape(objectives):
            return name
    return "+".join(str(o.get("name")) for o in objectives)
