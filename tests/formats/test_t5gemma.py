"""Directories of T5Gemma: both forms of `config.json`, one head or two tables, shards, and refusals."""

import copy
import json

import numpy as np
import pytest
import safetensors.numpy

from stepdistill_jax.data.vocabulary import load_vocabulary
from stepdistill_jax.errors import InputError
from stepdistill_jax.formats import hf
from stepdistill_jax.formats.directory import read_config, write_model_files
from stepdistill_jax.models.t5gemma import T5GemmaConfig, gemma_side

SHARED = {
    "model_type": "t5_gemma_module",
    "vocab_size": 384,
    "head_dim": 8,
    "query_pre_attn_scalar": 24,
    "hidden_activation": "gelu_pytorch_tanh",
    "rms_norm_eps": 1e-5,
    "attention_bias": False,
    "final_logit_softcapping": 20.0,
    "attn_logit_softcapping": 40.0,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "bos_token_id": 2,
}
ENCODER = SHARED | {
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "sliding_window": 9,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
}
DECODER = SHARED | {
    "hidden_size": 24,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "sliding_window": 6,
    "layer_types": ["full_attention", "sliding_attention"],
}
# versions 5 of transformers, and 4
ROPE = {
    "rope_parameters": {"rope_parameters": {"rope_type": "default", "rope_theta": 5000.0}},
    "rope_theta": {"rope_theta": 5000.0, "rope_scaling": None},
}
WANTED = T5GemmaConfig(
    vocab_size=384,
    layer_norm_epsilon=1e-5,
    logits_softcap=20.0,
    encoder=gemma_side(
        *(32, 4, 2, 8, 40, 3),
        windows=(9, 0, 9),
        score_scale=24**-0.5,
        score_softcap=40.0,
        rope_theta=5000.0,
    ),
    decoder=gemma_side(
        *(24, 6, 3, 8, 48, 2),
        windows=(0, 6),
        score_scale=24**-0.5,
        score_softcap=40.0,
        rope_theta=5000.0,
    ),
)


def written(form="rope_parameters", **changes):
    """The content of a `config.json`; `changes` hold fields of it, `encoder` and `decoder` of a module."""
    sides = {"encoder": ENCODER | ROPE[form], "decoder": DECODER | ROPE[form]}
    for name in sides:
        sides[name] = sides[name] | changes.pop(name, {})
    return {
        "model_type": "t5gemma",
        "is_encoder_decoder": True,
        "vocab_size": 384,
        **sides,
        **changes,
    }


def write(directory, **changes):
    (directory / "config.json").write_text(json.dumps(written(**changes)))
    return directory


@pytest.mark.parametrize("form", ROPE)
def test_the_configuration_is_read_field_by_field_and_as_transformers_reads_it(form, tmp_path):
    assert read_config(write(tmp_path, form=form)) == WANTED
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoConfig.from_pretrained(tmp_path)
    assert theirs.encoder.rope_parameters == ROPE["rope_parameters"]["rope_parameters"]
    assert (theirs.encoder.sliding_window, theirs.decoder.sliding_window) == (9, 6)


def test_fields_left_out_are_those_of_gemma_2(tmp_path):
    raw = {"model_type": "t5gemma", "encoder": {}, "decoder": {"num_hidden_layers": 3}}
    (tmp_path / "config.json").write_text(json.dumps(raw))
    config = read_config(tmp_path)
    assert config.encoder == gemma_side(2304, 8, 4, 256, 9216, 26)
    assert config.decoder == gemma_side(2304, 8, 4, 256, 9216, 3)
    assert config.decoder.windows == (4096, 0, 4096)
    assert (config.bos_id, config.logits_softcap) == (2, 30.0)


def test_an_instruction_tuned_models_second_end_is_left_out(tmp_path):
    """`eos_token_id` of the published ones also names the end of a turn."""
    ends = {"eos_token_id": [1, 107]}
    assert read_config(write(tmp_path, encoder=ends, decoder=ends)) == WANTED


