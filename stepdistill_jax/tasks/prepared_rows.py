"""Tokenises the rows of a prepared dataset, without TensorFlow and SeqIO."""

import dataclasses
import functools
import itertools
from collections.abc import Iterator, Sequence

import numpy as np

from stepdistill_jax.data.example import Example
from stepdistill_jax.data.objectives import Objective
from stepdistill_jax.data.prepared import PreparedDataset
from stepdistill_jax.data.published_split import WHOLE, drawn_splits
from stepdistill_jax.data.vocabulary import EOS_ID, Vocabulary
from stepdistill_jax.errors import InputError
from stepdistill_jax.tasks.supervision import Supervision
from stepdistill_jax.tasks.token_store import TokenExample

AT_ONCE = 1024  # number of examples that are tokenised together, on all cores


@dataclasses.dataclass(frozen=True)
class PreparedRows:
    """Iterates over the examples of a prepared split, with input and target ids for each objective.

    Unless the dataset is `paper_exact`, `can_read(supervision)` must be true.

    Attributes:
        supervision: None keeps all examples. Otherwise, examples without a label are skipped, except in
            `paper_exact` datasets.
        share: (fraction of the examples to draw, seed of the draw). Only for `paper_exact` datasets.
    """

    # Except for `paper_exact` datasets, the ids equal those of `registry.joint_task`, but take a tenth of the time.

    dataset: PreparedDataset
    split: str
    objectives: Sequence[Objective]
    vocabulary: Vocabulary
    supervision: Supervision | None = None
    share: tuple[float, int] = WHOLE

    @staticmethod
    def can_read(supervision: Supervision | None) -> bool:
        """Returns whether this class supports a supervision, which must be None or the default `Supervision()`."""
        return supervision is None or supervision == Supervision()

    def __len__(self) -> int:
        if self._parts:
            return sum(int(mask.sum()) for _, mask in self._parts)
        return self.dataset.splits[self.split]

    def __iter__(self) -> Iterator[TokenExample]:
        examples = self.dataset.examples(self.split)
        if self._parts:
            found = ((self.dataset.examples(part), mask) for part, mask in self._parts)
            examples = itertools.chain(*(itertools.compress(rows, mask) for rows, mask in found))
        labelled = self.supervision is not None and not self.dataset.paper_exact
        kept = (e for e in examples if e.label or not labelled)
        while several := list(itertools.islice(kept, AT_ONCE)):
            yield from self._tokenised(several)

    @functools.cached_property
    def _parts(self) -> list[tuple[str, np.ndarray]]:
        """The rows to use, as pairs (name of a prepared split, bool mask over the split's rows).

        An empty list means every row of `split`.
        """
        dataset, (fraction, seed), draws = self.dataset, self.share, self.dataset.draws_validation
        if self.share == WHOLE:
            return []
        # The published code draws validation and a share from all rows of both prepared splits, so a row of
        # `split` may come from either of these.
        splits = dataset.drawn
        counts = [dataset.splits[split] for split in splits]
        prepared = np.concatenate(drawn_splits(sum(counts), validation=draws))
        shares = drawn_splits(sum(counts), fraction=fraction, seed=seed, validation=draws)
        mask = np.isin(prepared, shares[splits.index(self.split)])
        if not mask.any():
            raise InputError(
                f"dataset {dataset.name!r}: with `data_fraction={fraction:g}`, split {self.split!r} has no"
                " rows; use a larger fraction"
            )
        return list(zip(splits, np.split(mask, [counts[0]]), strict=False))

    def _texts(self, example: Example) -> dict[str, str]:
        texts = example.texts
        if self.supervision is not None and self.supervision.label_source == "llm":
            texts["label"] = example.llm_label
        return texts

    def _tokenised(self, examples: Sequence[Example]) -> Iterator[TokenExample]:
        blank = self.dataset.paper_exact  # the published code also trains on blank targets
        rows = [
            [o.render(self._texts(e), keep_empty=blank) for o in self.objectives] for e in examples
        ]
        own = not self.objectives[0].label_field
        # one call for all texts: input and target of each objective, example by example, then second inputs
        texts = [t for r in rows for pair in r for t in pair] + [e.input_pair for e in examples]
        found = self.vocabulary.encode_many(texts)
        ids, seconds = iter(found), found[-len(examples) :]
        framed = self.vocabulary.framing.input_ids
        for example, texts, second in zip(examples, rows, seconds, strict=True):
            pairs, more = [], [second] if example.input_pair else []
            for _, target in texts:
                inputs, targets = framed(next(ids), *more), [*next(ids), EOS_ID]
                # an absent target has not even an end of sequence
                pairs.append((inputs, targets if target or blank else []))
            label = texts[0][1] if own else example.label
            yield TokenExample(pairs, float(np.float32(example.weight)), label)
