"""Rearranges the decoder's parameters into the form that a GPU reads fastest at each token.

A loop over stacked layers would, at each token, copy each layer's matrices out of the stack and concatenate
the projections of one input. Here each layer has its own tree, and the projections of one input are one
matrix.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from stepdistill_jax.models.config import ModelConfig


def unrolled(params: Mapping[str, Any], config: ModelConfig) -> dict[str, Any]:
    """Returns the parameters with `layers_0`, `layers_1`, ... instead of `layers` in the decoder.

    In each layer, `self_attention` has one matrix `query_key_value` [embed, 3, joined_kv] instead of three.
    With fewer key/value heads it has `query` and `key_value` [embed, 2, joined]. `mlp` has one matrix `wi`
    [embed, 2, mlp] instead of two; with a single projection it is [embed, 1, mlp]. The features keep a
    separate axis, so kernels that are cut over devices need not be moved.

    Args:
        params: unboxed parameters of a model of `config`, int8 or not, layers stacked.
        config: of the model.
    """
    decoder = dict(params["decoder"])
    layers = decoder.pop("layers")
    gated = ["wi"] if len(config.mlp_activations) == 1 else ["wi_0", "wi_1"]
    grouped = config.decoder.num_kv_heads < config.decoder.num_heads
    attention = ["key", "value"] if grouped else ["query", "key", "value"]
    for i in range(config.decoder.num_layers):
        layer = jax.tree.map(lambda x, i=i: x[i], layers)
        for block, names, name in (
            ("self_attention", attention, "_".join(attention)),
            ("mlp", gated, "wi"),
        ):
            found = [layer[block].pop(one) for one in names]
            # axis -2 joins kernels [embed, features] to [embed, names, features], int8 scales [features] to
            # [names, features]
            layer[block][name] = jax.tree.map(lambda *x: jnp.stack(x, axis=-2), *found)
        decoder[f"layers_{i}"] = layer
    return {**params, "decoder": decoder}
