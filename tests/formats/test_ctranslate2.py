"""CTranslate2's directory: every family decodes there as here, and a directory that is not whole is refused."""

import dataclasses
import importlib
import json
import shutil

import jax
import numpy as np
import pytest

from stepdistill_jax.data.vocabulary import BYTES, load_vocabulary
from stepdistill_jax.decoding.greedy import LabelDecoder
from stepdistill_jax.errors import InputError
from stepdistill_jax.formats.ctranslate2 import (
    check_model,
    read_ctranslate2,
    to_int8,
    token_names,
    write_ctranslate2,
)
from stepdistill_jax.formats.directory import is_ctranslate2, read_config
from stepdistill_jax.models.encoder_decoder import init_params
from stepdistill_jax.models.t5 import T5Config

ctranslate2 = pytest.importorskip("ctranslate2", reason="ctranslate2 is not installed")

LENGTH = 6
SIZES = {
    "emb_dim": 24,
    "num_heads": 2,
    "head_dim": 8,
    "mlp_dim": 40,
    "num_encoder_layers": 2,
    "num_decoder_layers": 2,
}
V1_0 = {
    "mlp_activations": ("relu",),
    "logits_via_embedding": True,
    "scale_decoder_outputs": True,
}
FAMILIES = {
    "t5_v1_0": (T5Config(vocab_size=128, **SIZES, **V1_0), "spiece"),
    "t5_v1_1": (T5Config(vocab_size=128, **SIZES), "spiece"),
    "ul2": (T5Config(vocab_size=128, **SIZES, mlp_activations=("silu", "linear")), "spiece"),
    "bytes, a bias per layer as in umt5, sides of other depths": (
        T5Config(
            vocab_size=384,
            **SIZES | {"num_encoder_layers": 3},
            shared_relative_position_bias=False,
        ),
        BYTES,
    ),
}


@pytest.fixture(scope="module")
def spiece(tmp_path_factory, train_spiece):
    words = ["with rain in the forecast , the truck takes the narrow bridge .", "0 1 2 3 4 5 a b"]
    return train_spiece(tmp_path_factory.mktemp("spiece"), words)


def random_params(config):
    """Scales and biases that are told apart, and ends of sequence at all lengths."""
    rng = np.random.default_rng(0)
    params = jax.eval_shape(lambda: init_params(config, jax.random.key(0)))
    params = jax.tree.map(lambda x: rng.normal(size=x.shape).astype(np.float32) / 6, params)
    for x in jax.tree.leaves_with_path(params):
        if "scale" in jax.tree_util.keystr(x[0]):
            x[1][...] += 1
        if "rel_embedding" in jax.tree_util.keystr(x[0]):
            x[1][...] *= 12
    if config.logits_via_embedding:
        params["token_embedder"] *= 12
        params["token_embedder"][1] *= 1.4
        layers = params["decoder"]["layers"]  # else it repeats the token that it was given
        layers["encoder_decoder_attention"]["out"]["kernel"] *= 6
        layers["mlp"]["wo"]["kernel"] *= 6
    else:
        params["token_embedder"] *= 6
        params["logits_dense"]["kernel"] *= 6
        params["logits_dense"]["kernel"][:, 1] *= 1.8
    return params


@pytest.fixture(scope="module", params=FAMILIES)
def written(request, tmp_path_factory, spiece):
    config, vocabulary = FAMILIES[request.param]
    vocabulary = load_vocabulary(spiece if vocabulary == "spiece" else BYTES)
    folder, params = tmp_path_factory.mktemp("written"), random_params(config)
    count = write_ctranslate2(folder, params, config, vocabulary, None)
    assert count == sum(x.size for x in jax.tree.leaves(params))
    return folder, config, params, vocabulary


