"""Samples answers. A row's draw depends only on the random key and the row's ids."""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from stepdistill_jax.data.vocabulary import PAD_ID
from stepdistill_jax.decoding.token_loop import decode_tokens
from stepdistill_jax.models.config import ModelConfig
from stepdistill_jax.runtime.checks import number, whole


def sample_decode(
    params: Any,
    config: ModelConfig,
    encoder_input_tokens: jax.Array,
    *,
    max_decode_len: int,
    decoder_prefix: Sequence[int] = (),
    rng: jax.Array,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Samples an answer for each row from the model's distribution.

    Equal rows get equal answers. To sample other answers, pass another `rng`.

    Example: `LabelDecoder(..., decode_fn=functools.partial(sample_decode, rng=jax.random.key(0)))`.

    Args:
        params, config, encoder_input_tokens, max_decode_len, decoder_prefix: as for `greedy_decode`.
        temperature: divisor of the logits, above 0.
        top_k: number of likeliest tokens that can be drawn; ties are kept; 0 means all.
        top_p: probability from 0 to 1. Of the tokens that `top_k` allows, only the likeliest can be drawn: the
            fewest with a total probability of at least `top_p`. 0 means one token, 1 means all.

    Returns:
        The arrays of `greedy_decode`. The scores ignore the three options.

    Raises:
        InputError: `temperature`, `top_k` or `top_p` is out of range.
    """
    number("temperature", temperature, above=0)
    whole("top_k", top_k, 0)
    number("top_p", top_p, least=0, most=1)
    keys = row_keys(rng, encoder_input_tokens)

    def choose(logits, index, places):
        allowed = filter_logits(logits, temperature=temperature, top_k=top_k, top_p=top_p)
        # `places` are places in the whole batch, so a row keeps its key when the loop goes on with fewer rows
        now = jax.vmap(jax.random.fold_in, in_axes=(0, None))(keys[places], index)
        return jax.vmap(jax.random.categorical)(now, allowed)

    return decode_tokens(
        params,
        config,
        encoder_input_tokens,
        choose,
        max_decode_len=max_decode_len,
        decoder_prefix=decoder_prefix,
    )


def filter_logits(logits: jax.Array, *, temperature: float, top_k: int, top_p: float) -> jax.Array:
    """Divides logits [..., vocab] by `temperature`, and sets them to -inf for tokens that cannot be drawn.

    The options have the same meaning, and are applied in the same order, as in transformers
    (`TemperatureLogitsWarper`, `TopKLogitsWarper`, `TopPLogitsWarper`).
    """
    logits = logits / temperature
    if 0 < top_k < logits.shape[-1]:
        last = jax.lax.top_k(logits, top_k)[0][..., -1:]
        logits = jnp.where(logits < last, -jnp.inf, logits)
    if top_p < 1:
        # probabilities .2 .5 .3 and top_p .6: `order` is 1 2 0, `likelier` is 0 .5 .8, so ids 1 and 2 can be
        # drawn
        order = jnp.argsort(-logits, axis=-1)
        probs = jax.nn.softmax(jnp.take_along_axis(logits, order, axis=-1), axis=-1)
        likelier = jnp.cumsum(probs, axis=-1) - probs  # probability of all tokens before this one
        keep = (likelier < top_p).at[..., 0].set(True)
        # argsort of a permutation is its inverse: back to the order of the ids
        keep = jnp.take_along_axis(keep, jnp.argsort(order, axis=-1), axis=-1)
        logits = jnp.where(keep, logits, -jnp.inf)
    return logits


def row_keys(rng: jax.Array, encoder_input_tokens: jax.Array) -> jax.Array:
    """Returns a random key for each row, [batch], from `rng` and the row's ids without padding."""
    # with JAX's other generators, a row's bits depend on its batch; with threefry they do not
    threefry = functools.partial(jax.random.wrap_key_data, impl="threefry2x32")
    rng = threefry(jax.random.bits(rng, (2,), jnp.uint32))

    def words(position, id):  # [2] for one id at one position
        return jax.random.key_data(jax.random.fold_in(jax.random.fold_in(rng, position), id))

    def key(ids):  # [length]
        each = jax.vmap(words)(jnp.arange(ids.shape[0]), ids)
        # a sum: trailing zeros do not change it, and all positions are computed at once
        return threefry(jnp.sum(jnp.where(ids[:, None] == PAD_ID, 0, each), 0, dtype=jnp.uint32))

    return jax.vmap(key)(encoder_input_tokens)
