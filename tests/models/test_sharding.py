"""Meshes of layouts: where devices lie, and what is said where sizes do not fit."""

import dataclasses
import itertools

import flax.linen as nn
import jax
import pytest

from stepdistill_jax.errors import InputError
from stepdistill_jax.models.config import LoraConfig
from stepdistill_jax.models.encoder_decoder import abstract_params
from stepdistill_jax.models.families import model_config
from stepdistill_jax.models.sharding import LAYOUTS, Layout, make_mesh, param_shardings


@dataclasses.dataclass(frozen=True)
class Tpu:
    """What JAX's mesh functions ask of a device of a v4 pod slice."""

    id: int
    slice_index: int
    coords: tuple[int, int, int]
    process_index: int
    platform: str = "tpu"
    device_kind: str = "TPU v4"
    core_on_chip: int = 0


def slices(number, shape=(2, 2, 2)):
    """Slices of a 3-D torus, four chips a host, in an order that JAX does not promise."""
    places = itertools.product(range(number), *map(range, shape))
    found = [Tpu(i, s, (x, y, z), process_index=i // 4) for i, (s, x, y, z) in enumerate(places)]
    return found[::2] + found[1::2]


@dataclasses.dataclass(frozen=True)
class Cpu:
    """A virtual device; JAX gives those of one machine the same slice."""

    id: int
    process_index: int
    slice_index: int | None = 0
    platform: str = "cpu"
    device_kind: str = "cpu"


@pytest.mark.parametrize(
    ("layout", "shape"),
    [
        ("data", (8, 1, 1)),
        ("fsdp", (1, 8, 1)),
        ("fsdp_tensor", (1, 4, 2)),
        ("tensor", (1, 1, 8)),
        (Layout(dcn_data=2, fsdp=-1), (2, 4, 1)),
        (Layout(dcn_data=2, data=-1, tensor=2), (4, 1, 2)),
    ],
    ids=str,
)
def test_a_layout_takes_all_devices_in_order(layout, shape):
    mesh = make_mesh(layout)
    assert tuple(mesh.shape.values()) == shape
    assert mesh.devices.ravel().tolist() == jax.devices()


@pytest.mark.parametrize("number", [2, 4])
def test_hybrid_keeps_a_copy_in_each_slice(number):
    mesh = make_mesh("hybrid", slices(number))
    assert tuple(mesh.shape.values()) == (number, 8, 1)
    for copy, devices in enumerate(mesh.devices):
        assert {d.slice_index for d in devices.ravel()} == {copy}


def test_a_copy_inside_a_slice_may_be_cut_in_two_ways():
    mesh = make_mesh(Layout(dcn_data=-1, fsdp=-1, tensor=2), slices(2))
    assert mesh.devices.shape == (2, 4, 2)
    for devices in mesh.devices:
        assert len({d.slice_index for d in devices.ravel()}) == 1


def test_layouts_without_copies_across_slices_cross_them_on_the_outermost_axis():
    """`jax.make_mesh` refuses several slices."""
    for layout, axis in (("data", 0), ("fsdp", 1), ("fsdp_tensor", 1)):
        devices = make_mesh(layout, slices(2)).devices
        for half, slice_index in zip(
            (devices.take(range(devices.shape[axis] // 2), axis), devices), (0, None), strict=True
        ):
            found = {d.slice_index for d in half.ravel()}
            assert found == ({0, 1} if slice_index is None else {0})


@pytest.mark.parametrize("slice_index", [None, 0])
def test_a_process_is_a_slice_where_devices_know_none(slice_index):
    hosts = [Cpu(i, i // 4, slice_index) for i in range(16)]
    mesh = make_mesh("hybrid", hosts)
    assert mesh.devices.shape == (4, 4, 1)
    for copy, devices in enumerate(mesh.devices):
        assert {d.process_index for d in devices.ravel()} == {copy}
    halves = make_mesh(Layout(dcn_data=2, fsdp=-1), hosts).devices
    assert {d.process_index for d in halves[0].ravel()} == {0, 1}


@pytest.mark.parametrize(
    ("layout", "message"),
    [
        (
            Layout(1, 3, 2),
            "data x fsdp x tensor = 1 x 3 x 2 does not fit 8 devices; nearest that fits:"
            " fsdp=4, tensor=2",
        ),
        (Layout(data=4), "= 4 x 1 x 1 does not fit 8 devices; nearest that fits: data=8"),
        (Layout(fsdp=-1, tensor=3), "= 1 x -1 x 3 .* nearest that fits: fsdp=2, tensor=4"),
        (Layout(data=-1, fsdp=-1), "= -1 x -1 x 1 does not fit 8 devices"),
        (Layout(fsdp=0), "= 1 x 0 x 1 does not fit 8 devices"),
        (
            Layout(dcn_data=3, fsdp=-1),
            "dcn_data x data x fsdp x tensor = 3 x 1 x -1 x 1 does not fit 8 devices; nearest that"
            " fits: dcn_data=4, fsdp=2",
        ),
        (
            "hybrid",
            "keeps a copy of the parameters in each slice, and there is one slice",
        ),
        ("fdsp", "one of data, fsdp, fsdp_tensor, tensor, hybrid, not .*mean 'fsdp'"),
    ],
    ids=str,
)
def test_a_layout_that_does_not_fit_is_refused_with_the_nearest(layout, message):
    with pytest.raises(InputError, match=f"^`layout`.*{message}"):
        make_mesh(layout)


def test_several_processes_of_one_slice_are_one_slice():
    with pytest.raises(InputError, match="there is one slice"):
        make_mesh("hybrid", slices(1))


def test_copies_that_do_not_fit_the_slices_are_refused():
    with pytest.raises(InputError, match=r"dcn_data=2 does not fit 3 slices; .* dcn_data=3"):
        make_mesh(Layout(dcn_data=2, fsdp=-1), slices(3))
    with pytest.raises(
        InputError, match=r"slices must have equally many devices, but have \[4, 8\]"
    ):
        make_mesh("hybrid", [d for d in slices(2) if d.slice_index == 0 or d.coords[0] == 0])


@pytest.mark.parametrize(
    ("layout", "changes", "message"),
    [
        # T5 v1.1 small has 6 heads of 64: 4 divides their joined width, but not the heads
        (
            Layout(fsdp=2, tensor=4),
            {},
            r"tensor=4 does not divide num_heads=6 \(\S+/rel_embedding \[6, 32\]\); nearest layout"
            " of 8 devices that fits: fsdp=4, tensor=2",
        ),
        (
            "tensor",
            {},
            "num_heads=6 .* nearest layout of 8 devices that fits: fsdp=4, tensor=2",
        ),
        ("fsdp_tensor", {"mlp_dim": 1025}, r"tensor=2 does not divide mlp_dim=1025 .*: fsdp=8"),
        ("fsdp_tensor", {"vocab_size": 32101}, r"does not divide vocab_size=32101 \(.*: fsdp=8"),
        ("fsdp", {"emb_dim": 516}, r"fsdp=8 does not divide emb_dim=516 .*: fsdp=4, tensor=2"),
        ("fsdp", {"emb_dim": 515}, "fsdp=8 does not divide emb_dim=515 .*: data=8"),
        (
            Layout(dcn_data=2, fsdp=2, tensor=2),
            {"num_heads": 5, "mlp_dim": 1025},
            r"mlp_dim=1025 \(\S+ .*\), tensor=2 does not divide num_heads=5 .*: data=2, fsdp=4",
        ),
    ],
    ids=str,
)
def test_a_dimension_that_is_not_divided_is_named(layout, changes, message):
    given = {"vocab_size": 32128} | changes
    config = dataclasses.replace(model_config("t5_v1_1", "small", vocab_size=32128), **given)
    with pytest.raises(InputError, match=f"^`layout`.*{message}"):
        param_shardings(make_mesh(layout), abstract_params(config), config)


@pytest.mark.parametrize(
    ("size", "layout", "message"),
    [
        # 4 heads of 256: 8 divides the kernel's 1024 columns, and not the heads
        (
            "9b-2b",
            "tensor",
            r"tensor=8 does not divide num_kv_heads=4 \(the decoder cannot split a key and value head over devices\);"
            " nearest layout of 8 devices that fits: fsdp=2, tensor=4",
        ),
        (
            "2b-2b",
            Layout(fsdp=1, tensor=8),
            "num_kv_heads=4 .* that fits: fsdp=2, tensor=4",
        ),
        ("9b-2b", Layout(fsdp=2, tensor=4), None),
        ("9b-9b", "tensor", None),
    ],
    ids=str,
)
def test_heads_that_are_shared_are_cut_whole(size, layout, message):
    config = model_config("t5gemma", size, vocab_size=256_000)
    mesh, boxed = make_mesh(layout), abstract_params(config)
    if message is None:
        assert param_shardings(mesh, boxed, config)
        return
    with pytest.raises(InputError, match=f"^`layout`: .*{message}$"):
        param_shardings(mesh, boxed, config)


@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name not in ("tensor", "hybrid")])
@pytest.mark.parametrize(
    "config",
    [
        model_config("t5_v1_1", "small", vocab_size=32128),
        model_config("umt5", "base", vocab_size=256_384, lora=LoraConfig(query=3)),
        model_config("byt5", "small", vocab_size=384),
        model_config("t5_v1_0", "xl", vocab_size=32128),
    ],
    ids=["v1_1", "umt5_lora", "byt5", "v1_0"],
)
def test_published_models_fit_the_named_layouts(config, layout):
    boxed = abstract_params(config)
    mesh = make_mesh(layout)
    shardings = param_shardings(mesh, boxed, config)
    parts = {"data": 1, "fsdp": 8, "fsdp_tensor": 8}[layout]
    table = shardings["token_embedder"].shard_shape((config.vocab_size, config.emb_dim))
    assert table[0] * table[1] * parts == config.vocab_size * config.emb_dim


def test_a_layout_cuts_width_by_fsdp_and_heads_mlp_and_vocabulary_by_tensor():
    """Of every parameter; T5 v1.1 base has 12 layers, 12 heads of 64 and widths of 768 and 2048."""
    config = model_config("t5_v1_1", "base", vocab_size=32128)
    boxed = abstract_params(config)
    shapes = jax.tree_util.tree_leaves_with_path(jax.eval_shape(nn.meta.unbox, boxed))
    shardings = jax.tree.leaves(param_shardings(make_mesh(Layout(fsdp=2, tensor=4)), boxed, config))
    width, heads, mlp, vocabulary = 768 // 2, 12 * 64 // 4, 2048 // 4, 32128 // 4
    shares = {
        "attention/query/kernel": (12, width, heads),
        "attention/key/kernel": (12, width, heads),
        "attention/value/kernel": (12, width, heads),
        "attention/out/kernel": (12, heads, width),
        "mlp/wi_0/kernel": (12, width, mlp),
        "mlp/wi_1/kernel": (12, width, mlp),
        "mlp/wo/kernel": (12, mlp, width),
        "layer_norm/scale": (12, width),
        "coder_norm/scale": (width,),
        "rel_embedding": (12 // 4, 32),
        "token_embedder": (vocabulary, width),
        "logits_dense/kernel": (width, vocabulary),
    }
    found = dict.fromkeys(shares, 0)
    for (path, shape), sharding in zip(shapes, shardings, strict=True):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        (end,) = (end for end in shares if name.endswith(end))
        assert sharding.shard_shape(shape.shape) == shares[end], name
        found[end] += 1
    assert all(found.values()), found
