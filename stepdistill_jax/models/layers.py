"""The parts of a layer, as Flax Linen modules.

Logical axes are named as in T5X: batch, length, embed, heads, kv, joined_kv, mlp, vocab, layers.
"""

import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from stepdistill_jax.models.attention import attention, masked_softmax, seen, shaped_scores
from stepdistill_jax.models.config import ModelConfig, Side
from stepdistill_jax.models.dropout import Dropout
from stepdistill_jax.models.lora import LoraDense
from stepdistill_jax.models.products import kernel_product, precision_of
from stepdistill_jax.models.quantized import KERNEL, SCALE, QuantizedDense, int8_product, kernel_of

Segments = tuple[jax.Array, jax.Array]  # segments of queries and of keys, see `attention.attention`


class RMSNorm(nn.Module):
    """Layer norm without mean and bias, computed in float32."""

    config: ModelConfig

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Normalises x [batch, length, embed] and returns it in the config's dtype."""
        # the effective scale starts at 1: a stored 1, or a stored 0 with Gemma's offset of 1
        offset = self.config.norm_offset
        init = nn.with_logical_partitioning(nn.initializers.constant(1 - offset), ("embed",))
        scale: Any = self.param("scale", init, (x.shape[-1],))
        y = x.astype(jnp.float32)  # bfloat16 would lose digits of the mean of squares
        y = y * jax.lax.rsqrt(
            jnp.mean(y * y, axis=-1, keepdims=True) + self.config.layer_norm_epsilon
        )
        scale = scale + offset if offset else scale
        return (y * scale[None, None, :]).astype(self.config.dtype)


def dense(
    config: ModelConfig,
    features: int,
    axes: tuple[str, str],
    stddev: float,
    name: str | None = None,
    projection: str | None = None,
    float32_sums: bool = False,
) -> nn.Dense | LoraDense | QuantizedDense:
    """Returns a dense layer without bias: plain, with a LoRA adapter, or int8, depending on the config.

    Args:
        axes: logical axes of the kernel.
        stddev: of the initial kernel.
        projection: field of `LoraConfig` with the adapter's rank; None means no adapter.
        float32_sums: whether the output is float32 even in bfloat16 arithmetic.
    """
    # kernels are 2-D, since `nn.DenseGeneral` with axis names raises an error inside a mesh
    if config.lora and projection and (rank := getattr(config.lora, projection)):
        scale = config.lora.alpha / rank
        return LoraDense(features, axes, stddev, rank, scale, config.dtype, name=name)
    if config.quantized:
        return QuantizedDense(features, axes, config.dtype, float32_sums, name=name)
    init = nn.with_logical_partitioning(nn.initializers.normal(stddev), axes)
    return nn.Dense(
        features,
        use_bias=False,
        dtype=config.dtype,
        kernel_init=init,
        # `kernel_product` casts the kernel, so the parameter and its gradient are float32
        promote_dtype=lambda x, kernel, bias, *, dtype: (x.astype(dtype), kernel, bias),  # type: ignore[arg-type]  # Flax passes only these
        dot_general=lambda x, kernel, *_, **__: kernel_product(x, kernel, float32_sums),
        name=name,
    )


class Merged(nn.Module):
    """Several projections of the same input, computed as one matmul.

    `models.unrolled` makes the kernel. This module is only for decoding, since `kernel_product` has no gradient for
    a 3-D kernel.
    """

    config: ModelConfig

    @nn.compact
    def __call__(self, x: jax.Array) -> list[jax.Array]:
        """Projects x [..., inputs] and returns an array [..., features] for each projection."""
        params: Any = self.variables["params"]  # kernel [inputs, projections, features]
        if self.config.quantized:
            sums = int8_product(x, params[KERNEL], params[SCALE], self.config.dtype)
            y: Any = sums.astype(self.config.dtype)
        else:
            y = kernel_product(x, params[KERNEL])
        # [..., projections, features] -> an array for each projection
        return [y[..., i, :] for i in range(y.shape[-2])]


