"""Eight devices: the answers of one in any layout, and parameters that are recognised however they are cut."""

import functools
import json
import os
import re
import subprocess
import sys

import jax
import numpy as np
import pytest

from stepdistill_jax.data.vocabulary import load_vocabulary
from stepdistill_jax.decoding.beam import beam_search
from stepdistill_jax.decoding.greedy import greedy_decode
from stepdistill_jax.decoding.sampling import sample_decode
from stepdistill_jax.errors import InputError
from stepdistill_jax.formats.directory import write_model_files
from stepdistill_jax.inference import DecodeOptions, LabelDecoder, evaluate, load_model, predict
from stepdistill_jax.inference.evaluate import evaluate_tokens
from stepdistill_jax.inference.model import params_fingerprint
from stepdistill_jax.models import sharding
from stepdistill_jax.models.encoder_decoder import abstract_params, init_params
from stepdistill_jax.models.t5 import T5Config
from stepdistill_jax.models.t5gemma import T5GemmaConfig, gemma_side
from stepdistill_jax.planning.collectives import collectives
from stepdistill_jax.planning.hlo import Module
from stepdistill_jax.runtime.checkpoints.manager import Checkpoints
from stepdistill_jax.training.step import in_mesh

CONFIG = T5Config(
    vocab_size=128,
    emb_dim=32,
    num_heads=8,
    head_dim=8,
    mlp_dim=48,
    num_encoder_layers=2,
    num_decoder_layers=2,
)  # eight heads: `tensor` cuts them over all devices
SEARCHES = {
    "greedy": greedy_decode,
    "beam": functools.partial(beam_search, num_beams=4),
    "sampling": functools.partial(sample_decode, rng=jax.random.key(3), temperature=0.8, top_k=50),
}


@pytest.fixture(scope="module")
def params():
    params = jax.jit(init_params, static_argnums=0)(
        CONFIG, jax.random.key(2)
    )  # ends after 2 to 6 tokens
    head = np.array(params["logits_dense"]["kernel"])
    head[:, 1] *= 3
    params["logits_dense"]["kernel"] = jax.numpy.asarray(head)
    return params


@pytest.fixture(scope="module")
def rows():
    rng = np.random.default_rng(1)
    return [[*rng.integers(3, 128, rng.integers(1, 31)).tolist(), 1] for _ in range(21)]


@functools.cache
def mesh_of(layout):
    return sharding.make_mesh(layout)


def placed(params, layout):
    return jax.device_put(
        params, sharding.param_shardings(mesh_of(layout), abstract_params(CONFIG), CONFIG)
    )


@pytest.fixture(scope="module")
def one_device(params, rows):
    """The answers of a search on one device."""

    @functools.cache
    def decode(search):
        decoder = LabelDecoder(CONFIG, max_decode_len=6, batch_size=21, decode_fn=SEARCHES[search])
        return decoder(params, rows)

    return decode


