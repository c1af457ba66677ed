"""The tokens of one split of a task, as training and evaluation read them."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import numpy as np

from stepdistill_jax.data.objectives import Objective, share_encoding
from stepdistill_jax.data.vocabulary import Vocabulary
from stepdistill_jax.errors import InputError
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
        task: the `seqio.Task` of the first column, whose metrics count where that is the label's;
            None has none.
        own_inputs: whether its inputs are a plain task's own, whatever the objectives' templates.
        drawn: how rows of several tasks became examples, or why they did not; else empty.
    """

    name: str
    store: TokenStore
    columns: tuple[Column, ...]
    rate: float = 1.0
    metric: str = "text_match"
    labels: tuple[str, ...] = ()
    task: Any = None
    own_inputs: bool = False
    drawn: str = ""

    @property
    def label_column(self) -> int | None:
        """Returns the column of the first objective, which answers are compared with."""
        return next((i for i, c in enumerate(self.columns) if c.objective == 1), None)

    def labelled_inputs(self) -> tuple[list[list[int]], list[str]]:
        """Returns the ids of each example's input to the first objective, and its gold label."""
        if (column := self.label_column) is None:
            return [], []
        inputs = self.store.rows[column]["inputs"]
        there = np.flatnonzero(inputs.lengths).tolist()  # a paired example may have no label row
        labels = self.store.label_texts
        return [inputs[i].tolist() for i in there], [labels[i] for i in there]

    def label_targets(self) -> list[list[int]]:
        """Returns the ids of the target of each of `labelled_inputs`, uncut."""
        if (column := self.label_column) is None:
            return []
        rows = self.store.rows[column]
        there = np.flatnonzero(rows["inputs"].lengths).tolist()
        return [rows["targets"][i].tolist() for i in there]


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
    def shares_encoding(self) -> bool:
        """Returns whether the targets of an example read one encoding of its input."""
        return share_encoding(self.objectives) and not any(p.own_inputs for p in self.parts)

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

    def shares(self) -> list[dict[str, Any]]:
        """Returns what each part and objective gets of an endless run, before anything is cut.

        Each has `task` (the part's name), `objective`, `examples` (the share of examples that are
        the part's), `rows` and `target_tokens` (the shares of all rows and target tokens).
        """
        found, total = [], sum(self.rates)
        for part in self.parts:
            examples = max(part.store.num_examples, 1)
            drawn = part.rate / total
            for column, rows in zip(part.columns, part.store.rows, strict=True):
                if column.variant:
                    continue
                lengths = rows["targets"].lengths
                found.append(
                    {
                        "task": part.name,
                        "objective": self.objectives[column.objective - 1].name,
                        "examples": drawn,
                        "rows": drawn * np.count_nonzero(lengths) / examples,
                        "target_tokens": drawn * float(lengths.sum()) / examples,
                    }
                )
        for name in ("rows", "target_tokens"):
            all_of_it = sum(share[name] for share in found) or 1.0
            for share in found:
                share[name] = float(share[name] / all_of_it)
        return found

    @property
    def fingerprint(self) -> str:
        """Digest of everything that decides a batch: the stores' contents, their rates, prefixes."""
        parts = [[store.fingerprint for store in self.stores], list(self.rates)]
        if len(self.parts) > 1:
            parts.append([[column.objective for column in part.columns] for part in self.parts])
        if any(self.decoder_prefixes):
            parts.append(list(map(list, self.decoder_prefixes)))
        return digest(parts)

    @property
    def vocab_size(self) -> int:
        """Ids that a model must know: the vocabulary's, and extra ids that the rows use."""
        return max(self.vocabulary.size, *(store.max_id + 1 for store in self.stores))

    def check_ids(self, vocab_size: int) -> None:
        """Refuses a model that has no embedding for an id of the rows.

        Raises:
            InputError: the largest id is not below `vocab_size`, the model's.
        """
        if self.vocab_size > vocab_size:
            raise InputError(
                f"task {self.name!r}: its ids go up to {self.vocab_size - 1}, and the model's vocab_size"
                f" is {vocab_size}; take a model with more (`init_from`), or a task whose vocabulary has"
                " no or fewer extra_ids"
            )


def shares_in_words(data: TaskData) -> list[str]:
    """Returns a line for each part of a mixture: what its rows are, and how much of the run it gets.

    Example: `own: own_label and own_rationale paired by id; 100% of the examples: label 50.0% of the
    rows and 12.5% of the target tokens, rationale 50.0% and 87.5%`.
    """
    if len(data.parts) == 1 and not data.parts[0].drawn:
        return []
    lines, shares = [], data.shares()
    for part in data.parts:
        own = [share for share in shares if share["task"] == part.name]
        how = f"{part.drawn}; " if len(part.columns) > 1 and part.drawn else ""
        if len(part.columns) == 1 and part.drawn:
            how = f"its rows are drawn on their own, since {part.drawn}; "
        of = ", ".join(
            f"{s['objective']} {s['rows']:.1%} of the rows and {s['target_tokens']:.1%} of the target"
            " tokens"
            for s in own
        )
        lines.append(f"{part.name}: {how}{own[0]['examples']:.1%} of the examples: {of}")
    return lines
