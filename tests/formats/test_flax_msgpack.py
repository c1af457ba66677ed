"""Flax weights: there and back, slices of what is cut into chunks, and files that are broken."""

import flax.serialization
import jax
import ml_dtypes
import msgpack
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stepdistill_jax.errors import InputError
from stepdistill_jax.formats import hf
from stepdistill_jax.formats.mapped_msgpack import ChunkedArray, read_tree
from stepdistill_jax.models import sharding
from stepdistill_jax.models.t5 import abstract_params

FILE = "flax_model.msgpack"


@pytest.mark.parametrize("shards", [1, 3])
def test_weights_come_back_bitwise(family, write_flax, assert_same_params, tmp_path, shards):
    _, config, params = family
    write_flax(tmp_path, params, config, shards=shards)
    assert_same_params(hf.load_params(tmp_path, config), params)


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_other_float_types_are_read_to_float32(
    v1_1, write_flax, assert_same_params, tmp_path, dtype
):
    config, params = v1_1
    write_flax(tmp_path, params, config, dtype=dtype)
    want = jax.tree.map(lambda x: x.astype(dtype).astype(np.float32), params)
    assert_same_params(hf.load_params(tmp_path, config), want)


def test_arrays_that_flax_cut_into_chunks_are_read_by_slices(
    v1_1, write_flax, assert_same_params, tmp_path, monkeypatch
):
    config, params = v1_1
    monkeypatch.setattr(flax.serialization, "MAX_CHUNK_SIZE", 4 * 77)  # 2.4 rows of the embedding
    write_flax(tmp_path, params, config)
    assert b"__msgpack_chunked_array__" in (tmp_path / FILE).read_bytes()
    mesh = sharding.make_mesh(sharding.Layout(fsdp=4, tensor=2))
    shardings = sharding.param_shardings(mesh, abstract_params(config))
    assert_same_params(hf.load_params(tmp_path, config, shardings), params)


@given(data=st.data(), rows=st.integers(1, 7), width=st.integers(1, 7), size=st.integers(1, 20))
def test_any_slice_of_a_chunked_array_is_that_of_the_whole(data, rows, width, size):
    whole = np.arange(rows * width, dtype=np.float32)
    chunks = {str(i): whole[i * size :][:size] for i in range(-(-whole.size // size))}
    array = ChunkedArray({"shape": {"0": rows, "1": width}, "chunks": chunks})
    cut = tuple(
        slice(*sorted(data.draw(st.tuples(st.integers(0, n), st.integers(0, n)))))
        for n in (rows, width)
    )
    np.testing.assert_array_equal(array[cut], whole.reshape(rows, width)[cut])


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.text() | st.floats(),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=20),
        max_leaves=30,
    )
)
def test_values_are_those_that_the_msgpack_library_reads(tmp_path_factory, value):
    path = tmp_path_factory.mktemp("m") / "file"
    path.write_bytes(packed := msgpack.packb({"a" * 40: value}))
    # repr: nan is not nan
    assert repr(read_tree(path)) == repr(msgpack.unpackb(packed))


def test_arrays_are_views_of_the_file(tmp_path):
    tree = {"a": np.arange(6, dtype=np.int16).reshape(2, 3), "b": np.float32(2.5), "c": 1j}
    (tmp_path / "f").write_bytes(flax.serialization.msgpack_serialize(tree))
    got = read_tree(tmp_path / "f")
    assert not got["a"].flags.owndata and not got["a"].flags.writeable
    np.testing.assert_array_equal(got["a"], tree["a"])
    assert got["b"] == np.float32(2.5) and got["c"] is None


def test_a_file_that_is_cut_anywhere_is_refused_by_name(v1_1, write_flax, tmp_path):
    config, params = v1_1
    write_flax(tmp_path, params, config)
    whole = (tmp_path / FILE).read_bytes()
    for size in (0, 1, 2, 100, len(whole) // 2, len(whole) - 1):
        (tmp_path / FILE).write_bytes(whole[:size])
        with pytest.raises(InputError, match=r"flax_model\.msgpack") as error:
            hf.load_params(tmp_path, config)
        assert "\n" not in str(error.value)


def ext(payload, kind=1):
    return msgpack.packb({"a": msgpack.ExtType(kind, payload)})


HOSTILE = {
    "10,000 levels": (b"\x81\xa1a" * 10_000, "32 levels"),
    "4 G values": (b"\x81\xa1a\xdd\xff\xff\xff\xff" + b"\xc0" * 2_000_000, "1000000 values"),
    "4 GB text": (b"\x81\xa1a\xdb\xff\xff\xff\xff", "4294967295 bytes are wanted"),
    "a list": (msgpack.packb([1]), "a map is wanted"),
    "a number as key": (msgpack.packb({1: 2}), "a key that is no text"),
    "a key twice": (b"\x82\xa1a\x01\xa1a\x02", "twice there"),
    "bytes after it": (msgpack.packb({}) + b"\x00", "1 bytes too many"),
    "no array": (ext(msgpack.packb([1])), "not shape, type and bytes"),
    "object type": (ext(msgpack.packb([[1], "object", b"12345678"])), "the type 'object'"),
    "too few bytes": (ext(msgpack.packb([[9, 9], "float32", b"1234"])), "does not fit its 4 bytes"),
    "huge by nothing": (ext(msgpack.packb([[2**62, 4, 0], "int8", b""])), "not a whole"),
    "negative": (ext(msgpack.packb([[-1, -1], "int8", b"1"])), "does not fit its 1 bytes"),
    "chunks of nothing": (
        msgpack.packb({"a": {"__msgpack_chunked_array__": True, "shape": {}, "chunks": {}}}),
        "chunked array",
    ),
    "reserved byte": (b"\x81\xa1a\xc1", "byte 0xc1"),
    "no T5": (msgpack.packb({"a": {"b": 1}}), "a/b is no tensor of a T5"),
}


@pytest.mark.parametrize("content, message", HOSTILE.values(), ids=HOSTILE)
def test_a_hostile_file_is_refused_in_one_line(tmp_path, v1_1, content, message):
    (tmp_path / FILE).write_bytes(content)
    with pytest.raises(InputError, match=message) as error:
        hf.load_params(tmp_path, v1_1[0])
    assert str(tmp_path / FILE) in str(error.value) and "\n" not in str(error.value)


@given(st.binary(max_size=60))
def test_any_bytes_are_read_or_refused(tmp_path_factory, content):
    path = tmp_path_factory.mktemp("any") / "file"
    path.write_bytes(b"\x81\xa1a" + content)
    try:
        read_tree(path)
    except InputError as error:
        assert str(path) in str(error)
