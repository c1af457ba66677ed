import json
import os
import pathlib
import shutil
import socket
import subprocess
import sys
import textwrap

import numpy as np
import pytest

from stepdistill_jax.errors import InputError
from stepdistill_jax.runtime.folders import remove_leftovers
from stepdistill_jax.tasks.token_store import (
    TokenExample,
    open_store,
    own_tag,
    verify_store,
    write_store,
)

EXAMPLES = [
    TokenExample([([5, 6, 1], [7, 1]), ([8, 1], [9, 9, 1])], 1.0, "seven"),
    TokenExample([([5, 1], [7, 1]), ([8, 1], [])], 0.5, "ünïcode\nline"),
]


def contents(store):
    return [
        [rows[feature][i].tolist() for rows in store.rows for feature in ("inputs", "targets")]
        for i in range(store.num_examples)
    ]


def test_a_store_gives_back_what_was_written(tmp_path):
    write_store(tmp_path / "s", ["label", "rationale"], EXAMPLES, {"task": "x"})
    store = open_store(tmp_path / "s")
    assert contents(store) == [
        [[5, 6, 1], [7, 1], [8, 1], [9, 9, 1]],
        [[5, 1], [7, 1], [8, 1], []],
    ]
    assert store.objectives == ("label", "rationale")
    assert store.weights.tolist() == [1.0, 0.5]
    assert store.label_texts == ["seven", "ünïcode\nline"]
    assert store.about == {"task": "x"}
    assert store.max_id == 9
    assert store.rows[1]["targets"].lengths.tolist() == [3, 0]
    assert [p.name for p in tmp_path.iterdir()] == ["s"]


def test_an_objective_without_any_target_is_an_empty_file(tmp_path):
    write_store(tmp_path / "s", ["label"], [TokenExample([([5, 1], [])])])
    assert contents(open_store(tmp_path / "s")) == [[[5, 1], []]]


def test_a_store_of_many_batches_of_examples_gives_each_row_back(tmp_path):
    draw = np.random.default_rng(0)
    rows = [
        [draw.integers(1, 900, draw.integers(0, 6)).tolist() for _ in "1234"] for _ in range(2500)
    ]
    rows[1700][3] = [901]
    examples = [
        TokenExample([(r[0], r[1]), (r[2], r[3])], i / 4, f"{i} boxes") for i, r in enumerate(rows)
    ]
    store = write_store(tmp_path / "s", ["label", "rationale"], iter(examples))
    assert contents(store) == rows
    assert store.weights.tolist() == [i / 4 for i in range(2500)]
    assert store.label_texts == [f"{i} boxes" for i in range(2500)]
    assert store.max_id == 901


def test_the_fingerprint_follows_the_contents_and_nothing_else(tmp_path):
    first = write_store(tmp_path / "a", ["label", "rationale"], EXAMPLES)
    same = write_store(tmp_path / "b", ["label", "rationale"], iter(EXAMPLES), {"other": "about"})
    swapped = write_store(tmp_path / "c", ["label", "rationale"], EXAMPLES[::-1])
    assert first.fingerprint == same.fingerprint
    # moving a token from one row to the next does not change the ids
    cut = write_store(tmp_path / "d", ["label"], [TokenExample([([5, 6], [1])])])
    moved = write_store(tmp_path / "e", ["label"], [TokenExample([([5], [6, 1])])])
    assert len({first.fingerprint, swapped.fingerprint, cut.fingerprint, moved.fingerprint}) == 4


def test_the_fingerprint_follows_the_names_and_the_order_of_the_objectives(tmp_path):
    """The same tokens train a different objective under another name or in another column."""
    columns = [TokenExample(e.rows[::-1], e.weight, e.label_text) for e in EXAMPLES]
    sides = [TokenExample([(t, i) for i, t in e.rows], e.weight, e.label_text) for e in EXAMPLES]
    stores = {
        "as it is": write_store(tmp_path / "a", ["label", "rationale"], EXAMPLES),
        "another name": write_store(tmp_path / "b", ["label", "premise"], EXAMPLES),
        "names exchanged": write_store(tmp_path / "c", ["rationale", "label"], EXAMPLES),
        "columns exchanged": write_store(tmp_path / "d", ["label", "rationale"], columns),
        "inputs and targets exchanged": write_store(tmp_path / "e", ["label", "rationale"], sides),
    }
    found = {what: store.fingerprint for what, store in stores.items()}
    assert len(set(found.values())) == len(stores), found


