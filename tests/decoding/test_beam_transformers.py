"""Beam search against `generate` of transformers (torch, CPU): the same sequences and scores."""

import dataclasses
import functools

import jax
import numpy as np
import pytest

from stepdistill_jax.decoding.beam import search
from stepdistill_jax.decoding.greedy import LabelDecoder
from stepdistill_jax.models.encoder_decoder import init_params

MAX_DECODE_LEN = 12
ROWS = 200


@pytest.fixture(scope="module")
def make_pair(tmp_path_factory, tiny_config, tiny_t5gemma):
    """(encoder depth, or "t5gemma") -> (config, params, the model of transformers that reads them)."""
    pytest.importorskip("torch", reason="torch is not installed: no oracle to compare with")
    import transformers

    from stepdistill_jax.formats.config_json import config_json
    from stepdistill_jax.formats.hf import save_params
    from stepdistill_jax.runtime.files import write_json

    @functools.cache
    def make(model):
        if model == "t5gemma":
            config, params = tiny_t5gemma
        else:
            depths = {"num_encoder_layers": model, "num_decoder_layers": 2}
            config = dataclasses.replace(tiny_config, **depths)
            params = jax.jit(init_params, static_argnums=0)(config, jax.random.key(0))
            kernel = params["logits_dense"]["kernel"]
            # a random head never says EOS: ended answers and the stopping rule would not be compared
            params["logits_dense"]["kernel"] = kernel.at[:, 1].multiply(3.0)
        folder = tmp_path_factory.mktemp("pair")
        write_json(folder / "config.json", config_json(config))
        save_params(folder, params, config)
        auto = transformers.AutoModelForSeq2SeqLM
        return config, params, auto.from_pretrained(folder, attn_implementation="eager").eval()

    return make


@pytest.fixture(scope="module")
def inputs():
    rng = np.random.default_rng(0)
    return [[*rng.integers(3, 128, rng.integers(1, 32)).tolist(), 1] for _ in range(ROWS)]


def generated(model, config, inputs, num_beams, **options):
    """What `generate` gives: its sequences, without the start, and their scores."""
    import torch

    source = np.zeros((ROWS, 32), np.int64)
    for i, row in enumerate(inputs):
        source[i, : len(row)] = row
    depths = {side.num_layers for side in (config.encoder, config.decoder)}
    return model.generate(
        torch.tensor(source),
        attention_mask=torch.tensor(source > 0),
        do_sample=False,
        num_beams=num_beams,
        early_stopping=False,
        max_new_tokens=MAX_DECODE_LEN,
        use_cache=len(depths) == 1,  # transformers 5 raises where the depths differ
        decoder_start_token_id=config.start_id,
        eos_token_id=1,
        pad_token_id=0,
        return_dict_in_generate=True,
        output_scores=True,
        **options,
    )


@pytest.mark.parametrize(
    "model, length_penalty",
    [
        pytest.param(2, 1.0, marks=pytest.mark.slow),
        pytest.param(2, 0.0, marks=pytest.mark.slow),
        pytest.param(2, 2.0, marks=pytest.mark.slow),
        pytest.param(3, 0.6, marks=pytest.mark.slow),
        pytest.param("t5gemma", 1.0, marks=pytest.mark.slow),
        pytest.param("t5gemma", 0.6, marks=pytest.mark.slow),
    ],
)
def test_sequences_and_scores_are_those_of_generate(make_pair, inputs, model, length_penalty):
    config, params, theirs = make_pair(model)
    decoder = LabelDecoder(
        config,
        max_decode_len=MAX_DECODE_LEN,
        batch_size=ROWS,
        decode_fn=search(4, length_penalty),
    )
    got = decoder(params, inputs)
    want = generated(theirs, config, inputs, 4, length_penalty=length_penalty)
    for ids, row in zip(got.ids, want.sequences[:, 1:].tolist(), strict=True):
        # transformers fills up with EOS, not with padding
        assert ids == (row[: row.index(1) + 1] if 1 in row else row)
    lengths = np.array([len(ids) for ids in got.ids])
    # measured: 8e-6, of sums up to 45
    np.testing.assert_allclose(
        got.scores / lengths**length_penalty, want.sequences_scores.numpy(), rtol=1e-6, atol=1e-5
    )
    if length_penalty < 2:  # at 2 almost every answer is as long as it may be
        assert 0.3 * ROWS < got.finished.sum() < 0.7 * ROWS
        assert len(set(lengths.tolist())) > 6


@pytest.mark.slow
def test_greedy_answers_of_t5gemma_are_those_of_generate(make_pair, inputs):
    config, params, theirs = make_pair("t5gemma")
    got = LabelDecoder(config, max_decode_len=MAX_DECODE_LEN, batch_size=ROWS)(params, inputs)
    want = generated(theirs, config, inputs, 1)
    for ids, row in zip(got.ids, want.sequences[:, 1:].tolist(), strict=True):
        assert ids == row[: len(ids)] and not any(row[len(ids) :])
    assert 0.1 * ROWS < got.finished.sum() < 0.9 * ROWS
    assert len({len(ids) for ids in got.ids}) > 6
