"""Every family's directory: configuration there and back, and opened by `transformers`."""

import json

import jax
import numpy as np
import pytest

from stepdistill_jax.data.vocabulary import load_vocabulary
from stepdistill_jax.formats.directory import read_config, write_model_files
from stepdistill_jax.formats.hf import load_params, save_params
from stepdistill_jax.models.encoder_decoder import EncoderDecoder
from stepdistill_jax.models.families import model_config

# family -> model_type and class of its directory; mT5 and ByT5 are T5 v1.1 but for sizes and vocabulary
MODEL_TYPES = dict.fromkeys(("t5_v1_0", "t5_v1_1", "mt5", "byt5", "ul2"), ("t5", "T5"))
MODEL_TYPES |= {"umt5": ("umt5", "UMT5"), "t5gemma": ("t5gemma", "T5Gemma")}
# ul2 is T5 v1.1 with another activation; test_t5gemma.py has more than these
SLOW = {name: pytest.param(name, marks=pytest.mark.slow) for name in ("ul2", "t5gemma")}


@pytest.fixture(params=[SLOW.get(name, name) for name in MODEL_TYPES])
def written(request, make_params, tmp_path):
    """(family, config, directory with weights)."""
    config = model_config(request.param, "tiny", vocab_size=259)
    write_model_files(tmp_path, config, load_vocabulary("bytes"), None)
    save_params(tmp_path, jax.tree.map(lambda x: 0.3 * x, make_params(config)), config)
    return request.param, config, tmp_path


def test_the_configuration_is_read_back_as_written(written):
    family, config, directory = written
    raw = json.loads((directory / "config.json").read_text())
    kind, name = MODEL_TYPES[family]
    assert raw["model_type"] == kind
    assert raw["architectures"] == [f"{name}ForConditionalGeneration"]
    assert read_config(directory) == config
    (directory / "model.safetensors").unlink()  # and as a workdir has it, without weights beside it
    assert read_config(directory) == config


def test_transformers_gives_our_logits(written):
    torch = pytest.importorskip("torch", reason="torch is not installed: no logits to compare with")
    import transformers

    family, config, directory = written
    auto = transformers.AutoModelForSeq2SeqLM  # eager: else nothing caps the scores of T5Gemma
    model = auto.from_pretrained(directory, attn_implementation="eager").eval()
    assert type(model).__name__ == f"{MODEL_TYPES[family][1]}ForConditionalGeneration"
    if family == "umt5":  # transformers 5 forces true and scales the logits of an untied head
        model.config.tie_word_embeddings = False
    rng = np.random.default_rng(0)
    source, target = rng.integers(2, 259, (2, 2, 9))
    with torch.no_grad():
        want = model(
            input_ids=torch.tensor(source), decoder_input_ids=torch.tensor(target), use_cache=False
        ).logits.numpy()
    batch = {
        "encoder_input_tokens": source.astype(np.int32),
        "encoder_segment_ids": np.ones_like(source, np.int32),
        "decoder_input_tokens": target.astype(np.int32),
        "decoder_segment_ids": np.ones_like(target, np.int32),
    }
    got = jax.jit(EncoderDecoder(config).apply)({"params": load_params(directory, config)}, batch)
    assert np.std(want) > 0.01
    # measured: at most 2e-6 of the largest logit
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5 * np.abs(want).max())
