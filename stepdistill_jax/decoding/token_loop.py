"""Prepares decoding, and runs the loop over tokens of greedy decoding and sampling.

Beam search uses the preparation, too, but has its own loop.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from stepdistill_jax.data.vocabulary import EOS_ID, PAD_ID
from stepdistill_jax.models.config import ModelConfig
from stepdistill_jax.models.cpu_speed import in_row_blocks
from stepdistill_jax.models.encoder_decoder import Cache, EncoderDecoder, start_cache
from stepdistill_jax.models.sharding import traced_device, traced_platform
from stepdistill_jax.models.unrolled import unrolled
from stepdistill_jax.runtime.chips import chip_of

# When at most a quarter of the rows are unfinished, they are gathered into a batch of a quarter of the size,
# unless that is below 8 rows. This happens at most twice, since each size compiles one more step.
FEWER, FEWEST, SMALLER_SIZES = 4, 8, 2
# share of a GPU's memory that keys and values of the inputs may take if they only save time
KEPT = 1 / 8

Memory = dict[str, Any]


class Start(NamedTuple):
    """The initial state of a loop over tokens.

    Attributes:
        step: (previous ids [batch * beams], cache, memory, scalar position) -> (logits [batch * beams, vocab]
            float32, cache with the position filled in).
        cache: keys and values of self-attention, [layers, batch * beams, ...], with the decoder prefix and
            `max_decode_len` empty positions.
        memory: the encoded inputs, or their keys and values.
        last: ids to read at the answer's first position, [batch * beams] int32.
        filler: whether each row consists of zeros, [batch] bool.
    """

    step: Callable[[jax.Array, Cache, Memory, jax.Array], tuple[jax.Array, Cache]]
    cache: Cache
    memory: Memory
    last: jax.Array
    filler: jax.Array


def start(
    params: Any,
    config: ModelConfig,
    encoder_input_tokens: jax.Array,
    *,
    max_decode_len: int,
    beams: int = 1,
    decoder_prefix: Sequence[int] = (),
) -> Start:
    """Encodes each input once and fills in the decoder prefix.

    Args:
        params, config, encoder_input_tokens, max_decode_len, decoder_prefix: as for `greedy_decode`.
        beams: number of decoder rows for each input. The rows of an input are adjacent.
    """
    gpu = _gpu()
    if gpu:
        config = dataclasses.replace(config, unrolled_decoder=True)
    model = EncoderDecoder(config)
    segments = (encoder_input_tokens != PAD_ID).astype(jnp.int32)

    def encode(tokens, segments) -> Any:
        return model.apply({"params": params}, tokens, segments, method="encode")

    encoded = in_row_blocks(encode, encoder_input_tokens, segments)
    given = len(decoder_prefix)
    # Computing keys and values of the inputs pays off if enough queries read them. `Attention.over_states`
    # gives the number of queries at which the operations break even. Half of it is enough, since the small
    # matmuls of `over_states` are slow. A GPU reads keys and values as fast as the states, and in one kernel
    # instead of nine, so it keeps them where they fit. A TPU keeps the states in its own fast memory.
    side = config.decoder
    worth = side.head_dim * side.num_kv_heads // side.num_heads
    cross = 2 * beams * (given + max_decode_len) > worth
    cross = cross or (gpu is not None and _has_room(config, encoded, gpu))
    cache = start_cache(params, encoded, config, given + max_decode_len, cross=cross)
    memory: dict[str, Any] = {
        name: cache.pop(name) for name in [*cache] if name.startswith("cross")
    }
    memory["segments"] = segments
    if not cross:
        memory["encoded"] = (encoded, encoded.swapaxes(1, 2))
    if config.unrolled_decoder:
        params = unrolled(params, config)

    def step_at(last, cache, memory, index):
        of_layers = {name: x for name, x in memory.items() if name.startswith("cross")}
        called: Any = model.apply(
            {"params": params},
            last[:, None],
            {**cache, **of_layers},
            memory["segments"],
            index,
            memory.get("encoded"),
            method="decode_step",
        )
        logits, new = called
        return logits, {name: new[name] for name in cache}

    def step(last, cache, memory, index):
        return step_at(last, cache, memory, index + given)

    batch, begin = encoder_input_tokens.shape[0], jnp.array([PAD_ID, *decoder_prefix], jnp.int32)
    if given:  # before the beams are made, so once for each input

        def fill(cache, index):
            return step_at(jnp.full(batch, begin[index]), cache, memory, index)[1], None

        cache, _ = jax.lax.scan(fill, cache, jnp.arange(given))
    # rows a, b with 2 beams become a a b b, on the axis after the layers
    cache = {name: jnp.repeat(x, beams, axis=1) for name, x in cache.items()}
    last = jnp.full(batch * beams, begin[-1])
    return Start(step, cache, memory, last, jnp.sum(segments, axis=-1) == 0)


def _gpu() -> str | None:
    """Returns the kind of GPU that the traced program is for, or None for other devices."""
    return traced_device().device_kind if traced_platform() == "gpu" else None


def _has_room(config: ModelConfig, encoded: jax.Array, kind: str) -> bool:
    """Returns whether the keys and values of `encoded`, for all layers, fit into 1/8 of the GPU's memory.

    The result is False if the memory or the size of the batch is unknown.
    """
    chip, (batch, length, _) = chip_of(kind), encoded.shape
    if chip is None or not isinstance(batch, int) or not isinstance(length, int):
        return False
    side = config.decoder
    of_layer = 2 * batch * length * side.num_kv_heads * side.head_dim * encoded.dtype.itemsize
    return side.num_layers * of_layer <= KEPT * chip.memory


def decode_tokens(
    params: Any,
    config: ModelConfig,
    encoder_input_tokens: jax.Array,
    choose: Callable[[jax.Array, jax.Array, jax.Array], jax.Array],
    *,
    max_decode_len: int,
    decoder_prefix: Sequence[int] = (),
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Decodes one token at a time until every row has ended or has `max_decode_len` tokens.

    Args:
        params, config, encoder_input_tokens, max_decode_len, decoder_prefix: as for `greedy_decode`.
        choose: (logits [rows, vocab] float32, scalar position, indices of these rows in the batch [rows]) ->
            next ids [rows].

    Returns:
        The arrays (ids, scores, finished) of `greedy_decode`.
    """
    batch = encoder_input_tokens.shape[0]
    begin = start(
        params,
        config,
        encoder_input_tokens,
        max_decode_len=max_decode_len,
        decoder_prefix=decoder_prefix,
    )
    answers = {
        "ids": jnp.full((batch, max_decode_len), PAD_ID, jnp.int32),
        "scores": jnp.zeros(batch, jnp.float32),
        "done": begin.filler,
    }
    state = {"index": jnp.int32(0), "last": begin.last, "cache": begin.cache, **answers}
    memory, places, sizes = begin.memory, jnp.arange(batch), _sizes(batch)

    def body(state):
        logits, cache = begin.step(state["last"], state["cache"], memory, state["index"])
        chosen = choose(logits, state["index"], places).astype(jnp.int32)
        # the log softmax of the chosen id only, so that no second array [rows, vocab] is written
        log_prob = jnp.take_along_axis(logits, chosen[:, None], axis=-1)[:, 0]
        log_prob -= jax.nn.logsumexp(logits, axis=-1)
        # a row that is done stays in the batch: it gets padding, and its score no longer changes
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

    # most labels are short, so the few unfinished rows go on alone in a smaller batch
    for i, size in enumerate(sizes):
        if i > 0:
            rows = jnp.argsort(state["done"], stable=True)[:size]  # unfinished rows come first
            places, memory = places[rows], _take_rows(memory, rows)
            index = state.pop("index")
            state = {**_take_rows(state, rows), "index": index}
        # 64 rows, sizes [64, 16]: the first loop ends when 16 or fewer rows are unfinished, the second when
        # all have finished
        enough = sizes[i + 1] if i + 1 < len(sizes) else 0

        def unfinished(state, enough=enough):
            going = jnp.sum(~state["done"])
            return (state["index"] < max_decode_len) & (going > enough)

        state = jax.lax.while_loop(unfinished, body, state)
        # back to the rows' places in the batch; rows that finished earlier are in `answers` already
        answers = {name: x.at[places].set(state[name]) for name, x in answers.items()}
    return answers["ids"], answers["scores"], answers["done"] & ~begin.filler


def _sizes(batch: Any) -> list[int]:
    """Returns the batch sizes of the loop, largest first: `_sizes(64)` is [64, 16].

    The loop goes on with the next size when all unfinished rows fit into it. A symbolic batch size (`jax.export`) is
    the only size.
    """
    sizes = [batch]
    while isinstance(batch, int) and len(sizes) <= SMALLER_SIZES and sizes[-1] >= FEWER * FEWEST:
        sizes.append(sizes[-1] // FEWER)
    return sizes


def _take_rows(arrays: dict[str, Any], rows: jax.Array) -> dict[str, Any]:
    """Takes the given rows of each array, on axis 1 if there is a layer axis and otherwise on axis 0."""

    def take(name: str, x: Any) -> Any:
        axis = 1 if name == "cache" or name.startswith("cross") else 0
        return jax.tree.map(functools.partial(jnp.take, indices=rows, axis=axis), x)

    return {name: take(name, x) for name, x in arrays.items()}
