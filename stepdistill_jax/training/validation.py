"""Validates a model during training: computes the objectives' losses and the accuracy of decoded labels."""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from stepdistill_jax.batches.batch import Batches
from stepdistill_jax.data.schedules import end_value
from stepdistill_jax.data.text_metrics import accuracy, majority_baseline
from stepdistill_jax.data.vocabulary import truncate
from stepdistill_jax.decoding.choices import ChoiceScorer
from stepdistill_jax.decoding.greedy import Decoded, LabelDecoder
from stepdistill_jax.errors import InputError
from stepdistill_jax.inference.labels import score_targets
from stepdistill_jax.inference.prompting import read_answer, scored_answer
from stepdistill_jax.models.config import ModelConfig
from stepdistill_jax.models.encoder_decoder import EncoderDecoder
from stepdistill_jax.models.lora import merge
from stepdistill_jax.runtime.progress import log
from stepdistill_jax.tasks.metrics import TaskMetrics
from stepdistill_jax.tasks.task_data import Part, TaskData
from stepdistill_jax.training.data import on_this_host, placed
from stepdistill_jax.training.loss import over_tasks
from stepdistill_jax.training.state import TrainState
from stepdistill_jax.training.step import jit_eval_step

OWN = ("loss", "label_accuracy", "unfinished", "collapsed", "unparsed")  # names of our own metrics
MEANS = ("label_accuracy", "unfinished", "collapsed")  # averaged over the parts of a mixture


