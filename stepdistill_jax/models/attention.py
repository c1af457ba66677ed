"""Attention over segments, with plain operations or a kernel.

`attention` makes the mask from segments, and all rows share one relative bias. So no array
[batch, heads, q, k] is passed from layer to layer.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from stepdistill_jax.models.config import ATTENTIONS
from stepdistill_jax.models.cpu_speed import sum_over_rows
from stepdistill_jax.models.dropout import dropout
from stepdistill_jax.models.fused_attention import FEWEST_QUERIES, fused_attention
from stepdistill_jax.models.products import precision_of

NEG_INF = -1e9  # finite, since the softmax of a row of -inf is NaN
ATTENTION_OUTPUT = "attention_output"  # name of attention's output in `jax.checkpoint` policies


def attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    relative_bias: jax.Array | None = None,
    query_segments: jax.Array,
    key_segments: jax.Array,
    causal: bool,
    dropout_rate: float = 0.0,
    dropout_rng: jax.Array | None = None,
    dropout_broadcast: bool = False,
    softcap: float | None = None,
    window: jax.Array | int | None = None,
    scale: float = 1.0,
    implementation: str = "auto",
) -> jax.Array:
    """Returns the mean of the values that each query sees, weighted by the softmax of its scores.

    A query sees the keys of its own segment. Its score for a key is scale * (query . key), capped by `softcap`,
    plus the bias. The result of a query that sees no key is finite and meaningless.

    Args:
        q: [batch, q, heads, d].
        k: [batch, k, kv_heads, d]. Query head i reads key head i // (heads / kv_heads).
        v: in the shape of `k`.
        relative_bias: [1, heads, q, k] float32.
        query_segments: [batch or 1, q or 1] int32.
        key_segments: [batch or 1, k] int32. No query sees segment 0, which is padding.
        causal: whether a query sees only its own and earlier positions.
        dropout_rate: 0 <= rate < 1.
        dropout_rng: None turns dropout off.
        dropout_broadcast: whether all queries that read the same key head share one mask.
        softcap: a score s becomes softcap * tanh(s / softcap); None leaves scores unchanged.
        window: a query sees only keys less than this many positions away; None means no limit.
        implementation: "xla" or "auto" (plain operations), or "pallas" (one kernel, if it supports the options and
            there are enough queries; otherwise plain operations).

    Returns:
        The means, [batch, q, heads, d], in the dtype of `v`.
    """
    # before training, `training.attention_choice` replaces "auto"
    if implementation not in ATTENTIONS:
        raise ValueError(f"implementation must be one of {ATTENTIONS}, not {implementation!r}")
    if dropout_broadcast and dropout_rng is not None:
        # if dropout drops the same keys for all queries, it can set values to 0 instead of weights
        v, dropout_rng = _dropped_values(v, dropout_rate, dropout_rng), None
    plain = softcap is None and window is None and scale == 1.0 and q.shape[2] == k.shape[2]
    # The length is compared last: in an exported program it is a symbol, whose comparison may fail.
    if implementation == "pallas" and plain and q.shape[1] >= FEWEST_QUERIES:
        return fused_attention(
            q,
            k,
            v,
            relative_bias=relative_bias,
            query_segments=query_segments,
            key_segments=key_segments,
            causal=causal,
            dropout_rate=dropout_rate,
            dropout_rng=dropout_rng,
        )
    scores = shaped_scores(_scores(q, k), scale, softcap)
    if relative_bias is not None:
        scores = _plus_bias(scores, relative_bias)
    mask = seen(query_segments, key_segments)
    if causal or window is not None:
        mask &= _near(q.shape[1], k.shape[1], causal, window)
    # weights are float32 up to here; in bfloat16, the matmul with the values reads half of the bytes
    weights = masked_softmax(scores, mask).astype(v.dtype)
    weights = dropout(weights, dropout_rate, dropout_rng, broadcast=False)
    # the output of a kernel has the same name, to which `stacks.scan_layers` refers
    return checkpoint_name(_mixed(weights, v), ATTENTION_OUTPUT)


def shaped_scores(scores: jax.Array, scale: float, softcap: float | None) -> jax.Array:
    """Scales and caps scores in float32, or returns them unchanged if neither is needed."""
    if scale == 1.0 and softcap is None:
        return scores
    return softcapped(scores.astype(jnp.float32) * scale, softcap)


def softcapped(x: jax.Array, softcap: float | None) -> jax.Array:
    """Returns softcap * tanh(x / softcap), or x if `softcap` is None.

    See Gemma Team 2024 (arXiv:2408.00118, section 2).
    """
    return x if softcap is None else softcap * jnp.tanh(x / softcap)


def _dropped_values(v: jax.Array, rate: float, rng: jax.Array) -> jax.Array:
    """Applies dropout to values [batch, k, heads, d].

    This equals dropout of the attention weights with one mask for all queries. The mask has no query axis, so it
    is much smaller than the weights.
    """
    batch, keys, heads, _ = v.shape
    # the mask of `dropout` for weights [batch, heads, q, k] that all q share: [batch, heads, 1, k]
    kept = dropout(jnp.ones((batch, heads, 1, keys)), rate, rng, broadcast=True)
    return (v * kept.transpose(0, 3, 1, 2)).astype(v.dtype)


@jax.custom_vjp
def _plus_bias(scores: jax.Array, bias: jax.Array) -> jax.Array:
    """Adds a bias [1, heads, q, k] to scores [batch, heads, q, k]."""
    return scores + bias


# JAX's own gradient is the same sum, but slow on a CPU
_plus_bias.defvjp(
    lambda scores, bias: (scores + bias, None),
    lambda _, gradient: (gradient, sum_over_rows(gradient)),
)


def masked_softmax(scores: jax.Array, mask: jax.Array) -> jax.Array:
    """Returns the softmax over the keys where `mask` is true: [batch, heads, q, k] float32.

    Args:
        scores: [batch, heads, q, k].
        mask: [batch or 1, 1, q or 1, k] bool.
    """
    # A sum, since with `jnp.where` JAX would compute arrays as large as the scores, before the loop over layers.
    hidden = (~mask).astype(jnp.float32) * NEG_INF
    return nn.softmax(scores.astype(jnp.float32) + hidden, axis=-1)


def seen(query_segments: jax.Array, key_segments: jax.Array) -> jax.Array:
    """Returns True where a key is in the query's segment and is not padding: [batch, 1, q, k] bool.

    The segments are [batch, q] and [batch, k].
    """
    # query segments 1 2 0 and key segments 1 1 0: the first query sees 1 1 0, the others 0 0 0
    same = query_segments[:, :, None] == key_segments[:, None, :]
    return (same & (key_segments > 0)[:, None, :])[:, None]


def _near(queries: int, keys: int, causal: bool, window: jax.Array | int | None) -> jax.Array:
    """Returns the part of the mask that depends only on positions, [1, 1, q, k] bool."""
    # ahead[i, j] = j - i, so for query 2 and four keys it is -2 -1 0 1. If causal with a window of 2, query 2 sees
    # the keys 1 and 2.
    ahead = jnp.arange(keys)[None, :] - jnp.arange(queries)[:, None]
    mask = ahead <= 0 if causal else jnp.full(ahead.shape, True)
    if window is not None:
        mask &= jnp.abs(ahead) < window
    return mask[None, None]


def _scores(q: jax.Array, k: jax.Array) -> jax.Array:
    """Computes the scores (query . key) in the dtype of q and returns them as float32, [batch, heads, q, k]."""
    precision = precision_of(q.dtype)
    batch, queries, heads, width = q.shape
    keys, kv_heads = k.shape[1:3]
    if heads == kv_heads:
        scores = jnp.einsum("bqhd,bkhd->bhqk", q, k, precision=precision)
    else:  # the g heads of a group share keys, so keys are not copied g times
        q = q.reshape(batch, queries, kv_heads, heads // kv_heads, width)
        scores = jnp.einsum("bqhgd,bkhd->bhgqk", q, k, precision=precision)
        scores = scores.reshape(batch, heads, queries, keys)
    return scores.astype(jnp.float32)


def _mixed(weights: jax.Array, v: jax.Array) -> jax.Array:
    """Returns sums over k of values [batch, k, kv_heads, d], with weights [batch, heads, q, k]."""
    precision = precision_of(v.dtype)
    batch, heads, queries, keys = weights.shape
    kv_heads, width = v.shape[2:]
    if heads == kv_heads:
        return jnp.einsum("bhqk,bkhd->bqhd", weights, v, precision=precision)
    weights = weights.reshape(batch, kv_heads, heads // kv_heads, queries, keys)
    mixed = jnp.einsum("bhgqk,bkhd->bqhgd", weights, v, precision=precision)
    return mixed.reshape(batch, queries, heads, width)
