"""The tokens of one split of a task, for training and evaluation."""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
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
    """The examples of one dataset, one plain task, or several plain tasks whose rows are paired.

    Attributes:
        columns: a `Column` for each entry of `store.rows`. `Column.objective` is 1 for the first of
            `TaskData.objectives`.
        rate: rate at which examples are drawn, relative to other parts.
        metric: name in `data.text_metrics.METRICS`.
        labels: the distinct labels if there are only a few, otherwise ().
        task: the `seqio.Task` of the first column, or None. Its metrics are computed if the part has labels.
        input_pair: whether rows have a second input text.
        own_inputs: whether the inputs come from a plain task, instead of templates.
        drawn: a note on how the rows of several tasks were paired, or on why they were not; else "".
    """

    name: str
    store: TokenStore
    columns: tuple[Column, ...]
    rate: float = 1.0
    metric: str = "text_match"
    labels: tuple[str, ...] = ()
    task: Any = None
    input_pair: bool = False
    own_inputs: bool = False
    drawn: str = ""

    @property
    def has_targets(self) -> bool:
        """Whether any example has a target."""
        return any(rows["targets"].lengths.any() for rows in self.store.rows)

    @property
    def label_column(self) -> int | None:
        """Index in `columns` of the first objective's column, or None if there is none."""
        return next((i for i, c in enumerate(self.columns) if c.objective == 1), None)

    def labelled_inputs(self) -> tuple[list[list[int]], list[str]]:
        """Returns two lists: input ids and gold labels of the examples that have a row of the first objective."""
        if (column := self.label_column) is None:
            return [], []
        inputs = self.store.rows[column]["inputs"]
        there = np.flatnonzero(inputs.lengths).tolist()  # paired examples may lack a label row
        labels = self.store.label_texts
        return [inputs[i].tolist() for i in there], [labels[i] for i in there]

    def label_targets(self) -> list[list[int]]:
        """Returns the target ids of the rows of `labelled_inputs`, not truncated."""
        if (column := self.label_column) is None:
            return []
        rows = self.store.rows[column]
        there = np.flatnonzero(rows["inputs"].lengths).tolist()
        return [rows["targets"][i].tolist() for i in there]


