"""Model directories that are broken or hostile: one line that names file and field, exit 2, nothing else.

tests/bad_inputs/models holds them: files, laid one at a time into a good directory (files.tsv), and fields of its JSON
files (fields.tsv). What is binary or large is made here.
"""

import collections
import contextlib
import json
import os
import pathlib
import pickle
import resource
import shutil
import struct
import time
import warnings
import zipfile

import flax.linen as nn
import flax.serialization
import jax
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from stepdistill_jax.commands.main import main
from stepdistill_jax.data.objectives import step_by_step
from stepdistill_jax.data.vocabulary import load_vocabulary
from stepdistill_jax.errors import InputError
from stepdistill_jax.formats.directory import TaskInfo, read_model_files, write_model_files
from stepdistill_jax.formats.hf import save_params
from stepdistill_jax.formats.weights import open_weights
from stepdistill_jax.models.encoder_decoder import init_params
from stepdistill_jax.models.t5 import T5Config
from stepdistill_jax.runtime.checkpoints import manifest

CORPUS = pathlib.Path(__file__).parent.parent / "bad_inputs" / "models"
WEIGHTS, INDEX, TORCH = "model.safetensors", "model.safetensors.index.json", "pytorch_model.bin"
FLAX, ZARRAY = "flax_model.msgpack", "target.token_embedder.embedding/.zarray"
INFO = TaskInfo("roads", step_by_step(), 40, 24, 8, "text_match", ("smooth", "trouble"))
CONFIG = T5Config(
    vocab_size=384,
    emb_dim=8,
    num_heads=2,
    head_dim=4,
    mlp_dim=16,
    num_encoder_layers=1,
    num_decoder_layers=1,
)
SECONDS, MEGABYTES = 20, 300  # of one refusal, on a busy machine; what it may add to the process


def table(name: str, columns: int) -> list[list[str]]:
    """Rows of a table of the corpus, without its first line."""
    lines = (CORPUS / name).read_text("utf-8").splitlines()[1:]
    rows = [line.split("\t") for line in lines]
    assert all(len(row) == columns for row in rows), name
    return rows


def one_of_each_kind(rows: list[list[str]]) -> list:
    """The first row of each damaged file and kind of refusal, by its words; the others are slow."""
    seen, params = set(), []
    for row in rows:
        words = " ".join(filter(str.isalpha, row[-1].split()))
        kind = row[0].partition("/")[0], words or row[-1]
        params.append(pytest.param(*row, marks=[pytest.mark.slow] if kind in seen else []))
        seen.add(kind)
    return params


@pytest.fixture(scope="module")
def good(tmp_path_factory) -> pathlib.Path:
    """A ByT5 of 10,000 numbers, with a task."""
    folder = tmp_path_factory.mktemp("good")
    shapes = nn.meta.unbox(jax.eval_shape(lambda: init_params(CONFIG, jax.random.key(0))))
    params = jax.tree.map(lambda x: np.ones(x.shape, np.float32), shapes)
    write_model_files(folder, CONFIG, load_vocabulary("bytes"), INFO)
    save_params(folder, params, CONFIG)
    return folder


@pytest.fixture
def bad(good, tmp_path) -> pathlib.Path:
    """A copy to spoil."""
    return pathlib.Path(shutil.copytree(good, tmp_path / "model"))


def state(folder: pathlib.Path) -> dict[str, tuple[int, int]]:
    return {
        os.fspath(p.relative_to(folder)): (p.lstat().st_size, p.lstat().st_mtime_ns)
        for p in folder.rglob("*")
        if not p.is_dir()
    }


@pytest.fixture
def refused(tmp_path, capsys, printed):
    """`refused(model, wanted, argv=None)`: the one line; checks exit code, time, memory, and what is there."""

    def refused(model: pathlib.Path, wanted: str, argv: list[str] | None = None) -> str:
        source, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
        source.write_text('{"input": "rain"}\n')
        output.write_text('{"id": "0", "label": "of an earlier run", "score": -1.0}\n')
        before, memory = state(tmp_path), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        start = time.monotonic()
        argv = argv or ["predict", os.fspath(model), os.fspath(source), os.fspath(output)]
        with warnings.catch_warnings(record=True) as recorded:
            code = main(argv)
        seconds, (out, err) = time.monotonic() - start, capsys.readouterr()
        assert code == 2, err
        assert err.count("\n") == 1 and err.startswith("stepdistill: error: "), err
        assert wanted in err and out == "" and not printed(recorded)
        assert state(tmp_path) == before, "something was written"
        assert seconds < SECONDS
        grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory
        assert grown < MEGABYTES * 1024, f"{grown / 1024:.0f} MB more"
        return err

    return refused


