"""The two-objective loss, as sums that can be added over slices, devices and steps."""

from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import optax
from flax import struct

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


def objective_sums(logits: jax.Array, group: Group, num_objectives: int) -> ObjectiveSums:
    """Totals of one group of rows.

    Hsieh et al. 2023 (arXiv:2305.02301, section 3.2): L = L_label + lambda L_rationale, each a mean
    of cross-entropies over target tokens. The division is left to the caller, who knows the counts
    of the global batch: a mean of means would weigh a token by the slice that it fell into.

    With uniform logits over 4 ids, 2 label tokens and 3 rationale tokens the sums are
    (2 ln 4, 3 ln 4) and, with weights (1, 0.5), the loss is 1.5 ln 4 = 2.0794.

    Args:
        logits: [batch, length, vocab] float32.
        group: `decoder_target_tokens`, `decoder_objective_ids` (0 padding, i for the i-th
            objective) and `decoder_loss_weights`, all [batch, length].
        num_objectives: N.
    """
    targets, weights = group["decoder_target_tokens"], token_weights(group, num_objectives)
    nll = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
    correct = (jnp.argmax(logits, axis=-1) == targets).astype(jnp.float32)
    return ObjectiveSums(
        loss=jnp.einsum("bl,blo->o", nll, weights),
        correct=jnp.einsum("bl,blo->o", correct, weights),
        count=weights.sum((0, 1)),
    )
