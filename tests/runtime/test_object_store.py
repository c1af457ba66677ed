"""Paths in an object store, on a store in memory that refuses what object stores refuse."""

import importlib.util
import json
import pathlib

import fsspec
import pytest
from etils.epath import backend, gpath
from fsspec.implementations.memory import MemoryFileSystem
from fsspec.registry import _registry

from stepdistill_jax.commands.main import main
from stepdistill_jax.data.objectives import label_only
from stepdistill_jax.data.prepared import data_folder
from stepdistill_jax.data.vocabulary import load_vocabulary
from stepdistill_jax.errors import InputError
from stepdistill_jax.formats.directory import TaskInfo, read_model_files, write_model_files
from stepdistill_jax.inference import export
from stepdistill_jax.models.families import model_config
from stepdistill_jax.runtime import files
from stepdistill_jax.runtime import metrics as writers
from stepdistill_jax.runtime.checkpoints import manifest
from stepdistill_jax.runtime.checkpoints.manager import is_workdir, resolve_step, saved_steps
from stepdistill_jax.runtime.checkpoints.manifest import seal
from stepdistill_jax.runtime.compile_cache import folder_for
from stepdistill_jax.runtime.files import atomic_write, read_json, write_json
from stepdistill_jax.runtime.metrics import MetricsWriter, last_step_metrics, read_metrics
from stepdistill_jax.runtime.stores import as_path, is_remote, local_path
from stepdistill_jax.training import TrainConfig
from stepdistill_jax.training.workdir import check_config, check_workdir

RUN = "gs://bucket/runs/a"


class Store(MemoryFileSystem):
    """Whole objects only; a folder is there while an object is below it; the bucket is `bucket`."""

    protocol = ("gs", "gcs")
    objects: dict = {}  # noqa: RUF012
    puts: list = []  # noqa: RUF012

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.store, self.pseudo_dirs = Store.objects, [""]

    @classmethod
    def _strip_protocol(cls, path):
        return "/" + str(path).removeprefix("gs://").strip("/")

    def _open(self, path, mode="rb", **kwargs):
        path = self._strip_protocol(path)
        assert mode in ("rb", "wb"), f"an object store has no mode {mode!r}"
        if not path.startswith("/bucket/"):
            raise PermissionError(f"no right to\n{path}")
        if mode == "wb":
            Store.puts.append(path)
        return super()._open(path, mode, **kwargs)

    def mv(self, *_, **__):
        raise AssertionError("an object store has no rename")

    def mkdir(self, *_, **__):
        pass

    makedirs = mkdir


@pytest.fixture
def store(monkeypatch, tmp_path):
    """Objects by key. Nothing of a run may appear in the current folder: none named `gs:`."""
    for name in ("gcs", "gs"):  # epath asks for the first, fsspec reads the second off a URL
        fsspec.register_implementation(name, Store, clobber=True)
    # epath asks once whether TensorFlow reads its paths; a test before may have had it ask
    monkeypatch.setenv("EPATH_USE_TF", "false")
    gpath._is_tf_installed.cache_clear()
    backend.fsspec_backend._get_filesystem.cache_clear()
    monkeypatch.chdir(tmp_path)
    Store.objects.clear()
    Store.puts.clear()
    yield Store.objects
    for name in ("gcs", "gs"):
        del _registry[name]  # the real one comes back when it is asked for
    backend.fsspec_backend._get_filesystem.cache_clear()
    assert not [p for p in tmp_path.iterdir() if ":" in p.name]


def test_a_local_path_is_pathlibs_and_a_url_is_not(store):
    for local in ("runs/a", "~/a", "a:/b", "gs", "C:/a"):
        assert as_path(local) == pathlib.Path(local)
        assert type(as_path(local)) is type(pathlib.Path())
        assert not is_remote(local)
    assert str(as_path(RUN) / "run.json") == f"{RUN}/run.json"
    assert str(as_path(pathlib.Path(RUN))) == RUN  # pathlib makes `gs:/` of it
    assert as_path(as_path(RUN)) == as_path(RUN + "/")
    assert folder_for(RUN) == "gs://bucket/runs/.jax_cache"


def test_the_config_of_a_run_in_a_store_follows_changed_settings(store):
    config = as_path(RUN) / "config.gin"
    config.write_text("SEED = 1\n")
    check_config(config, "SEED = 2\n")
    config.write_text("SEED = 1  # mine\n")
    with pytest.raises(InputError, match=r"config\.gin: was not written by `train`"):
        check_config(config, "SEED = 2\n")


