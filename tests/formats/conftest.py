"""Random tiny models of each family, and writers of other tools' formats that know nothing of our readers."""

import functools
import json

import flax.serialization
import flax.traverse_util
import jax
import ml_dtypes
import numpy as np
import pytest

from stepdistill_jax.formats import hf
from stepdistill_jax.models.encoder_decoder import init_params
from stepdistill_jax.models.t5 import T5Config

SIZES = {
    "vocab_size": 64,
    "emb_dim": 32,
    "num_heads": 4,
    "head_dim": 8,
    "mlp_dim": 48,
    "num_encoder_layers": 3,
    "num_decoder_layers": 2,
}
FAMILIES = {
    "t5_v1_0": T5Config(
        **SIZES,
        mlp_activations=("relu",),
        logits_via_embedding=True,
        scale_decoder_outputs=True,
    ),
    "t5_v1_1": T5Config(**SIZES),
    "umt5": T5Config(**SIZES, shared_relative_position_bias=False),
}


def random_params(config, seed=0):
    """Random everywhere: initial norm scales are 1, and any order of them would look right."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: rng.normal(size=x.shape).astype(np.float32), shapes_of(config))


@functools.cache
def shapes_of(config):
    return jax.eval_shape(lambda: init_params(config, jax.random.key(0)))


@pytest.fixture(scope="session")
def make_params():
    return random_params


@pytest.fixture(params=FAMILIES)
def family(request):
    """(name, config, params) of each architecture."""
    config = FAMILIES[request.param]
    return request.param, config, random_params(config)


@pytest.fixture(scope="session")
def v1_1():
    """(config, params) of a T5 v1.1."""
    return FAMILIES["t5_v1_1"], random_params(FAMILIES["t5_v1_1"])


@pytest.fixture(scope="session")
def assert_same_params():
    def check(got, want):
        assert jax.tree.structure(got) == jax.tree.structure(want)
        for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
            assert a.dtype == np.float32
            np.testing.assert_array_equal(np.asarray(a), b)

    return check


def flax_tree(params, config, dtype=np.float32):
    """The nested parameters of transformers 4's FlaxT5ForConditionalGeneration."""
    flat = {}
    for name, tensor in hf.to_hf(params, config).items():
        *where, module, _ = name.split(".")
        tensor = tensor.astype(dtype)
        if module in ("shared", "relative_attention_bias"):
            leaf = "embedding"
        elif module.endswith("layer_norm"):
            leaf = "weight"
        else:
            leaf, tensor = "kernel", np.ascontiguousarray(tensor.T)
        flat[(*where, module, leaf)] = tensor
    return flat


@pytest.fixture(scope="session")
def write_flax():
    def write(folder, params, config, *, dtype=np.float32, shards=1):
        """`flax_model.msgpack`, or shards with their index."""
        flat = flax_tree(params, config, dtype)
        if shards == 1:
            tree = flax.traverse_util.unflatten_dict(flat)
            (folder / "flax_model.msgpack").write_bytes(flax.serialization.to_bytes(tree))
            return
        weight_map = {}
        for i in range(shards):
            file = f"flax_model-{i + 1:05d}-of-{shards:05d}.msgpack"
            part = dict(list(flat.items())[i::shards])
            tree = flax.traverse_util.unflatten_dict(part)
            (folder / file).write_bytes(flax.serialization.to_bytes(tree))
            weight_map |= {"/".join(key): file for key in part}
        index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
        (folder / "flax_model.msgpack.index.json").write_text(json.dumps(index))

    return write


