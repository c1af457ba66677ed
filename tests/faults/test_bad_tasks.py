"""Tasks of a user's module and TFDS folders that are not as they should be; all that needs TensorFlow."""

import json
import shutil
import struct
import sys

import numpy as np
import pytest

from stepdistill_jax.commands.main import main
from stepdistill_jax.data.prepare import prepare
from stepdistill_jax.data.vocabulary import ByteVocabulary
from stepdistill_jax.errors import InputError
from stepdistill_jax.formats.directory import write_model_files
from stepdistill_jax.inference.evaluate import evaluate
from stepdistill_jax.models.families import model_config
from stepdistill_jax.tasks.load import load_task
from stepdistill_jax.tasks.lookup import import_task_module
from stepdistill_jax.training.config import TrainConfig
from stepdistill_jax.training.run import assemble

MODULES = {  # a module's files, its name, and what is said of it
    "exits": ({"m.py": "import sys\nsys.exit(0)"}, "m", "SystemExit: 0 at "),
    "exits with words": ({"m.py": "raise SystemExit('no licence')"}, "m", "SystemExit: no licence"),
    "raises": ({"m.py": "x = 1 / 0"}, "m", "ZeroDivisionError: division by zero at "),
    "raises on two lines": ({"m.py": "raise OSError('a\\nb')"}, "m", "OSError: a"),
    "needs a package": ({"m.py": "import no_such_package"}, "m", "No module named"),
    "does not parse": ({"m.py": "def f(:\n"}, "m", "SyntaxError: "),
    "is latin-1": ({"m.py": b"x = '\xe9'"}, "m", "SyntaxError: "),
    "is binary": ({"m.py": bytes(99)}, "m", "SyntaxError: "),
    "never ends its recursion": ({"m.py": "f = lambda: f()\nf()"}, "m", "RecursionError: "),
    "lies in a package that raises": (
        {"p/__init__.py": "raise RuntimeError('no GPU')", "p/m.py": ""},
        "p.m",
        "RuntimeError: no GPU at ",
    ),
    "lies in a package that exits": (
        {"p/__init__.py": "exit(3)", "p/m.py": ""},
        "p.m",
        "SystemExit: 3",
    ),
    "lies in a package that needs one": (
        {"p/__init__.py": "import no_such_package", "p/m.py": ""},
        "p.m",
        "No module named 'no_such_package'",
    ),
    "lies in no package": ({"p/__init__.py": ""}, "p.m", "no module 'p.m'"),
    "lies in a module": ({"p.py": ""}, "p.m", "no module 'p.m'"),
    "is a file's name": ({"m.py": ""}, "m.py", "write it as a module, m"),
    "is a path": ({"m.py": ""}, "./m.py", "write it as a module, m"),
    "is empty": ({}, "", "no module ''"),
    "is relative": ({"m.py": ""}, ".m", "no module '.m'"),
    "is a blank": ({}, " ", "no module ' '"),
    "has NUL in it": ({}, "m\0", "no module"),
    "is too long": ({}, "m" * 300, "no module"),
}


def test_modules_that_cannot_be_imported(tmp_path, monkeypatch, record_fault):
    wrong = []
    for number, (kind, (files, name, says)) in enumerate(MODULES.items()):
        folder = tmp_path / str(number)
        folder.mkdir()
        for file, content in files.items():
            path = folder / file
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(content if isinstance(content, bytes) else content.encode())
        with monkeypatch.context() as patch:
            patch.syspath_prepend(folder)
            for gone in ("m", "p", "p.m"):
                patch.delitem(sys.modules, gone, raising=False)
            try:
                import_task_module(name)
                wrong.append(f"{kind}: imported")
            except InputError as error:
                if says not in str(error) or "`task_module`" not in str(error):
                    wrong.append(f"{kind}: {error}")
            except BaseException as error:
                wrong.append(f"{kind}: {error!r}")
    record_fault(
        "modules that raise, exit or are none",
        tried=len(MODULES),
        survived=len(MODULES) - len(wrong),
    )
    assert not wrong, "\n".join(wrong)


def test_a_module_that_registers_nothing_is_one_line(tmp_path, monkeypatch, capfd):
    (tmp_path / "idle_module.py").write_text("'''Nothing.'''\n")
    monkeypatch.chdir(tmp_path)
    argv = ["inspect", "mine", "--module", "idle_module", "--data-dir", str(tmp_path / "data")]
    code = main(argv)
    err = capfd.readouterr().err
    assert code == 2 and err.count("\n") == 1 and "unknown task 'mine'" in err, err


