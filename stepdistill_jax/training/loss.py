"""Computes the loss of all objectives as sums over tokens, which can be added up over microbatches and devices."""

import functools
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from stepdistill_jax.batches.packing import TASK_IDS
from stepdistill_jax.models.encoder_decoder import OutputLayer
from stepdistill_jax.models.products import precision_of
from stepdistill_jax.training.cross_entropy import cross_entropy

Group = Mapping[str, jax.Array]
Batch = Sequence[Group]
Columns = TypeVar("Columns", jax.Array, np.ndarray)


class ObjectiveSums(struct.PyTreeNode):
    """Totals of each objective, as arrays [columns] float32.

    The columns are the first task's objectives, then the second task's, and so on. An extra loss comes last.

    Attributes:
        loss: sum of weight x cross-entropy over target tokens, in nats.
        correct: sum of the weights of correctly predicted target tokens.
        count: sum of the weights of all target tokens.
    """

    loss: jax.Array
    correct: jax.Array
    count: jax.Array

    @classmethod
    def empty(cls, num_objectives: int) -> "ObjectiveSums":
        """Returns sums of 0."""
        zeros = jnp.zeros(num_objectives, jnp.float32)
        return cls(zeros, zeros, zeros)

    def merge(self, other: "ObjectiveSums") -> "ObjectiveSums":
        """Returns the totals of `self` plus the totals of `other`."""
        return jax.tree.map(jnp.add, self, other)

    def with_last(self, loss: jax.Array, count: jax.Array) -> "ObjectiveSums":
        """Returns the sums after adding an extra loss and its count to the last column."""
        loss, count = self.loss.at[-1].add(loss), self.count.at[-1].add(count)
        return self.replace(loss=loss, count=count)

    def over_tasks(self, num_objectives: int, num_tasks: int) -> "ObjectiveSums":
        """Adds up each objective's columns over all tasks. The column of an extra loss is kept as it is."""
        return jax.tree.map(lambda x: over_tasks(x, num_objectives, num_tasks), self)

    def weighted_loss(self, objective_weights: jax.Array) -> jax.Array:
        """Returns the weighted sum of the objectives' mean losses. An objective without tokens adds 0."""
        scale = loss_scale(self.count, objective_weights)
        return jnp.vdot(scale, self.loss, precision=precision_of(scale.dtype))


def means_of_tasks(
    sums: ObjectiveSums, tasks: Sequence[str], objectives: Sequence[str]
) -> dict[str, float]:
    """Returns `loss/TASK/OBJECTIVE`, in nats per token, for each task and objective with tokens."""
    columns = [f"loss/{task}/{objective}" for task in tasks for objective in objectives]
    return {
        name: float(loss / count)
        for name, loss, count in zip(columns, sums.loss, sums.count, strict=False)
        if count > 0
    }


def loss_scale(counts: jax.Array, objective_weights: jax.Array) -> jax.Array:
    """Returns each objective's weight / count, [objectives] float32; 0 for an objective whose count is 0."""
    # Inside `where` both sides are computed, so the divisor must not be 0. A count is a sum of loss weights
    # and may be below 1.
    return jnp.where(counts > 0, objective_weights / jnp.maximum(counts, 1e-9), 0.0)


def over_tasks(columns: Columns, num_objectives: int, num_tasks: int) -> Columns:
    """Adds up the tasks' columns: [num_tasks * num_objectives + more] -> [num_objectives + more].

    The `more` columns at the end are kept.
    """
    if num_tasks == 1:
        return columns
    # values on the host stay in NumPy, since a device operation would wait for the running step
    concatenate: Any = jnp.concatenate if isinstance(columns, jax.Array) else np.concatenate
    of_tasks, more = columns[: num_tasks * num_objectives], columns[num_tasks * num_objectives :]
    return concatenate([of_tasks.reshape(num_tasks, num_objectives).sum(0), more])


def for_tasks(values: jax.Array, num_objectives: int, num_tasks: int) -> jax.Array:
    """Repeats the objectives' values for each task: [num_objectives + more] -> [num_tasks * num_objectives + more].

    With an extra loss, `more` is 1: the loss's value comes last and is not repeated. Otherwise it is 0.
    """
    if num_tasks == 1:
        return values
    return jnp.concatenate([jnp.tile(values[:num_objectives], num_tasks), values[num_objectives:]])


def token_weights(group: Group, columns: int, num_objectives: int) -> jax.Array:
    """Returns the loss weights of the tokens, [batch, length, columns] float32.

    A token's weight is in the column of `ObjectiveSums` that counts the token; the other columns are 0.
    """
    # 2 objectives: objective 1 of task 3 is column 1 + 2 * (3 - 1) = 5, counted from 1; padding stays 0
    ids = group["decoder_objective_ids"]
    if TASK_IDS in group:
        ids = jnp.where(ids > 0, ids + num_objectives * (group[TASK_IDS] - 1), 0)
    of = (ids[..., None] == jnp.arange(1, columns + 1)[None, None, :]).astype(jnp.float32)
    return of * group["decoder_loss_weights"][..., None]


def objective_sums(
    states: jax.Array,
    output: OutputLayer,
    group: Group,
    scale: jax.Array,
    num_objectives: int | None = None,
) -> tuple[jax.Array, ObjectiveSums]:
    """Returns what a group of rows adds to the loss, and the group's totals.

    The loss is L = L_label + lambda L_rationale (Hsieh et al. 2023, arXiv:2305.02301, section 3.2). Each term is
    the mean cross-entropy over an objective's target tokens in the global batch.

    Example: with uniform logits over 4 ids, each token has a cross-entropy of ln 4. The total losses of 2 label
    tokens and 3 rationale tokens are 2 ln 4 and 3 ln 4, and both means are ln 4. With the objective weights
    (1, 0.5), the loss is 1.5 ln 4 = 2.0794.

    Args:
        states: the decoder's states, [batch, length, embed].
        group: `decoder_target_tokens`, `decoder_objective_ids` (index of the objective, from 1; 0 is padding)
            and `decoder_loss_weights`, all [batch, length].
        scale: `loss_scale` of the global batch, [columns] float32.
        num_objectives: number of objectives of each task; None means the number of columns.

    Returns:
        The sum of scale x loss over all columns, a scalar with a gradient.
        The group's totals, without a gradient.
    """
    weights = token_weights(group, len(scale), num_objectives or len(scale))
    targets = group["decoder_target_tokens"]
    product = functools.partial(jnp.einsum, precision=precision_of(weights.dtype))
    # each token's factor in the loss: its weight times the scale of its column
    of_tokens = product("blo,o->bl", weights, scale)
    loss, nll, correct = cross_entropy(  # type: ignore[misc]  # custom_vjp hides the type
        states, output.weights, targets, of_tokens, output.softcap, output.tied
    )
    sums = ObjectiveSums(
        loss=product("bl,blo->o", nll, weights),
        correct=product("bl,blo->o", correct, weights),
        count=weights.sum((0, 1)),
    )
    return loss, sums
