"""The model card says what its readers need of each family, and nothing of another."""

import dataclasses

import pytest

from stepdistill_jax.data.vocabulary import load_vocabulary
from stepdistill_jax.formats.card import model_card
from stepdistill_jax.models.families import model_config

WORDS = {
    "t5_v1_0": "A T5 v1.0 (ReLU) of",
    "t5_v1_1": "A T5 v1.1 (gated GELU) of",
    "umt5": "A UMT5 of",
    "ul2": "A UL2 (gated SiLU) of",
    "t5gemma": "A T5Gemma of",
}


@pytest.fixture
def card_of(task_info, spiece):
    def card(config):
        made = {"num_parameters": 1234, "version": "1", "step": 5, "metrics": {}}
        return model_card(task_info, config, load_vocabulary(spiece), **made)

    return card


@pytest.mark.parametrize("family", WORDS)
def test_the_family_is_named_and_ctranslate2_is_for_t5_alone(family, card_of):
    card = card_of(model_config(family, "tiny", vocab_size=128))
    assert f"{WORDS[family]} 1,234 parameters" in card
    is_gemma = family == "t5gemma"
    assert ("ctranslate2" in card) != is_gemma
    assert ("Gemma Terms of Use" in card) == is_gemma
    assert f"tags: [{'t5gemma' if is_gemma else 't5'}, " in card


def test_sides_of_two_sizes_are_both_said(card_of):
    config = model_config("t5gemma", "9b-2b", vocab_size=256_000)
    card = card_of(config)
    assert "(42 encoder layers of width 3584, 26 decoder layers of width 2304)" in card


def test_a_decoder_prefix_stands_behind_the_start_of_its_family(task_info, spiece):
    label, rationale = task_info.objectives
    prefixed = dataclasses.replace(rationale, decoder_prefix="explain:")
    info = dataclasses.replace(task_info, objectives=(label, prefixed))
    vocabulary = load_vocabulary(spiece)
    ids = ", ".join(map(str, vocabulary.encode("explain:")))
    made = {"num_parameters": 1, "version": "1", "step": 5, "metrics": {}}
    for family, start in (("t5_v1_1", 0), ("t5gemma", 2)):
        config = model_config(family, "tiny", vocab_size=128)
        assert f"new_tensor([[{start}, {ids}]])" in model_card(info, config, vocabulary, **made)