def lay(folder: pathlib.Path, name: str, content: bytes) -> None:
    """Puts a file where it will be read: what would be read in its stead is removed."""
    if name.startswith(("flax_", "pytorch_", "checkpoint")) or name == INDEX:
        (folder / WEIGHTS).unlink()
    if name == "checkpoint":
        (folder / "config.json").unlink()
    (folder / name).write_bytes(content)


def edit(path: pathlib.Path, **changes) -> None:
    path.write_text(json.dumps(json.loads(path.read_text("utf-8")) | changes), "utf-8")


# the corpus


@pytest.mark.parametrize("file, wanted", one_of_each_kind(table("files.tsv", 2)))
def test_a_bad_file_is_refused(bad, refused, file, wanted):
    folder = file.partition("/")[0]
    if folder.startswith(TORCH):
        pytest.importorskip("torch")
    lay(bad, folder, (CORPUS / file).read_bytes())
    assert os.fspath(bad) in refused(bad, wanted)


def test_every_file_of_the_corpus_is_in_the_table():
    listed = {file for file, _ in table("files.tsv", 2)}
    there = {p.relative_to(CORPUS).as_posix() for p in CORPUS.rglob("*") if p.is_file()}
    assert there == listed | {"files.tsv", "fields.tsv"}


@pytest.mark.parametrize("file, fields, wanted", one_of_each_kind(table("fields.tsv", 3)))
def test_a_bad_field_is_refused(bad, refused, file, fields, wanted):
    edit(bad / file, **json.loads(fields))
    assert f"{bad / file}: " in refused(bad, wanted)


def test_the_good_directory_is_read(good):
    assert read_model_files(good).task_info == INFO
    assert len(open_weights(good).shapes()) == 29


# every command that reads a model


@pytest.mark.parametrize("command", ["evaluate", "export", "init_from"])
def test_each_command_refuses_it_in_one_line(bad, refused, tmp_path, command):
    edit(bad / "config.json", num_layers=10**9)
    argv = {
        "evaluate": ["evaluate", bad, "--task", "delivery", "--data-dir", tmp_path / "data"],
        "export": ["export", bad, tmp_path / "exported", "--format", "jax"],
        "init_from": [
            *("train", "demo_step_by_step", "--workdir", tmp_path / "run"),
            *("--set", f"INIT_FROM={bad}", "--data-dir", tmp_path / "data"),
        ],
    }[command]
    refused(bad, "num_layers must be at most 1000", [os.fspath(a) for a in argv])


@pytest.mark.parametrize(
    "argv, wanted",
    [
        (["--step", "-1"], "--step -1"),
        (["--step", "1e9"], "--step 1e9"),
        (["--step", "best2"], "--step best2"),
        (["--step", "../../x"], "--step ../../x"),
        (["--step", "9" * 5000], "--step 999"),
        (["--max-decode-len", "0"], "--max-decode-len must be a whole number of at least 1"),
        (
            ["--max-decode-len", "1" + "0" * 12],
            "--max-decode-len must be a whole number from 1 to 65536",
        ),
        (["--batch-size", "-1"], "--batch-size must be a whole number of at least 1"),
        (["--layout", "../x"], "--layout must be one of"),
        (["--num-beams", "0"], "--num-beams"),
        (["--num-beams", "2", "--length-penalty", "nan"], "--length-penalty"),
    ],
    ids=lambda value: " ".join(value)[:30] if isinstance(value, list) else None,
)
def test_bad_flags_are_refused(good, refused, tmp_path, argv, wanted):
    files = [os.fspath(p) for p in (good, tmp_path / "in.jsonl", tmp_path / "out.jsonl")]
    refused(good, wanted, ["predict", *files, *argv])


