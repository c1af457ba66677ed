"""Defines the training step as a pure function, and compiles it for a mesh."""

import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from stepdistill_jax.data.schedules import Schedule, Weight
from stepdistill_jax.models.cpu_speed import step_options
from stepdistill_jax.models.encoder_decoder import EncoderDecoder, output_layer
from stepdistill_jax.models.lora import base_of, combine, split
from stepdistill_jax.models.sharding import LOGICAL_AXIS_RULES, batch_sharding, replicated
from stepdistill_jax.training.extra_loss import ExtraLoss
from stepdistill_jax.training.loss import (
    Batch,
    ObjectiveSums,
    for_tasks,
    loss_scale,
    objective_sums,
    over_tasks,
    token_weights,
)
from stepdistill_jax.training.optimizer import weights_at
from stepdistill_jax.training.state import TrainState, hashable, shardings_of

Metrics = dict[str, jax.Array | ObjectiveSums]


def batch_sums(
    model: EncoderDecoder,
    params,
    batch: Batch,
    scale: jax.Array,
    extra_loss: ExtraLoss | None = None,
    num_objectives: int | None = None,
    **apply,
) -> tuple[jax.Array, ObjectiveSums]:
    """Returns the loss of a batch and the batch's totals, summed over its groups of rows (see `objective_sums`).

    If there is an extra loss, the last column of the totals belongs to it.
    """
    loss, sums = jnp.zeros(()), ObjectiveSums.empty(len(scale))
    for group in batch:
        states: Any = model.apply({"params": params}, group, method="states", **apply)
        output = output_layer(params, model.config)
        part, part_sums = objective_sums(states, output, group, scale, num_objectives)
        loss, sums = loss + part, sums.merge(part_sums)
        if extra_loss is not None:
            total = extra_loss.total(states, output, group).astype(jnp.float32)
            loss += scale[-1] * total
            sums = sums.with_last(total, extra_loss.count(group))
    return loss, sums


def batch_counts(
    batch: Batch, columns: int, extra_loss: ExtraLoss | None, num_objectives: int
) -> jax.Array:
    """Returns `ObjectiveSums.count` of a batch, [columns] float32, without running the model."""
    counts = [token_weights(group, columns, num_objectives).sum((0, 1)) for group in batch]
    total = jnp.sum(jnp.stack(counts), axis=0)
    if extra_loss is not None:
        total = total.at[-1].add(sum(extra_loss.count(group) for group in batch))
    return total


def slices_of(batch: Batch, num_microbatches: int) -> Batch:
    """Splits a batch into n = `num_microbatches` microbatches: arrays [rows, length] -> [n, rows / n, length].

    Microbatch i has the rows i, i + n, i + 2 n, ..., so that no row moves to another device.
    """

    # Rows 0 to 7 on two devices, 0-3 and 4-7, in two microbatches: 0 2 | 4 6 and 1 3 | 5 7. Each device keeps
    # its rows and has half of each microbatch.
    def cut(x: jax.Array) -> jax.Array:
        x = jnp.swapaxes(x.reshape(-1, num_microbatches, *x.shape[1:]), 0, 1)
        return nn.with_logical_constraint(x, (None, "batch", "length"))

    return jax.tree.map(cut, batch)


def train_step(
    state: TrainState,
    batch: Batch,
    *,
    model: EncoderDecoder,
    tx: optax.GradientTransformation,
    objective_weights: tuple[Weight, ...],
    num_microbatches: int = 1,
    extra_loss: ExtraLoss | None = None,
    num_tasks: int = 1,
) -> tuple[TrainState, Metrics]:
    """Computes the loss and the gradient of the global batch and makes one update.

    The result does not depend on microbatches, devices or packing. If there are adapters, no other parameters change.
    If the loss or the gradient is not finite, only the step number changes.

    Args:
        batch: groups of rows, see `batches.batch`.
        num_microbatches: number of microbatches in the batch. Each group's row count must be a multiple of it.
        num_tasks: number of `TaskData.parts`. An objective's loss is the mean over the tokens of all parts.

    Returns:
        The new state.
        The metrics: `sums` (an `ObjectiveSums`), `loss` (nats per token), `grad_norm` (before the clip) and,
        if any weight is a schedule, `weights` (of the objectives, then of the extra loss, at this step).
    """
    all_weights = (*objective_weights, *([extra_loss.weight] if extra_loss is not None else []))
    # 2 tasks with 2 objectives and an extra loss: 5 columns, 2 for task 1, 2 for task 2, 1 for the extra loss
    of = (len(objective_weights), num_tasks)
    columns = len(all_weights) + (num_tasks - 1) * of[0]
    weights = weights_at(all_weights, state.step)
    # weight / count over the GLOBAL batch: with it, sums over microbatches and devices need no division
    counts = over_tasks(batch_counts(batch, columns, extra_loss, of[0]), *of)
    scale = for_tasks(loss_scale(counts, weights), *of)
    dropout = model.config.dropout_rate > 0
    # a function of seed and step, so a resumed run draws the same dropout masks
    step_rng = jax.random.fold_in(state.rng, state.step)
    # with adapters, gradients are computed only for them, and the optimizer's state has only theirs
    trained, frozen = split(state.params)

    def slice_loss(trained, part: Batch, rng) -> tuple[jax.Array, ObjectiveSums]:
        apply = {"enable_dropout": True, "rngs": {"dropout": rng}} if dropout else {}
        params = combine(trained, frozen)
        return batch_sums(model, params, part, scale, extra_loss, of[0], **apply)

    value_and_grad = jax.value_and_grad(slice_loss, has_aux=True)
    if num_microbatches == 1:
        (_, sums), grads = value_and_grad(trained, batch, step_rng)
    else:
        # one microbatch's activations exist at a time; gradients are float32, as the parameters
        def add_slice(carry, part_and_index):
            part, index = part_and_index
            rng = jax.random.fold_in(step_rng, index)
            (_, sums), grads = value_and_grad(trained, part, rng)
            return jax.tree.map(jnp.add, carry, (sums, grads)), None

        zeros = (ObjectiveSums.empty(columns), jax.tree.map(jnp.zeros_like, trained))
        parts = (slices_of(batch, num_microbatches), jnp.arange(num_microbatches))
        (sums, grads), _ = jax.lax.scan(add_slice, zeros, parts)

    loss, grad_norm = sums.over_tasks(*of).weighted_loss(weights), optax.global_norm(grads)
    updates, opt_state = tx.update(grads, _scheduled_at(state.opt_state, state.step), trained)
    updated = (optax.apply_updates(trained, updates), opt_state)
    updated, opt_state = _if_finite(loss, grad_norm, updated, (trained, state.opt_state))
    metrics: Metrics = {"sums": sums, "loss": loss, "grad_norm": grad_norm}
    if any(isinstance(weight, Schedule) for weight in all_weights):
        metrics["weights"] = weights
    params = combine(updated, frozen)
    return state.replace(step=state.step + 1, params=params, opt_state=opt_state), metrics