@pytest.mark.parametrize("url", ["hdfs://a/b", "s3://bucket/run", pathlib.Path("s3://bucket/run")])
def test_a_store_of_another_kind_is_refused_with_what_to_give(url):
    shown = str(url).replace("s3:/b", "s3://b")
    with pytest.raises(InputError, match=f"^{shown}: .*use a local path or gs://BUCKET/") as error:
        as_path(url)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "command",
    [
        ["train", "demo_label_only", "--workdir", "RUN"],
        ["checkpoints", "RUN"],
        ["evaluate", "RUN", "--task", "delivery"],
        ["predict", "RUN", "in.jsonl", "out.jsonl"],
        ["export", "RUN", "model"],
        ["serve", "RUN"],
    ],
    ids=lambda command: command[0],
)
def test_a_workdir_in_s3_is_refused_in_one_line(command, monkeypatch, tmp_path, capfd):
    monkeypatch.chdir(tmp_path)
    pathlib.Path("in.jsonl").write_text('{"input": "a"}\n')
    assert main([{"RUN": "s3://bucket/run"}.get(word, word) for word in command]) == 2
    (line,) = [x for x in capfd.readouterr().err.splitlines() if x.startswith("stepdistill:")]
    assert "s3://bucket/run: " in line and "a local path or gs://BUCKET/" in line
    assert [p.name for p in tmp_path.iterdir()] == ["in.jsonl"]


def test_what_is_missing_is_said(monkeypatch):
    with pytest.raises(InputError, match=r"^gs://: the bucket is missing; expected gs://BUCKET"):
        as_path("gs://")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(
        InputError,
        match=r"^gs://a/b: .* needs the package gcsfs; run pip install -c constraints\.txt -e '\.\[gcs\]' in the source folder of stepdistill_jax$",
    ):
        as_path("gs://a/b")


def test_a_file_is_put_whole_or_not_at_all(store):
    path = f"{RUN}/a.json"
    write_json(path, {"a": "ü"})
    assert read_json(path) == {"a": "ü"}
    with pytest.raises(ZeroDivisionError), atomic_write(path) as f:
        f.write("half")
        f.flush()
        _ = 1 / 0
    assert read_json(path) == {"a": "ü"}
    assert Store.puts == ["/bucket/runs/a/a.json"]
    with pytest.raises(InputError, match=r"gs://bucket/runs/a/b\.json: no such file"):
        read_json(f"{RUN}/b.json")


def test_metrics_are_uploaded_before_a_checkpoint_and_cut_back_on_a_resume(store, monkeypatch):
    writer = MetricsWriter(RUN, start_step=0)
    for step in range(1, 4):
        writer.write(step, {"loss": step / 2})
    assert not store  # not at each step: each time would send all of them again
    writer.sync()
    assert [line["step"] for line in read_metrics(RUN)] == [1, 2, 3]
    writer.write(4, {"loss": 2.0})
    resumed = MetricsWriter(RUN, start_step=2)  # the first one was killed
    resumed.write(3, {"loss": 9.0})
    monkeypatch.setattr(writers, "UPLOAD_SECS", 0.0)
    resumed.write(4, {"loss": 8.0})
    assert [line["loss"] for line in read_metrics(RUN)] == [0.5, 1.0, 9.0, 8.0]
    resumed.write(5, {"loss": 7.0})
    resumed.close()
    assert last_step_metrics(RUN)["loss"] == 7.0
    assert any("tfevents" in key for key in store)
    writer.close()


def test_a_workdir_is_a_model_directory_there_too(store, delivery_data_dir):
    vocabulary = load_vocabulary(delivery_data_dir / "delivery" / "spiece.model")
    config = model_config("t5_v1_1", "tiny", vocab_size=vocabulary.size)
    info = TaskInfo("delivery", label_only(), 64, 8, 8)
    write_model_files(as_path(RUN), config, vocabulary, info)
    write_model_files(as_path(RUN), config, vocabulary, info)  # over itself
    found = read_model_files(RUN)
    assert (found.config, found.task_info) == (config, info)
    assert found.vocabulary.encode("a dry alley") == vocabulary.encode("a dry alley")


def put(name, value=""):
    (as_path(RUN) / name).write_text(value if isinstance(value, str) else json.dumps(value))


def put_step(step, array="a" * 100):
    """What Orbax leaves in a store, where a save ends with a file of its own, not with a rename."""
    put(f"checkpoints/{step}/params/d/array", array)
    put(f"checkpoints/{step}/commit_success.txt")
    return as_path(RUN) / "checkpoints" / str(step)


