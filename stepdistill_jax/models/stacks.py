"""Encoder and decoder, as stacks of layers whose parameters are stacked along axis 0."""

from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from stepdistill_jax.models.attention import ATTENTION_OUTPUT
from stepdistill_jax.models.config import MAX_LENGTH, ModelConfig, Side
from stepdistill_jax.models.dropout import Dropout
from stepdistill_jax.models.layers import Attention, Mlp, RMSNorm, Segments
from stepdistill_jax.models.positions import RelativeBias, Rotation, rotate, rotation


class Context(NamedTuple):
    """Inputs that all layers of a stack share.

    Attributes:
        segments: segments of the queries and of the keys in self-attention.
        query, key: positions [q] of the queries and [k] of the keys in self-attention.
        bias: for self-attention, [1, heads, q, k] float32. None if each layer has its own bias or there is none.
        turn: rotation at the positions `query`; None if the model has no rotary positions.
        encoded: None in an encoder. In a decoder without a cache, the encoder's states [batch, length, embed]. In a
            decoder with a cache, the argument `encoded` of `EncoderDecoder.decode_step`.
        cross_segments: segments of the queries and of the keys in attention to the encoder.
        index: position of the decoded token.
    """

    segments: Segments
    query: jax.Array
    key: jax.Array
    bias: jax.Array | None
    turn: Rotation | None
    encoded: Any = None
    cross_segments: Any = None
    index: Any = 0


def _dropout(config: ModelConfig, deterministic: bool) -> Dropout:
    """Returns a dropout module that draws another mask at each call."""
    return Dropout(config.dropout_rate, config.dropout_broadcast, deterministic=deterministic)


class _Layer(nn.Module):
    """The parts that encoder and decoder layers share."""

    config: ModelConfig
    deterministic: bool

    def normed(self, y: jax.Array, block: str) -> jax.Array:
        """Normalises a block's output if `config.post_norms` is set."""
        if not self.config.post_norms:
            return y
        return RMSNorm(self.config, name=f"post_{block}_layer_norm")(y)

    def bias(self, context: Context, bidirectional: bool) -> jax.Array | None:
        """Returns this layer's position bias of self-attention, or None if the model has none."""
        if self.config.position_bias != "layer":
            return context.bias
        table = RelativeBias(self.config, bidirectional, name="relpos_bias")
        return table(context.query, context.key)


class EncoderLayer(_Layer):
    @nn.compact
    def __call__(self, x, window, context: Context):
        """Applies the layer to x [batch, length, embed] and returns (an array of the same shape, None).

        `window` is the attention window of this layer, computed by `windows_of`. None means no limit.
        """
        c, side = self.config, self.config.encoder
        drop = _dropout(c, self.deterministic)
        bias = self.bias(context, bidirectional=True)
        attention = Attention(c, side, side.emb_dim, name="attention")
        # x + block(norm(x)); in Gemma, `normed` is a second norm, of the block's output
        h = RMSNorm(c, name="pre_attention_layer_norm")(x)
        keys, values = attention.keys_values(h)
        queries, keys = _turned(attention.queries(h), keys, context.turn)
        options: dict[str, Any] = {"window": window, "deterministic": self.deterministic}
        y = attention(queries, keys, values, context.segments, bias, **options)
        x = x + drop(self.normed(y, "attention"))
        h = RMSNorm(c, name="pre_mlp_layer_norm")(x)
        y = Mlp(c, side, name="mlp")(h, deterministic=self.deterministic)
        x = x + drop(self.normed(y, "mlp"))
        return nn.with_logical_constraint(x, ("batch", "length", "embed")), None


