"""The form of the decoder for a GPU, run on a CPU, against the one with a loop over layers."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from stepdistill_jax.decoding.beam import beam_search
from stepdistill_jax.decoding.greedy import greedy_decode
from stepdistill_jax.models.encoder_decoder import init_params
from stepdistill_jax.models.quantized import quantize
from stepdistill_jax.models.t5 import T5Config

# 8 tokens are few for heads so wide: their queries read the encoder's states, and 18 keys and values
CONFIG = T5Config(
    vocab_size=128,
    emb_dim=32,
    num_heads=2,
    head_dim=32,
    mlp_dim=48,
    num_encoder_layers=1,
    num_decoder_layers=3,
)
# a position bias for each layer, one feed-forward projection
OTHER = dataclasses.replace(CONFIG, shared_relative_position_bias=False, mlp_activations=("relu",))


@pytest.mark.parametrize(
    ("config", "int8", "search"),
    [
        pytest.param(
            CONFIG,
            False,
            {"decoder_prefix": (5, 9)},
            id="greedy after a prefix",
            marks=pytest.mark.slow,
        ),
        pytest.param(OTHER, True, {"num_beams": 3}, id="beams of int8 weights"),
    ],
)
def test_answers_and_scores_are_those_of_the_loop_over_layers(config, int8, search):
    params = jax.jit(init_params, static_argnums=0)(config, jax.random.key(2))
    if int8:
        params, config = quantize(params, config)
    rng = np.random.default_rng(1)
    inputs = rng.integers(3, 128, (9, 14)) * (np.arange(14) < rng.integers(1, 15, (9, 1)))
    decode = beam_search if "num_beams" in search else greedy_decode

    def answers(config):
        asked = functools.partial(decode, config=config, max_decode_len=6, **search)
        found = jax.jit(lambda params, ids: asked(params, encoder_input_tokens=ids))
        return map(np.asarray, found(params, jnp.asarray(inputs, jnp.int32)))

    ids, scores, finished = answers(dataclasses.replace(config, unrolled_decoder=True))
    want, of_want, ended = answers(config)
    assert len({tuple(row) for row in want.tolist()}) > 3
    np.testing.assert_array_equal(ids, want)
    np.testing.assert_array_equal(finished, ended)
    # measured: 2e-6
    np.testing.assert_allclose(scores, of_want, rtol=0, atol=1e-5)
