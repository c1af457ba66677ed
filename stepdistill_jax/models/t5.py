"""T5 in Flax Linen, scanned over layers.

A batch's way through: `T5.__call__` -> `Encoder` -> `Decoder` -> logits. Decoding takes the same
modules apart: `encode` once, `start_cache` once, `decode_step` per token.
"""

import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from stepdistill_jax.models.attention import ATTENTION_OUTPUT
from stepdistill_jax.models.config import T5Config
from stepdistill_jax.models.dropout import Dropout
from stepdistill_jax.models.layers import (
    Attention,
    Mlp,
    RelativeBias,
    RMSNorm,
    Segments,
    dense,
)
from stepdistill_jax.models.lora import has_adapters
from stepdistill_jax.models.products import precision_of
from stepdistill_jax.models.quantized import kernel_of

Cache = dict[str, jax.Array]


class EncoderLayer(nn.Module):
    config: T5Config
    deterministic: bool

    @nn.compact
    def __call__(self, x, segments, bias, position):
        """`bias`, of attention: [1, heads, q, k], or None where each layer has its own."""
        c, off = self.config, self.deterministic
        drop = Dropout(c.dropout_rate, c.dropout_broadcast, deterministic=off)
        if not c.shared_relative_position_bias:
            bias = RelativeBias(c, True, name="relpos_bias")(position, position)
        attention = Attention(c, name="attention")
        h = RMSNorm(c, name="pre_attention_layer_norm")(x)
        keys, values = attention.keys_values(h)
        x = x + drop(attention(h, keys, values, (segments, segments), bias, deterministic=off))
        h = RMSNorm(c, name="pre_mlp_layer_norm")(x)
        x = x + drop(Mlp(c, name="mlp")(h, deterministic=off))
        return nn.with_logical_constraint(x, ("batch", "length", "embed")), None


class DecoderContext(NamedTuple):
    """Inputs that all layers of a decoder share."""

    encoded: Any  # [batch, length, embed], or `encoded` of `T5.decode_step`
    self_segments: Segments
    cross_segments: Segments
    bias: Any  # of self-attention: [1, heads, q, k] float32, or None where each layer has its own
    query: jax.Array  # positions [q], [k] of the self-attention
    key: jax.Array
    index: Any  # position of the cache that is filled in


class DecoderLayer(nn.Module):
    """`cache` None: teacher forcing. Else this layer's key and value, and of the input `encoded` or cross_key, cross_value."""

    config: T5Config
    causal: bool
    deterministic: bool

    @nn.compact
    def __call__(self, x, cache, context: DecoderContext):
        c, off = self.config, self.deterministic
        encoded, self_segments, cross_segments, bias, query, key, index = context
        drop = Dropout(c.dropout_rate, c.dropout_broadcast, deterministic=off)
        if not c.shared_relative_position_bias:
            bias = RelativeBias(c, False, name="relpos_bias")(query, key)
        attention = Attention(c, name="self_attention")
        cross = Attention(c, name="encoder_decoder_attention")
        h = RMSNorm(c, name="pre_self_attention_layer_norm")(x)
        new = None
        if cache is None or "key" not in cache:
            given = attention.keys_values(h)
            y = attention(h, *given, self_segments, bias, causal=self.causal, deterministic=off)
        else:
            if c.unrolled_decoder:
                queries, keys, values = attention.queries_keys_values(h)
            else:
                queries, (keys, values) = attention.queries(h), attention.keys_values(h)
            new = {"key": keys.transpose(0, 2, 3, 1), "value": values.swapaxes(1, 2)}
            # the cache of all layers is written once, by `decode_step`
            here = key == index
            keys = jnp.where(here[None, None, None, :], new["key"], cache["key"])
            values = jnp.where(here[None, None, :, None], new["value"], cache["value"])
            y = attention.over_cache(queries, keys, values, self_segments, bias)
        x = x + drop(y)
        h = RMSNorm(c, name="pre_cross_attention_layer_norm")(x)
        if cache is None:
            y = cross(h, *cross.keys_values(encoded), cross_segments, deterministic=off)
        else:
            # beams of one input are so many queries to the same keys: no copy of these per beam
            queries = h.reshape(cross_segments[1].shape[0], -1, h.shape[-1])
            if encoded is not None:
                y = cross.over_states(queries, *encoded, cross_segments)
            else:
                given = cache["cross_key"], cache["cross_value"]
                y = cross.over_cache(cross.queries(queries), *given, cross_segments)
        x = x + drop(y.reshape(x.shape))
        h = RMSNorm(c, name="pre_mlp_layer_norm")(x)
        x = x + drop(Mlp(c, c.unrolled_decoder, name="mlp")(h, deterministic=off))
        x = nn.with_logical_constraint(x, ("batch", "length", "embed"))
        return x, new