class DecoderLayer(_Layer):
    """A decoder layer, for teacher forcing and for decoding one token.

    If the cache contains `key` and `value` of earlier tokens, the layer decodes one token.

    With a cache, attention to the encoder reads `context.encoded` or, if that is None, the cache's `cross_key` and
    `cross_value`.
    """

    causal: bool

    @nn.compact
    def __call__(self, x, window, cache, context: Context):
        """Applies the layer to x [batch, q, embed].

        Returns:
            An array of the same shape.
            The key and value of the decoded token, or None under teacher forcing.
        """
        c, side, off = self.config, self.config.decoder, self.deterministic
        drop = _dropout(c, off)
        bias = self.bias(context, bidirectional=False)
        attention = Attention(c, side, side.emb_dim, name="self_attention")
        cross = Attention(c, side, c.encoder.emb_dim, name="encoder_decoder_attention")
        h = RMSNorm(c, name="pre_self_attention_layer_norm")(x)
        new = None
        if cache is None or "key" not in cache:
            keys, values = attention.keys_values(h)
            queries, keys = _turned(attention.queries(h), keys, context.turn)
            options: dict[str, Any] = {"causal": self.causal, "window": window}
            y = attention(
                queries, keys, values, context.segments, bias, deterministic=off, **options
            )
        else:
            y, new = self._next(attention, h, window, cache, bias, context)
        x = x + drop(self.normed(y, "self_attention"))
        h = RMSNorm(c, name="pre_cross_attention_layer_norm")(x)
        segments = context.cross_segments
        if cache is None:
            keys, values = cross.keys_values(context.encoded)
            y = cross(cross.queries(h), keys, values, segments, deterministic=off)
        else:
            # [batch * beams, 1, embed] -> [batch, beams, embed]: the beams of an input are queries that read the
            # same keys, so the keys are not copied for each beam
            queries = h.reshape(segments[1].shape[0], -1, h.shape[-1])
            if context.encoded is not None:
                y = cross.over_states(queries, *context.encoded, segments=segments)
            else:
                given = cache["cross_key"], cache["cross_value"]
                y = cross.over_cache(cross.queries(queries), *given, segments)
        x = x + drop(self.normed(y.reshape(x.shape), "cross_attention"))
        h = RMSNorm(c, name="pre_mlp_layer_norm")(x)
        y = Mlp(c, side, c.unrolled_decoder, name="mlp")(h, deterministic=off)
        x = x + drop(self.normed(y, "mlp"))
        return nn.with_logical_constraint(x, ("batch", "length", "embed")), new

    def _next(self, attention: Attention, h, window, cache, bias, context: Context):
        """Returns the self-attention output of the token being decoded, and the key and value to cache for it."""
        if self.config.unrolled_decoder:
            queries, keys, values = attention.queries_keys_values(h)
        else:
            queries, (keys, values) = attention.queries(h), attention.keys_values(h)
        # the rotation of a key depends only on its own position, so the cache stores rotated keys
        queries, keys = _turned(queries, keys, context.turn)
        # [batch, 1, kv_heads, kv] -> [batch, kv_heads, kv, 1] and [batch, kv_heads, 1, kv]
        new = {"key": keys.transpose(0, 2, 3, 1), "value": values.swapaxes(1, 2)}
        # The token must see itself, but only `decode_step` writes into the cache, once for all layers. So this
        # layer adds the token to copies that exist only while it computes.
        here = context.key == context.index
        keys = jnp.where(here[None, None, None, :], new["key"], cache["key"])
        values = jnp.where(here[None, None, :, None], new["value"], cache["value"])
        of_queries, of_keys = context.segments
        if window is not None:
            near = context.key > context.index - window
            of_keys = jnp.where(near[None, :], of_keys, 0)
        return attention.over_cache(queries, keys, values, (of_queries, of_keys), bias), new


def _turned(queries, keys, turn: Rotation | None):
    return (queries, keys) if turn is None else (rotate(queries, turn), rotate(keys, turn))


def windows_of(side: Side, longest: int, *, causal: bool) -> jax.Array | None:
    """Returns the window of each layer for `attention.attention`, [layers] int32.

    None means that each window covers a whole row of length `longest`.
    """
    # In Hugging Face, an encoder's position sees distances <= window, and a decoder's sees distances < window.
    # `attention` masks distances >= window, so the window of an encoder becomes one more. A window of 0, which
    # means all, becomes more than any length.
    reach = [w + (not causal) if w else 2 * MAX_LENGTH for w in side.windows or ()]
    if not reach or (isinstance(longest, int) and min(reach) >= longest):
        return None
    return jnp.array(reach, jnp.int32)