def test_what_we_write_is_read_back_by_us_and_by_transformers(tmp_path):
    write_model_files(tmp_path, WANTED, load_vocabulary("bytes"), None)
    assert read_config(tmp_path) == WANTED
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoConfig.from_pretrained(tmp_path)
    want = written()
    for side in ("encoder", "decoder"):
        got = getattr(theirs, side).to_dict()
        assert {name: got[name] for name in want[side]} == want[side]
    assert theirs.decoder.cross_attention_hidden_size == 32


REFUSALS = {
    "biases": (
        {"decoder": {"attention_bias": True}},
        "decoder: attention_bias must be one of False",
    ),
    "kind of positions": (
        {"encoder": {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4}}},
        "encoder: rope_parameters must describe plain rotary positions",
    ),
    "positions of each kind of layer": (
        {"encoder": {"rope_parameters": {"full_attention": {"rope_theta": 1e6}}}},
        "encoder: rope_parameters must describe plain rotary positions",
    ),
    "scaled positions": (
        {"decoder": {"rope_scaling": {"type": "linear", "factor": 2}}},
        "decoder: rope_parameters must describe plain rotary positions",
    ),
    "base of positions": (
        {"decoder": {"rope_parameters": {"rope_theta": -1}}},
        "decoder: rope_theta must be a number above 0, got -1",
    ),
    "layers of another kind": (
        {"decoder": {"layer_types": ["full_attention", "chunked_attention"]}},
        "decoder: layer_types must name one of sliding_attention, full_attention for each of 2",
    ),
    "a type too few": (
        {"encoder": {"layer_types": ["full_attention"]}},
        "encoder: layer_types must name one of sliding_attention, full_attention for each of 3",
    ),
    "no window": (
        {"encoder": {"sliding_window": None}},
        "encoder: sliding_window must be a whole number above 0, got None",
    ),
    "a scale that is not whole": (
        {"encoder": {"query_pre_attn_scalar": 24.5}},
        "encoder: query_pre_attn_scalar must be a whole number above 0, got 24.5",
    ),
    "activation": (
        {side: {"hidden_activation": "relu"} for side in ("encoder", "decoder")},
        "decoder: hidden_activation must be one of gelu_pytorch_tanh, silu, got 'relu'",
    ),
    "two activations": (
        {"encoder": {"hidden_activation": "silu"}},
        "encoder: hidden_activation must be one of gelu_pytorch_tanh, got 'silu'",
    ),
    "two vocabularies": (
        {"encoder": {"vocab_size": 512}},
        "encoder: vocab_size must be one of 384, got 512",
    ),
    "two epsilons": ({"encoder": {"rms_norm_eps": 1e-6}}, "encoder: rms_norm_eps must be one of"),
    "heads": (
        {"decoder": {"num_key_value_heads": 4}},
        "`num_kv_heads`: 4 does not divide the 6 heads",
    ),
    "width of the inputs": (
        {"decoder": {"cross_attention_hidden_size": 24}},
        "decoder.cross_attention_hidden_size must be encoder.hidden_size (32), got 24",
    ),
    "another end": (
        {"decoder": {"eos_token_id": [107]}},
        "decoder: eos_token_id must be 1, or a list that begins with it, got [107]",
    ),
    "another padding": ({"decoder": {"pad_token_id": 3}}, "decoder: pad_token_id must be one of 0"),
    "an encoder alone": (
        {"is_encoder_decoder": False},
        "is_encoder_decoder must be one of True, got False",
    ),
    "vision": ({"model_type": "t5gemma2"}, "got 't5gemma2'"),
    "a module": ({"model_type": "t5_gemma_module"}, "got 't5_gemma_module'"),
}


@pytest.mark.parametrize("changes, message", REFUSALS.values(), ids=REFUSALS)
def test_what_would_change_results_is_refused_by_file_side_and_field(changes, message, tmp_path):
    with pytest.raises(InputError) as error:
        read_config(write(tmp_path, **copy.deepcopy(changes)))
    assert str(error.value).startswith(f"{tmp_path / 'config.json'}: ")
    assert message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("side", ["encoder", "decoder"])
