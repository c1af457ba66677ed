import json
import os
import pathlib
import subprocess
import sys
import time

import pytest

from stepdistill_jax.data import builder
from stepdistill_jax.data.example import Example, Rationale
from stepdistill_jax.errors import InputError


class FakeConfig:
    """`tf.config` of a machine with one GPU; `used`: whether TensorFlow has created its devices."""

    def __init__(self, used=False):
        self.visible = {"GPU": ["gpu:0"], "TPU": []}
        self.used = used

    def set_visible_devices(self, devices, kind):
        if self.used:
            raise RuntimeError("Visible devices cannot be modified after being initialized")
        self.visible[kind] = devices

    def get_visible_devices(self, kind):
        return self.visible[kind]


@pytest.fixture
def fake_tensorflow(monkeypatch):
    def install(config):
        module = type(sys)("tensorflow")
        module.config = config
        monkeypatch.setitem(sys.modules, "tensorflow", module)
        return builder.tensorflow.__wrapped__  # past the cache

    return install


def test_accelerators_are_hidden_from_tensorflow(fake_tensorflow):
    config = FakeConfig()
    assert fake_tensorflow(config)().config is config
    assert config.visible == {"GPU": [], "TPU": []}


def test_a_gpu_that_tensorflow_already_holds_is_an_error(fake_tensorflow):
    with pytest.raises(InputError, match="already uses a GPU"):
        fake_tensorflow(FakeConfig(used=True))()


def test_a_missing_tensorflow_says_where_to_do_this_step(monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorflow", None)
    with pytest.raises(InputError, match="run this step on Linux"):
        builder.tensorflow.__wrapped__()


@pytest.mark.slow
@pytest.mark.parametrize("first", ["os", "grain"], ids=["alone", "after_absl_logging_began"])
def test_importing_tensorflow_writes_nothing(first):
    code = (
        f"import {first};"
        "from stepdistill_jax.data.builder import tensorflow as t; print(t().__version__[:2])"
    )
    environment = {k: v for k, v in os.environ.items() if k != "TF_CPP_MIN_LOG_LEVEL"}
    found = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment
    )
    assert (found.stdout.strip(), found.stderr) == ("2.", "")


EXAMPLES = [
    Example("1", "in\nput", "yes"),
    Example(
        "2", "é", "", "because", (Rationale("because", "llm", "no"), Rationale("since", "human")),
        "no", 0.1, ("yes", "no"),
    ),
]  # fmt: skip


@pytest.mark.parametrize("example", EXAMPLES, ids=["bare", "full"])
def test_a_record_is_what_tfds_would_write(example):
    tf = builder.tensorflow()
    from tensorflow_datasets.core.example_serializer import ExampleSerializer

    features = builder.features()
    theirs = ExampleSerializer(features.get_serialized_info()).serialize_example(
        features.encode_example(
            {
                **{name: getattr(example, name) for name in builder.TEXT_FEATURES},
                "weight": example.weight,
                "choices": list(example.choices),
                "rationales": [vars(r) for r in example.rationales],
            }
        )
    )
    ours = builder.to_record(json.loads(json.dumps(example.to_json())))
    assert tf.train.Example.FromString(ours) == tf.train.Example.FromString(theirs)


def _folder(tmp_path, count=5):
    folder = tmp_path / "mine"
    folder.mkdir()
    rows = [Example(str(i), f"question {i}", "yes").to_json() for i in range(count)]
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "unlabelled.jsonl").write_text(json.dumps(EXAMPLES[1].to_json()) + "\n")
    return folder, {"train": count, "unlabelled": 1}


def _inputs(data_dir, split):
    import tensorflow_datasets as tfds

    dataset = tfds.load("mine", data_dir=str(data_dir), split=split)
    return [row["input"].decode() for row in tfds.as_numpy(dataset)]


def test_several_shards_keep_the_order_and_splits_can_be_joined(tmp_path, monkeypatch):
    # more rows than TFDS reads of a shard at a time
    monkeypatch.setattr(builder, "SHARD_ROWS", 20)
    folder, splits = _folder(tmp_path, 50)
    builder.build("mine", folder, splits)
    assert len(list((folder / "1.0.0").glob("mine-train.tfrecord-*-of-00003"))) == 3
    assert _inputs(tmp_path, "train") == [f"question {i}" for i in range(50)]
    # how a trainer on the teacher's labels reads both
    assert _inputs(tmp_path, "train+unlabelled") == [*_inputs(tmp_path, "train"), "é"]


@pytest.mark.slow
def test_another_process_writes_the_same_files(tmp_path):
    folder, splits = _folder(tmp_path)
    with builder.build_in_subprocess("mine", folder, splits):
        pass
    aside = (folder / "1.0.0" / "mine-train.tfrecord-00000-of-00001").read_bytes()
    os.rename(folder / "1.0.0", tmp_path / "aside")
    builder.build("mine", folder, splits)
    assert (folder / "1.0.0" / "mine-train.tfrecord-00000-of-00001").read_bytes() == aside


@pytest.mark.slow
def test_a_failure_of_the_other_process_is_a_failure(tmp_path, capfd):
    folder, splits = _folder(tmp_path)
    (folder / "unlabelled.jsonl").unlink()
    with (
        pytest.raises(InputError, match=r"unlabelled\.jsonl: no such file"),
        builder.build_in_subprocess("mine", folder, splits),
    ):
        pass


def test_the_other_process_ends_when_the_work_beside_it_fails(tmp_path, monkeypatch):
    started = []
    popen = subprocess.Popen
    monkeypatch.setattr(
        subprocess, "Popen", lambda *a, **k: started.append(popen(*a, **k)) or started[-1]
    )
    folder, splits = _folder(tmp_path)
    with (
        pytest.raises(OSError, match="No space left"),
        builder.build_in_subprocess("mine", folder, splits),
    ):
        raise OSError(28, "No space left on device")
    assert started[0].returncode is not None
    assert not (folder / "1.0.0" / "dataset_info.json").exists()


@pytest.mark.slow
def test_a_kill_leaves_no_other_process_behind(tmp_path):
    folder, splits = _folder(tmp_path)
    code = (
        "import sys, time, pathlib; from stepdistill_jax.data import builder\n"
        f"with builder.build_in_subprocess('mine', pathlib.Path({str(folder)!r}), {splits}):\n"
        "    print('ready', flush=True); time.sleep(600)"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    assert process.stdout.readline() == b"ready\n"
    children = pathlib.Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    process.kill()
    process.wait()
    process.stdout.close()
    assert len(children) == 1
    end = time.monotonic() + 60
    while pathlib.Path(f"/proc/{children[0]}/cmdline").exists():
        state = pathlib.Path(f"/proc/{children[0]}/stat").read_text().rsplit(")")[1].split()[0]
        if state == "Z":  # a zombie: no process waits for it
            break
        assert time.monotonic() < end
        time.sleep(0.2)
    assert not (folder / "1.0.0" / "dataset_info.json").exists()