def scan_layers(layer: type[nn.Module], config: ModelConfig, length: int, in_axes: Any, **kwargs):
    """Returns a module that applies `length` layers, one after the other.

    The layers run in a loop or unrolled (`config.scan_layers`), with parameters stacked along axis 0 in both cases.
    The backward pass recomputes what `config.remat_policy` says.
    """
    policies = jax.checkpoint_policies
    policy = {
        # Activations and norms are cheaper to recompute than to write to memory and read again. An attention
        # kernel is not a matmul, so its output is saved by name. With plain operations, the same name marks the
        # result of a matmul, which is saved anyway.
        "elementwise": policies.save_from_both_policies(
            policies.dots_saveable, policies.save_only_these_names(ATTENTION_OUTPUT)
        ),
        "minimal": policies.dots_with_no_batch_dims_saveable,
        "full": policies.nothing_saveable,
    }[config.remat_policy]
    # XLA's common-subexpression elimination (CSE) could undo the recomputation in unrolled layers, but not across
    # a loop. Undoing is harmless if only elementwise results are recomputed.
    prevent_cse = not config.scan_layers and config.remat_policy != "elementwise"
    layer = nn.remat(layer, prevent_cse=prevent_cse, policy=policy)
    scanned = nn.scan(
        layer,
        variable_axes={"params": 0},
        # each layer has its own initial weights and dropout masks
        split_rngs={"params": True, "dropout": True},
        in_axes=in_axes,
        length=length,
        unroll=1 if config.scan_layers else length,
        # the name of axis 0 for the logical axis rules
        metadata_params={nn.PARTITION_NAME: "layers"},
    )
    return scanned(config, name="layers", **kwargs)


class _Stack(nn.Module):
    """The parts that encoder and decoder share."""

    config: ModelConfig

    def context(self, side: Side, bidirectional: bool, segments, query, key, **more) -> Context:
        """Returns the inputs that all layers share, for query positions [q] and key positions [k]."""
        bias = turn = None
        if self.config.position_bias == "side":
            bias = RelativeBias(self.config, bidirectional, name="relpos_bias")(query, key)
        if side.rope_theta is not None:
            turn = rotation(query, side.head_dim, side.rope_theta)
        return Context(segments, query, key, bias, turn, **more)


class Encoder(_Stack):
    @nn.compact
    def __call__(self, x, segments, *, deterministic: bool):
        """Encodes embeddings x [batch, length, embed] with segments [batch, length] to states of the same shape."""
        c, side = self.config, self.config.encoder
        drop, position = _dropout(c, deterministic), jnp.arange(x.shape[1])
        context = self.context(side, True, (segments, segments), position, position)
        windows = windows_of(side, x.shape[1], causal=False)
        axes = (0, nn.broadcast)
        layers = scan_layers(EncoderLayer, c, side.num_layers, axes, deterministic=deterministic)
        x, _ = layers(drop(x), windows, context)
        return drop(RMSNorm(c, name="encoder_norm")(x))


class Decoder(_Stack):
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
        index: jax.Array | int = 0,
        deterministic: bool,
    ):
        """Applies all layers to embeddings x [batch, q, embed].

        `Context` describes the arguments. `cache` has the arrays of all layers, stacked.

        Returns:
            A pair: the states, in the shape of x, and the keys and values of the current token in all layers.
            Under teacher forcing, the second item is None.
        """
        c, side = self.config, self.config.decoder
        drop = _dropout(c, deterministic)
        more = {"encoded": encoded, "cross_segments": cross_segments, "index": index}
        context = self.context(side, False, self_segments, query, key, **more)
        windows = windows_of(side, key.shape[0], causal=True)
        options: dict[str, Any] = {"causal": causal, "deterministic": deterministic}
        if c.unrolled_decoder:
            # each layer has separate parameters (`models.unrolled`), and the cache is still stacked
            x, found = drop(x), []
            for i in range(side.num_layers):
                layer = DecoderLayer(c, **options, name=f"layers_{i}")
                window, kept = jax.tree.map(lambda stacked, i=i: stacked[i], (windows, cache))
                x, new = layer(x, window, kept, context)
                found.append(new)
            cache = jax.tree.map(lambda *of_layers: jnp.stack(of_layers), *found)
        else:
            axes = (0, 0, nn.broadcast)
            layers = scan_layers(DecoderLayer, c, side.num_layers, axes, **options)
            x, cache = layers(drop(x), windows, cache, context)
        return drop(RMSNorm(c, name="decoder_norm")(x)), cache