def test_a_side_that_is_not_there_is_named(side, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({**written(), side: None}))
    with pytest.raises(InputError, match=f"{side} must be an object, got None"):
        read_config(tmp_path)


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "own head"])
def theirs(request, tmp_path_factory):
    """(whether the head is tied, tensors by name, a directory of shards that transformers wrote)."""
    torch = pytest.importorskip("torch", reason="torch is not installed: no writer to compare with")
    import transformers

    tied = request.param
    modules = {name: transformers.T5GemmaModuleConfig(**side | ROPE["rope_parameters"]) for name, side in (("encoder", ENCODER), ("decoder", DECODER))}  # fmt: skip
    config = transformers.T5GemmaConfig(**modules, vocab_size=384, tie_word_embeddings=tied)
    torch.manual_seed(0)
    model = transformers.T5GemmaForConditionalGeneration(config)
    with torch.no_grad():
        for p in model.parameters():  # initial norms are 0, and any order of them would look right
            p.normal_()
    folder = tmp_path_factory.mktemp("theirs")
    model.save_pretrained(folder, max_shard_size="60KB")
    tensors = {name: p.detach().numpy() for name, p in model.named_parameters()}
    assert ("lm_head.out_proj.weight" in tensors) != tied
    return tied, tensors, folder


def assert_same_tensors(got, want):
    assert got.keys() == want.keys()
    for name, tensor in want.items():
        np.testing.assert_array_equal(got[name], tensor, err_msg=name)


def test_their_shards_are_read_and_ours_are_opened_by_transformers(theirs, tmp_path):
    import transformers

    tied, want, folder = theirs
    assert len(list(folder.glob("model-*-of-*.safetensors"))) > 3
    config = read_config(folder)
    assert config.logits_via_embedding == tied
    assert (config.encoder, config.decoder) == (WANTED.encoder, WANTED.decoder)
    params = hf.load_params(folder, config)
    assert_same_tensors(hf.to_hf(params, config), want)
    write_model_files(tmp_path, config, load_vocabulary("bytes"), None)
    assert hf.save_params(tmp_path, params, config, max_shard_size=60_000) == sum(
        x.size for x in want.values()
    )
    assert len(list(tmp_path.glob("model-*-of-*.safetensors"))) > 3
    assert read_config(tmp_path) == config
    model, info = transformers.T5GemmaForConditionalGeneration.from_pretrained(
        tmp_path, output_loading_info=True
    )
    assert not any(info.values()), info
    assert_same_tensors({name: p.detach().numpy() for name, p in model.named_parameters()}, want)


def test_missing_and_unknown_tensors_are_named(theirs, tmp_path):
    tied, want, _ = theirs
    tensors = dict(want)
    del tensors["model.decoder.layers.1.cross_attn.k_proj.weight"]
    tensors["model.encoder.layers.3.self_attn.q_proj.weight"] = np.zeros((32, 32), np.float32)
    safetensors.numpy.save_file(tensors, write(tmp_path) / "model.safetensors")
    config = read_config(tmp_path)
    assert config.logits_via_embedding == tied
    with pytest.raises(InputError) as error:
        hf.load_params(tmp_path, config)
    assert "1 missing: model.decoder.layers.1.cross_attn.k_proj.weight" in str(error.value)
    assert "1 unknown: model.encoder.layers.3.self_attn.q_proj.weight" in str(error.value)


def test_a_head_that_repeats_the_embedding_is_tied(theirs, tmp_path):
    _, want, _ = theirs
    embedding = want["model.decoder.embed_tokens.weight"]
    tensors = want | {"lm_head.out_proj.weight": embedding.copy()}
    safetensors.numpy.save_file(tensors, write(tmp_path) / "model.safetensors")
    config = read_config(tmp_path)
    assert config.logits_via_embedding
    assert "logits_dense" not in hf.load_params(tmp_path, config)