def ask(folder, rows):
    """(ids, scores) of raw CTranslate2."""
    names = json.loads((folder / "shared_vocabulary.json").read_text())
    assert len(set(names)) == len(names)
    translator = ctranslate2.Translator(str(folder), device="cpu", intra_threads=1)
    results = translator.translate_batch(
        [[names[i] for i in row] for row in rows],
        beam_size=1,
        length_penalty=0,
        max_decoding_length=LENGTH,
        max_input_length=0,
        min_decoding_length=0,
        return_end_token=True,
        return_scores=True,
    )
    ids = [[names.index(name) for name in result.hypotheses[0]] for result in results]
    return ids, [result.scores[0] for result in results]


def test_each_family_decodes_to_the_same_ids_and_scores(written):
    folder, config, params, vocabulary = written
    rng = np.random.default_rng(1)
    rows = [[*rng.integers(2, vocabulary.size, n), 1] for n in rng.integers(1, 63, 40)]
    want = LabelDecoder(config, max_decode_len=LENGTH, batch_size=40)(params, rows)
    assert 0 < want.finished.sum() < 40 and len(set(map(tuple, want.ids))) > 10
    ids, scores = ask(folder, rows)
    assert ids == want.ids
    np.testing.assert_allclose(scores, want.scores, atol=1e-4)  # measured 8e-6 at -10


def test_the_directory_holds_what_predict_reads(written):
    folder, config, _, vocabulary = written
    files = read_ctranslate2(folder)
    check_model(folder, files)
    assert files.vocabulary.fingerprint == vocabulary.fingerprint and files.task_info is None
    assert len(files.tokens) == config.vocab_size
    own = "tokenizer_config.json" if vocabulary.source == BYTES else "spiece.model"
    names = {"config.json", "model.bin", "shared_vocabulary.json", own}
    assert {path.name for path in folder.iterdir()} == names
    written_config = json.loads((folder / "config.json").read_text())
    assert (
        written_config["unk_token"] == "<unk>" and written_config["decoder_start_token"] == "<pad>"
    )


@pytest.fixture(scope="module")
def int8(tmp_path_factory, spiece):
    folder, config = tmp_path_factory.mktemp("int8"), FAMILIES["t5_v1_1"][0]
    params = jax.tree.map(jax.numpy.asarray, random_params(config))  # read-only on the host
    write_ctranslate2(folder, params, config, load_vocabulary(spiece), None, "int8")
    return folder, params


def test_int8_is_near_and_leaves_the_parameters_alone(int8):
    folder, params = int8
    want = random_params(FAMILIES["t5_v1_1"][0])
    for a, b in zip(jax.tree.leaves(params), jax.tree.leaves(want), strict=True):
        np.testing.assert_array_equal(a, b)
    translator = ctranslate2.Translator(str(folder), device="cpu")
    assert translator.compute_type == "int8_float32"
    assert json.loads((folder / "config.json").read_text())["stepdistill"]["quantization"] == "int8"


