"""What the searches are compared with: teacher forcing, on models of few ids."""

import jax
import numpy as np
import pytest


@pytest.fixture(scope="session")
def log_probs_of():
    """(config, params, inputs, answers, both [rows, any] padded with 0) -> [rows, any, vocab]."""
    from stepdistill_jax.models.encoder_decoder import EncoderDecoder

    def teacher_forced(config, params, inputs, answers):
        batch = {
            "encoder_input_tokens": inputs,
            "encoder_segment_ids": (inputs > 0).astype(np.int32),
            "decoder_input_tokens": np.pad(answers, ((0, 0), (1, 0)))[:, :-1],
            "decoder_segment_ids": np.ones_like(answers),
        }
        logits = jax.jit(EncoderDecoder(config).apply)({"params": params}, batch)
        logits = np.asarray(logits, np.float64)
        return logits - np.log(np.exp(logits).sum(-1, keepdims=True))

    return teacher_forced


@pytest.fixture(scope="session")
def model_of_few_ids():
    """(number of ids, of decoder layers, seed) -> (config, params)."""
    from stepdistill_jax.models.encoder_decoder import init_params
    from stepdistill_jax.models.t5 import T5Config

    def make(vocab_size, num_decoder_layers, seed):
        config = T5Config(
            vocab_size=vocab_size,
            emb_dim=16,
            num_heads=2,
            head_dim=8,
            mlp_dim=24,
            num_encoder_layers=1,
            num_decoder_layers=num_decoder_layers,
        )
        return config, jax.jit(init_params, static_argnums=0)(config, jax.random.key(seed))

    return make