def scan_layers(layer: type[nn.Module], config: T5Config, length: int, in_axes: Any, **kwargs):
    """`length` layers, in a loop or one after the other; params are stacked, the layer is axis 0."""
    policies = jax.checkpoint_policies
    policy = {
        # activations and norms are cheaper to compute again than to write and read. A kernel's
        # output is kept by its name; plain operations end in a product, of which that is the only copy
        "elementwise": policies.save_from_both_policies(
            policies.dots_saveable, policies.save_only_these_names(ATTENTION_OUTPUT)
        ),
        "minimal": policies.dots_with_no_batch_dims_saveable,
        "full": policies.nothing_saveable,
    }[config.remat_policy]
    # in a loop XLA cannot keep what is to be computed again; without one it may, where that is only
    # elementwise and so no question of memory
    prevent_cse = not config.scan_layers and config.remat_policy != "elementwise"
    layer = nn.remat(layer, prevent_cse=prevent_cse, policy=policy)
    scanned = nn.scan(
        layer,
        variable_axes={"params": 0},
        split_rngs={"params": True, "dropout": True},
        in_axes=in_axes,
        length=length,
        unroll=1 if config.scan_layers else length,
        metadata_params={nn.PARTITION_NAME: "layers"},
    )
    return scanned(config, name="layers", **kwargs)


class Encoder(nn.Module):
    config: T5Config

    @nn.compact
    def __call__(self, x, segments, *, deterministic: bool):
        """x [batch, length, embed], segments [batch, length] -> [batch, length, embed]."""
        c = self.config
        drop = Dropout(c.dropout_rate, c.dropout_broadcast, deterministic=deterministic)
        position, bias = jnp.arange(x.shape[1]), None
        if c.shared_relative_position_bias:
            bias = RelativeBias(c, True, name="relpos_bias")(position, position)
        layers = scan_layers(
            EncoderLayer, c, c.num_encoder_layers, nn.broadcast, deterministic=deterministic
        )
        x, _ = layers(drop(x), segments, bias, position)
        return drop(RMSNorm(c, name="encoder_norm")(x))


class Decoder(nn.Module):
    config: T5Config

    @nn.compact
    def __call__(
        self,
        x,
        cache,
        *,
        encoded=None,
        self_segments: Segments,
        cross_segments: Segments,
        causal: bool,
        query,
        key,
        index=0,
        deterministic: bool,
    ):
        """x [batch, q, embed] -> ([batch, q, embed], updated cache or None)."""
        c, bias = self.config, None
        drop = Dropout(c.dropout_rate, c.dropout_broadcast, deterministic=deterministic)
        if c.shared_relative_position_bias:
            bias = RelativeBias(c, False, name="relpos_bias")(query, key)
        context = DecoderContext(encoded, self_segments, cross_segments, bias, query, key, index)
        options: dict[str, Any] = {"causal": causal, "deterministic": deterministic}
        if c.unrolled_decoder:
            x, found = drop(x), []
            for i in range(c.num_decoder_layers):
                layer = DecoderLayer(c, **options, name=f"layers_{i}")
                x, of_layer = layer(
                    x, jax.tree.map(lambda stacked, i=i: stacked[i], cache), context
                )
                found.append(of_layer)
            cache = jax.tree.map(lambda *of_layers: jnp.stack(of_layers), *found)
        else:
            axes = (0, nn.broadcast)
            layers = scan_layers(DecoderLayer, c, c.num_decoder_layers, axes, **options)
            x, cache = layers(drop(x), cache, context)
        return drop(RMSNorm(c, name="decoder_norm")(x)), cache


def _one_segment(visible: jax.Array) -> Segments:
    """Segments by which each query sees the keys where `visible` [batch or 1, k] is true."""
    return jnp.ones((1, 1), jnp.int32), visible.astype(jnp.int32)


