"""The lines of the model card work as they stand, and the tools in them decode as we do."""

import dataclasses
import json
import re

import jax
import numpy as np
import pytest

from stepdistill_jax.data.vocabulary import load_vocabulary
from stepdistill_jax.formats.card import model_card
from stepdistill_jax.formats.directory import write_model_files
from stepdistill_jax.inference import LabelDecoder, export, load_model
from stepdistill_jax.models.config import LoraConfig
from stepdistill_jax.models.encoder_decoder import init_params
from stepdistill_jax.models.families import model_config
from stepdistill_jax.runtime.checkpoints.manager import Checkpoints

LENGTH = 8
V1_0 = {
    "mlp_activations": ("relu",),
    "logits_via_embedding": True,
    "scale_decoder_outputs": True,
}


@pytest.fixture(scope="module", params=[{}, V1_0], ids=["v1_1", "v1_0"])
def exported(request, tmp_path_factory, tiny_config, task_info, spiece):
    """The directory of a random model; EOS is likely enough for answers of all lengths, 0 included."""
    config = dataclasses.replace(tiny_config, **request.param)
    params = jax.jit(init_params, static_argnums=0)(config, jax.random.key(0))
    if config.logits_via_embedding:
        params["token_embedder"] = params["token_embedder"].at[1].multiply(1.5)
        # a tied model that has learnt nothing repeats the token that it was given
        layers = params["decoder"]["layers"]
        layers["encoder_decoder_attention"]["out"]["kernel"] *= 3
        layers["mlp"]["wo"]["kernel"] *= 15
    else:
        params["logits_dense"]["kernel"] = params["logits_dense"]["kernel"].at[:, 1].multiply(3)
    workdir = tmp_path_factory.mktemp("run")
    write_model_files(workdir, config, load_vocabulary(spiece), task_info)
    checkpoints = Checkpoints(workdir)
    checkpoints.save(1, params, {"step": np.int32(1)}, {"step": 1, "validated": False})
    checkpoints.close()
    folder = tmp_path_factory.mktemp("model") / "exported"
    export(workdir, folder)
    return folder


@pytest.fixture(scope="module")
def asked(exported, questions):
    """(prompts, their ids, our answers)."""
    prompts = ["predict: " + q["input"] for q in questions[:30]]
    model = load_model(exported)
    rows = [[*model.vocabulary.encode(p), 1] for p in prompts]
    rows = [row if len(row) <= 40 else [*row[:39], 1] for row in rows]
    decoder = LabelDecoder(model.config, max_decode_len=LENGTH, batch_size=30)
    ours = decoder(model.params, rows)
    assert 0 < ours.finished.sum() < 30 and len(set(map(tuple, ours.ids))) > 5
    return prompts, rows, ours


def run_card(folder, number):
    """Names that a block of Python of the card leaves."""
    blocks = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)
    names = {}
    exec(blocks[number].replace("THIS_FOLDER", str(folder)), names)
    return names


def test_transformers_decodes_the_same_ids_to_the_same_scores(exported, asked, capsys):
    torch = pytest.importorskip("torch", reason="torch is not installed: nothing to compare with")
    prompts, rows, ours = asked
    names = run_card(exported, 0)
    assert capsys.readouterr().out.count("\n") == 1
    tokenizer, model = names["tokenizer"], names["model"]
    assert [tokenizer(p, truncation=True)["input_ids"] for p in prompts] == rows
    inputs = tokenizer(prompts, truncation=True, padding=True, return_tensors="pt")
    with torch.no_grad():
        out = model.generate(
            **inputs, do_sample=False, output_logits=True, return_dict_in_generate=True
        )
    ids = out.sequences[:, 1:].tolist()
    log_probs = torch.stack(out.logits, 1).log_softmax(-1).numpy()
    for i, want in enumerate(ours.ids):
        assert ids[i] == want + [0] * (len(ids[i]) - len(want))
        score = log_probs[i, range(len(want)), want].sum()
        assert abs(score - ours.scores[i]) < 5e-5  # measured 4e-6 at -15


def test_ctranslate2_decodes_the_same_ids_to_the_same_scores(exported, asked, capsys):
    pytest.importorskip("ctranslate2", reason="ctranslate2 is not installed ([bench])")
    pytest.importorskip("torch", reason="torch is not installed: CTranslate2 converts through it")
    _, rows, ours = asked
    names = run_card(exported, 1)
    assert capsys.readouterr().out.count("\n") == 1
    tokens = json.loads((exported / "ctranslate2" / "shared_vocabulary.json").read_text())
    results = names["translator"].translate_batch(
        [names["tokenizer"].convert_ids_to_tokens(row) for row in rows],
        beam_size=1,
        min_decoding_length=0,  # else EOS is forbidden at first
        max_decoding_length=LENGTH,
        length_penalty=0,
        return_scores=True,
    )
    for result, want, score in zip(results, ours.ids, ours.scores, strict=True):
        ids = [tokens.index(token) for token in result.hypotheses[0]]
        assert ids == [i for i in want if i != 1]
        assert abs(result.scores[0] - score) < 5e-5


def test_the_card_says_which_family_it_is(exported):
    card = (exported / "README.md").read_text()
    tied = load_model(exported).config.logits_via_embedding
    assert ("A T5 v1.0 (ReLU)" in card) == tied
    assert ("A T5 v1.1 (gated GELU)" in card) != tied
    assert ("about tied weights" in card) != tied
    assert "Started from random weights" in card and "No validation was run" in card


@pytest.mark.parametrize(
    ("family", "vocabulary", "words"),
    [
        ("t5_v1_0", None, "A T5 v1.0 (ReLU)"),
        ("t5_v1_1", None, "A T5 v1.1 (gated GELU)"),
        ("byt5", "bytes", "A ByT5"),
        ("umt5", None, "A UMT5"),
    ],
)
def test_the_card_names_families_and_adapters(family, vocabulary, words, task_info, spiece):
    config = model_config(family, "tiny", vocab_size=384)
    card = model_card(
        task_info,
        config,
        load_vocabulary(vocabulary or spiece),
        num_parameters=1234,
        version="1",
        step=2,
        metrics={},
        lora=LoraConfig(query=4, value=8),
    )
    assert f"{words} of 1,234 parameters" in card
    assert "rank query 4, value 8; alpha 16" in card
    assert ("every UMT5" in card) == (family == "umt5")
