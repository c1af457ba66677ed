"""Base classes for a further term of the loss, written by a user."""

import abc
import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from stepdistill_jax.batches.packing import EXAMPLE_IDS
from stepdistill_jax.data.schedules import Weight, check_weight
from stepdistill_jax.models.encoder_decoder import OutputLayer
from stepdistill_jax.runtime.checks import snake_case


@dataclasses.dataclass(frozen=True)
class ExtraLoss(abc.ABC):
    """Adds `weight` x (sum of `total`) / (sum of `count`) to the loss.

    Both sums are over the global batch. A subclass is a frozen dataclass whose fields are its settings. A call of
    `count` or `total` may get only some rows of the batch, and must return the sum over these rows. JAX traces
    both methods, so no Python branch may depend on values in their arguments. In a packed row, segment ids
    distinguish the examples.

    Attributes:
        name: name in lower_snake_case, as in the metric `loss/<name>`.
        weight: number of at least 0, or a `Schedule`, whose value is the metric `loss_weight/<name>`.

    Raises:
        InputError: the name or the weight is invalid.
    """

    name: ClassVar[str] = ""
    weight: Weight = 1.0

    def __post_init__(self):
        kind = type(self).__name__
        snake_case(f"{kind}.name", self.name)
        check_weight(f"{kind}.weight", self.weight)

    @abc.abstractmethod
    def count(self, group: Mapping[str, jax.Array]) -> jax.Array:
        """Returns the number of terms that `total` adds up, a scalar.

        The step calls this method before the model runs, so the number may depend only on `group`.

        Args:
            group: as for `total`.
        """

    @abc.abstractmethod
    def total(
        self, states: jax.Array, output: OutputLayer, group: Mapping[str, jax.Array]
    ) -> jax.Array:
        """Returns the sum of the loss terms of a group's rows, a scalar in nats.

        The sum must be finite even if the group has no terms.

        Args:
            states: the decoder's states after its last norm, [rows, length, embed] in the run's dtype.
            output: `output.logits(states)` returns float32 logits; `output.kernel` is [embed, vocab] float32.
            group: arrays [rows, length] of `batches.batch`, such as `decoder_target_tokens`,
                `decoder_segment_ids`, `decoder_loss_weights` and `decoder_objective_ids` (index of the
                objective, from 1; 0 is padding). A `PairedLoss` also gets `decoder_example_ids`.
        """

    def to_json(self) -> dict[str, Any]:
        """Returns the class and its settings for `run.json`. A resumed run must have the same values."""
        kind = type(self)
        return {"class": f"{kind.__module__}.{kind.__qualname__}", **dataclasses.asdict(self)}


class PairedLoss(ExtraLoss):
    """An `ExtraLoss` over pairs. A subclass defines `total`.

    A pair is an example that has targets of the first two objectives. An example with several rationales is
    still one pair.

    All targets of an example are in the same row of a batch. `decoder_example_ids` gives each target token the
    1-based index of its example within the row; 0 is padding. In the shapes below, `examples` is `length` // 2,
    which is enough for all pairs of a row.
    """

    def count(self, group: Mapping[str, jax.Array]) -> jax.Array:
        """Returns the number of pairs in `group`, a scalar."""
        return self.is_pair(group).sum()

    @staticmethod
    def is_pair(group: Mapping[str, jax.Array]) -> jax.Array:
        """Returns which examples of each row are pairs, [rows, examples] bool."""
        ones = jnp.ones_like(group[EXAMPLE_IDS])
        first, second = (PairedLoss.pooled(ones, group, i) > 0 for i in (1, 2))
        return first & second

    @staticmethod
    def pooled(
        values: jax.Array,
        group: Mapping[str, jax.Array],
        objective: int,
        by: Callable[..., jax.Array] = jax.ops.segment_sum,
    ) -> jax.Array:
        """Reduces the values of one objective's target tokens to one value for each example.

        Args:
            values: a value for each target token, [rows, length, ...].
            group: the argument of `total`.
            objective: 1 for the first objective, 2 for the second.
            by: a segment reduction of `jax.ops`.

        Returns:
            The reduced values, [rows, examples, ...]. An example without target tokens of this objective gets
            the value that `by` returns for an empty segment (0 for `segment_sum`).
        """
        # Example ids 1 1 1 2 2 2 0 0 with objectives 1 2 2 1 2 2 0 0: for objective 2, `numbers` is
        # 0 1 1 0 2 2 0 0. Segment 0 collects all other tokens and is dropped.
        numbers = jnp.where(group["decoder_objective_ids"] == objective, group[EXAMPLE_IDS], 0)
        # enough for all pairs: examples with several targets come first, and a pair has at least 2 tokens
        places = numbers.shape[1] // 2 + 1

        def of_row(values: jax.Array, numbers: jax.Array) -> jax.Array:
            return by(values, numbers, num_segments=places)[1:]

        return jax.vmap(of_row)(values, numbers)