@pytest.mark.parametrize(
    "path, wanted",
    [
        ("x" * 5000, "too long for a file name"),
        ("a\0b", "no such folder"),
        ("/dev/null", "no such folder"),
        ("\x1b[2Jred", "\\x1b[2Jred: no such folder"),
        ("https://huggingface.co/t5", "use a local path or gs://BUCKET/..."),
    ],
    ids=["long", "nul", "device", "escape", "URL"],
)
def test_bad_paths_are_refused(refused, tmp_path, path, wanted):
    refused(path, wanted)


# config.json and its neighbours on the disk


def test_large_and_deep_json_is_refused(bad, refused):
    path = bad / "config.json"
    with open(path, "wb") as f:
        f.truncate(100 << 20)
    refused(bad, "config.json: larger than 64 MiB")
    for text in ('{"a":' * 100_000, "[" * 100_000, '{"d_model": 1' + "0" * 10_000 + "}"):
        path.write_text(text)
        refused(bad, "config.json: unreadable JSON")
    path.write_text(json.dumps({"model_type": "x" * 1_000_000}))
    assert len(refused(bad, "model_type must be one of")) < 3000


def test_what_is_no_file_is_refused(bad, refused):
    path = bad / "config.json"
    for place in (lambda: path.mkdir(), lambda: path.symlink_to("/dev/zero"),
                  lambda: path.symlink_to(path.name), lambda: os.mkfifo(path)):  # fmt: skip
        with contextlib.suppress(FileNotFoundError):
            path.unlink()
        place()
        refused(bad, "it has no config.json")
        if path.is_dir():
            path.rmdir()


def test_a_link_that_leads_out_shows_nothing_of_what_is_there(bad, refused, tmp_path):
    # links are followed: Hugging Face's cache consists of them
    secret = tmp_path / "secret"
    secret.write_text("hunter2 hunter2 hunter2\n" * 100)
    for name in (WEIGHTS, "config.json", "stepdistill.json", "spiece.model"):
        folder = pathlib.Path(shutil.copytree(bad, tmp_path / f"with_{name}"))
        (folder / name).unlink(missing_ok=True)
        (folder / name).symlink_to(secret)
        assert "hunter2" not in refused(folder, name)


# model.safetensors


def _entry(header, **changes):
    header["shared.weight"] |= changes


SAFETENSORS = {
    "overlapping": (
        lambda h: _entry(h, data_offsets=[0, 12288]),
        "not a complete safetensors file",
    ),
    "out of range": (lambda h: _entry(h, data_offsets=[2**40, 2**40 + 12288]), "not a complete"),
    "negative offset": (lambda h: _entry(h, data_offsets=[-12288, 0]), "not a complete"),
    "negative shape": (lambda h: _entry(h, shape=[-384, -8]), "not a complete"),
    "huge shape": (lambda h: _entry(h, shape=[2**62, 4]), "not a complete"),
    "huge by nothing": (
        lambda h: h.update(x={"dtype": "F32", "shape": [2**62, 0], "data_offsets": [0, 0]}),
        "x has a shape that no array can have",
    ),
    "100 axes": (
        lambda h: _entry(h, shape=[384, 8] + [1] * 100),
        "has a shape that no array can have",
    ),
    "whole numbers": (lambda h: _entry(h, dtype="I32"), "shared.weight is stored as I32"),
    "no such type": (lambda h: _entry(h, dtype="O"), "not a complete"),
    "a text": (lambda h: h.update(x="y"), "not a complete"),
    "a path as name": (
        lambda h: h.update({"../../etc/passwd": h.pop("shared.weight")}),
        "1 missing: shared.weight; 1 unknown: ../../etc/passwd",
    ),
    "an escape as name": (
        lambda h: h.update({"a\n\x1b[31mred": h.pop("shared.weight")}),
        "unknown: a \\x1b[31mred",
    ),
    "another shape": (lambda h: _entry(h, shape=[8, 384]), "is [8, 384], expected [384, 8]"),
}


def with_header(content: bytes, change) -> bytes:
    size = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + size])
    change(header)
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + content[8 + size :]


