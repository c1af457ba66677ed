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
from stepdistill_jax.formats.flax_msgpack import read_tree
from stepdistill_jax.models import sharding
from stepdistill_jax.models.encoder_decoder import abstract_params

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


def test_arrays_that_flax_cut_into_chunks_are_read(
    v1_1, write_flax, assert_same_params, tmp_path, monkeypatch
):
    config, params = v1_1
    monkeypatch.setattr(flax.serialization, "MAX_CHUNK_SIZE", 4 * 77)  # 2.4 rows of the embedding
    write_flax(tmp_path, params, config)
    assert b"__msgpack_chunked_array__" in (tmp_path / FILE).read_bytes()
    mesh = sharding.make_mesh(sharding.Layout(fsdp=4, tensor=2))
    shardings = sharding.param_shardings(mesh, abstract_params(config), config)
    assert_same_params(hf.load_params(tmp_path, config, shardings), params)


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


def test_a_file_that_is_cut_anywhere_is_refused_by_name(v1_1, write_flax, tmp_path):
    config, params = v1_1
    write_flax(tmp_path, params, config)
    whole = (tmp_path / FILE).read_bytes()
    for size in (0, 1, 2, 100, len(whole) // 2, len(whole) - 1):
        (tmp_path / FILE).write_bytes(whole[:size])
        with pytest.raises(InputError, match=r"flax_model\.msgpack") as error:
            hf.load_params(tmp_path, config)
        assert "\n" not in str(error.value)


def test_a_file_larger_than_the_memory_is_refused_before_it_is_read(
    v1_1, write_flax, tmp_path, monkeypatch
):
    config, params = v1_1
    write_flax(tmp_path, params, config)
    memory = (tmp_path / FILE).stat().st_size - 1
    sizes = {"SC_PHYS_PAGES": memory, "SC_PAGE_SIZE": 1}
    monkeypatch.setattr("os.sysconf", sizes.__getitem__)
    monkeypatch.setattr("flax.serialization.msgpack_restore", lambda data: pytest.fail("was read"))
    with pytest.raises(
        InputError, match=rf"{FILE}: .* this machine has only {memory} bytes; save the model"
    ):
        hf.load_params(tmp_path, config)


def ext(payload, kind=1):
    return msgpack.packb({"a": msgpack.ExtType(kind, payload)})


HOSTILE = {
    "10,000 levels": (b"\x81\xa1a" * 10_000, "StackError"),
    "4 G values": (b"\x81\xa1a\xdd\xff\xff\xff\xff" + b"\xc0" * 2_000_000, "4294967295 exceeds"),
    "4 GB text": (b"\x81\xa1a\xdb\xff\xff\xff\xff", "incomplete input"),
    "a list": (msgpack.packb([1]), "expected .*dict"),
    "a number as key": (msgpack.packb({1: 2}), "expected str"),
    "a key twice": (b"\x82\xa1a\x01\xa1a\x02", "a is not a tensor of a T5"),
    "bytes after it": (msgpack.packb({}) + b"\x00", "extra data"),
    "no array": (ext(msgpack.packb([1])), "not enough values"),
    "object type": (ext(msgpack.packb([[1], "object", b"12345678"])), "an OBJECT array"),
    "too few bytes": (ext(msgpack.packb([[9, 9], "float32", b"1234"])), "cannot reshape"),
    "huge by nothing": (ext(msgpack.packb([[2**62, 4, 0], "int8", b""])), "not a complete"),
    "negative": (ext(msgpack.packb([[-1, -1], "int8", b"1"])), "one unknown dimension"),
    "chunks of nothing": (
        msgpack.packb({"a": {"__msgpack_chunked_array__": True, "shape": {}, "chunks": {}}}),
        "at least one array",
    ),
    "reserved byte": (b"\x81\xa1a\xc1", "FormatError"),
    "no T5": (msgpack.packb({"a": {"b": 1}}), "a/b is not a tensor of a T5"),
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