@dataclasses.dataclass(frozen=True)
class Validator:
    """Everything that validations need, created once for a run."""

    config: ModelConfig
    data: TaskData
    batches: Batches
    decoder: LabelDecoder
    eval_step: Callable
    mesh: Mesh
    metrics: Mapping[str, TaskMetrics] = dataclasses.field(default_factory=dict)  # by part
    scorer: Callable | None = None  # for given targets, if a metric reads their scores

    @classmethod
    def create(
        cls,
        data: TaskData,
        batches: Batches,
        *,
        config: ModelConfig,
        abstract: TrainState,
        mesh: Mesh,
        max_decode_len: int,
        batch_size: int,
    ) -> "Validator":
        """Creates the functions that validations call, and the metrics of the SeqIO tasks that make up the data.

        `batches` must cover the split once, in order. The decoder decodes `batch_size` rows together.
        """
        plain = dataclasses.replace(config, lora=None)
        found = {part.name: TaskMetrics.of(part, data.split) for part in data.parts}
        metrics = {name: of_part for name, of_part in found.items() if of_part is not None}
        scorer = None
        if any(of_part.reads_target_scores for of_part in metrics.values()):
            scorer = ChoiceScorer(plain, batch_size=batch_size, mesh=mesh)
        return cls(
            config,
            data,
            batches,
            LabelDecoder(plain, max_decode_len=max_decode_len, batch_size=batch_size, mesh=mesh),
            jit_eval_step(
                abstract,
                mesh,
                model=EncoderDecoder(plain),
                num_objectives=len(data.objectives),
                num_tasks=len(data.parts),
            ),
            mesh,
            metrics,
            scorer,
        )

    def try_out(self) -> list[str]:
        """Returns the names of the metrics by which the best step can be chosen, without the prefix `eval/<split>/`.

        Computes the tasks' own metrics once, with the targets as answers, to find metrics that fail.

        Raises:
            InputError: a metric fails, or has the name of a metric that every validation computes.
        """
        several, of_parts = len(self.data.parts) > 1, []
        for part in self.data.parts:
            found = self._numbers_of(part) if several else []
            if (metrics := self.metrics.get(part.name)) is not None:
                found += _checked(part, metrics.try_out())
            of_parts += [f"{part.name}/{name}" if several else name for name in found]
        ours = [name for part in self.data.parts for name in self._numbers_of(part)]
        return [*dict.fromkeys(["label_accuracy", "loss", *ours]), *of_parts]

    def _numbers_of(self, part: Part) -> list[str]:
        """Returns the names of the metrics that every validation computes for a part."""
        names = ["label_accuracy"] if part.label_column is not None else []
        for column, rows in zip(part.columns, part.store.rows, strict=True):
            if rows["targets"].lengths.any():
                objective = self.data.objectives[column.objective - 1].name
                names += [f"loss/{objective}", f"accuracy/{objective}"]
        return list(dict.fromkeys(names))

    def majority_baseline(self) -> float:
        """Returns the accuracy of always answering a part's most frequent label, averaged over the parts."""
        labelled = [part for part in self.data.parts if part.label_column is not None]
        of_parts = [majority_baseline(p.labelled_inputs()[1], p.metric) for p in labelled]
        return float(np.mean(of_parts))

    def ranking(self, found: Mapping[str, float], best_metric: str | None) -> list[float]:
        """Returns two numbers that rank a step: the value of `best_metric` and, for ties, minus the label loss.

        If `best_metric` is a loss, its value is negated, too, so larger numbers are always better.

        Args:
            found: the result of `compute`.
            best_metric: name without `eval/<split>/`; None means `label_accuracy`.

        Raises:
            InputError: this validation has no such metric.
        """
        ranked = []
        for name in (best_metric or "label_accuracy", f"loss/{self.data.objectives[0].name}"):
            if (value := found.get(f"eval/{self.data.split}/{name}")) is None:
                raise InputError(
                    f"`best_metric`: this validation has no {name!r}, but every validation must return"
                    " this metric"
                )
            bare = name
            for part in self.data.parts:
                bare = bare.removeprefix(f"{part.name}/")
            value = -value if bare.startswith("loss") else value
            ranked.append(-math.inf if math.isnan(value) else value)
        return ranked

    def compute(
        self,
        params: Any,
        *,
        on_batch: Callable[[], None] = lambda: None,
        keep: Callable[[dict[str, Any]], None] = lambda _: None,
    ) -> dict[str, float]:
        """Returns the metrics of the split, named `eval/<split>/...`. All processes must call this method.

        They are the metrics that a part's own SeqIO task defines, and:

            label_accuracy        share of decoded labels that equal the gold label, as text, or as a number
                                  for equations
            collapsed             1 if all of several answers are the same, otherwise 0
            unfinished            share of answers without an end of sequence
            unparsed              share of answers without a label, which count as wrong; only if targets
                                  contain more than a label
            loss/<objective>      mean in nats per token
            accuracy/<objective>  share of target tokens that the model finds likeliest under teacher
                                  forcing, weighted as in the loss
            loss                  weighted sum of the objectives' losses, with the final weights of schedules

        With several parts (`TaskData.parts`), a part's metrics are named `eval/<split>/<part>/...`. The whole
        split then has `loss`, `loss/...` and `accuracy/...`, and the means of `label_accuracy`, `collapsed` and
        `unfinished` over the parts.

        Args:
            params: parameters of a step, with or without adapters.
            on_batch: called after each batch of losses or answers; may raise an exception.
            keep: called with each answer: `id` (1-based index of its row), `label`, `score` (natural log of
                its probability), `target`, and, with several parts, `task`.

        Raises:
            InputError: a task's metric fails.
        """
        params, _ = merge(params, self.config)
        parts, count = [part.name for part in self.data.parts], len(self.data.objectives)
        # rows: loss, correct, count; float64, since they add up over many batches
        totals = np.zeros((3, len(parts) * count))
        for batch in on_this_host(self.batches, 0, self.batches.num_steps, self.mesh):
            sums = self.eval_step(params, placed(batch, self.mesh))
            totals += np.array([sums.loss, sums.correct, sums.count], np.float64)
            on_batch()
        # over all parts first, then each part: columns are the objectives of part 1, of part 2, ...
        metrics = self._means(over_tasks(of, count, len(parts)) for of in totals)
        for name, *of_part in zip(parts, *totals.reshape(3, len(parts), count), strict=True):
            if len(parts) > 1:
                metrics |= {f"{name}/{key}": x for key, x in self._means(of_part).items()}
        weights = {o.name: end_value(o.weight) for o in self.data.objectives}
        metrics["loss"] = sum(
            w * metrics[f"loss/{n}"] for n, w in weights.items() if f"loss/{n}" in metrics
        )
        metrics |= self._decode(params, on_batch, keep)
        return {f"eval/{self.data.split}/{name}": value for name, value in metrics.items()}

    def _means(self, totals: Iterable[np.ndarray]) -> dict[str, float]:
        """Returns the loss and the accuracy of each objective that has tokens.

        `totals` is (loss, correct, count), each with one value for each objective.
        """
        found = {}
        for objective, loss, correct, count in zip(self.data.objectives, *totals, strict=True):
            if count > 0:
                found[f"loss/{objective.name}"] = float(loss / count)
                found[f"accuracy/{objective.name}"] = float(correct / count)
        return found

    def _decode(
        self, params: Any, on_batch: Callable[[], None], keep: Callable[[dict[str, Any]], None]
    ) -> dict[str, float]:
        """Decodes the labels, and returns each part's metrics. If there are several parts, adds means over them."""
        parts = [p for p in self.data.parts if p.label_column is not None]
        asked = [part.labelled_inputs() for part in parts]
        prompts = [
            truncate(ids, self.batches.input_length) for inputs, _ in asked for ids in inputs
        ]
        # the prompts of all parts together, so that few batches are partly empty
        decoded = self.decoder(params, prompts, on_progress=lambda _: on_batch())
        each, several, end = {}, len(self.data.parts) > 1, 0
        for part, (inputs, labels) in zip(parts, asked, strict=True):
            of_part = slice(end, end := end + len(inputs))
            found = Decoded(
                decoded.ids[of_part], decoded.scores[of_part], decoded.finished[of_part]
            )
            texts = list(map(self.data.vocabulary.decode, found.ids))
            each[part.name] = (
                self._compare(part, labels, texts)
                | {"unfinished": float(np.mean(~found.finished))}
                | self._of_task(part, params, prompts[of_part], found, on_batch)
            )
            for number, (text, score) in enumerate(zip(texts, found.scores, strict=True), 1):
                answer, _ = scored_answer(self.data.objectives[0], text, score)
                of = {"task": part.name} if several else {}
                keep({**of, "id": str(number), **answer, "target": labels[number - 1]})
        if not several:
            return each[parts[0].name]
        means = {n: float(np.mean([m[n] for m in each.values() if n in m])) for n in MEANS}
        return means | {f"{part}/{n}": v for part, m in each.items() for n, v in m.items()}

    def _of_task(
        self,
        part: Part,
        params: Any,
        prompts: Sequence[Sequence[int]],
        found: Decoded,
        on_batch: Callable[[], None],
    ) -> dict[str, float]:
        """Returns the metrics that the SeqIO task of a part defines."""
        if (metrics := self.metrics.get(part.name)) is None:
            return {}
        target_scores = None
        if metrics.reads_target_scores:
            assert self.scorer is not None
            score = functools.partial(self.scorer, params)
            target_scores = score_targets(score, prompts, metrics.targets, lambda _: on_batch())
        values = metrics.compute(found.ids, found.scores, target_scores)
        _checked(part, values)
        return values

    def _compare(
        self, part: Part, labels: Sequence[str], answers: Sequence[str]
    ) -> dict[str, float]:
        objective = self.data.objectives[0]
        read = [read_answer(objective, text) for text in answers]
        found = [answer["label"] for answer, _ in read]
        collapsed = len(set(found)) == 1 < len(found)
        if collapsed and jax.process_index() == 0:
            of = (
                self.data.split
                if len(self.data.parts) == 1
                else f"{self.data.split} of {part.name}"
            )
            answer, parsed = read[0]
            log(
                f"warning: all {len(read)} answers in {of} are"
                f" {'' if parsed else 'without a label, so they count as '}{answer['label']!r}: the model does"
                " not distinguish the inputs yet"
            )
        unparsed = {"unparsed": float(np.mean([not parsed for _, parsed in read]))}
        return {
            "label_accuracy": accuracy(found, labels, part.metric),
            "collapsed": float(collapsed),
            **(unparsed if objective.writes_more else {}),
        }


def _checked(part: Part, names: Iterable[str]) -> list[str]:
    """Returns the names of a task's metrics. Raises InputError for a name that validation itself uses."""
    for name in (found := list(names)):
        if name in OWN or name.startswith(("loss/", "accuracy/")):
            raise InputError(
                f"task {part.name!r}: its metric {name!r} has the same name as a metric that every"
                " validation computes; rename it"
            )
    return found
