"""Weights there and back, slices only, and what does not fit is listed."""

import json

import jax
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from stepdistill_jax.errors import InputError
from stepdistill_jax.formats import hf, safetensors_file
from stepdistill_jax.models import sharding
from stepdistill_jax.models.encoder_decoder import abstract_params, init_params
from stepdistill_jax.models.t5 import T5Config

CONFIG = T5Config(
    vocab_size=64,
    emb_dim=32,
    num_heads=4,
    head_dim=8,
    mlp_dim=48,
    num_encoder_layers=3,
    num_decoder_layers=2,
)


@pytest.fixture(scope="module")
def params():
    """Random everywhere: initial norm scales are 1, and any order of them would look right."""
    initial = jax.jit(init_params, static_argnums=0)(CONFIG, jax.random.key(0))
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda x: rng.normal(size=x.shape).astype(np.float32), initial)


@pytest.fixture(scope="module")
def directory(params, tmp_path_factory):
    folder = tmp_path_factory.mktemp("weights")
    assert hf.save_params(folder, params, CONFIG) == sum(x.size for x in jax.tree.leaves(params))
    return folder


def tensors_of(directory):
    return safetensors.numpy.load_file(directory / "model.safetensors")


def assert_equal(got, want):
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert a.dtype == np.float32
        np.testing.assert_array_equal(np.asarray(a), b)


def test_written_tensors_have_the_names_and_orientation_of_torch(directory, params):
    tensors = tensors_of(directory)
    assert len(tensors) == 6 + 3 * 9 + 2 * 14
    layers = params["decoder"]["layers"]
    for name, want in (
        ("shared.weight", params["token_embedder"]),
        ("lm_head.weight", params["logits_dense"]["kernel"].T),
        (  # square: a reader takes it in either orientation
            "encoder.block.1.layer.0.SelfAttention.q.weight",
            params["encoder"]["layers"]["attention"]["query"]["kernel"][1].T,
        ),
        (
            "decoder.block.1.layer.1.EncDecAttention.v.weight",
            layers["encoder_decoder_attention"]["value"]["kernel"][1].T,
        ),
        ("decoder.block.0.layer.2.DenseReluDense.wo.weight", layers["mlp"]["wo"]["kernel"][0].T),
        (
            "encoder.block.2.layer.1.layer_norm.weight",
            params["encoder"]["layers"]["pre_mlp_layer_norm"]["scale"][2],
        ),
        (
            "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight",
            params["encoder"]["relpos_bias"]["rel_embedding"].T,
        ),
    ):
        np.testing.assert_array_equal(tensors[name], want)


def test_weights_come_back_bitwise(directory, params):
    assert_equal(hf.load_params(directory, CONFIG), params)


@pytest.mark.parametrize("layout", [(1, 4, 2), (2, 2, 2)], ids=str)
def test_weights_come_back_bitwise_on_a_mesh(directory, params, layout):
    mesh = sharding.make_mesh(sharding.Layout(*layout))
    shardings = sharding.param_shardings(mesh, abstract_params(CONFIG), CONFIG)
    got = hf.load_params(directory, CONFIG, shardings)
    assert_equal(got, params)
    placed = jax.tree.leaves(jax.tree.map(lambda x, s: x.sharding == s, got, shardings))
    assert all(placed)


def test_a_mesh_reads_slices_and_no_whole_matrix(directory, monkeypatch):
    largest, read = [], hf.Weights.read

    def watched(self, name, index):
        part = read(self, name, index)
        largest.append(part.size)
        return part

    monkeypatch.setattr(hf.Weights, "read", watched)
    mesh = sharding.make_mesh(sharding.Layout(fsdp=4, tensor=2))
    hf.load_params(
        directory, CONFIG, sharding.param_shardings(mesh, abstract_params(CONFIG), CONFIG)
    )
    assert max(largest) == 64 * 32 // 8


def test_shards_with_an_index_are_one_model(directory, params, tmp_path):
    weight_map = {}
    tensors = tensors_of(directory)
    for i in range(3):
        name = f"model-0000{i + 1}-of-00003.safetensors"
        part = dict(list(tensors.items())[i::3])
        safetensors.numpy.save_file(part, tmp_path / name)
        weight_map |= dict.fromkeys(part, name)
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    assert_equal(hf.load_params(tmp_path, CONFIG), params)
    (tmp_path / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(InputError, match=r"00002-of-00003\.safetensors: named in .*missing"):
        hf.load_params(tmp_path, CONFIG)


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float64])
def test_other_float_types_are_read_to_float32(directory, params, tmp_path, dtype):
    stored = {name: t.astype(dtype) for name, t in tensors_of(directory).items()}
    safetensors.numpy.save_file(stored, tmp_path / "model.safetensors")
    want = jax.tree.map(lambda x: x.astype(dtype).astype(np.float32), params)
    assert_equal(hf.load_params(tmp_path, CONFIG), want)


def test_copies_of_the_embedding_and_a_table_that_t5_never_reads_are_let_pass(
    directory, params, tmp_path
):
    tensors = tensors_of(directory)
    tensors["encoder.embed_tokens.weight"] = tensors["shared.weight"].copy()
    unread = "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"
    tensors[unread] = np.zeros((32, 4), np.float32)
    safetensors.numpy.save_file(tensors, tmp_path / "model.safetensors")
    assert_equal(hf.load_params(tmp_path, CONFIG), params)


def test_missing_unknown_and_wrongly_shaped_tensors_are_listed_in_one_line(directory, tmp_path):
    tensors = tensors_of(directory)
    del tensors["encoder.block.1.layer.0.SelfAttention.q.weight"]
    del tensors["decoder.final_layer_norm.weight"]
    tensors["encoder.block.3.layer.0.layer_norm.weight"] = np.zeros(32, np.float32)
    tensors["shared.weight"] = np.zeros((60, 32), np.float32)
    safetensors.numpy.save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(InputError) as error:
        hf.load_params(tmp_path, CONFIG)
    message = str(error.value)
    assert "\n" not in message
    for part in (
        "2 missing: decoder.final_layer_norm.weight, encoder.block.1.layer.0.SelfAttention.q.weight",
        "1 unknown: encoder.block.3.layer.0.layer_norm.weight",
        "1 of a wrong shape: shared.weight is [60, 32], expected [64, 32]",
    ):
        assert part in message


def test_a_truncated_file_is_named(directory, tmp_path):
    whole = (directory / "model.safetensors").read_bytes()
    for size in (5, len(whole) // 2):
        (tmp_path / "model.safetensors").write_bytes(whole[:size])
        with pytest.raises(
            InputError, match=r"model\.safetensors: not a complete safetensors file"
        ):
            hf.load_params(tmp_path, CONFIG)


def test_a_write_that_went_wrong_is_seen_and_leaves_nothing_to_trust(params, tmp_path, monkeypatch):
    read = safetensors_file.open_safetensors

    def flips_a_bit(path):
        damaged = bytearray(path.read_bytes())
        damaged[-1] ^= 1
        path.write_bytes(damaged)
        return read(path)

    monkeypatch.setattr(safetensors_file, "open_safetensors", flips_a_bit)
    with pytest.raises(OSError, match="reads back differently"):
        hf.save_params(tmp_path, params, CONFIG)
    assert not (tmp_path / "model.safetensors").exists()
