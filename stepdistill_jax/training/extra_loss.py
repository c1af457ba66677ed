"""One more term of the loss, written by a user: what the step calls, and how it is divided.

A `PairedLoss` compares the label and the rationale of each example.
"""

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
    """Adds `weight` x (sum of `total`) / (sum of `count`) to the loss, both over the global batch.

    A subclass is a frozen dataclass, whose fields are its settings. Both methods are traced inside
    the compiled step (arrays of jax, no Python branches on their values), once for each group of
    rows and slice of the batch, and see nothing else of the batch: what they return must be a sum
    over rows, so that the step does not depend on devices and microbatches. Rows are packed: tokens
    of several examples lie side by side, told apart by the segment ids.

    Attributes:
        name: of the metric `loss/<name>`, total over count; lower_snake_case.
        weight: at least 0, or a `Schedule`; then `loss_weight/<name>` is a metric, too.

    Raises:
        InputError: a name or weight that is not that.
    """

    name: ClassVar[str] = ""
    weight: Weight = 1.0

    def __post_init__(self):
        kind = type(self).__name__
        snake_case(f"{kind}.name", self.name)
        check_weight(f"{kind}.weight", self.weight)

    @abc.abstractmethod
    def count(self, group: Mapping[str, jax.Array]) -> jax.Array:
        """Scalar: how many terms `total` adds up, from the ids alone.

        It is asked before the model runs, since a slice's share of the gradient has to be known.
        """

    @abc.abstractmethod
    def total(
        self, states: jax.Array, output: OutputLayer, group: Mapping[str, jax.Array]
    ) -> jax.Array:
        """Scalar: the sum of the terms of these rows, in nats; finite also where there are none.

        Args:
            states: [rows, length, embed] of the decoder after its last norm, in the run's dtype.
            output: `output.logits(states)` are the logits, float32, and the largest array of the step
                if all are made at once; `output.kernel` is [embed, vocab] float32.
            group: see `batches.batch`: [rows, length] each, `decoder_target_tokens`,
                `decoder_segment_ids`, `decoder_objective_ids` (0 padding, i for the i-th
                objective), `decoder_loss_weights`, of a mixture `decoder_task_ids`, for a
                `PairedLoss` `decoder_example_ids`, ..., and the encoder's.
        """

    def to_json(self) -> dict[str, Any]:
        """Class and settings, as `run.json` keeps them and a resume compares them."""
        kind = type(self)
        return {"class": f"{kind.__module__}.{kind.__qualname__}", **dataclasses.asdict(self)}


class PairedLoss(ExtraLoss):
    """An `ExtraLoss` over pairs: the targets of the first two objectives of one example.

    Where a run has one, a row holds all targets of its examples, packed or padded, and `group` has
    `decoder_example_ids`: the number of each target token's example in its row, from 1. So no pair
    is split by devices, hosts or microbatches. A row of `length` target tokens has `examples` places
    for pairs, `length // 2`: their numbers are at most that. An example with several rationales is
    one pair; one that lacks a target is none.

    A subclass writes `total`; `count` is the number of pairs.
    """

    def count(self, group: Mapping[str, jax.Array]) -> jax.Array:
        """Scalar: the pairs of these rows."""
        return self.is_pair(group).sum()

    @staticmethod
    def is_pair(group: Mapping[str, jax.Array]) -> jax.Array:
        """[rows, examples] bool, whether an example has a target of both objectives."""
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
        """Adds up each example's values over its target tokens of one objective.

        Args:
            values: [rows, length, ...], of the target tokens.
            group: that `total` gets.
            objective: 1 for the first of OBJECTIVES (the label), 2 for the second (the rationale).
            by: another reduction of `jax.ops`, such as `segment_max`.

        Returns:
            [rows, examples, ...]; without such a token 0, or what `by` gives for none.
        """
        numbers = jnp.where(group["decoder_objective_ids"] == objective, group[EXAMPLE_IDS], 0)
        places = numbers.shape[1] // 2 + 1  # 0 is of all other tokens

        def of_row(values: jax.Array, numbers: jax.Array) -> jax.Array:
            return by(values, numbers, num_segments=places)[1:]

        return jax.vmap(of_row)(values, numbers)