class Attention(nn.Module):
    """Multi-head attention.

    Attributes:
        side: sizes of the stack that the queries belong to.
        inputs: width of the states from which keys and values are computed.
    """

    config: ModelConfig
    side: Side
    inputs: int

    def setup(self):
        c, s = self.config, self.side
        joined, axes = s.joined_kv, ("embed", "joined_kv")
        keys = s.num_kv_heads * s.head_dim
        # T5 does not divide scores by sqrt(head_dim); its initial query kernel contains that factor
        of_query, of_keys, of_out = (
            s.init_stddev or width**-0.5 for width in (s.emb_dim * s.head_dim, self.inputs, joined)
        )
        self.query = dense(c, joined, axes, of_query, projection="query")
        self.key = dense(c, keys, axes, of_keys, projection="key")
        self.value = dense(c, keys, axes, of_keys, projection="value")
        self.out = dense(c, s.emb_dim, ("joined_kv", "embed"), of_out, projection="out")
        self.query_key_value = Merged(c)
        self.key_value = Merged(c)

    def _split(self, x: jax.Array) -> jax.Array:
        # [batch, length, joined_kv] -> [batch, length, heads, kv]
        x = x.reshape(*x.shape[:2], -1, self.side.head_dim)
        return nn.with_logical_constraint(x, ("batch", "length", "heads", "kv"))

    def queries(self, x: jax.Array) -> jax.Array:
        """Projects x [batch, length, embed] to queries [batch, length, heads, kv]."""
        return self._split(self.query(x))

    def queries_keys_values(self, x: jax.Array) -> list[jax.Array]:
        """Projects x to queries, keys and values, with the merged kernels that `models.unrolled` makes."""
        if self.side.num_kv_heads == self.side.num_heads:
            return [self._split(y) for y in self.query_key_value(x)]
        return [self._split(y) for y in (self.query(x), *self.key_value(x))]

    def keys_values(self, y: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Projects y [batch, length, inputs] to keys and to values, each [batch, length, kv_heads, kv]."""
        return self._split(self.key(y)), self._split(self.value(y))

    def __call__(
        self,
        queries: jax.Array,
        keys: jax.Array,
        values: jax.Array,
        segments: Segments,
        relative_bias: jax.Array | None = None,
        *,
        causal: bool = False,
        window: jax.Array | None = None,
        deterministic: bool,
    ) -> jax.Array:
        """Applies attention and the output projection, and returns [batch, q, embed].

        Args:
            queries: [batch, q, heads, kv].
            keys, values: [batch, k, kv_heads, kv].
            relative_bias, causal, window: as for `attention.attention`.
        """
        c, s = self.config, self.side
        off = deterministic or not c.dropout_rate
        mixed = attention(
            queries,
            keys,
            values,
            relative_bias=relative_bias,
            query_segments=segments[0],
            key_segments=segments[1],
            causal=causal,
            dropout_rate=c.dropout_rate,
            dropout_rng=None if off else self.make_rng("dropout"),
            dropout_broadcast=c.dropout_broadcast,
            softcap=s.score_softcap,
            window=window,
            scale=s.score_scale,
            implementation=c.attention,
        )
        return self.out(mixed.reshape(*mixed.shape[:2], -1))

    def _weights(self, scores, segments: Segments, relative_bias=None) -> jax.Array:
        """Turns scores [batch, heads, q, k] into softmax weights in the config's dtype."""
        scores = shaped_scores(scores, self.side.score_scale, self.side.score_softcap)
        if relative_bias is not None:
            scores = scores.astype(jnp.float32) + relative_bias
        return masked_softmax(scores, seen(*segments)).astype(self.config.dtype)

    def over_cache(
        self, queries, keys, values, segments: Segments, relative_bias=None
    ) -> jax.Array:
        """Returns the same as `__call__`, for keys and values in the layout of a cache.

        Args:
            queries: [batch, q, heads, kv].
            keys: [batch, kv_heads, kv, k].
            values: [batch, kv_heads, k, kv].
            segments, relative_bias: as for `__call__`.
        """
        product = functools.partial(jnp.einsum, precision=precision_of(self.config.dtype))
        # `count` queries in each row: one token or, in attention to the encoder, the beams of an input
        batch, count, heads, width = queries.shape
        if self.side.num_kv_heads == heads:
            scores = product("bqhd,bhdk->bhqk", queries, keys)
            weights = self._weights(scores, segments, relative_bias)
            mixed = product("bhqk,bhkd->bqhd", weights, values)
        else:  # the g heads of a group share keys and values, so these are not copied g times
            grouped = queries.reshape(batch, count, self.side.num_kv_heads, -1, width)
            scores = product("bqhgd,bhdk->bhgqk", grouped, keys)
            scores = scores.reshape(batch, heads, count, -1)
            weights = self._weights(scores, segments, relative_bias)
            weights = weights.reshape(batch, self.side.num_kv_heads, -1, *weights.shape[2:])
            mixed = product("bhgqk,bhkd->bqhgd", weights, values)
        return self.out(mixed.reshape(batch, count, -1))

    def over_states(self, x, encoded, transposed, segments: Segments) -> jax.Array:
        """Returns attention to the encoder's states, without computing their keys and values.

        If every query head has its own key and value head, this saves work while the number of queries per input
        is below about the head dimension.

        Args:
            x: the decoder's states, [batch, q, embed].
            encoded: the encoder's states, [batch, k, inputs], where `inputs` is their width.
            transposed: the same states, [batch, inputs, k].
        """
        # For a state e, a query q, and the kernels K and V of keys and values, up to rounding: a score q . (K e)
        # equals (K^T q) . e, and a weighted mean of V e equals V times the weighted mean of e.
        c = self.config
        product = functools.partial(jnp.einsum, precision=precision_of(c.dtype))

        def kernel(projection: nn.Module) -> jax.Array:  # [inputs, heads, kv]
            params: Any = projection.variables["params"]
            found = kernel_of(params, c.dtype).reshape(self.inputs, -1, self.side.head_dim)
            groups = self.side.num_heads // self.side.num_kv_heads
            # query head i reads kv head i // groups: 4 heads and 2 kv heads -> kernels 0 0 1 1
            return jnp.repeat(found, groups, axis=1) if groups > 1 else found

        # K^T q: the queries, projected to the width of the states, [batch, heads, q, inputs]
        queries = product("bqhd,ehd->bhqe", self._split(self.query(x)), kernel(self.key))
        scores = product("bhqe,bek->bhqk", queries, transposed)
        weights = self._weights(scores, segments)
        means = product("bhqk,bke->bhqe", weights, encoded)
        # V is applied once per query and head, after the mean over all keys
        mixed = product("bhqe,ehd->bqhd", means, kernel(self.value))
        return self.out(mixed.reshape(*x.shape[:2], -1))


_ACTIVATION_FNS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "relu": nn.relu,
    "gelu": functools.partial(nn.gelu, approximate=True),
    "silu": nn.silu,
    "linear": lambda x: x,
}


