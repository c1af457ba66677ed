"""The parts of a T5 layer in Linen, with logical axis names.

Axis names are T5X's: batch, length, embed, heads, kv, joined_kv, mlp, vocab, layers.
"""

import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from stepdistill_jax.models.attention import attention, masked_softmax, seen
from stepdistill_jax.models.config import T5Config
from stepdistill_jax.models.dropout import Dropout
from stepdistill_jax.models.lora import LoraDense
from stepdistill_jax.models.products import kernel_product, precision_of
from stepdistill_jax.models.quantized import KERNEL, SCALE, QuantizedDense, int8_product, kernel_of

Segments = tuple[jax.Array, jax.Array]  # of queries and keys, as `attention` takes them


class RMSNorm(nn.Module):
    """T5's layer norm: no mean, no bias; computed in float32."""

    config: T5Config

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """x [batch, length, embed] -> the same shape in the config's dtype."""
        init = nn.with_logical_partitioning(nn.initializers.ones, ("embed",))
        scale: Any = self.param("scale", init, (x.shape[-1],))
        y = x.astype(jnp.float32)  # the mean of squares loses digits in bfloat16
        y = y * jax.lax.rsqrt(
            jnp.mean(y * y, axis=-1, keepdims=True) + self.config.layer_norm_epsilon
        )
        return (y * scale[None, None, :]).astype(self.config.dtype)


def dense(
    config: T5Config,
    features: int,
    axes: tuple[str, str],
    stddev: float,
    name: str | None = None,
    projection: str | None = None,
    float32_sums: bool = False,
) -> nn.Dense | LoraDense | QuantizedDense:
    """A matrix without bias; 2-D, since `nn.DenseGeneral` with names raises inside a mesh.

    It has an adapter where `config.lora` has a rank for `projection`. With `float32_sums` the output
    is float32, whatever the factors are: else two logits may round to one number.
    """
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
        # the kernel stays float32, and so does its gradient
        promote_dtype=lambda x, kernel, bias, *, dtype: (x.astype(dtype), kernel, bias),
        dot_general=lambda x, kernel, *_, **__: kernel_product(x, kernel, float32_sums),
        name=name,
    )


class Merged(nn.Module):
    """Projections of one input as one product; their kernel comes from `models.unrolled`.

    For decoding: `kernel_product` has no gradient by such a kernel.
    """

    config: T5Config

    @nn.compact
    def __call__(self, x: jax.Array) -> list[jax.Array]:
        """x [..., inputs] -> [..., features] of each projection."""
        params: Any = self.variables["params"]  # kernel [inputs, projections, features]
        if self.config.quantized:
            sums = int8_product(x, params[KERNEL], params[SCALE], self.config.dtype)
            y: Any = sums.astype(self.config.dtype)
        else:
            y = kernel_product(x, params[KERNEL])
        return [y[..., i, :] for i in range(y.shape[-2])]


