"""Rearranges the decoder's parameters for fast decoding on a GPU.

Splits stacked layers and joins projections of the same input once, instead of at each token.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from stepdistill_jax.models.config import ModelConfig


def unrolled(params: Mapping[str, Any], config: ModelConfig) -> dict[str, Any]:
    """Returns the parameters with `layers_0`, `layers_1`, ... instead of `layers` in the decoder.

    In two blocks, the kernels that read the same input are stacked:

    - `self_attention`: one kernel `query_key_value` [embed, 3, joined_kv]. If there are fewer key/value heads than
      query heads, `query` stays separate, and only `key_value` [embed, 2, features] is stacked.
    - `mlp`: one kernel `wi` [embed, 2, mlp], or [embed, 1, mlp] without a gate.

    Args:
        params: unboxed, with stacked layers. The kernels may be int8.
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
            # [names, features]. With a new axis, a sharded kernel need not be moved between devices.
            layer[block][name] = jax.tree.map(lambda *x: jnp.stack(x, axis=-2), *found)
        decoder[f"layers_{i}"] = layer
    return {**params, "decoder": decoder}
