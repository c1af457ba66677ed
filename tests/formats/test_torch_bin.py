"""`pytorch_model.bin`: mapped and old form, shards, and files that are no tensors."""

import json
import os
import pickle
import sys

import numpy as np
import pytest

from stepdistill_jax.data.vocabulary import load_vocabulary
from stepdistill_jax.errors import InputError
from stepdistill_jax.formats import hf
from stepdistill_jax.formats.directory import read_config, write_model_files

FILE = "pytorch_model.bin"


@pytest.fixture(scope="module")
def torch():
    return pytest.importorskip("torch", reason="torch is not installed: it reads and writes these")


@pytest.fixture
def state(torch, v1_1):
    config, params = v1_1
    return {name: torch.from_numpy(t) for name, t in hf.to_hf(params, config).items()}


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "old"])
def test_weights_come_back_bitwise(torch, state, v1_1, assert_same_params, tmp_path, zipped):
    config, params = v1_1
    torch.save(state, tmp_path / FILE, _use_new_zipfile_serialization=zipped)
    assert_same_params(hf.load_params(tmp_path, config), params)


def test_shards_with_an_index_are_one_model(torch, state, v1_1, assert_same_params, tmp_path):
    config, params = v1_1
    where = {name: f"pytorch_model-{i % 2}.bin" for i, name in enumerate(state)}
    for file in set(where.values()):
        torch.save({n: t for n, t in state.items() if where[n] == file}, tmp_path / file)
    index = tmp_path / "pytorch_model.bin.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": where}))
    assert_same_params(hf.load_params(tmp_path, config), params)
    index.write_text(json.dumps({"weight_map": {"a": "../other/pytorch_model-0.bin"}}))
    with pytest.raises(InputError, match="must name files in this folder"):
        hf.load_params(tmp_path, config)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_other_float_types_are_read_to_float32(torch, state, v1_1, tmp_path, dtype):
    config, _ = v1_1
    stored = {name: t.to(getattr(torch, dtype)) for name, t in state.items()}
    torch.save(stored, tmp_path / FILE)
    got = hf.to_hf(hf.load_params(tmp_path, config), config)
    assert got.keys() == stored.keys()
    for name, tensor in got.items():
        np.testing.assert_array_equal(tensor, stored[name].float().numpy())


def test_the_head_of_v1_0_that_is_the_embedding_a_second_time_stays_tied(
    torch, make_params, v1_1, assert_same_params, tmp_path
):
    import dataclasses

    config = dataclasses.replace(
        v1_1[0], vocab_size=384, logits_via_embedding=True, scale_decoder_outputs=True
    )
    params = make_params(config)
    state = {name: torch.from_numpy(t) for name, t in hf.to_hf(params, config).items()}
    for name in ("lm_head", "encoder.embed_tokens", "decoder.embed_tokens"):
        state[f"{name}.weight"] = state["shared.weight"]
    write_model_files(tmp_path, config, load_vocabulary("bytes"), None)
    raw = json.loads((tmp_path / "config.json").read_text())
    del raw["tie_word_embeddings"], raw["scale_decoder_outputs"]  # as in google-t5/t5-base
    (tmp_path / "config.json").write_text(json.dumps(raw))
    torch.save(state, tmp_path / FILE)
    assert read_config(tmp_path) == config
    assert_same_params(hf.load_params(tmp_path, config), params)
    edited = json.dumps(raw | {"tie_word_embeddings": False})  # a head that began as a copy
    (tmp_path / "config.json").write_text(edited)
    assert not read_config(tmp_path).logits_via_embedding
    (tmp_path / "config.json").write_text(json.dumps(raw))
    state["lm_head.weight"] = state["shared.weight"] + 1
    torch.save(state, tmp_path / FILE)
    assert not read_config(tmp_path).logits_via_embedding
    with pytest.raises(InputError, match=r"1 unknown: lm_head\.weight"):
        hf.load_params(tmp_path, config)


class Attack:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.mark.parametrize("form", ["zip", "pickle"])
def test_a_pickle_with_code_is_refused_and_not_run(torch, v1_1, tmp_path, form):
    attack = {"shared.weight": Attack(os.fspath(tmp_path / "ran"))}
    if form == "zip":
        torch.save(attack, tmp_path / FILE)
    else:
        (tmp_path / FILE).write_bytes(pickle.dumps(attack, protocol=2))
    with pytest.raises(InputError, match=r"its pickle calls posix\.mkdir.*refused") as error:
        hf.load_params(tmp_path, v1_1[0])
    assert str(tmp_path / FILE) in str(error.value) and "\n" not in str(error.value)
    assert not (tmp_path / "ran").exists()


def test_a_file_that_is_cut_or_no_dictionary_of_tensors_is_refused(torch, state, v1_1, tmp_path):
    path = tmp_path / FILE
    for zipped in (True, False):
        torch.save(state, path, _use_new_zipfile_serialization=zipped)
        whole = path.read_bytes()
        for size in (0, 1, len(whole) // 2, len(whole) - 1):
            path.write_bytes(whole[:size])
            with pytest.raises(InputError, match="not a complete torch file") as error:
                hf.load_params(tmp_path, v1_1[0])
            assert str(path) in str(error.value) and "\n" not in str(error.value)
    for content in ([1, 2], {"state_dict": {"a": torch.zeros(1)}}):
        torch.save(content, path)
        with pytest.raises(InputError, match="expected a dictionary of tensors"):
            hf.load_params(tmp_path, v1_1[0])


def test_without_torch_the_error_says_what_to_install(v1_1, tmp_path, monkeypatch):
    (tmp_path / FILE).write_bytes(os.urandom(8))
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(
        InputError,
        match=r"run pip install -c constraints\.txt -e '\.\[torch\]' in the source folder",
    ):
        hf.load_params(tmp_path, v1_1[0])