class Attention(nn.Module):
    """Multi-head attention; keys and values are computed apart, so that a decoder can keep them."""

    config: T5Config

    def setup(self):
        c = self.config
        joined = c.num_heads * c.head_dim
        # T5 does not divide the scores by sqrt(head_dim): it is folded into the initial query kernel
        stddev, axes = (c.emb_dim * c.head_dim) ** -0.5, ("embed", "joined_kv")
        self.query = dense(c, joined, axes, stddev, projection="query")
        self.key = dense(c, joined, axes, c.emb_dim**-0.5, projection="key")
        self.value = dense(c, joined, axes, c.emb_dim**-0.5, projection="value")
        self.out = dense(c, c.emb_dim, ("joined_kv", "embed"), joined**-0.5, projection="out")
        self.query_key_value = Merged(c)

    def _split(self, x: jax.Array) -> jax.Array:
        # [batch, length, joined_kv] -> [batch, length, heads, kv]
        x = x.reshape(*x.shape[:2], self.config.num_heads, self.config.head_dim)
        return nn.with_logical_constraint(x, ("batch", "length", "heads", "kv"))

    def queries(self, x: jax.Array) -> jax.Array:
        """x [batch, length, embed] -> [batch, length, heads, kv]."""
        return self._split(self.query(x))

    def queries_keys_values(self, x: jax.Array) -> list[jax.Array]:
        """`queries` and `keys_values` of x by one product, of the parameters of `models.unrolled`."""
        return [self._split(y) for y in self.query_key_value(x)]

    def keys_values(self, y: jax.Array) -> tuple[jax.Array, jax.Array]:
        """y [batch, length, embed] -> keys and values, each [batch, length, heads, kv]."""
        return self._split(self.key(y)), self._split(self.value(y))

    def __call__(
        self,
        x: jax.Array,
        keys: jax.Array,
        values: jax.Array,
        segments: Segments,
        relative_bias: jax.Array | None = None,
        *,
        causal: bool = False,
        deterministic: bool,
    ) -> jax.Array:
        """x [batch, q, embed], keys and values [batch, k, heads, kv] -> [batch, q, embed]; see `attention`."""
        c = self.config
        off = deterministic or not c.dropout_rate
        mixed = attention(
            self.queries(x),
            keys,
            values,
            relative_bias=relative_bias,
            query_segments=segments[0],
            key_segments=segments[1],
            causal=causal,
            dropout_rate=c.dropout_rate,
            dropout_rng=None if off else self.make_rng("dropout"),
            dropout_broadcast=c.dropout_broadcast,
            implementation=c.attention,
        )
        return self.out(mixed.reshape(*x.shape[:2], -1))

    def over_cache(
        self, queries, keys, values, segments: Segments, relative_bias=None
    ) -> jax.Array:
        """`__call__` with what a cache keeps, and keeps as these products read it.

        Args:
            queries: [batch, q, heads, kv].
            keys: [batch, heads, kv, k].
            values: [batch, heads, k, kv].
            segments, relative_bias: as for `__call__`.
        """
        c = self.config
        product = functools.partial(jnp.einsum, precision=precision_of(c.dtype))
        scores = product("bqhd,bhdk->bhqk", queries, keys)
        if relative_bias is not None:
            scores = scores.astype(jnp.float32) + relative_bias
        weights = masked_softmax(scores, seen(*segments)).astype(c.dtype)
        mixed = product("bhqk,bhkd->bqhd", weights, values)
        return self.out(mixed.reshape(*queries.shape[:2], -1))

    def over_states(self, x, encoded, transposed, segments: Segments) -> jax.Array:
        """`__call__` with the keys and values of `encoded` [batch, k, embed], which are never made.

        A score q . (K e) is (K^T q) . e, and the mean of V e is V of the mean of e: equal but for
        rounding. A query costs embed / kv times as much, so `kv` queries of one input cost what its
        keys and values would have; below that this is less work, and it keeps no copy per layer.
        `transposed` is the same [batch, embed, k]: turned round once, not at each call.
        """
        c = self.config
        product = functools.partial(jnp.einsum, precision=precision_of(c.dtype))

        def kernel(projection: nn.Module) -> jax.Array:  # [embed, heads, kv]
            params: Any = projection.variables["params"]
            return kernel_of(params, c.dtype).reshape(-1, c.num_heads, c.head_dim)

        queries = product("bqhd,ehd->bhqe", self._split(self.query(x)), kernel(self.key))
        scores = product("bhqe,bek->bhqk", queries, transposed)
        weights = masked_softmax(scores, seen(*segments)).astype(c.dtype)
        means = product("bhqk,bke->bhqe", weights, encoded)
        mixed = product("bhqe,ehd->bqhd", means, kernel(self.value))
        return self.out(mixed.reshape(*x.shape[:2], -1))


_ACTIVATION_FNS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "relu": nn.relu,
    "gelu": functools.partial(nn.gelu, approximate=True),
    "linear": lambda x: x,
}