def test_an_error_while_writing_leaves_the_old_store(tmp_path):
    old = write_store(tmp_path / "s", ["label", "rationale"], EXAMPLES)

    def failing():
        yield EXAMPLES[0]
        raise RuntimeError("the source broke")

    with pytest.raises(RuntimeError, match="the source broke"):
        write_store(tmp_path / "s", ["label", "rationale"], failing())
    assert open_store(tmp_path / "s").fingerprint == old.fingerprint
    assert [p.name for p in tmp_path.iterdir()] == ["s"]


def test_what_a_killed_writer_left_beside_a_store_is_removed(tmp_path, monkeypatch):
    def killed(*_):
        raise KeyboardInterrupt

    for name in ("s", "other"):
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(shutil, "rmtree", lambda *_, **__: None)  # as after a kill
            write_store(tmp_path / name, ["label"], map(killed, "x"))
    assert len(list(tmp_path.iterdir())) == 2
    with monkeypatch.context() as patch:
        patch.setattr(socket, "gethostname", lambda: "another")  # its lock may not be ours
        remove_leftovers(tmp_path / "s", own_tag())
    assert len(list(tmp_path.iterdir())) == 2
    remove_leftovers(tmp_path / "s", own_tag())
    assert [p.name.split(".")[1] for p in tmp_path.iterdir()] == ["other"]


def test_what_a_killed_writer_of_another_user_left_stops_nobody(tmp_path, monkeypatch):
    left = tmp_path / f".s.partial-{own_tag()}-x"
    left.mkdir()

    def forbidden(folder):
        raise PermissionError(folder)

    monkeypatch.setattr(pathlib.Path, "iterdir", forbidden)
    remove_leftovers(tmp_path / "s", own_tag())
    assert left.is_dir()


def test_a_replaced_store_stays_readable_for_those_who_have_it_open(tmp_path):
    old = write_store(tmp_path / "s", ["label", "rationale"], EXAMPLES)
    new = write_store(tmp_path / "s", ["label", "rationale"], EXAMPLES[:1])
    assert contents(old)[1][0] == [5, 1]
    assert new.num_examples == 1
    assert [p.name for p in tmp_path.iterdir()] == ["s"]


def test_the_labels_of_a_replaced_store_are_still_its_own(tmp_path):
    old = write_store(tmp_path / "s", ["label", "rationale"], EXAMPLES)
    write_store(tmp_path / "s", ["label", "rationale"], EXAMPLES[:1])
    assert old.label_texts == ["seven", "ünïcode\nline"]


def test_the_same_store_is_not_replaced(tmp_path):
    write_store(tmp_path / "s", ["label", "rationale"], EXAMPLES, {"task": "x"})
    inode = (tmp_path / "s").stat().st_ino
    write_store(tmp_path / "s", ["label", "rationale"], EXAMPLES, {"task": "x"})
    assert (tmp_path / "s").stat().st_ino == inode
    # what a store was made from is compared at the next start
    store = write_store(tmp_path / "s", ["label", "rationale"], EXAMPLES, {"task": "y"})
    assert store.about == open_store(tmp_path / "s").about == {"task": "y"}
    assert [p.name for p in tmp_path.iterdir()] == ["s"]


def test_the_same_store_that_comes_at_the_last_moment_is_not_replaced(tmp_path, monkeypatch):
    rename, inodes = os.rename, []

    def after_another(source, target):
        monkeypatch.setattr(os, "rename", rename)
        write_store(tmp_path / "s", ["label", "rationale"], EXAMPLES)
        inodes.append((tmp_path / "s").stat().st_ino)
        rename(source, target)

    monkeypatch.setattr(os, "rename", after_another)
    store = write_store(tmp_path / "s", ["label", "rationale"], EXAMPLES)
    assert [(tmp_path / "s").stat().st_ino] == inodes
    assert store.num_examples == len(EXAMPLES)
    assert [p.name for p in tmp_path.iterdir()] == ["s"]


@pytest.mark.parametrize("kinds", [1, 2])
def test_processes_that_write_and_read_at_once_all_get_whole_stores(tmp_path, kinds):
    code = """
        import pathlib, sys, time
        from stepdistill_jax.tasks.token_store import TokenExample, open_store, write_store

        folder, me, kinds = pathlib.Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
        (folder / f"ready-{me}").touch()
        while len(list(folder.glob("ready-*"))) < 2:
            time.sleep(0.001)
        for k in range(60):
            length = 2 + (k + int(me)) % kinds
            rows = [TokenExample([([7] * length, [length, 1])], 1.0, str(length))] * length
            store = write_store(folder / "at" / str(k // 15), ["label"], iter(rows))
            for store in (store, open_store(folder / "at" / str(k // 15))):
                if store is None:  # the other one replaces it just now
                    assert kinds > 1
                    continue
                n = store.num_examples
                assert store.label_texts == [str(n)] * n, (store.label_texts, n)
                assert store.rows[0]["inputs"].ids.tolist() == [7] * n * n
                assert store.rows[0]["targets"][n - 1].tolist() == [n, 1]
    """
    writers = [
        subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(code), str(tmp_path), me, str(kinds)],
            stderr=subprocess.PIPE,
            text=True,
        )
        for me in "01"
    ]
    errors = [writer.communicate(timeout=120)[1] for writer in writers]
    assert [writer.returncode for writer in writers] == [0, 0], errors
    assert sorted(p.name for p in (tmp_path / "at").iterdir()) == ["0", "1", "2", "3"]