IDS = {  # the ids of a row of a plain SeqIO task, and what is said of it
    "negative": ([3, -4, 1], "has ids from -4 to 3"),
    "huge": ([3, 2**31 - 1, 1], "has ids from 1 to 2147483647"),
    "of two dimensions": ([[3, 4], [5, 1]], "must be ids [length]"),
    "floats": ([3.5, 1.0], ""),
    "texts": (["a", "b"], ""),
    "one number": (3, ""),
    "nothing": (np.zeros(0, np.int32), "is empty; an encoder needs at least one token"),
}


def plain_task(name, inputs, targets=(5, 1), features=("inputs", "targets")):
    import seqio
    import tensorflow as tf

    def read(split, shuffle_files=False, seed=None):
        row = dict(zip(features, (np.asarray(inputs), np.asarray(targets, np.int32)), strict=False))
        for key, ids in row.items():
            if ids.dtype == np.int64:
                row[key] = ids.astype(np.int32)
        return tf.data.Dataset.from_tensors(row)

    vocabulary = seqio.ByteVocabulary(extra_ids=0)
    return seqio.Task(
        name,
        source=seqio.FunctionDataSource(read, splits=["train"]),
        preprocessors=[],
        output_features={
            key: seqio.Feature(vocabulary, rank=np.asarray(value).ndim)
            for key, value in (("inputs", inputs), ("targets", targets))
        },
    )


def test_plain_tasks_with_wrong_rows(tmp_path, record_fault):
    from stepdistill_jax.data.builder import tensorflow
    from stepdistill_jax.tasks.tokenizing import read_tokens

    tensorflow()
    kinds = {f"inputs {kind}": ((ids,), says) for kind, (ids, says) in IDS.items()}
    kinds["targets negative"] = (([3, 1], [-1]), "'targets' has ids from -1 to -1")
    kinds["no targets"] = (([3, 1], (5, 1), ("inputs",)), "targets")
    kinds["other names"] = (([3, 1], (5, 1), ("input", "label")), "")
    wrong = []
    for kind, (arguments, says) in kinds.items():
        try:
            list(read_tokens(plain_task("bad_rows", *arguments), "train", [""]))
            wrong.append(f"{kind}: read")
        except InputError as error:
            if says not in str(error) or "task 'bad_rows', split 'train'" not in str(error):
                wrong.append(f"{kind}: {error}")
        except Exception as error:
            wrong.append(f"{kind}: {error!r}")
    assert len(list(read_tokens(plain_task("good_rows", [3, 1]), "train", [""]))) == 1
    record_fault(
        "tasks with other ids, shapes, features", tried=len(kinds), survived=len(kinds) - len(wrong)
    )
    assert not wrong, "\n".join(wrong)


def cut_by_length(dataset, sequence_length):
    return dataset.filter(lambda row: len(row["inputs"]) < sequence_length["inputs"])


def draw_an_id(dataset):
    import tensorflow as tf

    return dataset.map(lambda row: row | {"inputs": tf.random.uniform([3], 3, 10**6, tf.int32)})