class Mlp(nn.Module):
    """Feed-forward block: the product of one projection per activation, then one back.

    `("relu",)` has one projection, `wi`; `("gelu", "linear")`, the gated one, `wi_0` and `wi_1`. With
    `merged` these are one product, of the parameters of `models.unrolled`.
    """

    config: T5Config
    merged: bool = False

    @nn.compact
    def __call__(self, x: jax.Array, *, deterministic: bool) -> jax.Array:
        """x [batch, length, embed] -> the same shape."""
        c = self.config
        names = ["wi"] if len(c.mlp_activations) == 1 else ["wi_0", "wi_1"]
        if self.merged:
            projected = Merged(c, name="wi")(x)
        else:
            size = c.mlp_dim, ("embed", "mlp"), c.emb_dim**-0.5
            projected = [dense(c, *size, name, "wi")(x) for name in names]
        h = jnp.ones((), c.dtype)
        for y, activation in zip(projected, c.mlp_activations, strict=True):
            h = h * _ACTIVATION_FNS[activation](y)
        h = Dropout(c.dropout_rate, c.dropout_broadcast)(h, deterministic=deterministic)
        wo = dense(c, c.emb_dim, ("mlp", "embed"), c.mlp_dim**-0.5, "wo", "wo")
        return wo(nn.with_logical_constraint(h, ("batch", "length", "mlp")))


def relative_buckets(
    query: jax.Array, key: jax.Array, *, bidirectional: bool, num_buckets: int, max_distance: int
) -> jax.Array:
    """Bucket of each (query, key) pair of positions: [q], [k] -> [q, k] int32.

    Half the buckets are exact distances, the rest grow by the logarithm up to `max_distance`
    (Raffel et al. 2020, arXiv:1910.10683, section 2.1). Packed segments are contiguous in both
    inputs and targets, so plain indices give the same differences as positions in a segment.
    """
    relative, offset = key[None, :] - query[:, None], 0
    if bidirectional:
        num_buckets //= 2
        offset = (relative > 0) * num_buckets
        relative = jnp.abs(relative)
    else:
        relative = jnp.maximum(-relative, 0)
    exact = num_buckets // 2
    ratio = jnp.log(jnp.maximum(relative, 1) / exact) / np.log(max_distance / exact)
    large = jnp.minimum(exact + (ratio * (num_buckets - exact)).astype(jnp.int32), num_buckets - 1)
    return offset + jnp.where(relative < exact, relative, large)


@jax.custom_vjp
def _of_buckets(table: jax.Array, buckets: jax.Array) -> jax.Array:
    """table [heads, buckets], buckets [q, k] -> [heads, q, k]; the gradient is a product.

    A lookup's own gradient is a scatter, which accelerators do slowly; T5X multiplies with one-hot
    buckets both ways. At HIGHEST precision the sums are those of float32.
    """
    return jnp.take(table, buckets, axis=1)


def _to_table(kept: tuple[jax.Array, jax.Array], slope: jax.Array) -> tuple[jax.Array, None]:
    table, buckets = kept
    hot = jax.nn.one_hot(buckets, table.shape[1], dtype=slope.dtype)
    product = jnp.einsum("hqk,qkb->hb", slope, hot, precision=jax.lax.Precision.HIGHEST)
    return product, None


_of_buckets.defvjp(
    lambda table, buckets: (_of_buckets(table, buckets), (table, buckets)), _to_table
)


class RelativeBias(nn.Module):
    """Learned bias per head and bucket; computed once for all layers of a side, but in UMT5."""

    config: T5Config
    bidirectional: bool

    @nn.compact
    def __call__(self, query: jax.Array, key: jax.Array) -> jax.Array:
        """Positions [q], [k] -> bias [1, heads, q, k] float32."""
        c = self.config
        init = nn.with_logical_partitioning(
            nn.initializers.normal(c.emb_dim**-0.5), ("heads", "relpos_buckets")
        )
        table: Any = self.param("rel_embedding", init, (c.num_heads, c.num_buckets))
        buckets = relative_buckets(
            query,
            key,
            bidirectional=self.bidirectional,
            num_buckets=c.num_buckets,
            max_distance=c.max_distance,
        )
        return _of_buckets(table, buckets)[None]