class T5(nn.Module):
    """Encoder-decoder over packed or padded batches."""

    config: T5Config

    def setup(self):
        c = self.config
        init = nn.with_logical_partitioning(nn.initializers.normal(1.0), ("vocab", "embed"))
        self.token_embedder: Any = self.param("token_embedder", init, (c.vocab_size, c.emb_dim))
        self.encoder, self.decoder = Encoder(c), Decoder(c)
        if not c.logits_via_embedding:
            axes = ("embed", "vocab")
            self.logits_dense = dense(c, c.vocab_size, axes, c.emb_dim**-0.5, float32_sums=True)

    def _embed(self, ids: jax.Array) -> jax.Array:
        # [batch, length] -> [batch, length, embed]. The width is gathered first: a lookup whose
        # width is cut over fsdp forces XLA into a full rematerialization
        table = nn.with_logical_constraint(self.token_embedder, ("vocab", None))
        # cast after the lookup: its gradient sums over equal tokens, which bfloat16 would stop at 256
        x = jnp.take(table, ids, axis=0).astype(self.config.dtype)
        return nn.with_logical_constraint(x, ("batch", "length", "embed"))

    def _scaled(self, x: jax.Array) -> jax.Array:
        return x * self.config.emb_dim**-0.5 if self.config.scale_decoder_outputs else x

    def _logits(self, x: jax.Array) -> jax.Array:
        # [batch, length, embed] -> [batch, length, vocab]; float32 for the softmax
        if self.config.logits_via_embedding:
            dtype = self.config.dtype
            logits = jnp.einsum(
                "ble,ve->blv",
                x,
                self.token_embedder.astype(dtype),
                precision=precision_of(dtype),
                preferred_element_type=jnp.float32,
            )
        else:
            logits = self.logits_dense(x)
        return nn.with_logical_constraint(logits, ("batch", "length", "vocab"))

    def encode(
        self, encoder_input_tokens, encoder_segment_ids, *, enable_dropout: bool = False
    ) -> jax.Array:
        """[batch, length] ids and segments -> encoder states [batch, length, embed]."""
        return self.encoder(
            self._embed(encoder_input_tokens),
            encoder_segment_ids,
            deterministic=not enable_dropout,
        )

    def __call__(
        self, batch: Mapping[str, jax.Array], *, enable_dropout: bool = False
    ) -> jax.Array:
        """Logits of each target position: [batch, target length, vocab] float32; see `states`."""
        return self._logits(self.states(batch, enable_dropout=enable_dropout))

    def states(self, batch: Mapping[str, jax.Array], *, enable_dropout: bool = False) -> jax.Array:
        """The decoder's states under teacher forcing; times `output_kernel` they are the logits.

        Args:
            batch: int32 `encoder_input_tokens`, `encoder_segment_ids` [batch, length] and
                `decoder_input_tokens`, `decoder_segment_ids` [batch, target length]. Segment 0 is
                padding; a decoder segment reads the encoder segment of the same number, or the one
                that `decoder_encoder_segment_ids` [batch, target length] names where it is given.
            enable_dropout: needs the rng collection `dropout`.

        Returns:
            [batch, target length, embed].
        """
        source, target = batch["encoder_segment_ids"], batch["decoder_segment_ids"]
        encoded = self.encode(batch["encoder_input_tokens"], source, enable_dropout=enable_dropout)
        position = jnp.arange(target.shape[1])
        x, _ = self.decoder(
            self._embed(batch["decoder_input_tokens"]),
            None,
            encoded=encoded,
            self_segments=(target, target),
            cross_segments=(batch.get("decoder_encoder_segment_ids", target), source),
            causal=True,
            query=position,
            key=position,
            deterministic=not enable_dropout,
        )
        return self._scaled(x)

    def decode_step(
        self,
        ids: jax.Array,
        cache: Cache,
        encoder_segment_ids: jax.Array,
        index: jax.Array,
        encoded: tuple[jax.Array, jax.Array] | None = None,
    ) -> tuple[jax.Array, Cache]:
        """One token for each row.

        Args:
            ids: [batch, 1] int32, the previous token (0 first). In a beam search [batch * beams, 1],
                and so are `key` and `value` of the cache; what comes from the encoder is [batch].
            cache: from `start_cache`.
            encoder_segment_ids: [batch, length], 0 is padding.
            index: scalar int32, position of the token that is decoded.
            encoded: where the cache has no keys and values of it, [batch, length, embed] from `encode`
                and the same [batch, embed, length].

        Returns:
            Logits [batch, vocab] float32 and the cache with this position filled in.
        """
        key = jnp.arange(cache["key"].shape[-1])
        x, new = self.decoder(
            self._embed(ids),
            cache,
            encoded=encoded,
            self_segments=_one_segment((key <= index)[None]),  # what is filled in
            cross_segments=_one_segment(encoder_segment_ids > 0),
            causal=False,
            query=index[None],
            key=key,
            index=index,
            deterministic=True,
        )
        new = {
            name: jax.lax.dynamic_update_slice_in_dim(cache[name], new[name], index, axis)
            for name, axis in (("key", -1), ("value", -2))
        }
        return self._logits(self._scaled(x))[:, 0], {**cache, **new}

    def target_states(
        self,
        decoder_input_tokens: jax.Array,
        decoder_segment_ids: jax.Array,
        cache: Cache,
        encoder_segment_ids: jax.Array,
    ) -> jax.Array:
        """`states` of given targets, from the keys and values that `start_cache` keeps of the inputs.

        Args:
            decoder_input_tokens, decoder_segment_ids: [batch, target length] int32. Each segment is a
                target by itself, 0 is padding; all of a row read the same input.
            cache: from `start_cache`, of so many positions; nothing is put into it.
            encoder_segment_ids: [batch, length], 0 is padding.

        Returns:
            [batch, target length, embed].
        """
        position = jnp.arange(decoder_input_tokens.shape[1])
        x, _ = self.decoder(
            self._embed(decoder_input_tokens),
            {name: x for name, x in cache.items() if name.startswith("cross")},
            self_segments=(decoder_segment_ids, decoder_segment_ids),
            cross_segments=_one_segment(encoder_segment_ids > 0),
            causal=True,
            query=position,
            key=position,
            deterministic=True,
        )
        return self._scaled(x)


