"""Safetensors that are written: cut into shards, replaced whole, read by others."""

import gc
import json
import stat
import weakref

import jax
import numpy as np
import pytest
import safetensors
import safetensors.numpy

from stepdistill_jax.data.vocabulary import load_vocabulary
from stepdistill_jax.formats import hf
from stepdistill_jax.formats.directory import write_model_files
from stepdistill_jax.models import sharding
from stepdistill_jax.models.encoder_decoder import abstract_params
from stepdistill_jax.models.t5 import T5Config

LIMIT = 30_000  # bytes; the embedding of 64 x 32 floats has 8,192
INDEX = "model.safetensors.index.json"


@pytest.fixture(scope="module")
def sharded(v1_1, tmp_path_factory):
    config, params = v1_1
    folder = tmp_path_factory.mktemp("sharded")
    count = hf.save_params(folder, params, config, max_shard_size=LIMIT)
    assert count == sum(x.size for x in jax.tree.leaves(params))
    return folder


def test_shards_come_back_bitwise(sharded, v1_1, assert_same_params):
    assert_same_params(hf.load_params(sharded, v1_1[0]), v1_1[1])


def test_shards_are_named_and_indexed_as_hugging_face_does(sharded, v1_1):
    index = json.loads((sharded / INDEX).read_text())
    tensors = hf.to_hf(v1_1[1], v1_1[0])
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in tensors.values())
    assert index["weight_map"].keys() == tensors.keys()
    files = sorted(p.name for p in sharded.iterdir())
    n = len(files) - 1
    assert n > 3
    assert files == sorted(
        [INDEX, *(f"model-{i + 1:05d}-of-{n:05d}.safetensors" for i in range(n))]
    )
    assert set(index["weight_map"].values()) == set(files) - {INDEX}
    for file in set(files) - {INDEX}:
        with safetensors.safe_open(sharded / file, "numpy") as opened:
            assert opened.metadata() == {"format": "pt"}
            names = list(opened.keys())
            sizes = [opened.get_tensor(name).nbytes for name in names]
        assert sum(sizes) <= LIMIT, file
        assert {index["weight_map"][name] for name in names} == {file}
        assert stat.S_IMODE((sharded / file).stat().st_mode) == 0o644
    assert stat.S_IMODE((sharded / INDEX).stat().st_mode) & 0o044 == 0o044


def test_a_tensor_larger_than_a_shard_has_its_own(v1_1, tmp_path, assert_same_params):
    config, params = v1_1
    hf.save_params(tmp_path, params, config, max_shard_size=1)
    files = list(tmp_path.glob("model-*.safetensors"))
    assert len(files) == len(hf.to_hf(params, config))
    assert_same_params(hf.load_params(tmp_path, config), params)


@pytest.mark.parametrize("before, after", [(1, 10**9), (10**9, LIMIT), (1, LIMIT)])
def test_older_weights_in_the_directory_are_replaced(
    v1_1, make_params, assert_same_params, tmp_path, before, after
):
    """`model.safetensors` is read before an index: an old one would win over new shards."""
    config, params = v1_1
    hf.save_params(tmp_path, make_params(config, seed=5), config, max_shard_size=before)
    hf.save_params(tmp_path, params, config, max_shard_size=after)
    assert_same_params(hf.load_params(tmp_path, config), params)
    fresh = tmp_path / "fresh"
    fresh.mkdir()
    hf.save_params(fresh, params, config, max_shard_size=after)
    assert {p.name for p in tmp_path.iterdir()} - {"fresh"} == {p.name for p in fresh.iterdir()}


def test_parameters_on_a_mesh_are_written_whole(v1_1, sharded, assert_same_params, tmp_path):
    config, params = v1_1
    mesh = sharding.make_mesh(sharding.Layout(fsdp=4, tensor=2))
    shardings = sharding.param_shardings(mesh, abstract_params(config), config)
    hf.save_params(tmp_path, hf.load_params(sharded, config, shardings), config)
    assert_same_params(hf.load_params(tmp_path, config), params)


def test_one_tensor_at_a_time_is_in_memory(v1_1, tmp_path, monkeypatch):
    config, params = v1_1
    alive, make = [], hf._tensor

    def watched(*part):
        gc.collect()
        assert sum(ref() is not None for ref in alive) <= 1  # the one before may be on its way out
        tensor = np.array(make(*part))  # a copy of its own, which nothing else keeps alive
        alive.append(weakref.ref(tensor))
        return tensor

    monkeypatch.setattr(hf, "_tensor", watched)
    gc.collect()
    gc.freeze()  # a look at all that the tests before have left takes a second, for each tensor
    try:
        hf.save_params(tmp_path, jax.device_put(params), config, max_shard_size=LIMIT)
    finally:
        gc.unfreeze()
    assert len(alive) == 2 * len(json.loads((tmp_path / INDEX).read_text())["weight_map"])


@pytest.mark.parametrize("limit", [LIMIT, 10**9])
def test_the_bytes_are_those_of_the_library(family, tmp_path, limit):
    _, config, params = family
    hf.save_params(tmp_path, params, config, max_shard_size=limit)
    tensors, names = hf.to_hf(params, config), []
    for path in tmp_path.glob("*.safetensors"):
        with safetensors.safe_open(path, "numpy") as opened:
            held = list(opened.keys())
        want = {name: tensors[name] for name in held}
        assert path.read_bytes() == safetensors.numpy.save(want, metadata={"format": "pt"})
        names += held
    assert sorted(names) == sorted(tensors)


def test_a_failed_write_leaves_no_index(v1_1, tmp_path, monkeypatch):
    config, params = v1_1
    hf.save_params(tmp_path, params, config, max_shard_size=LIMIT)

    def fails(path, shapes, tensor):
        raise OSError("disk full")

    monkeypatch.setattr(hf, "write_safetensors", fails)
    with pytest.raises(OSError, match="disk full"):
        hf.save_params(tmp_path, params, config, max_shard_size=LIMIT)
    assert not (tmp_path / INDEX).exists()


def test_transformers_opens_the_shards(make_params, tmp_path):
    pytest.importorskip("torch", reason="torch is not installed: transformers cannot open weights")
    from transformers import T5ForConditionalGeneration

    config = T5Config(
        vocab_size=384,
        emb_dim=32,
        num_heads=4,
        head_dim=8,
        mlp_dim=48,
        num_encoder_layers=2,
        num_decoder_layers=2,
    )
    params = make_params(config)
    write_model_files(tmp_path, config, load_vocabulary("bytes"), None)
    hf.save_params(tmp_path, params, config, max_shard_size=LIMIT)
    assert not (tmp_path / "model.safetensors").exists()
    state = T5ForConditionalGeneration.from_pretrained(tmp_path).state_dict()
    for name, tensor in hf.to_hf(params, config).items():
        np.testing.assert_array_equal(state[name].numpy(), tensor, err_msg=name)