def t5x_flat(params, *, scanned, heads_apart):
    """`target` of a T5X train state: path -> array, layers apart or as axis 1."""
    flat = {}
    for path, x in flax.traverse_util.flatten_dict(params, sep="/").items():
        if path == "token_embedder":
            flat["token_embedder/embedding"] = x
        elif path == "logits_dense/kernel":
            flat["decoder/logits_dense/kernel"] = x
        elif "/layers/" not in path:
            flat[path] = x
        else:
            side, _, rest = path.partition("/layers/")
            if heads_apart and rest.endswith("out/kernel"):  # [heads, kv, embed]
                x = x.reshape(len(x), SIZES["num_heads"], SIZES["head_dim"], -1)
            elif heads_apart and "attention/" in rest:  # [embed, heads, kv]
                x = x.reshape(len(x), -1, SIZES["num_heads"], SIZES["head_dim"])
            if scanned:
                flat[f"{side}/{side}/{rest}"] = np.ascontiguousarray(np.moveaxis(x, 0, 1))
            else:
                flat |= {f"{side}/layers_{i}/{rest}": layer for i, layer in enumerate(x)}
    return flat


def write_zarr(folder, name, array, *, driver="file"):
    """A zarr array as T5X writes it, and the spec that it leaves in `checkpoint`."""
    import tensorstore

    stored = array
    if array.dtype == ml_dtypes.bfloat16 and driver == "version 2":
        stored, driver = array.view(np.uint16), "file"
    name = name.replace("/", ".")
    chunks = [-(-n // 2) for n in array.shape]
    metadata = {"compressor": {"id": "gzip", "level": 1}, "shape": [*array.shape], "chunks": chunks}
    spec = {"driver": "zarr", "dtype": stored.dtype.name, "metadata": metadata}
    here = {"driver": "file", "path": f"{folder}/{name}/"}
    tensorstore.open(spec | {"kvstore": here}, create=True, open=True).result().write(
        stored
    ).result()
    kvstore = {"driver": driver, "path": f"{name}/"}
    if driver == "gcs":
        kvstore["bucket"] = "t5x-dummy-bucket"
    return spec | {"kvstore": kvstore}


@pytest.fixture(scope="session")
def write_t5x():
    def write(
        folder,
        params,
        *,
        scanned=False,
        heads_apart=False,
        version=3,
        driver="file",
        dtype=np.float32,
        zarr=True,
    ):
        """The first T5X form: `checkpoint`, with zarr folders for what has two axes."""
        folder.mkdir(parents=True, exist_ok=True)
        target, slots = {}, {}
        for path, array in t5x_flat(params, scanned=scanned, heads_apart=heads_apart).items():
            array, key = array.astype(dtype), tuple(path.split("/"))
            target[key] = array
            if zarr and array.ndim > 1:
                spec = write_zarr(
                    folder, f"target/{path}", array, driver="version 2" if version == 2 else driver
                )
                target[key] = spec
            slots[(*key, "v")] = np.zeros(1, np.float32)
        state = {
            "target": flax.traverse_util.unflatten_dict(target),
            "state": {
                "step": np.int32(7),
                "param_states": flax.traverse_util.unflatten_dict(slots),
            },
        }
        whole = flax.serialization.to_bytes({"version": version, "optimizer": state})
        (folder / "checkpoint").write_bytes(whole)

    return write


@pytest.fixture(scope="session")
def write_t5x_orbax():
    def write(folder, params, *, scanned=False, heads_apart=False, **handler):
        """The later T5X form: `checkpoint_STEP/state`, written by Orbax."""
        import orbax.checkpoint as ocp

        target = t5x_flat(params, scanned=scanned, heads_apart=heads_apart)
        state = {
            "target": flax.traverse_util.unflatten_dict(target, sep="/"),
            "state": {"step": np.int32(7), "param_states": {"v": np.zeros(3, np.float32)}},
        }
        saver = ocp.Checkpointer(ocp.PyTreeCheckpointHandler(**handler))
        saver.save(folder / "state", args=ocp.args.PyTreeSave(state))

    return write


@pytest.fixture(scope="session")
def train_spiece():
    """Makes a small SentencePiece model by the library itself; gives its file."""
    import sentencepiece

    def train(folder, texts, **settings):
        given = {"vocab_size": 100, "pad_id": 0, "eos_id": 1, "unk_id": 2, "bos_id": -1}
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(texts * 20),
            model_prefix=str(folder / "spiece"),
            hard_vocab_limit=False,
            minloglevel=2,
            num_threads=1,
            **given | settings,
        )
        return folder / "spiece.model"

    return train
