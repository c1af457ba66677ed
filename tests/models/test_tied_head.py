"""Whether the head is tied, and whether logits are scaled, where `config.json` and weights disagree."""

import dataclasses
import functools
import json

import jax
import numpy as np
import pytest

from stepdistill_jax.formats import hf
from stepdistill_jax.formats.directory import read_config
from stepdistill_jax.models.encoder_decoder import EncoderDecoder, init_params
from stepdistill_jax.models.t5 import T5Config

UNTIED = T5Config(
    vocab_size=32,
    emb_dim=16,
    num_heads=2,
    head_dim=8,
    mlp_dim=24,
    num_encoder_layers=1,
    num_decoder_layers=1,
)
TIED = dataclasses.replace(UNTIED, logits_via_embedding=True)


@pytest.fixture
def bare_directory(tmp_path):
    """Writes weights of a model, and a `config.json` of another tool's making."""

    def write(config, **flags):
        shapes = jax.eval_shape(functools.partial(init_params, config), jax.random.key(0))
        rng = np.random.default_rng(0)
        params = jax.tree.map(lambda x: rng.normal(size=x.shape).astype(np.float32), shapes)
        hf.save_params(tmp_path, params, config)
        raw = {
            "model_type": "t5",
            "vocab_size": 32,
            "d_model": 16,
            "num_heads": 2,
            "d_kv": 8,
            "d_ff": 24,
            "num_layers": 1,
            "feed_forward_proj": "gated-gelu",
        }
        (tmp_path / "config.json").write_text(json.dumps(raw | flags))
        return tmp_path

    return write


@pytest.mark.parametrize("flags", [{}, {"tie_word_embeddings": True}], ids=["silent", "lies"])
def test_a_head_in_the_weights_is_used_and_not_scaled(bare_directory, flags):
    config = read_config(bare_directory(UNTIED, **flags))
    assert not config.logits_via_embedding and not config.scale_decoder_outputs


@pytest.mark.parametrize("flags", [{}, {"tie_word_embeddings": False}], ids=["silent", "lies"])
def test_weights_without_a_head_are_tied_and_scaled(bare_directory, flags):
    config = read_config(bare_directory(TIED, **flags))
    assert config.logits_via_embedding and config.scale_decoder_outputs


@pytest.mark.parametrize("scaled", [True, False])
@pytest.mark.parametrize("model", [TIED, UNTIED], ids=["tied", "untied"])
def test_an_explicit_scale_decoder_outputs_is_honoured(bare_directory, model, scaled):
    directory = bare_directory(model, scale_decoder_outputs=scaled)
    config = read_config(directory)
    assert config.scale_decoder_outputs == scaled


def test_scaled_logits_are_divided_by_the_root_of_the_width(bare_directory):
    directory = bare_directory(TIED)
    config = read_config(directory)
    params = hf.load_params(directory, config)
    x = np.random.default_rng(1).normal(size=(1, 3, 16)).astype(np.float32)

    def logits(scaled):
        model = EncoderDecoder(dataclasses.replace(config, scale_decoder_outputs=scaled))
        return model.apply({"params": params}, x, method=lambda m, x: m._logits(m._scaled(x)))

    np.testing.assert_allclose(logits(True), logits(False) / 4, rtol=1e-5)  # 16 ** 0.5
    want = x @ np.asarray(params["token_embedder"]).T
    np.testing.assert_allclose(logits(False), want, rtol=1e-5, atol=1e-5)