@pytest.mark.parametrize("change, wanted", SAFETENSORS.values(), ids=SAFETENSORS)
def test_a_bad_header_of_safetensors_is_refused(bad, refused, change, wanted):
    path = bad / WEIGHTS
    path.write_bytes(with_header(path.read_bytes(), change))
    refused(bad, wanted)


def test_a_tensor_that_is_there_twice_is_refused(bad, refused):
    path = bad / WEIGHTS
    content = path.read_bytes()
    size = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + size])
    again = json.dumps({"shared.weight": header["shared.weight"]})
    text = (json.dumps(header)[:-1] + ", " + again[1:]).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + content[8 + size :])
    refused(bad, "shared.weight is stored twice")


def test_safetensors_that_are_cut_or_longer_are_refused(bad, refused):
    path = bad / WEIGHTS
    whole = path.read_bytes()
    for content in (whole[:4], whole[:50], whole[:-1], whole + b"\0"):
        path.write_bytes(content)
        refused(bad, f"{WEIGHTS}: not a complete safetensors file")


# pytorch_model.bin


@pytest.fixture
def tensors(good):
    torch = pytest.importorskip("torch")
    weights = open_weights(good)
    return {n: torch.from_numpy(np.array(t)) for n, t in weights.tensors.items()}


class Attack:
    """Unpickled, it makes a folder."""

    def __init__(self, canary):
        self.canary = canary

    def __reduce__(self):
        return os.mkdir, (os.fspath(self.canary),)


def test_a_pickle_with_code_is_refused_and_not_run(bad, refused, tmp_path, tensors):
    import torch

    canary = tmp_path / "ran"
    lay(bad, TORCH, b"")
    for write in (
        lambda: torch.save(tensors | {"a": Attack(canary)}, bad / TORCH),
        lambda: (bad / TORCH).write_bytes(pickle.dumps(Attack(canary), protocol=2)),
        lambda: (bad / TORCH).write_bytes(pickle.dumps(Attack(canary), protocol=4)),
    ):
        write()
        refused(bad, TORCH)
        assert not canary.exists()
    (bad / TORCH).unlink()
    # nor under a name that is read by another library
    for name in (WEIGHTS, FLAX, "config.json", "spiece.model"):
        (bad / name).write_bytes(pickle.dumps(Attack(canary)))
        refused(bad, name)
        assert not canary.exists()
        if name != "config.json":
            (bad / name).unlink()
        else:
            write_model_files(bad, CONFIG, load_vocabulary("bytes"), INFO)