def unfit_tasks():
    """{kind: (what differs from a task that trains, what is said of it and what to do instead)}."""
    import seqio
    import tensorflow as tf

    def features(more=None, **feature):
        known = {"vocabulary": seqio.ByteVocabulary(), "add_eos": False}
        one = seqio.Feature(**known | feature)
        return {"output_features": {"inputs": one, "targets": one} | (more or {})}

    byte = seqio.Feature(seqio.ByteVocabulary())
    other = seqio.Feature(seqio.ByteVocabulary(extra_ids=100))
    floats = seqio.ContinuousFeature(dtype=tf.float32, rank=2)
    no_rows = seqio.FunctionDataSource(
        lambda split, shuffle_files: rows_of_ids().take(0), ["train"]
    )
    no_splits = seqio.FunctionDataSource(lambda split, shuffle_files: rows_of_ids(), [])
    gone = seqio.TfdsDataSource("no_such_dataset:1.0.0", "/no/such/folder", ["train"])
    version = seqio.TfdsDataSource("glue/cola:9.9.9", "/no/such/folder", ["train"])
    return {
        "targets alone": (
            {"output_features": {"targets": byte}},
            ("this task has the feature `targets` but not `inputs`", "splits the text in two"),
        ),
        "other features": (
            {"output_features": {"question": byte, "answer": byte}},
            ("this task has answer, question", "rekey"),
        ),
        "a required third": (
            features({"images": floats}),
            ("'images' is required", "required=False"),
        ),
        "ids of their own": (
            features(vocabulary=seqio.PassThroughVocabulary(100)),
            ("PassThroughVocabulary", "SentencePieceVocabulary"),
        ),
        "two vocabularies": (features({"targets": other}), ("share a vocabulary", "give both")),
        "an unknown vocabulary": (
            features(vocabulary=seqio.FullCodepointVocabulary()),
            ("is a FullCodepointVocabulary", "`stepdistill prepare` trains"),
        ),
        "ids of two dimensions": (features(rank=2), ("int32 of rank 2", "tokenise it")),
        "floats": (features(dtype=tf.float32), ("float32 of rank 1", "tokenise it")),
        "rows by length": (
            {"preprocessors": [cut_by_length]},
            ("cut_by_length depends on sequence_length", "functools.partial"),
        ),
        "rows by length before a cache": (
            {"preprocessors": [cut_by_length, seqio.CacheDatasetPlaceholder()]},
            ("its preprocessors: 'cut_by_length' has a `sequence_length` argument",),
        ),
        "a cache alone": (
            {"preprocessors": [seqio.CacheDatasetPlaceholder(required=True)]},
            ("read only from a cache that `seqio_cache_tasks` wrote", "remove required=True"),
        ),
        "a draw at each reading": (
            {"preprocessors": [draw_an_id]},
            ("split 'train' differ between two readings", "map_over_dataset(num_seeds=1)"),
        ),
        "no rows": ({"source": no_rows}, ("split 'train' has no rows", "its source is empty")),
        "no splits": ({"source": no_splits}, ("has no splits", "set `splits`")),
        "a TFDS version that there is not": (
            {"source": version},
            ("glue/cola:9.9.9 is not downloaded", "only: 2.0.0", "check its name, version"),
        ),
        "TFDS without code": (
            {"source": gone},
            (
                "TFDS dataset no_such_dataset:1.0.0 is not downloaded in /no/such/folder",
                "tfds build",
            ),
        ),
    }


def rows_of_ids():
    import tensorflow as tf

    row = {"inputs": [3, 4, 1], "targets": [5, 1], "images": [[0.5]]}
    specs = {"inputs": tf.int32, "targets": tf.int32, "images": tf.float32}
    return tf.data.Dataset.from_tensors({k: tf.constant(v, specs[k]) for k, v in row.items()})


def add_plain(name, **arguments):
    """Registers a task that trains, but for `arguments`."""
    import seqio

    feature = seqio.Feature(seqio.ByteVocabulary(), add_eos=False)
    source = seqio.FunctionDataSource(lambda split, shuffle_files: rows_of_ids(), ["train"])
    given = {
        "source": source,
        "preprocessors": [],
        "output_features": {"inputs": feature, "targets": feature},
    }
    return seqio.TaskRegistry.add(name, **given | arguments)


@pytest.fixture
def registries(monkeypatch):
    """What a test registers is gone after it."""
    from stepdistill_jax.data.builder import tensorflow

    tensorflow()
    import seqio

    for kind in (seqio.TaskRegistry, seqio.MixtureRegistry):
        monkeypatch.setattr(kind, "_REGISTRY", dict(kind._REGISTRY))


def test_plain_tasks_that_cannot_be_trained_on(tmp_path, record_fault, registries):
    import seqio

    wrong, cases = [], unfit_tasks()
    for number, (kind, (arguments, says)) in enumerate(cases.items()):
        name = f"unfit_{number}"
        add_plain(name, **arguments)
        try:
            load_task(name, split="train", data_dir=tmp_path)
            wrong.append(f"{kind}: loaded")
        except InputError as error:
            said = str(error)
            if (
                not said.startswith(f"task {name!r}: ")
                or "\n" in said
                or not all(map(said.__contains__, says))
            ):
                wrong.append(f"{kind}: {said}")
        except BaseException as error:
            wrong.append(f"{kind}: {error!r}")
    record_fault(
        "SeqIO tasks that no encoder-decoder can be trained on",
        tried=len(cases),
        survived=len(cases) - len(wrong),
    )
    assert not wrong, "\n".join(wrong)
    feature = seqio.Feature(seqio.ByteVocabulary(), add_eos=False)
    optional = seqio.ContinuousFeature(
        dtype=__import__("tensorflow").float32, rank=2, required=False
    )
    add_plain("fit", output_features={"inputs": feature, "targets": feature, "images": optional})
    assert load_task("fit", split="train", data_dir=tmp_path).stores[0].num_examples == 1


