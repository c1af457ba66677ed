"""The tokens of a prepared dataset's rows as they stand, without TensorFlow and SeqIO."""

import dataclasses
import itertools
from collections.abc import Iterator, Sequence

import numpy as np

from stepdistill_jax.data.example import Example
from stepdistill_jax.data.objectives import Objective
from stepdistill_jax.data.prepared import PreparedDataset
from stepdistill_jax.data.vocabulary import EOS_ID, Vocabulary
from stepdistill_jax.tasks.supervision import Supervision
from stepdistill_jax.tasks.token_store import TokenExample

AT_ONCE = 1024  # examples whose texts are tokenised together, on all cores


@dataclasses.dataclass(frozen=True)
class PreparedRows:
    """Tokens of a split, from its SPLIT.jsonl: those of `registry.joint_task` in a tenth of the time.

    Only where labels and rationales are taken as they stand (`can_read`); what chooses among them is
    a SeqIO preprocessor, and read by SeqIO.

    Attributes:
        dataset, split: a prepared dataset, and its split.
        objectives: each gives a row.
        vocabulary: of both sides.
        labelled: leaves out the rows without a label.
    """

    dataset: PreparedDataset
    split: str
    objectives: Sequence[Objective]
    vocabulary: Vocabulary
    labelled: bool

    @staticmethod
    def can_read(supervision: Supervision | None) -> bool:
        """Whether the supervision takes each row as it stands, or leaves it out."""
        return supervision is None or supervision == Supervision()

    def __len__(self) -> int:
        return self.dataset.splits[self.split]

    def __iter__(self) -> Iterator[TokenExample]:
        examples = self.dataset.examples(self.split)
        kept = (e for e in examples if e.label or not self.labelled)
        while several := list(itertools.islice(kept, AT_ONCE)):
            yield from self._tokenised(several)

    def _tokenised(self, examples: Sequence[Example]) -> Iterator[TokenExample]:
        rows = [[o.render(e.texts) for o in self.objectives] for e in examples]
        own = not self.objectives[0].label_field
        ids = iter(self.vocabulary.encode_many([t for r in rows for pair in r for t in pair]))
        for example, texts in zip(examples, rows, strict=True):
            pairs = []
            for _, target in texts:
                inputs, targets = [*next(ids), EOS_ID], [*next(ids), EOS_ID]
                pairs.append((inputs, targets if target else []))  # absent: no end of sequence
            label = texts[0][1] if own else example.label
            yield TokenExample(pairs, float(np.float32(example.weight)), label)