def _if_finite(loss: jax.Array, grad_norm: jax.Array, updated: Any, before: Any) -> Any:
    """Returns `updated`, or `before` if the loss or the gradient is not finite.

    `optax.apply_if_finite` would add counters to checkpoints and read each gradient once more.
    """
    # a NaN or infinity in any gradient makes the global norm NaN or infinite
    finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm)
    return jax.tree.map(lambda new, old: jnp.where(finite, new, old), updated, before)


def _scheduled_at(opt_state: Any, step: jax.Array) -> Any:
    """Sets the step counters of schedules to `step`, so that skipped updates do not delay the learning rate.

    A state whose only field is `count` belongs to a schedule.
    """

    def of_schedule(x: Any) -> bool:
        return getattr(x, "_fields", None) == ("count",)

    def at_step(x: Any) -> Any:
        return x._replace(count=step.astype(x.count.dtype)) if of_schedule(x) else x

    return jax.tree.map(at_step, opt_state, is_leaf=of_schedule)


def eval_step(
    params, batch: Batch, *, model: EncoderDecoder, num_objectives: int, num_tasks: int = 1
) -> ObjectiveSums:
    """Returns the totals of a batch's losses and correct tokens, computed without dropout."""
    # the scale only affects the loss, which is not used here
    scale = jnp.zeros(num_objectives * num_tasks)
    return batch_sums(model, params, batch, scale, num_objectives=num_objectives)[1]


def in_mesh(function: Callable, mesh: Mesh) -> Callable:
    """Wraps `function` to run, and be traced, in the context of the mesh and the logical axis rules."""

    @functools.wraps(function)
    def inside(*args):
        with jax.set_mesh(mesh), nn.logical_axis_rules(LOGICAL_AXIS_RULES):
            return function(*args)

    return inside


def jit_train_step(abstract: TrainState, mesh: Mesh, **static) -> Callable:
    """Returns `train_step` with explicit shardings, compiled once for each batch shape.

    The compiled function reuses the memory of its argument `state` (donation). Calls of `jit_train_step` with equal
    arguments return the same function.
    """
    return _jit_train_step(*hashable(abstract), mesh, tuple(static.items()))


@functools.lru_cache(maxsize=4)
def _jit_train_step(leaves: tuple, tree: Any, mesh: Mesh, static: tuple) -> Callable:
    shardings = shardings_of(jax.tree.unflatten(tree, leaves))
    step = jax.jit(
        functools.partial(train_step, **dict(static)),
        in_shardings=(shardings, batch_sharding(mesh)),
        out_shardings=(shardings, replicated(mesh)),
        donate_argnums=0,
        compiler_options=step_options(mesh),
    )
    return in_mesh(step, mesh)


def jit_eval_step(abstract: TrainState, mesh: Mesh, **static) -> Callable:
    """Returns `eval_step`, compiled once for each batch shape.

    The compiled function takes plain parameters; merge any adapters into them first. Calls of `jit_eval_step` with
    equal arguments return the same function.
    """
    return _jit_eval_step(*hashable(base_of(abstract.params)), mesh, tuple(static.items()))


@functools.lru_cache(maxsize=4)
def _jit_eval_step(leaves: tuple, tree: Any, mesh: Mesh, static: tuple) -> Callable:
    step = jax.jit(
        functools.partial(eval_step, **dict(static)),
        in_shardings=(shardings_of(jax.tree.unflatten(tree, leaves)), batch_sharding(mesh)),
        out_shardings=replicated(mesh),
    )
    return in_mesh(step, mesh)