def test_ids_above_the_models_vocabulary(tmp_path, registries):
    import seqio

    model = tmp_path / "model"
    write_model_files(
        model, model_config("t5_v1_1", "tiny", vocab_size=259), ByteVocabulary(), None
    )
    feature = seqio.Feature(seqio.ByteVocabulary(extra_ids=100), add_eos=False)
    high = seqio.map_over_dataset(lambda row: {k: row[k] * 100 for k in ("inputs", "targets")})
    add_plain(
        "high_ids", preprocessors=[high], output_features={"inputs": feature, "targets": feature}
    )
    says = r"task 'high_ids': its ids go up to 500, but the model's vocab_size is 384; use"
    config = TrainConfig(task="high_ids", init_from=str(model), input_length=8, target_length=8)
    with pytest.raises(InputError, match=says):
        assemble(config, tmp_path / "run", tmp_path)
    with pytest.raises(InputError, match=says):
        evaluate(model, task="high_ids", split="train", data_dir=tmp_path)


TFDS_MODULE = """
import seqio

feature = seqio.Feature(seqio.ByteVocabulary())
for name, splits in (("cola_splits", ["train"]), ("cola_all", None)):
    seqio.TaskRegistry.add(
        name,
        source=seqio.TfdsDataSource("glue/cola:2.0.0", tfds_data_dir=DIR, splits=splits),
        preprocessors=[seqio.preprocessors.tokenize],
        output_features={"inputs": feature, "targets": feature},
    )
seqio.MixtureRegistry.add("cola_mixture", ["cola_all"], default_rate=1)
"""


@pytest.mark.parametrize("task", ["cola_splits", "cola_all", "cola_mixture"])
def test_a_tfds_dataset_that_is_not_downloaded_is_one_line_of_each_command(
    tmp_path, monkeypatch, capfd, registries, model_dir, record_fault, task
):
    import tensorflow_datasets as tfds

    def no_download(*_, **__):
        raise AssertionError("a download was started")

    monkeypatch.setattr(tfds.core.DatasetBuilder, "download_and_prepare", no_download)
    folder = tmp_path / "tfds"
    (tmp_path / "cola_tasks.py").write_text(TFDS_MODULE.replace("DIR", repr(str(folder))))
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "cola_tasks", raising=False)
    where = ["--module", "cola_tasks", "--data-dir", str(tmp_path / "data")]
    commands = [
        ["inspect", task],
        ["train", "demo_label_only", "--workdir", str(tmp_path / "run"), "--set", f"TASK={task}"],
        ["evaluate", str(model_dir), "--task", task, "--split", "train"],
    ]
    wrong = []
    for command in commands:
        code = main([*command, *where])
        err = capfd.readouterr().err
        last = err.splitlines()[-1]
        want = f"TFDS dataset glue/cola:2.0.0 is not downloaded in {folder}; run"
        want += f" `tfds build glue/cola:2.0.0 --data_dir {folder}`"
        if code != 2 or want not in last or "Traceback" in err:
            wrong.append(f"{command[0]}: {code} {err}")
    record_fault(
        "TFDS datasets that are not downloaded",
        tried=len(commands),
        survived=len(commands) - len(wrong),
    )
    assert not wrong, "\n".join(wrong)
    assert not (tmp_path / "run").exists()


ROWS = [{"input": f"is {i} even ?", "label": "no" if i % 2 else "yes"} for i in range(30)]
INFO = ("1.0.0/dataset_info.json", "1.0.0/features.json")


