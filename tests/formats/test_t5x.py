"""T5X checkpoints: both forms, layers apart and stacked. Fixtures after the public code of t5x."""

import json
import shutil

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stepdistill_jax.errors import InputError
from stepdistill_jax.formats import hf
from stepdistill_jax.formats.config_json import config_json
from stepdistill_jax.formats.directory import read_config, read_model_files
from stepdistill_jax.formats.weights import open_weights
from stepdistill_jax.models import sharding
from stepdistill_jax.models.encoder_decoder import abstract_params
from stepdistill_jax.models.families import model_config

TREES = {
    "layers apart": {},
    "layers apart, heads apart": {"heads_apart": True},
    "stacked": {"scanned": True, "heads_apart": True},
}


@pytest.mark.parametrize("tree", TREES.values(), ids=TREES)
def test_the_first_form_gives_sizes_and_weights(
    family, write_t5x, assert_same_params, tmp_path, tree
):
    _, config, params = family
    write_t5x(tmp_path, params, **tree)
    assert read_config(tmp_path) == config
    assert_same_params(hf.load_params(tmp_path, config), params)


@pytest.mark.parametrize(
    "tree", [TREES["layers apart"], TREES["stacked"]], ids=["apart", "stacked"]
)
@pytest.mark.parametrize(
    "handler",
    [{}, {"use_ocdbt": False}, {"use_zarr3": True}],
    ids=["ocdbt", "folders", "zarr3"],
)
def test_the_orbax_form_gives_sizes_and_weights(
    v1_1, write_t5x_orbax, assert_same_params, tmp_path, tree, handler
):
    config, params = v1_1
    write_t5x_orbax(tmp_path / "checkpoint_1000", params, **tree, **handler)
    assert read_config(tmp_path) == config
    assert_same_params(hf.load_params(tmp_path, config), params)


def test_a_t5gemma_is_not_read_from_t5x(v1_1, write_t5x, tmp_path):
    write_t5x(tmp_path, v1_1[1])
    config = model_config("t5gemma", "tiny", vocab_size=64)
    (tmp_path / "config.json").write_text(json.dumps(config_json(config)))
    with pytest.raises(InputError, match=r"do not fit config\.json") as caught:
        hf.load_params(tmp_path, read_config(tmp_path))
    assert "\n" not in str(caught.value)


def test_orbax_s_first_form_keeps_its_tree_in_the_file_of_t5x(
    v1_1, write_t5x, assert_same_params, tmp_path
):
    import flax.serialization

    config, params = v1_1
    write_t5x(tmp_path, params)
    raw = flax.serialization.msgpack_restore((tmp_path / "checkpoint").read_bytes())

    def placeholders(tree, path):
        if isinstance(tree, dict) and "driver" not in tree:
            return {key: placeholders(value, f"{path}.{key}") for key, value in tree.items()}
        return f"PLACEHOLDER://{path}" if isinstance(tree, dict) else tree

    tree = {"target": placeholders(raw["optimizer"]["target"], "target"), "params_axes": None}
    (tmp_path / "checkpoint").write_bytes(flax.serialization.msgpack_serialize(tree))
    assert_same_params(hf.load_params(tmp_path, config), params)


@pytest.mark.parametrize(
    "tree", [TREES["layers apart"], TREES["stacked"]], ids=["apart", "stacked"]
)
def test_devices_get_their_slices(v1_1, write_t5x, assert_same_params, tmp_path, tree):
    config, params = v1_1
    write_t5x(tmp_path, params, **tree)
    mesh = sharding.make_mesh(sharding.Layout(fsdp=4, tensor=2))
    shardings = sharding.param_shardings(mesh, abstract_params(config), config)
    assert_same_params(hf.load_params(tmp_path, config, shardings), params)


@pytest.fixture(scope="module")
def stacked(v1_1, write_t5x, tmp_path_factory):
    """(weights read from stacked layers with heads apart, Hugging Face's tensors)."""
    folder = tmp_path_factory.mktemp("stacked")
    write_t5x(folder, v1_1[1], **TREES["stacked"])
    config, params = v1_1
    return open_weights(folder), hf.to_hf(params, config)


@given(data=st.data())
def test_any_slice_is_that_of_the_whole(stacked, data):
    """Of joined heads, too: half of one, or half of two."""
    weights, tensors = stacked
    assert weights.shapes() == {name: t.shape for name, t in tensors.items()}
    name = data.draw(st.sampled_from(sorted(tensors)))
    cut = tuple(
        slice(*sorted(data.draw(st.tuples(st.integers(0, n), st.integers(0, n)))))
        for n in tensors[name].shape
    )
    np.testing.assert_array_equal(weights.read(name, cut), tensors[name][cut])