@pytest.mark.parametrize("inputs", [1, 2, 7, 64])
def test_products_of_two_adjacent_int8_weights_fit_into_16_bits(inputs):
    """Processors without VNNI add two products in 16 bits; an activation is at most 255."""
    rng = np.random.default_rng(inputs)
    matrix = rng.normal(size=(50, inputs)) * rng.lognormal(size=(50, 1)) ** 9
    matrix = matrix.astype(np.float32)
    matrix[7] = 0
    matrix[8] = np.abs(matrix[8]).max()  # the worst: all are the largest
    want = matrix.copy()
    weights, scale = to_int8(want)
    assert weights.dtype == np.int8 and scale.dtype == np.float32 and np.isfinite(scale).all()
    np.testing.assert_array_equal(want, matrix)
    pairs = weights[:, : inputs // 2 * 2].reshape(50, -1, 2).astype(int)
    for of_all in (pairs.clip(0), pairs.clip(max=0)):  # a weight of the other sign meets a 0
        assert (np.abs(255 * of_all.sum(2)) < 2**15).all()
    # half a step, and a step is at most a 63rd of the largest weight
    gap = np.abs(weights / scale[:, None] - want)
    assert (gap <= 0.501 / scale[:, None]).all()
    assert (1 / scale[want.any(1)] <= np.abs(want).max(1)[want.any(1)] / 63).all()


def test_names_of_rows_without_a_piece_are_no_pieces(spiece):
    vocabulary = load_vocabulary(spiece)
    names = token_names(vocabulary, 128)
    assert names[: vocabulary.size] == vocabulary.pieces()
    assert names[-1] == "<row 127>" and len(set(names)) == 128
    assert names[vocabulary.unk_id] == "<unk>"


@pytest.mark.parametrize(
    ("quantization", "words"),
    [("float16", r"gives NaN.*CTranslate2#1074"), ("int4", "one of float32, int8")],
)
def test_other_quantizations_are_refused(quantization, words, tmp_path, spiece):
    config = FAMILIES["t5_v1_1"][0]
    with pytest.raises(InputError, match=f"`quantization`.*{words}"):
        write_ctranslate2(tmp_path, {}, config, load_vocabulary(spiece), None, quantization)
    assert list(tmp_path.iterdir()) == []


def other_vocabulary(folder, train_spiece):
    train_spiece(folder, ["some other text , of other words"])


def fewer_tokens(folder, _):
    path = folder / "shared_vocabulary.json"
    path.write_text(json.dumps(json.loads(path.read_text())[:-1]))


def not_ours(folder, _):
    path = folder / "config.json"
    config = json.loads(path.read_text())
    del config["stepdistill"]
    path.write_text(json.dumps(config))


def one_bit(folder, _):
    data = bytearray((folder / "model.bin").read_bytes())
    data[len(data) // 2] ^= 1
    (folder / "model.bin").write_bytes(data)


def half(folder, _):
    data = (folder / "model.bin").read_bytes()
    (folder / "model.bin").write_bytes(data[: len(data) // 2])


DAMAGE = {
    "no model": (lambda f, _: (f / "model.bin").unlink(), "model.bin is missing"),
    "no tokens": (
        lambda f, _: (f / "shared_vocabulary.json").unlink(),
        "shared_vocabulary.json is missing",
    ),
    "no vocabulary": (lambda f, _: (f / "spiece.model").unlink(), "no vocabulary"),
    "another vocabulary": (other_vocabulary, "does not match the vocabulary of spiece.model"),
    "fewer tokens": (fewer_tokens, "does not match the vocabulary of spiece.model"),
    "another converter": (not_ours, "not written by `stepdistill export"),
    "one bit": (one_bit, r"model.bin: damaged"),
    "half": (half, r"model.bin: damaged"),
}


@pytest.mark.parametrize(("damage", "words"), DAMAGE.values(), ids=DAMAGE)
def test_a_directory_that_is_not_as_it_was_written_is_refused(
    int8, tmp_path, train_spiece, damage, words
):
    folder = tmp_path / "copy"
    shutil.copytree(int8[0], folder)
    damage(folder, train_spiece)
    assert is_ctranslate2(folder)
    with pytest.raises(InputError, match=words) as error:
        check_model(folder, read_ctranslate2(folder))
    assert "\n" not in str(error.value) and str(folder) in str(error.value)


def test_others_say_what_the_directory_is(int8):
    with pytest.raises(
        InputError, match="a CTranslate2 directory, which only `predict`, `evaluate`"
    ):
        read_config(int8[0])


def test_a_parameter_that_nobody_reads_is_no_silent_loss(tmp_path, spiece):
    config = dataclasses.replace(FAMILIES["t5_v1_1"][0], num_encoder_layers=1)
    params = random_params(config)
    hf = importlib.import_module("stepdistill_jax.formats.ctranslate2")
    tensors = hf.to_hf(params, config) | {"encoder.block.1.more": np.zeros(1, np.float32)}
    with pytest.raises(AssertionError, match=r"encoder\.block\.1\.more"):
        hf._spec(importlib.import_module("ctranslate2.specs"), tensors, config)
