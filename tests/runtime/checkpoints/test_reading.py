import json
import zlib

import hypothesis.strategies as st
import jax
import pytest
from hypothesis import given

from stepdistill_jax.runtime.checkpoints import manifest, reading
from stepdistill_jax.runtime.checkpoints.reading import balanced_shares

FILES = {"params/a": b"first" * 100, "params/b": b"second" * 50, "params/c": b"third"}


@pytest.fixture
def two_hosts(tmp_path, monkeypatch):
    """A step of FILES, its folder as each of two processes sees it, and what runs both in turn."""
    views = [tmp_path / host / "1" for host in ("here", "there")]
    for view in views:
        (view / "params").mkdir(parents=True)
        for name, data in FILES.items():
            (view / name).write_bytes(data)
    me = [0]
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(jax, "process_index", lambda: me[0])

    def of_all(action, channel):
        found = []
        for me[0] in (1, 0):
            found.insert(0, action())
        return json.loads(json.dumps(found))

    def digest_each(of_file, folder, names):
        return plain(of_file, views[me[0]], names)

    plain = reading.digest_each
    monkeypatch.setattr(reading, "gather_from_all", of_all)
    monkeypatch.setattr(reading, "digest_each", digest_each)
    monkeypatch.setattr(manifest, "on_process_0", lambda action, channel=None: action())
    return views


def saved_crcs(view):
    return {
        name: crc
        for name, (_, crc) in json.loads((view / manifest.MANIFEST).read_text())["files"].items()
    }


@pytest.mark.parametrize("seen", [b"sec", b"", None], ids=["cut", "empty", "absent"])
def test_what_a_lagging_host_sees_of_a_file_is_not_sealed(two_hosts, seen):
    here, there = two_hosts
    for name in FILES:
        if seen is None:
            (there / name).unlink()
        else:
            (there / name).write_bytes(seen)
    manifest.seal(here, {"step": 1})
    assert saved_crcs(here) == {name: f"{zlib.crc32(data):08x}" for name, data in FILES.items()}


def test_a_bad_read_of_one_host_condemns_no_step_and_a_damaged_file_does(two_hosts):
    here, there = two_hosts
    manifest.seal(here, {"step": 1})
    for name, data in FILES.items():
        (there / name).write_bytes(data[::-1])
    assert manifest.defect_by_all(here) is None
    (here / "params/a").write_bytes(FILES["params/a"][::-1])
    assert manifest.defect_by_all(here).startswith("params/a: its bytes have changed")


def test_dealt_out_docstring():
    assert balanced_shares({"a": 3, "b": 5, "c": 2, "d": 4}, 2) == [["b", "c"], ["d", "a"]]


@given(st.dictionaries(st.text(max_size=3), st.integers(0, 1000)), st.integers(1, 5), st.randoms())
def test_each_file_is_one_processs_and_parts_are_as_large_as_files_allow(sizes, count, random):
    parts = balanced_shares(sizes, count)
    assert sorted(name for part in parts for name in part) == sorted(sizes)
    loads = [sum(sizes[name] for name in part) for part in parts]
    assert max(loads) - min(loads) <= max(sizes.values(), default=0)
    names = list(sizes)
    random.shuffle(names)  # a listing's order
    assert balanced_shares({name: sizes[name] for name in names}, count) == parts