def test_version_2_wrote_bfloat16_as_16_bits(v1_1, write_t5x, assert_same_params, tmp_path):
    config, params = v1_1
    write_t5x(tmp_path, params, version=2, dtype=ml_dtypes.bfloat16)
    zarray = tmp_path / "target.decoder.logits_dense.kernel" / ".zarray"
    assert json.loads(zarray.read_text())["dtype"] == "<u2"
    want = _as_stored(params, ml_dtypes.bfloat16)
    assert_same_params(hf.load_params(tmp_path, config), want)


def test_bfloat16_of_version_3_is_read_to_float32(v1_1, write_t5x, assert_same_params, tmp_path):
    config, params = v1_1
    write_t5x(tmp_path, params, dtype=ml_dtypes.bfloat16)
    assert_same_params(hf.load_params(tmp_path, config), _as_stored(params, ml_dtypes.bfloat16))


def test_a_checkpoint_that_was_written_to_a_bucket_is_read_from_a_folder(
    v1_1, write_t5x, assert_same_params, tmp_path
):
    config, params = v1_1
    write_t5x(tmp_path, params, driver="gcs")
    assert_same_params(hf.load_params(tmp_path, config), params)


def test_the_newest_step_of_a_model_dir_is_read(v1_1, write_t5x, make_params, tmp_path):
    config, params = v1_1
    write_t5x(tmp_path / "checkpoint_900", make_params(config, seed=1), zarr=False)
    write_t5x(tmp_path / "checkpoint_1000", params, zarr=False)
    got = hf.load_params(tmp_path, config)
    np.testing.assert_array_equal(got["token_embedder"], params["token_embedder"])


def test_the_vocabulary_must_lie_beside_it_and_the_error_says_which(v1_1, write_t5x, tmp_path):
    _, params = v1_1
    write_t5x(tmp_path, params, zarr=False)
    with pytest.raises(
        InputError,
        match=r"copy the sentencepiece\.model of its gin file into this folder as spiece\.model",
    ):
        read_model_files(tmp_path)


def test_what_is_missing_is_listed(v1_1, write_t5x, tmp_path):
    import flax.serialization

    config, params = v1_1
    write_t5x(tmp_path, params, zarr=False)
    raw = flax.serialization.msgpack_restore((tmp_path / "checkpoint").read_bytes())
    target = raw["optimizer"]["target"]
    del target["encoder"]["layers_1"]["mlp"]["wo"]
    target["decoder"]["adapter"] = np.zeros(3, np.float32)
    (tmp_path / "checkpoint").write_bytes(flax.serialization.msgpack_serialize(raw))
    with pytest.raises(
        InputError, match=r"1 missing: encoder\.block\.1.*wo.*1 unknown: decoder/ad"
    ):
        hf.load_params(tmp_path, config)


def test_a_chunk_that_is_missing_is_no_zeros(v1_1, write_t5x, tmp_path):
    config, params = v1_1
    write_t5x(tmp_path, params)
    (tmp_path / "target.decoder.logits_dense.kernel" / "1.1").unlink()
    with pytest.raises(InputError, match="logits_dense/kernel cannot be read"):
        hf.load_params(tmp_path, config)
    shutil.rmtree(tmp_path / "target.decoder.logits_dense.kernel")
    with pytest.raises(
        InputError, match=r"target\.decoder\.logits_dense\.kernel cannot be read"
    ) as e:
        hf.load_params(tmp_path, config)
    assert "\n" not in str(e.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 1}, "of version 2 or later can be read, got version 1"),
        ({"optimizer": {"state": {}}}, "has no `target`"),
        ({"optimizer": {"target": {"a": "text"}}}, "a is not an array"),
        (
            {
                "optimizer": {
                    "target": {
                        "a": {"driver": "zarr", "kvstore": {"path": "../else/"}, "metadata": {}}
                    }
                }
            },
            "may refer only to arrays in its own folder, got '../else'",
        ),
    ],
    ids=["version", "no target", "text", "elsewhere"],
)
def test_what_is_no_such_checkpoint_is_refused_by_name(tmp_path, change, message):
    import flax.serialization

    tree = {"version": 3, "optimizer": {"target": {}}} | change
    (tmp_path / "checkpoint").write_bytes(flax.serialization.msgpack_serialize(tree))
    with pytest.raises(InputError, match=message) as error:
        read_config(tmp_path)
    assert str(tmp_path / "checkpoint") in str(error.value)


def test_a_checkpoint_of_tensorflow_is_told_apart(tmp_path):
    (tmp_path / "checkpoint").write_text('model_checkpoint_path: "model.ckpt-1"\n')
    with pytest.raises(InputError, match="from TensorFlow's T5, not from T5X"):
        read_config(tmp_path)


def _as_stored(params, dtype):
    import jax

    return jax.tree.map(lambda x: x.astype(dtype).astype(np.float32), params)