class Mlp(nn.Module):
    """Feed-forward block: relu(x wi) wo or, if gated, (gelu(x wi_0) * (x wi_1)) wo.

    If `merged`, one matmul computes all projections of x. The parameters then come from `models.unrolled`.
    """

    config: ModelConfig
    side: Side
    merged: bool = False

    @nn.compact
    def __call__(self, x: jax.Array, *, deterministic: bool) -> jax.Array:
        """Applies the block to x [batch, length, embed] and returns the same shape."""
        c, s = self.config, self.side
        names = ["wi"] if len(c.mlp_activations) == 1 else ["wi_0", "wi_1"]
        if self.merged:
            projected = Merged(c, name="wi")(x)
        else:
            size = s.mlp_dim, ("embed", "mlp"), s.init_stddev or s.emb_dim**-0.5
            projected = [dense(c, *size, name, "wi")(x) for name in names]
        # with a gate (Shazeer 2020, arXiv:2002.05202): gelu(x wi_0) * (x wi_1); without: relu(x wi)
        h = jnp.ones((), c.dtype)
        for y, activation in zip(projected, c.mlp_activations, strict=True):
            h = h * _ACTIVATION_FNS[activation](y)
        # between the two projections, as in T5X
        h = Dropout(c.dropout_rate, c.dropout_broadcast)(h, deterministic=deterministic)
        stddev = s.init_stddev or s.mlp_dim**-0.5
        wo = dense(c, s.emb_dim, ("mlp", "embed"), stddev, "wo", "wo")
        return wo(nn.with_logical_constraint(h, ("batch", "length", "mlp")))
