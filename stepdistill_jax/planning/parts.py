"""Finds the part of the model that an operation belongs to, by the operation's name in JAX and Flax."""

import collections
import re

from stepdistill_jax.models.positions import ROPE
from stepdistill_jax.planning.costs import Cost, is_kernel
from stepdistill_jax.planning.hlo import Instruction, Module

ATTENTION_PRODUCTS = "attention: matmuls"
ATTENTION_ELEMENTWISE = "attention: elementwise"
ATTENTION_KERNEL = "attention: kernel"
PROJECTIONS = "attention: projections"
MLP = "MLP"
RANDOM_BITS = "dropout: random bits"
KEPT = "layers' loop: stored activations"
OUTPUT = "output layer and loss"
NORMS = "norms"
EMBEDDING = "embedding"
RESIDUAL = "layers: residuals, dropout, casts"
OPTIMIZER = "optimizer and the rest"

_PROJECTIONS = {"query", "key", "value", "query_key_value", "key_value", "out"}
# the loss is computed outside the Flax modules, so its operations have only the names of transformations
_OUTPUT = {"logits_dense", "_logits", "jvp()", "transpose(jvp())"}


def part_of(module: Module, instruction: Instruction, cost: Cost) -> str:
    """Returns the part of the model that an operation belongs to.

    If a fusion's name is too general to tell, the result is the part that computes most elements in the fusion.
    """
    names = [instruction.op_name]
    fused = [inner for c in module.called(instruction) for inner in module.nested(c)]
    if not cost.flops and cost.integer > cost.other:
        names_inside = [*names, *(inner.op_name for inner in fused)]
        if any("ropout" in name for name in names_inside):
            return RANDOM_BITS
    found = _by_name(instruction.op_name, bool(cost.flops))
    if found in (ATTENTION_PRODUCTS, ATTENTION_ELEMENTWISE) and is_kernel(instruction):
        return ATTENTION_KERNEL
    if found not in (RESIDUAL, OPTIMIZER) or not fused:
        return found
    # Each instruction votes for its part, weighted by the size of its result: a fusion of a norm's [32, 512, 1024]
    # and a scalar of a residual belongs to the norms.
    votes: collections.Counter[str] = collections.Counter()
    for inner in fused:
        if inner.op_name and inner.opcode not in ("parameter", "constant", "broadcast"):
            votes[_by_name(inner.op_name, False)] += inner.arrays[0].size if inner.arrays else 0
    return votes.most_common(1)[0][0] if votes else found


def _by_name(op_name: str, is_product: bool) -> str:
    """Returns the part for a name like `jit(train_step)/jvp(EncoderDecoder.states)/.../layers/mlp/wi_0/dot_general`."""
    # the order of the checks matters: `layers/attention/query` contains both `layers` and `attention`
    names = [piece for step in op_name.split("/") for piece in step.split(".")]
    steps, last = set(names), names[-1]
    if _OUTPUT & steps:
        return OUTPUT
    if any(name.endswith("attention") for name in names):
        if _PROJECTIONS & steps:
            return PROJECTIONS
        if is_product:
            return ATTENTION_PRODUCTS
        if _in_dropout(names) and last in ("lt", "ge", "gt", "xor", "concatenate", "or", "and"):
            return RANDOM_BITS
        return ATTENTION_ELEMENTWISE
    if {"relpos_bias", ROPE} & steps:
        return ATTENTION_ELEMENTWISE
    if any(name.endswith("norm") for name in names):
        return NORMS
    if "mlp" in steps:
        return MLP
    if re.search(r"dynamic_(update_)?(slice|index)", last) or _clears(names):
        return KEPT
    if {"_embed", "_embed_targets"} & steps:
        return EMBEDDING
    return RESIDUAL if {"encoder", "decoder", "layers"} & steps else OPTIMIZER


def _in_dropout(names: list[str]) -> bool:
    return any(name == "dropout" or name.startswith("Dropout") for name in names)


def _clears(names: list[str]) -> bool:
    """Returns whether an operation creates an array of zeros, which a scan over layers then overwrites."""
    return names[-1] == "broadcast_in_dim" and names[-2:-1] in (["encoder"], ["decoder"])