@dataclasses.dataclass(frozen=True)
class TaskData:
    """One tokenised split of a task.

    Attributes:
        name: name of the task.
        parts: a mixture has one for each dataset, and one for each task that is not paired with others by ids.
        sample_rationales: whether a batch uses only one of an example's rationales.
        share_is_drawn: whether the examples are already the share that the run's `data_fraction` asks for.
    """

    name: str
    split: str
    objectives: tuple[Objective, ...]
    parts: tuple[Part, ...]
    vocabulary: Vocabulary
    sample_rationales: bool = False
    share_is_drawn: bool = False

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
        share_is_drawn: bool = False,
        **part: Any,
    ) -> "TaskData":
        """Returns data whose only part has the examples of `store`.

        `store.rows` must have `most_rationales` entries for each objective that reads a rationale, and one entry
        for each other objective.
        """
        objectives = tuple(objectives)
        columns = registry.columns_of(objectives, most_rationales)
        parts = (Part(name, store, columns, **part),)
        return cls(name, split, objectives, parts, vocabulary, sample_rationales, share_is_drawn)

    @property
    def stores(self) -> tuple[TokenStore, ...]:
        """The store of each part."""
        return tuple(part.store for part in self.parts)

    @property
    def rates(self) -> tuple[float, ...]:
        """The rate of each part."""
        return tuple(part.rate for part in self.parts)

    @property
    def shares_encoding(self) -> bool:
        """Whether all targets of an example have the same input, so that the input is encoded only once."""
        return share_encoding(self.objectives) and not any(p.own_inputs for p in self.parts)

    @property
    def metric(self) -> str:
        """The metric that all `parts` have, or `text_match` if their metrics differ."""
        found = {part.metric for part in self.parts}
        return found.pop() if len(found) == 1 else "text_match"

    @property
    def labels(self) -> tuple[str, ...]:
        """The labels of the only entry of `parts`, or () if there are several entries."""
        return self.parts[0].labels if len(self.parts) == 1 else ()

    @property
    def input_pair(self) -> bool:
        """Whether rows have a second input text."""
        return any(part.input_pair for part in self.parts)

    @functools.cached_property
    def decoder_prefixes(self) -> tuple[tuple[int, ...], ...]:
        """Ids of each objective's `decoder_prefix`, or () for an objective without a prefix."""
        return tuple(
            tuple(self.vocabulary.encode(o.decoder_prefix)) if o.decoder_prefix else ()
            for o in self.objectives
        )

    @property
    def is_mixed(self) -> bool:
        """Whether the data comes from several tasks, paired or not."""
        return len(self.parts) > 1 or any(part.drawn for part in self.parts)

    def shares(self) -> list[dict[str, Any]]:
        """Returns each objective's expected share of the training data in each part, before truncation.

        Returns:
            A dict for each objective in each part, with these entries.
            `task`: name of the part.
            `objective`: name of the objective.
            `examples`: the part's share of all examples.
            `rows`: the objective's share of all rows.
            `target_tokens`: the objective's share of all target tokens.
            `drawn`: `Part.drawn` of the part.
        """
        # Example: with two parts of rates 1 and 3, one of four examples comes from the first part. On average, it
        # has the part's mean number of rows and target tokens.
        found, total = {}, sum(self.rates)
        for part in self.parts:
            lengths = [rows["targets"].lengths for rows in part.store.rows]
            usable = max(int(np.any([x > 0 for x in lengths], axis=0).sum()), 1)
            drawn = part.rate / total
            for column, of_rows in zip(part.columns, lengths, strict=True):
                objective = self.objectives[column.objective - 1].name
                share = found.setdefault(
                    (part.name, objective),
                    {"task": part.name, "objective": objective, "examples": drawn}
                    | {"rows": 0.0, "target_tokens": 0.0, "drawn": part.drawn},
                )
                # a step has a row for each of an example's rationales, or for one that is drawn
                if column.variant == 0 or not self.sample_rationales:
                    share["rows"] += drawn * np.count_nonzero(of_rows) / usable
                    share["target_tokens"] += drawn * float(of_rows.sum()) / usable
        for name in ("rows", "target_tokens"):
            all_of_it = sum(share[name] for share in found.values()) or 1.0
            for share in found.values():
                share[name] = float(share[name] / all_of_it)
        return list(found.values())

    @property
    def fingerprint(self) -> str:
        """Digest of all data that determines a batch: rates, decoder prefixes and the contents of token stores."""
        parts = [[store.fingerprint for store in self.stores], list(self.rates)]
        if len(self.parts) > 1:
            parts.append([[column.objective for column in part.columns] for part in self.parts])
        if any(self.decoder_prefixes):
            parts.append(list(map(list, self.decoder_prefixes)))
        return digest(parts)

    @property
    def vocab_size(self) -> int:
        """Number of ids that a model needs. Rows may use extra ids above those of the vocabulary."""
        return max(self.vocabulary.size, *(store.max_id + 1 for store in self.stores))

    def check_ids(self, vocab_size: int) -> None:
        """Checks that a model has an embedding for each id of the rows.

        Raises:
            InputError: the largest id is not below `vocab_size`.
        """
        if self.vocab_size > vocab_size:
            raise InputError(
                f"task {self.name!r}: its ids go up to {self.vocab_size - 1}, but the model's vocab_size"
                f" is {vocab_size}; use a model with a larger vocabulary (`init_from`), or a task whose"
                " vocabulary has fewer extra_ids"
            )


def shares_in_words(shares: Sequence[Mapping[str, Any]]) -> list[str]:
    """Formats the result of `TaskData.shares` as one line for each part.

    Example: `own_label: own_label and own_rationale paired by id; 100.0% of the examples: label 50.0% of the
    rows and 12.5% of the target tokens, rationale 50.0% of the rows and 87.5% of the target tokens`.
    """
    lines = []
    for name in dict.fromkeys(share["task"] for share in shares):
        own = [share for share in shares if share["task"] == name]
        how = own[0]["drawn"]
        if how and len(own) == 1:
            how = f"its rows are drawn separately, since {how}"
        of = ", ".join(
            f"{s['objective']} {s['rows']:.1%} of the rows and {s['target_tokens']:.1%} of the target"
            " tokens"
            for s in own
        )
        share = f"{own[0]['examples']:.1%} of the examples: {of}"
        lines.append(f"{name}: {'; '.join([*filter(None, [how]), share])}")
    return lines
