"""The tokens of one split of a task, as training and evaluation read them."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

from stepdistill_jax.data.objectives import Objective
from stepdistill_jax.data.vocabulary import Vocabulary
from stepdistill_jax.runtime.fingerprints import digest
from stepdistill_jax.tasks import registry
from stepdistill_jax.tasks.registry import Column
from stepdistill_jax.tasks.token_store import TokenStore


@dataclasses.dataclass(frozen=True)
class Part:
    """The examples of one dataset, or of one task of a mixture.

    Attributes:
        name: of the dataset or task.
        store: its examples, tokenised.
        columns: what `store.rows` hold; their objectives are numbers of `TaskData.objectives`.
        rate: share of the drawn examples; those of all parts need not add up to 1.
        metric: name in `data.text_metrics.METRICS`, by which labels are compared.
        labels: the distinct labels where they are few, else empty.
        task: the `seqio.Task` that gives the labels and has metrics of its own, else None.
    """

    name: str
    store: TokenStore
    columns: tuple[Column, ...]
    rate: float = 1.0
    metric: str = "text_match"
    labels: tuple[str, ...] = ()
    task: Any = None

    @property
    def label_column(self) -> int | None:
        """Returns the column of the first objective, which answers are compared with."""
        return next((i for i, c in enumerate(self.columns) if c.objective == 1), None)

    def labelled_inputs(self) -> tuple[list[list[int]], list[str]]:
        """Returns the ids of each example's input to the first objective, and its gold label."""
        if (column := self.label_column) is None:
            return [], []
        inputs = self.store.rows[column]["inputs"]
        return [inputs[i].tolist() for i in range(len(inputs))], self.store.label_texts

    def label_targets(self) -> list[list[int]]:
        """Returns the ids of the target of each of `labelled_inputs`, uncut."""
        if (column := self.label_column) is None:
            return []
        targets = self.store.rows[column]["targets"]
        return [targets[i].tolist() for i in range(len(targets))]


@dataclasses.dataclass(frozen=True)
class TaskData:
    """One split of a task, tokenised.

    Attributes:
        name, split: what was asked for.
        objectives: those of the rows, in the order of their ids (1, 2, ...).
        parts: one, or several of a mixture.
        vocabulary: of inputs and targets.
        sample_rationales: whether a batch takes one of an example's rationales, or all there are.
    """

    name: str
    split: str
    objectives: tuple[Objective, ...]
    parts: tuple[Part, ...]
    vocabulary: Vocabulary
    sample_rationales: bool = False

    @classmethod
    def of_store(
        cls,
        name: str,
        split: str,
        objectives: Sequence[Objective],
        store: TokenStore,
        vocabulary: Vocabulary,
        *,
        most_rationales: int = 1,
        sample_rationales: bool = False,
        **part: Any,
    ) -> "TaskData":
        """Returns the data of one store; `most_rationales` of an example are rows of their own."""
        objectives = tuple(objectives)
        columns = registry.columns_of(objectives, most_rationales)
        parts = (Part(name, store, columns, **part),)
        return cls(name, split, objectives, parts, vocabulary, sample_rationales)

    @property
    def stores(self) -> tuple[TokenStore, ...]:
        """Returns the store of each part."""
        return tuple(part.store for part in self.parts)

    @property
    def rates(self) -> tuple[float, ...]:
        """Returns the rate of each part."""
        return tuple(part.rate for part in self.parts)

    @property
    def metric(self) -> str:
        """Returns the metric of all parts; `text_match` where they differ."""
        found = {part.metric for part in self.parts}
        return found.pop() if len(found) == 1 else "text_match"

    @property
    def labels(self) -> tuple[str, ...]:
        """Returns the labels of the one part; none of several."""
        return self.parts[0].labels if len(self.parts) == 1 else ()

    @functools.cached_property
    def decoder_prefixes(self) -> tuple[tuple[int, ...], ...]:
        """Ids of each objective's `decoder_prefix`, mostly none."""
        return tuple(
            tuple(self.vocabulary.encode(o.decoder_prefix)) if o.decoder_prefix else ()
            for o in self.objectives
        )

    @property
    def fingerprint(self) -> str:
        """Digest of everything that decides a batch: the stores' contents, their rates, prefixes."""
        parts = [[store.fingerprint for store in self.stores], list(self.rates)]
        if any(self.decoder_prefixes):
            parts.append(list(map(list, self.decoder_prefixes)))
        return digest(parts)

    @property
    def vocab_size(self) -> int:
        """Ids that a model must know: the vocabulary's, and extra ids that the rows use."""
        return max(self.vocabulary.size, *(store.max_id + 1 for store in self.stores))