def repacked(path: pathlib.Path, blown_up: int = 0) -> None:
    """A torch file whose members are compressed, its pickle `blown_up` megabytes of zeros."""
    with zipfile.ZipFile(path) as archive:
        members = {i.filename: archive.read(i) for i in archive.infolist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        for name, content in members.items():
            with archive.open(name, "w", force_zip64=True) as member:
                if blown_up and name.endswith("data.pkl"):
                    for _ in range(blown_up):
                        member.write(bytes(1 << 20))
                else:
                    member.write(content)


def test_zips_of_torch_that_would_grow_or_lie_are_refused(bad, refused, tensors):
    import torch

    lay(bad, TORCH, b"")
    for megabytes in (0, 50):
        torch.save(tensors, bad / TORCH)
        repacked(bad / TORCH, megabytes)
        refused(bad, "is compressed, which torch never does")
    claimed = torch.zeros(1).expand(2**20, 2**20)
    torch.save(tensors | {"shared.weight": claimed}, bad / TORCH)
    refused(bad, "shared.weight cannot be read (its shape needs 4398046511104 bytes")
    for tensor in (
        tensors["shared.weight"].to_sparse(),
        tensors["shared.weight"].to("meta"),
        tensors["shared.weight"].to(torch.float8_e4m3fn),
    ):
        torch.save(tensors | {"shared.weight": tensor}, bad / TORCH)
        refused(bad, "shared.weight cannot be read")
    with zipfile.ZipFile(bad / TORCH, "w") as archive:
        archive.writestr("../../evil", "x")
    refused(bad, "not a complete torch file")
    assert not list(bad.parent.parent.glob("evil"))


# T5X


@pytest.fixture(scope="module")
def t5x(tmp_path_factory, good) -> pathlib.Path:
    """A T5X checkpoint whose embedding is a zarr folder, with a vocabulary of bytes."""
    import tensorstore

    folder = tmp_path_factory.mktemp("t5x")
    shutil.copy(good / "tokenizer_config.json", folder)
    zarr = {"compressor": {"id": "gzip", "level": 1}, "shape": [384, 8], "chunks": [192, 8]}
    spec = {"driver": "zarr", "dtype": "float32", "metadata": zarr}
    name = ZARRAY.partition("/")[0]
    place = {"driver": "file", "path": f"{folder}/{name}/"}
    array = tensorstore.open(spec | {"kvstore": place}, create=True).result()
    array.write(np.ones((384, 8), np.float32)).result()
    kernel = {"kernel": np.ones((8, 8), np.float32)}
    layer = {
        "attention": dict.fromkeys(("query", "key", "value", "out"), kernel),
        "mlp": {"wi": {"kernel": np.ones((8, 16), np.float32)}},
    }
    target = {
        "token_embedder": {"embedding": spec | {"kvstore": {"driver": "file", "path": f"{name}/"}}},
        "encoder": {
            "layers_0": layer,
            "relpos_bias": {"rel_embedding": np.ones((2, 32), np.float32)},
        },
    }
    tree = {"version": 3, "optimizer": {"target": target}}
    (folder / "checkpoint").write_bytes(flax.serialization.msgpack_serialize(tree))
    return folder


ZARRAYS = {
    "negative": ({"shape": [-1, 8]}, "cannot be read"),
    "2**40 rows": ({"shape": [2**40, 8]}, "claims"),
    "a chunk of 2**60": ({"chunks": [2**40, 2**20]}, "claims 4611686018427387904 bytes, but"),
    "a chunk of 40 GB": ({"chunks": [100_000, 100_000]}, "claims 40000000000 bytes, but"),
    "chunks of nothing": ({"chunks": [0, 0]}, "cannot be read"),
    "objects": ({"dtype": "|O"}, "cannot be read"),
    "a compressor of its own": ({"compressor": {"id": "evil"}}, "cannot be read"),
    "a pickle as filter": ({"filters": [{"id": "pickle"}]}, "cannot be read"),
    "64 axes": ({"shape": [1] * 64, "chunks": [1] * 64}, "cannot be read"),
}


@pytest.mark.parametrize("changes, wanted", ZARRAYS.values(), ids=ZARRAYS)
def test_a_hostile_zarr_array_is_refused(t5x, refused, tmp_path, changes, wanted):
    bad = pathlib.Path(shutil.copytree(t5x, tmp_path / "model"))
    edit(bad / ZARRAY, **changes)
    refused(bad, wanted)


def _embedder(tree):
    return tree["optimizer"]["target"]["token_embedder"]["embedding"]["kvstore"]


def _layers(tree, name):
    encoder = tree["optimizer"]["target"]["encoder"]
    encoder[name] = encoder["layers_0"]


TREES = {
    **{
        f"path {path!r}": (
            lambda t, p=path: _embedder(t).update(path=p),
            "may refer only to arrays in its own folder",
        )
        for path in ("../../x", "/etc", "..", ".", "", "a/b", "a\0b", 5, None)
    },
    "a long path": (
        lambda t: _embedder(t).update(path="x" * 5000),
        "may refer only to arrays in its own folder",
    ),
    "placeholder": (
        lambda t: t["optimizer"]["target"].update(a="PLACEHOLDER://../../etc"),
        "may refer only to arrays in its own folder, got '../../etc'",
    ),
    "10**9 layers": (lambda t: _layers(t, f"layers_{10**9 - 1}"), "a whole number from 1 to 1000"),
    "a layer of 5,000 digits": (lambda t: _layers(t, "layers_" + "9" * 5000), "do not fit any T5"),
    "10**6 stacked layers": (
        lambda t: t["optimizer"]["target"]["encoder"].update(
            encoder={"pre_mlp_layer_norm": {"scale": np.zeros((1, 10**6), np.int8)}}
        ),
        "claims 1000000 layers",
    ),
    "no array": (lambda t: t["optimizer"]["target"].update(a=3), "a is not an array"),
    "version": (lambda t: t.update(version=[9]), "of version 2 or later"),
    "no target": (lambda t: t.update(optimizer=[1]), "has no `target`"),
}


@pytest.mark.parametrize("change, wanted", TREES.values(), ids=TREES)
def test_a_hostile_tree_of_t5x_is_refused(t5x, refused, tmp_path, change, wanted):
    bad = pathlib.Path(shutil.copytree(t5x, tmp_path / "model"))
    tree = flax.serialization.msgpack_restore((bad / "checkpoint").read_bytes())
    change(tree)
    (bad / "checkpoint").write_bytes(flax.serialization.msgpack_serialize(tree))
    refused(bad, wanted)


# a workdir, whose manifests anybody can seal anew


MANIFESTS = {
    "up and out": ({"files": {"../../../../etc/passwd": [1, "00000000"]}}, "missing"),
    "absolute": ({"files": {"/etc/passwd": [1, "00000000"]}}, "/etc/passwd: missing"),
    "a link that leads out": ({"files": {"link": [1, "00000000"]}}, "link: "),
    "2**60 bytes": (
        {"files": {"params/d": [2**60, None]}},
        "expected 1152921504606846976 bytes, got 3",
    ),
    "another digest": ({"files": {"params/d": [3, "00000000"]}}, "its bytes have changed"),
    "files is a list": ({"files": ["params/d"]}, "not written by stepdistill"),
    "a size is text": ({"files": {"params/d": ["3", None]}}, "not written by stepdistill"),
    "a digest is a list": ({"files": {"params/d": [3, []]}}, "not written by stepdistill"),
    "metrics is a list": ({"metrics": []}, "not written by stepdistill"),
    "no step": ({"metrics": {}}, "not written by stepdistill"),
    "accuracy is text": (
        {"metrics": {"step": 3, "validated": True, "label_accuracy": "1", "label_loss": 1.0}},
        "not written by stepdistill",
    ),
    "a rank is text": (
        {"metrics": {"step": 3, "validated": False, "rank": ["1", 0]}},
        "not written by stepdistill",
    ),
    "nothing that Orbax reads": ({}, "not a checkpoint that Orbax can read"),
}


@pytest.fixture
def workdir(bad) -> pathlib.Path:
    """One whose only step holds three bytes; not sealed."""
    (bad / WEIGHTS).unlink()
    params = bad / "checkpoints" / "3" / "params"
    params.mkdir(parents=True)
    (params / "d").write_text("abc")
    return bad


def sealed(workdir: pathlib.Path, **changes) -> None:
    body = {"metrics": {"step": 3, "validated": False}, "files": {"params/d": [3, None]}} | changes
    (workdir / "checkpoints" / "3" / manifest.MANIFEST).write_text(manifest._text(body))


@pytest.mark.parametrize("changes, wanted", MANIFESTS.values(), ids=MANIFESTS)
def test_a_forged_manifest_is_refused(workdir, refused, capsys, changes, wanted):
    (workdir / "checkpoints" / "3" / "link").symlink_to("/etc/passwd")
    sealed(workdir, **changes)
    refused(workdir, wanted)
    if changes:
        assert main(["checkpoints", os.fspath(workdir), "--verify"]) == 1
        assert "damaged" in capsys.readouterr().out


def test_a_manifest_that_is_broken_and_folders_with_odd_names_are_refused(workdir, refused):
    path = workdir / "checkpoints" / "3" / manifest.MANIFEST
    for text in ("", "{}", "[]", "[" * 100_000, "null", '{"crc32": "00000000"}', "\0", "\ud800"):
        path.write_bytes(text.encode("utf-8", "surrogatepass"))
        refused(workdir, "manifest.json: ")
    for name in ("007", "-1", "1e3", "3.0", "\N{ARABIC-INDIC DIGIT THREE}", "3 ", "best", "..3"):
        shutil.rmtree(workdir / "checkpoints")
        (workdir / "checkpoints" / name).mkdir(parents=True)
        refused(workdir, "has no checkpoint")


# what is changed at random is read, or refused by an InputError

HOSTILE = [None, True, -1, 0, 1.5, 2**31, 10**30, float("nan"), "", "../x", "{a.b}", [], {}, [1], "\ud800"]  # fmt: skip


def changed_bytes(whole: bytes):
    """Copies of `whole` with up to four other bytes, some of them cut."""
    places = st.tuples(st.integers(0, len(whole) - 1), st.integers(0, 255))

    def change(edits, size):
        content = bytearray(whole)
        for place, value in edits:
            content[place] = value
        return bytes(content[:size])

    sizes = st.one_of(st.just(len(whole)), st.integers(0, len(whole)))
    return st.builds(change, st.lists(places, max_size=4), sizes)


def changed_json(whole: bytes):
    """Copies of a JSON file with another value somewhere, or without one."""
    raw = json.loads(whole)

    def places(value, above=()):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        for key, inner in items:
            yield (*above, key)
            if isinstance(inner, dict | list):
                yield from places(inner, (*above, key))

    def change(place, value):
        copy = json.loads(whole)
        *above, key = place
        inner = copy
        for step in above:
            inner = inner[step]
        inner[key] = value
        return json.dumps(copy).encode()

    return st.builds(
        change, st.sampled_from(sorted(places(raw), key=str)), st.sampled_from(HOSTILE)
    )


def _looked_at(folder: pathlib.Path) -> None:
    weights = open_weights(folder)
    for name, shape in weights.shapes().items():
        weights.read(name, tuple(slice(0, 1) for _ in shape))


KINDS = {
    "config.json": (changed_bytes, read_model_files),
    "config.json, values": (changed_json, read_model_files),
    "stepdistill.json": (changed_bytes, read_model_files),
    "stepdistill.json, values": (changed_json, read_model_files),
    "model.safetensors": (changed_bytes, _looked_at),
    "flax_model.msgpack": (changed_bytes, _looked_at),
    "checkpoint": (changed_bytes, _looked_at),
    "target.token_embedder.embedding/.zarray": (changed_bytes, _looked_at),
}


@pytest.fixture
def fuzz(good, t5x, tmp_path):
    """`fuzz(kind, examples)`: (what came of them, those that were neither read nor refused)."""

    def fuzz(kind: str, examples: int):
        changed, read = KINDS[kind]
        file = kind.partition(",")[0]
        source = t5x if file in ("checkpoint", ZARRAY) else good
        folder = pathlib.Path(shutil.copytree(source, tmp_path / "fuzzed"))
        if file == FLAX:
            (folder / WEIGHTS).rename(folder / "unread")
            whole = flax.serialization.msgpack_serialize(
                {
                    "shared": {"embedding": np.ones((4, 3), np.float32)},
                    "a": {"kernel": np.ones((2, 2))},
                }
            )
        else:
            whole = (folder / file).read_bytes()
        if file == WEIGHTS:  # few bytes beside the header
            whole = small_safetensors()
        seen, failures = collections.Counter(), []

        @settings(
            max_examples=examples,
            derandomize=True,  # a red run is the fault of what was changed
            deadline=None,
            database=None,
            suppress_health_check=HealthCheck,
        )
        @given(changed(whole))
        def one(content):
            (folder / file).write_bytes(content)
            try:
                read(folder)
                seen["read"] += 1
            except InputError:
                seen["refused"] += 1
            except Exception as error:
                failures.append((content, error))

        one()
        return seen, failures

    return fuzz


def small_safetensors() -> bytes:
    """Two tensors of [2, 3]."""
    header = {
        name: {"dtype": dtype, "shape": [2, 3], "data_offsets": [24 * i, 24 * i + 24]}
        for i, (name, dtype) in enumerate((("shared.weight", "F32"), ("lm_head.weight", "F32")))
    }
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + bytes(48)


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_changed_at_random_is_read_or_refused(fuzz, kind):
    seen, failures = fuzz(kind, 40)
    assert not failures, failures[0]
    assert seen["refused"]


@pytest.mark.faults
@pytest.mark.parametrize("kind", KINDS)
def test_thousands_that_are_changed_at_random_are_read_or_refused(fuzz, record_fault, kind):
    seen, failures = fuzz(kind, 3000)
    tried = sum(seen.values()) + len(failures)
    record_fault(
        f"model directory: {kind} changed at random",
        tried=tried,
        survived=tried - len(failures),
        seen=f"{seen['read']} read, {seen['refused']} refused in one line",
    )
    assert not failures, failures[0]
