"""The model of all families: an encoder-decoder in Flax Linen.

Training calls the whole model. Decoding calls `encode` and `start_cache` once, and `decode_step` for each token.
"""

import functools
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct

from stepdistill_jax.models.attention import softcapped
from stepdistill_jax.models.config import ModelConfig
from stepdistill_jax.models.layers import Segments, dense
from stepdistill_jax.models.lora import has_adapters
from stepdistill_jax.models.products import kernel_product, precision_of
from stepdistill_jax.models.quantized import kernel_of
from stepdistill_jax.models.stacks import Decoder, Encoder

Cache = dict[str, jax.Array]


def _one_segment(visible: jax.Array) -> Segments:
    """Returns (query segments, key segments) with which every query sees only the visible keys.

    Args:
        visible: [batch or 1, k], true for each visible key.
    """
    return jnp.ones((1, 1), jnp.int32), visible.astype(jnp.int32)


class EncoderDecoder(nn.Module):
    """An encoder-decoder for packed and padded batches."""

    config: ModelConfig

    def setup(self):
        c = self.config
        named = nn.with_logical_partitioning
        tables = {c.input_embedder: c.encoder, c.target_embedder: c.decoder}
        self.tables: Any = {
            name: self.param(
                name,
                named(nn.initializers.normal(side.init_stddev or 1.0), ("vocab", "embed")),
                (c.vocab_size, side.emb_dim),
            )
            for name, side in tables.items()
        }
        self.encoder, self.decoder = Encoder(c), Decoder(c)
        if not c.logits_via_embedding:
            width = c.decoder.emb_dim
            stddev, axes = c.decoder.init_stddev or width**-0.5, ("embed", "vocab")
            self.logits_dense = dense(c, c.vocab_size, axes, stddev, float32_sums=True)

    def _embed(self, ids: jax.Array, embedder: str) -> jax.Array:
        # [batch, length] -> [batch, length, embed]. The constraint makes devices gather the table's width before
        # the lookup. If the width stayed sharded over fsdp, XLA would replicate the complete result of the
        # lookup and shard it again ("full rematerialization").
        table = nn.with_logical_constraint(self.tables[embedder], ("vocab", None))
        # The cast comes after the lookup, so that the lookup's gradient, a sum over equal tokens, is added up in
        # float32. In bfloat16, a sum of ones would stop at 256, since bfloat16 has no 257.
        x = jnp.take(table, ids, axis=0).astype(self.config.dtype)
        if self.config.scaled_embeddings:
            # the square root is rounded to the dtype of activations, as in transformers
            x = x * jnp.asarray(x.shape[-1] ** 0.5, x.dtype)
        return nn.with_logical_constraint(x, ("batch", "length", "embed"))

    def _embed_targets(self, ids: jax.Array) -> jax.Array:
        c = self.config
        if c.start_id:
            # In a batch, 0 is both the first decoder input of a target and padding. Nothing attends to padding, and
            # no target contains 0, so every 0 can be replaced.
            ids = jnp.where(ids == 0, c.start_id, ids)
        return self._embed(ids, c.target_embedder)

    def _scaled(self, x: jax.Array) -> jax.Array:
        return x if self.config.output_scale == 1.0 else x * self.config.output_scale

    def _logits(self, x: jax.Array) -> jax.Array:
        # [batch, length, embed] -> [batch, length, vocab]; logits are float32, since the softmax needs it
        c = self.config
        if c.logits_via_embedding:
            logits = jnp.einsum(
                "ble,ve->blv",
                x,
                self.tables[c.target_embedder].astype(c.dtype),
                precision=precision_of(c.dtype),
                preferred_element_type=jnp.float32,
            )
        else:
            logits = self.logits_dense(x)
        logits = softcapped(logits, c.logits_softcap)
        return nn.with_logical_constraint(logits, ("batch", "length", "vocab"))

    def encode(
        self, encoder_input_tokens, encoder_segment_ids, *, enable_dropout: bool = False
    ) -> jax.Array:
        """Encodes ids and segments, each [batch, length], to states [batch, length, embed]."""
        return self.encoder(
            self._embed(encoder_input_tokens, self.config.input_embedder),
            encoder_segment_ids,
            deterministic=not enable_dropout,
        )

    def __call__(
        self, batch: Mapping[str, jax.Array], *, enable_dropout: bool = False
    ) -> jax.Array:
        """Returns the logits, [batch, target length, vocab] float32, for the arguments of `states`."""
        return self._logits(self.states(batch, enable_dropout=enable_dropout))

    def states(self, batch: Mapping[str, jax.Array], *, enable_dropout: bool = False) -> jax.Array:
        """Returns the decoder's states [batch, target length, embed] under teacher forcing, for `output_layer`.

        Args:
            batch: int32 arrays.
                `encoder_input_tokens`, `encoder_segment_ids`: [batch, length]. Segment 0 is padding.
                `decoder_input_tokens`, `decoder_segment_ids`: [batch, target length].
                `decoder_encoder_segment_ids`, optional: encoder segment that each target token reads, [batch, target
                length]. By default, it equals the token's own segment.
            enable_dropout: needs the rng collection `dropout`.
        """
        source, target = batch["encoder_segment_ids"], batch["decoder_segment_ids"]
        encoded = self.encode(batch["encoder_input_tokens"], source, enable_dropout=enable_dropout)
        # places in the row: attention uses only distances, and inside a segment these equal those in the text
        position = jnp.arange(target.shape[1])
        x, _ = self.decoder(
            self._embed_targets(batch["decoder_input_tokens"]),
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
        """Decodes one token for each row.

        In a beam search, `ids`, the cache's `key` and `value`, and the logits have batch * beams rows. All other
        arrays have batch rows.

        Args:
            ids: the previous tokens, [batch, 1] int32; 0 at the first position.
            cache: from `start_cache` or the previous step.
            encoder_segment_ids: [batch, length]; 0 is padding.
            index: position of the decoded token.
            encoded: the states [batch, length, embed] and their transpose [batch, embed, length], if the cache has no
                `cross_key`.

        Returns:
            The logits, [batch, vocab] float32.
            The cache with this position filled in.
        """
        key = jnp.arange(cache["key"].shape[-1])
        x, new = self.decoder(
            self._embed_targets(ids),
            cache,
            encoded=encoded,
            self_segments=_one_segment((key <= index)[None]),  # the positions filled in so far
            cross_segments=_one_segment(encoder_segment_ids > 0),
            causal=False,  # the segments above hide later positions already
            query=index[None],
            key=key,
            index=index,
            deterministic=True,
        )
        # writes this position for all layers at once. Keys are [layers, batch, kv_heads, kv, positions], and values
        # are [layers, batch, kv_heads, positions, kv].
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
        """Returns the decoder's states [batch, target length, embed] for given targets.

        All targets of a row read the same input.

        Args:
            decoder_input_tokens: [batch, target length] int32.
            decoder_segment_ids: [batch, target length] int32; one segment for each target, 0 for padding.
            cache: from `start_cache`, with `cross_key` and `cross_value`.
            encoder_segment_ids: [batch, length]; 0 is padding.
        """
        position = jnp.arange(decoder_input_tokens.shape[1])
        x, _ = self.decoder(
            self._embed_targets(decoder_input_tokens),
            # without `key` and `value`, the layers attend among the given targets
            {name: x for name, x in cache.items() if name.startswith("cross")},
            self_segments=(decoder_segment_ids, decoder_segment_ids),
            cross_segments=_one_segment(encoder_segment_ids > 0),
            causal=True,
            query=position,
            key=position,
            deterministic=True,
        )
        return self._scaled(x)


@struct.dataclass
class OutputLayer:
    """The layer that turns the decoder's states into logits.

    Attributes:
        weights: [embed, vocab], or [vocab, embed] if tied.
        softcap: `ModelConfig.logits_softcap`.
        tied: whether the weights are the embedding of the targets.
    """

    weights: jax.Array
    softcap: float | None = struct.field(pytree_node=False, default=None)
    tied: bool = struct.field(pytree_node=False, default=False)

    @property
    def kernel(self) -> jax.Array:
        """The weights as [embed, vocab]."""
        return self.weights.T if self.tied else self.weights

    def logits(self, states: jax.Array) -> jax.Array:
        """Turns states [..., embed] into logits [..., vocab] float32."""
        return softcapped(kernel_product(states, self.kernel, True), self.softcap)


def output_layer(params: Mapping, config: ModelConfig) -> OutputLayer:
    """Returns the layer that turns the result of `EncoderDecoder.states` into logits."""
    if tied := config.logits_via_embedding:
        weights = params[config.target_embedder]
    else:
        weights = kernel_of(params["logits_dense"], jnp.float32)
    return OutputLayer(weights, config.logits_softcap, tied)


def start_cache(
    params: Mapping,
    encoded: jax.Array,
    config: ModelConfig,
    max_decode_len: int,
    *,
    cross: bool = True,
) -> Cache:
    """Returns a cache for decoding, empty except for the keys and values of the inputs.

    Args:
        params: unboxed.
        encoded: states from `EncoderDecoder.encode`, [batch, length, embed].
        max_decode_len: number of target positions.
        cross: whether to include `cross_key` and `cross_value`. Without them, `decode_step` needs `encoded`.

    Returns:
        `key`: zeros, [layers, batch, kv_heads, kv, max_decode_len].
        `value`: zeros, [layers, batch, kv_heads, max_decode_len, kv].
        `cross_key`: [layers, batch, kv_heads, kv, length].
        `cross_value`: [layers, batch, kv_heads, length, kv].

    Raises:
        ValueError: the model has adapters, which decoding would ignore.
    """
    if config.lora is not None or has_adapters(params):
        raise ValueError(
            "the model has LoRA adapters, and decoding needs plain weights: call models.lora.merge first"
        )
    kernels = params["decoder"]["layers"]["encoder_decoder_attention"]
    side = config.decoder
    heads = (side.num_kv_heads, side.head_dim)

    def project(name: str, axes: str) -> jax.Array:
        kernel, precision = kernel_of(kernels[name], config.dtype), precision_of(config.dtype)
        # [layers, embed, kv_heads x kv] -> [layers, embed, kv_heads, kv]
        kernel = kernel.reshape(*kernel.shape[:2], *heads)
        return jnp.einsum(f"ble,nehd->{axes}", encoded, kernel, precision=precision)

    # the axes are in the order that the matmuls of each token need, so the loop transposes nothing
    rows, (count, width) = (side.num_layers, encoded.shape[0]), heads
    cache = {
        "key": jnp.zeros((*rows, count, width, max_decode_len), config.dtype),
        "value": jnp.zeros((*rows, count, max_decode_len, width), config.dtype),
    }
    # leaving them out saves work with few beams and few tokens (`layers.Attention.over_states`)
    if cross:
        cache |= {"cross_key": project("key", "nbhdl"), "cross_value": project("value", "nbhld")}
    return cache


_FEATURES = (
    "encoder_input_tokens",
    "encoder_segment_ids",
    "decoder_input_tokens",
    "decoder_segment_ids",
)


@functools.lru_cache(maxsize=8)  # JAX keeps 0.1 MB for each trace
def abstract_params(config: ModelConfig) -> Any:
    """Returns the parameter tree as boxed shapes with logical axis names, without allocating arrays."""
    # one row of 8: no parameter depends on the sizes of a batch
    batch = dict.fromkeys(_FEATURES, jax.ShapeDtypeStruct((1, 8), jnp.int32))
    return jax.eval_shape(EncoderDecoder(config).init, jax.random.key(0), batch)["params"]


def init_params(config: ModelConfig, rng: jax.Array) -> Any:
    """Returns random initial parameters, unboxed."""
    batch = dict.fromkeys(_FEATURES, jnp.ones((1, 8), jnp.int32))
    return nn.meta.unbox(EncoderDecoder(config).init(rng, batch)["params"])
