"""What greedy decoding, sampling and beam search share: the start, one step, the loop over tokens."""

from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from stepdistill_jax.models.config import T5Config
from stepdistill_jax.models.t5 import T5, Cache, start_cache
from stepdistill_jax.text.vocabulary import EOS_ID, PAD_ID


class Start(NamedTuple):
    """What a loop over tokens begins with.

    Attributes:
        step: (ids [batch * beams] of the position before, cache, scalar position) -> logits
            [batch * beams, vocab] float32 and the cache with that position filled in.
        cache: the decoder's own keys and values, [layers, batch * beams, max_decode_len, heads, kv].
        filler: [batch] bool, rows of zeros: they only fill the batch and have no answer.
    """

    step: Callable[[jax.Array, Cache, jax.Array], tuple[jax.Array, Cache]]
    cache: Cache
    filler: jax.Array


def start(
    params: Any,
    config: T5Config,
    encoder_input_tokens: jax.Array,
    *,
    max_decode_len: int,
    beams: int = 1,
) -> Start:
    """Encodes the inputs, once per row whatever the number of beams.

    Args:
        params: parameters of a `T5` (unboxed).
        config: its configuration.
        encoder_input_tokens: [batch, length] int32, 0 is padding.
        max_decode_len: positions to hold.
        beams: decoder rows per input; those of an input are neighbours.
    """
    model = T5(config)
    segments = (encoder_input_tokens != PAD_ID).astype(jnp.int32)
    encoded: Any = model.apply({"params": params}, encoder_input_tokens, segments, method="encode")
    cache = start_cache(params, encoded, config, max_decode_len)
    # the cross part never changes, so it is no loop state, and the beams of a row read one copy
    cross = {name: cache.pop(name) for name in ("cross_key", "cross_value")}
    cache = {name: jnp.repeat(x, beams, axis=1) for name, x in cache.items()}

    def step(last, cache, index):
        called: Any = model.apply(
            {"params": params},
            last[:, None],
            {**cache, **cross},
            segments,
            index,
            method="decode_step",
        )
        logits, new = called
        return logits, {name: new[name] for name in cache}

    return Start(step, cache, jnp.sum(segments, axis=-1) == 0)


def decode_tokens(
    params: Any,
    config: T5Config,
    encoder_input_tokens: jax.Array,
    choose: Callable[[jax.Array, jax.Array], jax.Array],
    *,
    max_decode_len: int,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """One token after the other, each chosen for good, until each row has said its end.

    Args:
        params: parameters of a `T5` (unboxed).
        config: its configuration.
        encoder_input_tokens: [batch, length] int32; a row of zeros is done from the start.
        choose: (logits [batch, vocab] float32, scalar position) -> ids [batch].
        max_decode_len: most tokens of an answer, the end of sequence included.

    Returns:
        ids, scores and finished, as `greedy_decode` says.
    """
    batch = encoder_input_tokens.shape[0]
    begin = start(params, config, encoder_input_tokens, max_decode_len=max_decode_len)
    state = {
        "index": jnp.int32(0),
        "last": jnp.full(batch, PAD_ID, jnp.int32),
        "done": begin.filler,
        "ids": jnp.full((batch, max_decode_len), PAD_ID, jnp.int32),
        "scores": jnp.zeros(batch, jnp.float32),
        "cache": begin.cache,
    }

    def body(state):
        logits, cache = begin.step(state["last"], state["cache"], state["index"])
        chosen = choose(logits, state["index"]).astype(jnp.int32)
        log_probs = nn.log_softmax(logits, axis=-1)
        log_prob = jnp.take_along_axis(log_probs, chosen[:, None], axis=-1)[:, 0]
        ids = jnp.where(state["done"], PAD_ID, chosen)
        return {
            "index": state["index"] + 1,
            "last": ids,
            "done": state["done"] | (ids == EOS_ID),
            "ids": jax.lax.dynamic_update_slice_in_dim(
                state["ids"], ids[:, None], state["index"], axis=1
            ),
            "scores": state["scores"] + jnp.where(state["done"], 0.0, log_prob),
            "cache": cache,
        }

    def unfinished(state):
        return (state["index"] < max_decode_len) & ~jnp.all(state["done"])

    state = jax.lax.while_loop(unfinished, body, state)
    return state["ids"], state["scores"], state["done"] & ~begin.filler
