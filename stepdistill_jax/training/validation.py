"""Validation during training: losses per objective and the accuracy of decoded labels."""

import dataclasses
import itertools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from stepdistill_jax.batches.batch import Batches
from stepdistill_jax.data.schedules import end_value
from stepdistill_jax.data.text_metrics import accuracy
from stepdistill_jax.decoding.greedy import LabelDecoder
from stepdistill_jax.inference.prompting import cut_ids, read_answer
from stepdistill_jax.models.config import T5Config
from stepdistill_jax.models.lora import merge
from stepdistill_jax.models.sharding import place_rows
from stepdistill_jax.models.t5 import T5
from stepdistill_jax.runtime.progress import log
from stepdistill_jax.tasks.task_data import Part, TaskData
from stepdistill_jax.training.loss import over_tasks
from stepdistill_jax.training.state import TrainState
from stepdistill_jax.training.step import jit_eval_step

MEANS = ("label_accuracy", "unfinished", "collapsed")  # over the parts of a mixture


@dataclasses.dataclass(frozen=True)
class Validator:
    """Everything that a validation needs, made once; `compute` is called with new parameters.

    Adapters are merged first: what is measured is the model that will be exported.
    """

    config: T5Config
    data: TaskData
    batches: Batches
    decoder: LabelDecoder
    eval_step: Callable
    mesh: Mesh

    @classmethod
    def create(
        cls,
        data: TaskData,
        batches: Batches,
        *,
        config: T5Config,
        abstract: TrainState,
        mesh: Mesh,
        max_decode_len: int,
        batch_size: int,
    ) -> "Validator":
        """Makes both compiled functions.

        `batches` goes through the split once, in order; `batch_size` is the decoder's, in rows.
        """
        plain = dataclasses.replace(config, lora=None)
        return cls(
            config,
            data,
            batches,
            LabelDecoder(plain, max_decode_len=max_decode_len, batch_size=batch_size, mesh=mesh),
            jit_eval_step(
                abstract,
                mesh,
                model=T5(plain),
                num_objectives=len(data.objectives),
                num_tasks=len(data.parts),
            ),
            mesh,
        )

    def compute(
        self, params: Any, *, on_batch: Callable[[], None] = lambda: None
    ) -> dict[str, float]:
        """Metrics of the split, each named `eval/<split>/...`.

        Of several parts, each part's are named `eval/<split>/<part>/...` and `label_accuracy` is the
        mean of theirs.

        `on_batch` is called after each batch of losses and of answers, and may raise. Every process runs the same batches. `label_accuracy` is the share of decoded labels that
        match (by text, or by value for equations); `collapsed` is 1 where two or more rows all got
        one answer (also said on standard error), else 0; where targets are more than a label, `unparsed` is
        the share of answers without one, which count as wrong; `accuracy/<objective>` is the share of target
        tokens that are the likeliest under teacher forcing, each weighed as in the loss. Losses are
        nats per token; `loss` takes the weights that schedules end with, so that those of several
        steps compare, and has no extra loss.
        """
        params, _ = merge(params, self.config)
        parts, count = [part.name for part in self.data.parts], len(self.data.objectives)
        totals = np.zeros(
            (3, len(parts) * count)
        )  # loss, correct, count; float64 over many batches
        for step in range(self.batches.num_steps):
            sums = self.eval_step(params, place_rows(self.batches(step), self.mesh))
            totals += np.array([sums.loss, sums.correct, sums.count], np.float64)
            on_batch()
        metrics = self._means(over_tasks(of, count, len(parts)) for of in totals)
        for name, *of_part in zip(parts, *totals.reshape(3, len(parts), count), strict=True):
            if len(parts) > 1:
                metrics |= {f"{name}/{key}": x for key, x in self._means(of_part).items()}
        weights = {o.name: end_value(o.weight) for o in self.data.objectives}
        metrics["loss"] = sum(
            w * metrics[f"loss/{n}"] for n, w in weights.items() if f"loss/{n}" in metrics
        )
        metrics |= self._decode(params, on_batch)
        return {f"eval/{self.data.split}/{name}": value for name, value in metrics.items()}

    def _means(self, totals: Iterable[np.ndarray]) -> dict[str, float]:
        """Returns loss and accuracy of the objectives with tokens; totals of loss, correct, count."""
        found = {}
        for objective, loss, correct, count in zip(self.data.objectives, *totals, strict=True):
            if count > 0:
                found[f"loss/{objective.name}"] = float(loss / count)
                found[f"accuracy/{objective.name}"] = float(correct / count)
        return found

    def _decode(self, params: Any, on_batch: Callable[[], None]) -> dict[str, float]:
        """Returns the metrics of the decoded labels; of several parts, each one's and their means."""
        parts = [p for p in self.data.parts if p.label_column is not None]
        asked = [part.labelled_inputs() for part in parts]
        prompts = [cut_ids(ids, self.batches.input_length) for inputs, _ in asked for ids in inputs]
        decoded = self.decoder(params, prompts, on_progress=lambda _: on_batch())
        texts, finished = map(self.data.vocabulary.decode, decoded.ids), iter(decoded.finished)
        each = {}
        for part, (_, labels) in zip(parts, asked, strict=True):
            answers = list(itertools.islice(texts, len(labels)))
            ended = list(itertools.islice(finished, len(labels)))
            each[part.name] = self._compare(part, labels, answers) | {
                "unfinished": float(np.mean(~np.asarray(ended)))
            }
        if len(self.data.parts) == 1:
            return each[parts[0].name]
        means = {n: float(np.mean([m[n] for m in each.values() if n in m])) for n in MEANS}
        return means | {f"{part}/{n}": v for part, m in each.items() for n, v in m.items()}

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
                f" {'' if parsed else 'without a label, and so '}{answer['label']!r}: so far the model"
                " does not tell the inputs apart"
            )
        unparsed = {"unparsed": float(np.mean([not parsed for _, parsed in read]))}
        return {
            "label_accuracy": accuracy(found, labels, part.metric),
            "collapsed": float(collapsed),
            **(unparsed if objective.writes_more else {}),
        }
