"""The two-objective loss, as sums that can be added over slices, devices and steps."""

from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
from flax import struct

from stepdistill_jax.training.cross_entropy import cross_entropy

Group = Mapping[str, jax.Array]
Batch = Sequence[Group]


class ObjectiveSums(struct.PyTreeNode):
    """Totals per objective, each [objectives] float32; divide once, at the end.

    Attributes:
        loss: sum of weight x cross-entropy, nats.
        correct: sum of weight where the likeliest token is the target.
        count: sum of weight over target tokens.
    """

    loss: jax.Array
    correct: jax.Array
    count: jax.Array

    @classmethod
    def empty(cls, num_objectives: int) -> "ObjectiveSums":
        """Zeros: adding them changes nothing."""
        zeros = jnp.zeros(num_objectives, jnp.float32)
        return cls(zeros, zeros, zeros)

    def merge(self, other: "ObjectiveSums") -> "ObjectiveSums":
        """Sums of both."""
        return jax.tree.map(jnp.add, self, other)

    def with_last(self, loss: jax.Array, count: jax.Array) -> "ObjectiveSums":
        """Adds to the last column, an extra loss's, which no token belongs to."""
        loss, count = self.loss.at[-1].add(loss), self.count.at[-1].add(count)
        return self.replace(loss=loss, count=count)

    def weighted_loss(self, objective_weights: jax.Array) -> jax.Array:
        """sum over o of weight_o x mean of o; an objective without tokens adds 0."""
        return jnp.vdot(loss_scale(self.count, objective_weights), self.loss)


def loss_scale(counts: jax.Array, objective_weights: jax.Array) -> jax.Array:
    """weight_o / count_o, and 0 where an objective has no token: [objectives] float32."""
    return jnp.where(counts > 0, objective_weights / jnp.maximum(counts, 1e-9), 0.0)


def token_weights(group: Group, num_objectives: int) -> jax.Array:
    """[batch, length, objectives] float32: a token's loss weight in its objective's column."""
    ids = group["decoder_objective_ids"][..., None]
    of = (ids == jnp.arange(1, num_objectives + 1)[None, None, :]).astype(jnp.float32)
    return of * group["decoder_loss_weights"][..., None]


def objective_sums(
    states: jax.Array, kernel: jax.Array, group: Group, scale: jax.Array
) -> tuple[jax.Array, ObjectiveSums]:
    """Totals of one group of rows, and its share of the loss.

    Hsieh et al. 2023 (arXiv:2305.02301, section 3.2): L = L_label + lambda L_rationale, each a mean
    of cross-entropies over target tokens. The scale is left to the caller, who knows the counts
    of the global batch: a mean of means would weigh a token by the slice that it fell into.

    With uniform logits over 4 ids, 2 label tokens and 3 rationale tokens the sums are
    (2 ln 4, 3 ln 4) and, with weights (1, 0.5), the loss is 1.5 ln 4 = 2.0794.

    Args:
        states: [batch, length, embed] of the decoder.
        kernel: [embed, vocab]; logits are states x kernel.
        group: `decoder_target_tokens`, `decoder_objective_ids` (0 padding, i for the i-th
            objective) and `decoder_loss_weights`, all [batch, length].
        scale: [objectives] float32, of `loss_scale`.

    Returns:
        sum over o of scale_o x loss_o, a scalar with a gradient, and the sums, which have none.
    """
    weights = token_weights(group, len(scale))
    targets = group["decoder_target_tokens"]
    loss, nll, correct = cross_entropy(states, kernel, targets, weights @ scale)
    sums = ObjectiveSums(
        loss=jnp.einsum("bl,blo->o", nll, weights),
        correct=jnp.einsum("bl,blo->o", correct, weights),
        count=weights.sum((0, 1)),
    )
    return loss, sums