def tfds_damage(made):
    """What is done to a prepared folder: {kind: a function of the folder}."""
    (record,) = (p.relative_to(made) for p in made.glob("1.0.0/*-train.tfrecord-*"))
    (other,) = (p.relative_to(made) for p in made.glob("1.0.0/*-test.tfrecord-*"))
    whole = (made / record).read_bytes()
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 4
    first = struct.unpack("<Q", whole[:8])[0] + 16  # length, its checksum, bytes, their checksum
    contents = {
        (record, "cut"): whole[:-50],
        (record, "empty"): b"",
        (record, "random"): bytes(range(256)),
        (record, "one flipped bit"): bytes(flipped),
        (record, "a record less"): whole[first:],
        (record, "a record twice"): whole + whole[:first],
        (record, "another split's"): (made / other).read_bytes(),
    }
    for name in INFO:
        info = json.loads((made / name).read_text())
        for kind, content in {
            "empty": b"", "cut": b"{", "list": b"[]", "object": b"{}", "null": b"null",
            "binary": b"\x80", "nested": b"[" * 50_000,
            "more": json.dumps(info | {"version": "9.9.9"}).encode(),
        }.items():  # fmt: skip
            contents[name, kind] = content
    info = json.loads((made / INFO[0]).read_text())
    info["splits"][0]["filepathTemplate"] = "../../{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}"
    contents[INFO[0], "a path out"] = json.dumps(info).encode()
    contents["train.jsonl", "edited"] = (made / "train.jsonl").read_bytes().replace(b"no", b"on")
    contents["spiece.model", "html"] = b"<html>"
    damage = {
        f"{name} {kind}": (name, lambda path, c=content: path.write_bytes(c))
        for (name, kind), content in contents.items()
    }
    for name in (record, *INFO, "spiece.model"):
        damage[f"{name} gone"] = (name, lambda path: path.unlink())
    return damage


def test_tfds_folders_are_refused_before_they_are_read_and_prepare_mends_them(
    tmp_path, record_fault
):
    source = tmp_path / "rows.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    options = {"source": source, "new_name": "mine", "data_dir": tmp_path / "data"}
    first = prepare("jsonl", **options)
    made, kept = tmp_path / "data" / "mine", tmp_path / "kept"
    shutil.copytree(made, kept)
    damage, wrong = tfds_damage(made), []
    for kind, (name, hurt) in damage.items():
        shutil.rmtree(made)
        shutil.copytree(kept, made)
        hurt(made / name)
        try:
            load_task("mine", split="train", data_dir=tmp_path / "data")
            wrong.append(f"{kind}: loaded")
        except InputError as error:
            if f"{made / name}: " not in str(error):
                wrong.append(f"{kind}: {error}")
        except Exception as error:
            wrong.append(f"{kind}: {error!r}")
    shutil.rmtree(made)
    shutil.copytree(kept, made)
    flipped = next(kind for kind in damage if kind.endswith("one flipped bit"))
    damage[flipped][1](made / damage[flipped][0])
    again = prepare("jsonl", **options)
    mended = not again["reused"] and again["fingerprint"] == first["fingerprint"]
    record_fault(
        "TFDS folders: flipped, cut, other splits' records, broken descriptions",
        tried=len(damage),
        survived=len(damage) - len(wrong),
        seen="`prepare` writes a damaged folder anew",
    )
    assert not wrong, "\n".join(wrong)
    assert mended and any("was damaged and has been rebuilt" in note for note in again["notes"])
    assert load_task("mine", split="train", data_dir=tmp_path / "data").stores[0].num_examples > 20
    assert prepare("jsonl", **options)["reused"]


def test_a_slice_of_a_tfds_split_without_rows(tmp_path, registries):
    """SeqIO ends the process when it is asked for the files of one."""
    import seqio

    # of 30 rows `prepare` leaves 24 in train
    source = tmp_path / "rows.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    prepare("jsonl", source=source, new_name="mine", data_dir=tmp_path)
    for slice_of in ("train[:0]", "train[:50%]"):
        add_plain(
            f"mine_{len(slice_of)}",
            source=seqio.TfdsDataSource("mine:1.0.0", str(tmp_path), {"train": slice_of}),
            preprocessors=[
                seqio.map_over_dataset(lambda r: {"inputs": r["input"], "targets": r["label"]}),
                seqio.preprocessors.tokenize,
            ],
        )
    with pytest.raises(
        InputError, match=r"split 'train' of source Tfds.* has no rows; choose another"
    ):
        load_task("mine_9", split="train", data_dir=tmp_path)
    assert load_task("mine_11", split="train", data_dir=tmp_path).stores[0].num_examples == 12
