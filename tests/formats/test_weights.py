"""Which file is read where several are there, and what is done where none can be."""

import json

import numpy as np
import pytest
import safetensors.numpy

from stepdistill_jax.errors import InputError
from stepdistill_jax.formats import hf
from stepdistill_jax.formats.weights import has_weights, open_weights


@pytest.fixture
def everything(v1_1, make_params, write_flax, write_t5x, tmp_path):
    """A directory with all formats; the name of the file -> the embedding that it holds."""
    torch = pytest.importorskip("torch", reason="torch is not installed: it writes its own form")
    config, tables = v1_1[0], {}
    names = ["model.safetensors", "flax_model.msgpack", "pytorch_model.bin"]
    for seed, name in enumerate([n + end for n in names for end in ("", ".index.json")]):
        params = make_params(config, seed)
        tensors, file = hf.to_hf(params, config), name.removesuffix(".index.json")
        tables[name] = tensors["shared.weight"]
        if file != name:  # an index of one shard
            weight_map = dict.fromkeys(tensors, file := f"shard-of-{file}")
            (tmp_path / name).write_text(json.dumps({"weight_map": weight_map}))
        if "safetensors" in name:
            safetensors.numpy.save_file(tensors, tmp_path / file)
        elif "torch" in name:
            torch.save({n: torch.from_numpy(t) for n, t in tensors.items()}, tmp_path / file)
        else:
            (sub := tmp_path / "flax").mkdir(exist_ok=True)
            write_flax(sub, params, config)
            (sub / "flax_model.msgpack").rename(tmp_path / file)
    params = make_params(config, 99)
    write_t5x(tmp_path, params, zarr=False)
    tables["checkpoint"] = params["token_embedder"]
    return tmp_path, tables


def test_the_first_format_in_the_documented_order_is_read(everything):
    directory, tables = everything
    for name, table in tables.items():
        got = open_weights(directory).read("shared.weight", (slice(None), slice(None)))
        np.testing.assert_array_equal(got, table, err_msg=name)
        assert has_weights(directory)
        (directory / name).unlink()
    assert not has_weights(directory)
    with pytest.raises(InputError, match=r"no model\.safetensors$"):
        open_weights(directory)


def test_a_missing_shard_is_named(v1_1, write_flax, tmp_path):
    config, params = v1_1
    write_flax(tmp_path, params, config, shards=3)
    (tmp_path / "flax_model-00002-of-00003.msgpack").unlink()
    with pytest.raises(InputError, match=r"00002-of-00003\.msgpack: named in .*missing"):
        hf.load_params(tmp_path, config)


@pytest.mark.parametrize("raw", [[], {}, {"weight_map": {}}, {"weight_map": {"a": 1}}], ids=str)
def test_an_index_that_names_no_files_is_refused(tmp_path, raw):
    (tmp_path / "flax_model.msgpack.index.json").write_text(json.dumps(raw))
    with pytest.raises(InputError, match=r"must name files in this folder|expected a JSON object"):
        open_weights(tmp_path)


def test_tensorflow_weights_are_named_with_the_way_to_convert_them(tmp_path):
    (tmp_path / "tf_model.h5").touch()
    assert has_weights(tmp_path)
    command = r"T\.from_pretrained\('(.*)', from_tf=True\)\.save_pretrained\('\1', "
    with pytest.raises(InputError, match=rf"only tf_model\.h5; .*below 5.*python -c.*{command}"):
        open_weights(tmp_path)


def test_the_embedding_may_be_there_as_a_copy_only(v1_1, assert_same_params, tmp_path):
    config, params = v1_1
    tensors = hf.to_hf(params, config)
    tensors["decoder.embed_tokens.weight"] = tensors.pop("shared.weight")
    safetensors.numpy.save_file(tensors, tmp_path / "model.safetensors")
    assert_same_params(hf.load_params(tmp_path, config), params)


def test_whole_numbers_are_no_weights(v1_1, write_flax, tmp_path):
    config, params = v1_1
    write_flax(tmp_path, params, config, dtype=np.int8)
    with pytest.raises(InputError, match=r"of a wrong type: .*shared\.weight is int8"):
        hf.load_params(tmp_path, config)
    tensors = {name: t.astype(np.int8) for name, t in hf.to_hf(params, config).items()}
    safetensors.numpy.save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(InputError, match="is stored as I8, expected one of F16"):
        hf.load_params(tmp_path, config)


def test_layers_are_read_into_one_array_without_a_copy_of_each(v1_1, tmp_path, monkeypatch):
    """A list of layers and np.stack would need the stack twice."""
    config, params = v1_1
    hf.save_params(tmp_path, params, config)
    monkeypatch.setattr(np, "stack", None)
    hf.load_params(tmp_path, config)
    view = open_weights(tmp_path).read("lm_head.weight", (slice(0, 5), slice(None)))
    assert not view.flags.owndata and view.base is not None