SAID = {
    "flipped": "its files have changed",
    "truncated": "1-inputs.ids: expected 20 bytes, got 19",
    "missing": "FileNotFoundError",
    "manifest": "JSONDecodeError",
}


@pytest.mark.parametrize("damage", [*SAID, "version", "absent"])
def test_a_damaged_store_is_no_store(tmp_path, capsys, damage):
    write_store(tmp_path / "s", ["label", "rationale"], EXAMPLES)
    manifest, ids = tmp_path / "s" / "manifest.json", tmp_path / "s" / "1-inputs.ids"
    if damage == "flipped":
        ids.write_bytes(bytes([ids.read_bytes()[0] ^ 1]) + ids.read_bytes()[1:])
    elif damage == "truncated":
        ids.write_bytes(ids.read_bytes()[:-1])
    elif damage == "missing":
        ids.unlink()
    elif damage == "manifest":
        manifest.write_text(manifest.read_text()[:-9])
    elif damage == "version":
        manifest.write_text(json.dumps({**json.loads(manifest.read_text()), "version": 0}))
    place = "elsewhere" if damage == "absent" else "s"
    assert open_store(tmp_path / place) is None
    said = capsys.readouterr().err
    if damage in SAID:
        assert said.startswith(f"warning: {tmp_path}/s: ") and said.count("\n") == 1
        assert SAID[damage] in said and "tokenised again" in said
    else:
        assert not said


@pytest.fixture
def large(tmp_path):
    """Writes a store with an input file of 6 MB; `flip(place)` changes a bit of it."""
    ids = np.arange(1_500_000)
    write_store(tmp_path / "s", ["label"], [TokenExample([(ids, [7, 1])])], {"task": "x"})

    def flip(place):
        with open(tmp_path / "s" / "1-inputs.ids", "r+b") as f:
            f.seek(place)
            byte = f.read(1)[0]
            f.seek(place)
            f.write(bytes([byte ^ 1]))

    return tmp_path / "s", flip


def test_opening_a_large_store_reads_samples_of_it(large):
    directory, flip = large
    for place in (0, 4095, 3_000_000 // 5860 * 5860, 5_999_000 // 5860 * 5860):
        flip(place)
        assert open_store(directory) is None, place
        flip(place)
    flip(5000)  # between the first two sampled pieces
    assert open_store(directory) is not None


def test_verifying_a_store_reads_every_byte(large):
    directory, flip = large
    files = [p for p in directory.iterdir() if p.name != "manifest.json"]
    assert verify_store(directory) == {
        "store": str(directory),
        "files": len(files),
        "bytes": sum(p.stat().st_size for p in files),
    }
    flip(5000)
    with pytest.raises(InputError, match=r"s: its files have changed .*; delete this folder"):
        verify_store(directory)
    shutil.rmtree(directory)
    with pytest.raises(InputError, match="FileNotFoundError"):
        verify_store(directory)


def test_a_store_of_a_version_before_the_samples_is_read_as_a_whole(large):
    directory, flip = large
    manifest = json.loads((directory / "manifest.json").read_text())
    for name in ("sampled", "max_ids"):
        del manifest[name]
    (directory / "manifest.json").write_text(json.dumps(manifest))
    assert open_store(directory).max_id == 1_499_999
    flip(5000)
    assert open_store(directory) is None


@pytest.mark.parametrize("field", ["fingerprint", "max_ids", "num_examples", "about"])
def test_a_changed_manifest_is_damage(tmp_path, field):
    write_store(tmp_path / "s", ["label", "rationale"], EXAMPLES, {"task": "x"})
    path = tmp_path / "s" / "manifest.json"
    manifest = json.loads(path.read_text())
    other = {"fingerprint": "0" * 64, "about": {"task": "y"}}.get(field, 3)
    path.write_text(json.dumps(manifest | {field: other}))
    assert open_store(tmp_path / "s") is None


def test_ids_are_memory_mapped_int32(tmp_path):
    store = write_store(tmp_path / "s", ["label", "rationale"], EXAMPLES)
    ids = store.rows[0]["inputs"].ids
    assert ids.dtype == np.int32
    assert not ids.flags.writeable
    assert isinstance(ids.base, np.memmap)