def output_kernel(params: Mapping, config: T5Config) -> jax.Array:
    """[embed, vocab]: `T5.states` times this are the logits; the embedding's own where it is tied."""
    if config.logits_via_embedding:
        return params["token_embedder"].T
    return kernel_of(params["logits_dense"], jnp.float32)


def start_cache(
    params: Mapping,
    encoded: jax.Array,
    config: T5Config,
    max_decode_len: int,
    *,
    cross: bool = True,
) -> Cache:
    """An empty decoder cache, with the cross-attention's keys and values of all layers filled in.

    They depend on the encoder alone, so they are computed once per batch, outside the loop.

    Args:
        params: parameters of a `T5` (unboxed).
        encoded: [batch, length, embed] from `T5.encode`.
        max_decode_len: positions of self-attention to hold.
        cross: false leaves these out; `decode_step` wants `encoded` itself then, which is less work
            where the rows of an input and their tokens are fewer than `head_dim`.

    Returns:
        `key` [layers, batch, heads, kv, max_decode_len] and `value` [layers, batch, heads,
        max_decode_len, kv], zeros; `cross_key` and `cross_value` are the same of `length`.

    Raises:
        ValueError: the parameters or the configuration have adapters, which decoding would leave out.
    """
    if config.lora is not None or has_adapters(params):
        raise ValueError("decoding wants plain weights: call models.lora.merge first")
    kernels = params["decoder"]["layers"]["encoder_decoder_attention"]
    heads = (config.num_heads, config.head_dim)

    def project(name: str, axes: str) -> jax.Array:
        kernel, precision = kernel_of(kernels[name], config.dtype), precision_of(config.dtype)
        kernel = kernel.reshape(*kernel.shape[:2], *heads)
        return jnp.einsum(f"ble,nehd->{axes}", encoded, kernel, precision=precision)

    # as the products of each token read them: no axis moves inside the loop
    rows, (count, width) = (config.num_decoder_layers, encoded.shape[0]), heads
    cache = {
        "key": jnp.zeros((*rows, count, width, max_decode_len), config.dtype),
        "value": jnp.zeros((*rows, count, max_decode_len, width), config.dtype),
    }
    if cross:
        cache |= {"cross_key": project("key", "nbhdl"), "cross_value": project("value", "nbhld")}
    return cache


_FEATURES = (
    "encoder_input_tokens",
    "encoder_segment_ids",
    "decoder_input_tokens",
    "decoder_segment_ids",
)


@functools.lru_cache(maxsize=8)  # JAX keeps 0.1 MB of each trace
def abstract_params(config: T5Config) -> Any:
    """The parameter tree as boxed shapes with logical axis names; nothing is allocated."""
    batch = dict.fromkeys(_FEATURES, jax.ShapeDtypeStruct((1, 8), jnp.int32))
    return jax.eval_shape(T5(config).init, jax.random.key(0), batch)["params"]


def init_params(config: T5Config, rng: jax.Array) -> Any:
    """Random initial parameters, unboxed."""
    batch = dict.fromkeys(_FEATURES, jnp.ones((1, 8), jnp.int32))
    return nn.meta.unbox(T5(config).init(rng, batch)["params"])
