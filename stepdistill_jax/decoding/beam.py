"""Beam search with the scores, candidates and stopping rule of Hugging Face's `generate`."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from stepdistill_jax.data.vocabulary import EOS_ID, PAD_ID
from stepdistill_jax.decoding.greedy import greedy_decode
from stepdistill_jax.decoding.token_loop import start
from stepdistill_jax.errors import InputError
from stepdistill_jax.models.config import ModelConfig
from stepdistill_jax.runtime.checks import number, whole

NOTHING = -1e9  # log probability of a candidate that cannot be chosen
LENGTH_PENALTY = 1.0


def beam_search(
    params: Any,
    config: ModelConfig,
    encoder_input_tokens: jax.Array,
    *,
    max_decode_len: int,
    decoder_prefix: Sequence[int] = (),
    num_beams: int,
    length_penalty: float = LENGTH_PENALTY,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Finds each row's best answer by beam search.

    Answers are ranked by `sum of log probabilities / tokens ** length_penalty`, where the end of sequence counts as
    a token. The result equals `generate(num_beams=..., length_penalty=..., do_sample=False, early_stopping=False)`
    of transformers 5.23 (generation/utils.py, `_beam_search`).

    Args:
        params, config, encoder_input_tokens, max_decode_len, decoder_prefix: as for `greedy_decode`.
        num_beams: at least 1; 1 means `greedy_decode`.
        length_penalty: -10 to 10. A value above 0 favours long answers; 0 ignores the length.

    Returns:
        The arrays of `greedy_decode`. The scores are sums of log probabilities, without the length penalty.

    Raises:
        InputError: `num_beams` or `length_penalty` is out of range.
    """
    _check(num_beams, length_penalty)
    asked = params, config, encoder_input_tokens
    lengths: Any = {"max_decode_len": max_decode_len, "decoder_prefix": decoder_prefix}
    if num_beams == 1:
        return greedy_decode(*asked, **lengths)
    begin = start(*asked, beams=num_beams, **lengths)
    batch = encoder_input_tokens.shape[0]
    ids = jnp.full((batch, num_beams, max_decode_len), PAD_ID, jnp.int32)
    state = {
        "index": jnp.int32(0),
        "done": begin.filler,
        # All beams start with the same ids, so all would have the same best continuations. So only the first
        # beam counts at the first step.
        "running": {
            "ids": ids,
            "log_probs": jnp.full((batch, num_beams), NOTHING).at[:, 0].set(0.0),
        },
        "last": begin.last,
        "cache": begin.cache,
        "ended": {
            "ids": ids,
            "log_probs": jnp.zeros((batch, num_beams), jnp.float32),
            "scores": jnp.full((batch, num_beams), -jnp.inf),
            "there": jnp.zeros((batch, num_beams), bool),
        },
    }
    # divisor of an answer that ends at each index: at index i it has i + 1 tokens
    penalties = jnp.asarray(np.arange(1, max_decode_len + 1.0) ** length_penalty, jnp.float32)

    def body(state):
        index, running = state["index"], state["running"]
        logits, cache = begin.step(state["last"], state["cache"], begin.memory, index)
        log_probs, beams, tokens = _candidates(logits, running["log_probs"])
        candidates = {
            "ids": jax.lax.dynamic_update_slice_in_dim(
                _gather(running["ids"], beams), tokens[..., None], index, axis=2
            ),
            "log_probs": log_probs,
        }
        ends = (tokens == EOS_ID) | (index + 1 == max_decode_len)
        # as in `generate`: a candidate that ends but is not among the first `num_beams` is dropped, and a row
        # that is done takes no further answers
        ended = _keep_ended(
            state["ended"],
            candidates,
            ends & ~state["done"][:, None] & (jnp.arange(2 * num_beams) < num_beams),
            penalties[index],
        )
        # each beam has only one continuation that ends, so at least `num_beams` of the candidates do not end
        go_on, places = jax.lax.top_k(jnp.where(ends, log_probs + NOTHING, log_probs), num_beams)
        # a row is done when it has `num_beams` finished answers, and its best unfinished one, scored at its current
        # length, is no better than the worst of them
        worst = jnp.min(ended["scores"], axis=-1)
        hopeless = go_on[:, 0] / penalties[index] <= worst
        return {
            "index": index + 1,
            "done": state["done"] | (jnp.all(ended["there"], axis=-1) & hopeless),
            "running": {"ids": _gather(candidates["ids"], places), "log_probs": go_on},
            "last": _gather(tokens, places).reshape(-1),
            "cache": _reorder(cache, _gather(beams, places)),
            "ended": ended,
        }

    def unfinished(state):
        return (state["index"] < max_decode_len) & ~jnp.all(state["done"])

    state = jax.lax.while_loop(unfinished, body, state)
    best = {name: x[:, 0] for name, x in state["ended"].items()}  # the best comes first
    finished = jnp.any(best["ids"] == EOS_ID, axis=-1)
    return best["ids"], best["log_probs"], finished