def test_a_step_counts_once_it_is_sealed(store):
    assert saved_steps(RUN) == {}
    assert not is_workdir(RUN)
    for step in (2, 4, 6):
        folder = put_step(step)
        if step < 6:
            seal(folder, {"step": step, "validated": False})
    assert saved_steps(RUN) == {s: {"step": s, "validated": False} for s in (2, 4)}
    assert resolve_step(RUN, "last") == 4


def test_an_array_is_not_read_again_to_seal_it_in_a_store(store, monkeypatch):
    monkeypatch.setattr(manifest, "READ_IN_STORE", 50)
    folder, read = put_step(2), []
    plain_open = Store._open
    monkeypatch.setattr(Store, "_open", lambda *a, **k: read.append(a[1]) or plain_open(*a, **k))
    seal(folder, {"step": 2})
    assert manifest.defect(folder) is None
    assert not [name for name in read if name.endswith("array")]
    put("checkpoints/2/params/d/array", "a" * 99)
    assert manifest.defect(folder) == "params/d/array: expected 100 bytes, got 99"


def test_a_damaged_step_in_a_store_is_moved_inside_it(store, capfd):
    """The newest has lost a file, the one before it is as it was; the one after is being uploaded."""
    for step in (2, 4):
        seal(put_step(step), {"step": step})
    put("checkpoints/6/params/d/array", "half")
    folder, root = as_path(RUN) / "checkpoints", "/bucket/runs/a/checkpoints"
    (folder / "4" / "params" / "d" / "array").unlink()
    assert manifest.quarantine_damaged(folder) == 2
    assert (
        "checkpoints/4: params/d/array: missing; renamed to 4.damaged-1" in capfd.readouterr().err
    )
    names = {name.removeprefix(root) for name in store if name.startswith(root)}
    assert {"/4.damaged-1/manifest.json", "/4.damaged-1/commit_success.txt"} <= names
    assert not [name for name in names if name.startswith("/4/")]
    assert "/6/params/d/array" in names  # Orbax removes it
    assert list(saved_steps(RUN)) == [2]


def test_a_workdir_that_cannot_be_used_is_refused_before_anything_is_read(store):
    check_workdir(as_path(RUN))
    assert not store  # the probe is gone
    with pytest.raises(InputError, match=r"^`workdir` gs://other/a: cannot be written \(Perm.*\)"):
        check_workdir(as_path("gs://other/a"))
    put("config.json", {})
    with pytest.raises(InputError, match=r"has config\.json but no run\.json"):
        check_workdir(as_path(RUN))
    config = TrainConfig(task="any").to_json()
    put("run.json", {"config": config, "examples": 1, "parameters": 1})
    check_workdir(as_path(RUN))


def test_what_must_be_local_says_so(store, monkeypatch, capfd):
    for use, name in (
        (lambda: data_folder("gs://b/data"), "`data_dir`"),
        (lambda: local_path(pathlib.Path("gs://b/data"), "--data-dir"), "--data-dir"),
        (lambda: files.check_writable("gs://b/data", "--output"), "--output"),
        (lambda: next(files.json_lines("gs://b/data")), "input"),
        (lambda: export(RUN, "gs://b/data"), "MODEL_DIR"),
    ):
        with pytest.raises(
            InputError, match=f"^{name} gs://b/data: must be a path on this machine"
        ):
            use()
    monkeypatch.setenv("STEPDISTILL_DATA_DIR", "gs://b/data")
    with pytest.raises(InputError, match=r"^`data_dir` gs://b/data: must be"):
        data_folder(None)
    monkeypatch.delenv("STEPDISTILL_DATA_DIR")
    pathlib.Path("in.jsonl").write_text('{"input": "a"}\n')
    pathlib.Path("model").mkdir()
    config, bad = ["train", "demo_label_only", "--workdir", RUN], "gs://bucket/bad"
    for command in (
        [*config, "--data-dir", bad],
        [*config, "--set", f"INIT_FROM={bad}", "--data-dir", "data"],
        ["predict", "model", bad, "out.jsonl"],
        ["predict", "model", "in.jsonl", bad],
        ["evaluate", RUN, "--task", "delivery", "--output", bad, "--data-dir", "data"],
        ["prepare", "delivery", "--data-dir", bad],
        ["prepare", "delivery", "--data-dir", "data", "--report", bad],
        ["prepare", "jsonl", "--name", "a", "--source", bad, "--data-dir", "data"],
        ["demo", "--workdir", bad],
        ["annotate", "in.jsonl", bad, "--task", "generic", "--model", "m"],
    ):
        assert main(command) == 2, command
        assert bad in capfd.readouterr().err.splitlines()[-1], command