@pytest.mark.parametrize(
    "search, layout, batch_size",
    [
        ("greedy", "data", 16),  # 21 rows: the last batch has 5, fewer than devices
        pytest.param("greedy", "fsdp", 21, marks=pytest.mark.slow),
        ("greedy", "tensor", 16),
        pytest.param("beam", "data", 16, marks=pytest.mark.slow),
        pytest.param("beam", "tensor", 16, marks=pytest.mark.slow),
        ("beam", "fsdp_tensor", None),
        pytest.param("sampling", "data", 16, marks=pytest.mark.slow),
    ],
)
def test_a_layout_gives_the_answers_of_one_device(
    params, rows, one_device, search, layout, batch_size
):
    decoder = LabelDecoder(
        CONFIG,
        max_decode_len=6,
        batch_size=batch_size,
        mesh=mesh_of(layout),
        decode_fn=SEARCHES[search],
    )
    want, got = one_device(search), decoder(placed(params, layout), rows)
    assert got.ids == want.ids
    assert len({len(ids) for ids in got.ids}) > 2
    np.testing.assert_array_equal(got.finished, want.finished)
    np.testing.assert_allclose(got.scores, want.scores, rtol=0, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(("search", "layout"), [("greedy", "fsdp_tensor"), ("beam", "tensor")])
def test_a_t5gemma_gives_the_answers_of_one_device(rows, search, layout):
    """Heads that share keys and values, windows of 5 tokens, sides of two widths."""
    sides = {
        "encoder": gemma_side(32, 16, 8, 8, 48, 2, window=5, init_stddev=0.3),
        "decoder": gemma_side(48, 16, 8, 8, 64, 2, window=3, init_stddev=0.3),
    }
    config = T5GemmaConfig(vocab_size=128, **sides, logits_via_embedding=False)
    params = jax.jit(init_params, static_argnums=0)(config, jax.random.key(2))
    mesh = mesh_of(layout)
    cut = sharding.param_shardings(mesh, abstract_params(config), config)
    options = {"max_decode_len": 6, "batch_size": 24, "decode_fn": SEARCHES[search]}
    want = LabelDecoder(config, **options)(params, rows)
    got = LabelDecoder(config, mesh=mesh, **options)(jax.device_put(params, cut), rows)
    assert got.ids == want.ids
    assert len({tuple(ids) for ids in got.ids}) > 3
    np.testing.assert_allclose(got.scores, want.scores, rtol=0, atol=5e-5)


@pytest.mark.parametrize("count", [1, 7])
def test_fewer_rows_than_devices(params, rows, one_device, count):
    decoder = LabelDecoder(CONFIG, max_decode_len=6, mesh=mesh_of("data"))
    got = decoder(placed(params, "data"), rows[:count])
    assert got.ids == one_device("greedy").ids[:count]


def test_the_batch_grows_with_the_devices_that_have_rows():
    sizes = {
        layout: LabelDecoder(CONFIG, max_decode_len=6, mesh=mesh_of(layout)).batch_size
        for layout in ("data", "fsdp", "fsdp_tensor", "tensor")
    }
    assert sizes == {"data": 512, "fsdp": 512, "fsdp_tensor": 256, "tensor": 64}
    assert LabelDecoder(CONFIG, max_decode_len=6).batch_size == 64


def compiled_decoder(params, layout, search):
    mesh = mesh_of(layout)
    decoder = LabelDecoder(CONFIG, max_decode_len=6, mesh=mesh, decode_fn=SEARCHES[search])
    tokens = jax.ShapeDtypeStruct((64, 32), np.int32, sharding=sharding.batch_sharding(mesh))
    lower = in_mesh(decoder._decode.lower, mesh)
    return lower(placed(params, layout), tokens).compile().as_text()


@pytest.mark.parametrize("search", SEARCHES)
def test_devices_that_have_the_whole_model_do_not_wait_for_each_other(params, search):
    """Nothing is sent at a token: only ids, scores and ends are gathered, once."""
    compiled = compiled_decoder(params, "data", search)
    sent = re.findall(r"= (\S+) (?:all-|collective-|reduce-scatter)[\w-]+\(", compiled)
    assert sorted(shape.split("{")[0] for shape in sent) == ["f32[64]", "pred[64]", "s32[64,6]"]


@pytest.mark.parametrize("layout", ["fsdp", pytest.param("fsdp_tensor", marks=pytest.mark.slow)])
def test_devices_that_have_a_part_of_the_model_gather_it_once(params, layout):
    """Inside the loops over tokens and layers nothing crosses the axis fsdp."""
    tensor = mesh_of(layout).shape["tensor"]
    sent, _ = collectives(Module(compiled_decoder(params, layout, "greedy")), 8)
    assert sum("/while/" not in c.op_name for c in sent if c.kind == "all-gather") > 10
    assert {c.group for c in sent if "/while/" in c.op_name} <= {tensor} - {1}


def test_a_fingerprint_does_not_depend_on_how_parameters_are_cut(params):
    want = params_fingerprint(params)
    for layout in ("data", "fsdp_tensor"):
        assert params_fingerprint(placed(params, layout)) == want
    assert params_fingerprint(jax.tree.map(np.asarray, params)) == want


def test_a_fingerprint_sees_a_bit_a_place_and_a_shape(params):
    def changed(change):
        flat = np.array(params["token_embedder"])
        return params_fingerprint({**params, "token_embedder": change(flat)})

    def flip(x):
        x.view(np.uint32)[5, 7] ^= 1
        return x

    def swap(x):
        x[5, 7], x[9, 7] = x[9, 7], x[5, 7]
        return x

    found = [changed(f) for f in (lambda x: x, flip, swap, np.transpose, lambda x: x[::-1])]
    assert found[0] == params_fingerprint(params)
    assert len(set(found)) == len(found)
    assert params_fingerprint({"a": np.zeros(3, np.float32)}) != params_fingerprint(
        {"a": np.zeros(4, np.float32)}
    )


@pytest.fixture(scope="module")
def run(params, task_info, spiece, tmp_path_factory):
    """A workdir that was saved from a cut over eight devices."""
    folder = tmp_path_factory.mktemp("fsdp")
    write_model_files(folder, CONFIG, load_vocabulary(spiece), task_info)
    cut = placed(params, "fsdp")
    assert not cut["token_embedder"].sharding.is_fully_replicated
    checkpoints = Checkpoints(folder)
    metrics = {"step": 4, "validated": True, "label_accuracy": 0.5, "label_loss": 1.0}
    checkpoints.save(4, cut, {"step": np.int32(4)}, metrics)
    checkpoints.close()
    return folder


def test_predict_and_evaluate_give_the_labels_of_any_layout(
    run, questions, write_rows, read_rows_of, tmp_path, lay_out
):
    source, answers, results = write_rows(questions[:30]), [], []
    data_dir = lay_out(
        tmp_path / "data", [q | {"id": str(i)} for i, q in enumerate(questions[:30])]
    )
    vocabulary = load_model(run).vocabulary
    ids = [[*vocabulary.encode("predict: " + q["input"]), 1] for q in questions[:30]]
    labels = [q["label"] for q in questions[:30]]
    out, mixed = tmp_path / "out.jsonl", sharding.Layout(data=2, fsdp=2, tensor=2)
    for layout in ("data", mixed):
        results.append(predict(run, source, out, layout=layout))
        answers.append(read_rows_of(out))
    results.append(evaluate(run, task="roads", data_dir=data_dir, layout=mixed))
    results.append(evaluate_tokens(run, ids, labels, "text_match", (), DecodeOptions(layout=mixed)))
    for result in results:
        for name in ("rows", "accuracy", "unfinished", "cut_inputs", "collapsed"):
            assert result[name] == results[0][name], name
    for other in answers[1:]:
        for row, want in zip(other, answers[0], strict=True):
            assert row["score"] == pytest.approx(want["score"], abs=1.1e-5)
            assert row | {"score": 0} == want | {"score": 0}


def test_an_unknown_layout_and_one_that_does_not_fit_are_refused(run, write_rows, tmp_path):
    source, out = write_rows([{"input": "a"}]), tmp_path / "out.jsonl"
    for layout in ("fspd", sharding.Layout(tensor=3)):
        with pytest.raises(InputError, match="`layout`"):
            predict(run, source, out, layout=layout)
    assert not out.exists()


ONE_DEVICE = """
import json, sys
import jax
from stepdistill_jax.inference import export, load_model
from stepdistill_jax.inference.model import params_fingerprint
assert jax.device_count() == 1
export(sys.argv[1], sys.argv[2])
prints = [params_fingerprint(load_model(path).params) for path in sys.argv[1:]]
print(json.dumps(prints))
"""


@pytest.mark.slow
def test_what_eight_devices_saved_is_exported_on_one(run, params, tmp_path):
    """One process of one device exports it; eight devices, each a part of it, read the export."""
    folder = tmp_path / "model"
    done = subprocess.run(
        [sys.executable, "-c", ONE_DEVICE, str(run), str(folder)],
        env=os.environ | {"XLA_FLAGS": os.environ["XLA_FLAGS_OF_ONE_DEVICE"]},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == [params_fingerprint(params)] * 2
    model = load_model(folder, mesh=mesh_of("fsdp"))
    assert not model.params["token_embedder"].sharding.is_fully_replicated
    for got, want in zip(jax.tree.leaves(model.params), jax.tree.leaves(params), strict=True):
        np.testing.assert_array_equal(np.asarray(got), np.asarray(want))