def search(num_beams: int, length_penalty: float | None = None) -> Callable:
    """Returns the decode function for these options, for `LabelDecoder`.

    Args:
        length_penalty: as for `beam_search`; None means 1.

    Raises:
        InputError: an option is out of range, or a single beam has a length penalty.
    """
    penalty = LENGTH_PENALTY if length_penalty is None else length_penalty
    _check(num_beams, penalty)
    if num_beams > 1:
        return _search(num_beams, float(penalty))
    if length_penalty is not None:
        raise InputError(
            "`length_penalty`: it has no effect with a single beam; set `num_beams=2` or more, or"
            " leave it out"
        )
    return greedy_decode


# cached, so that equal options give the same function object, which is compiled only once
@functools.lru_cache(maxsize=8)
def _search(num_beams: int, length_penalty: float) -> Callable:
    return functools.partial(beam_search, num_beams=num_beams, length_penalty=length_penalty)


def _check(num_beams: int, length_penalty: float) -> None:
    whole("num_beams", num_beams, 1)
    # 1024 ** 10 = 2^100 fits float32, and 1024 ** 13 does not
    number("length_penalty", length_penalty, least=-10, most=10)


def _candidates(logits: jax.Array, log_probs: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns the 2 * beams best continuations of each row, the best first.

    They are three arrays [batch, 2 * beams]: log probability, index of the continued beam, and new token.
    """
    batch, num_beams = log_probs.shape
    vocab = logits.shape[-1]
    total = nn.log_softmax(logits).reshape(batch, num_beams, vocab) + log_probs[..., None]
    # a flat index is beam * vocab + token: with 10 ids, index 27 is token 7 after beam 2
    best, places = jax.lax.top_k(total.reshape(batch, -1), 2 * num_beams)
    return best, places // vocab, places % vocab


def _keep_ended(ended, candidates, ends, penalty):
    """Adds the answers that end now to each row's finished answers, and keeps the best `num_beams` of each row."""
    new = {
        **candidates,
        "scores": jnp.where(ends, candidates["log_probs"] / penalty, -jnp.inf),
        "there": ends,
    }
    # [batch, beams] and [batch, 2 * beams] -> [batch, 3 * beams], of which `beams` are kept. Candidates that do
    # not end have the score -inf.
    merged = {name: jnp.concatenate([ended[name], new[name]], axis=1) for name in ended}
    _, places = jax.lax.top_k(merged["scores"], ended["scores"].shape[1])
    return {name: _gather(x, places) for name, x in merged.items()}


def _gather(x: jax.Array, places: jax.Array) -> jax.Array:
    """Returns the items of x [batch, n, ...] at each row's indices `places` [batch, m], as [batch, m, ...]."""
    return jax.vmap(lambda row, chosen: row[chosen])(x, places)


def _reorder(cache: dict[str, jax.Array], beams: jax.Array) -> dict[str, jax.Array]:
    """Gives each beam the keys and values of the beam that it continues.

    `beams` contains the index of the continued beam, [batch, beams].
    """

    def reorder(x):  # [layers, batch * beams, ...]
        by_row = x.reshape(x.shape[0], *beams.shape, *x.shape[2:])
        return jax.vmap(_gather, in_axes=(0, None))(by_row, beams).reshape(x.shape)

    return jax.tree.map(reorder, cache)
