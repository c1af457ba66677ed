# ruff: noqa: RUF001 (hard strings are meant to look alike)
import concurrent.futures
import json
import logging
import os
import pathlib
import re
import shutil
import subprocess
import sys
import textwrap
import time
import types

import numpy as np
import pytest

from stepdistill_jax.batches.batch import Batches
from stepdistill_jax.data.objectives import copy_control, step_by_step
from stepdistill_jax.data.prepare import prepare
from stepdistill_jax.data.prepared import open_prepared
from stepdistill_jax.data.vocabulary import EOS_ID, ByteVocabulary, SentencePieceVocabulary
from stepdistill_jax.errors import InputError
from stepdistill_jax.tasks.load import has_split, load_task, splits_of
from stepdistill_jax.tasks.supervision import Supervision
from stepdistill_jax.tasks.token_store import TokenExample

HARD_STRINGS = [
    "",
    " ",
    "plain",
    "  two  spaces \t tab\nnewline \r\n",
    "Ünïcode – “quotes” … ½ ﬁ ℃ ①",
    "日本語 the truck 🚚👩‍👩‍👧",
    "ａｂｃ １２３",
    "e\u0301 = é; zero\u200bwidth; nbsp\u00a0here; soft\u00adhyphen",
    "</s> <pad> <unk> <extra_id_0> ▁ ▁▁",
    "0" * 300,
    "{braces} {{doubled}} \\ % $",
]


@pytest.fixture(scope="module")
def seqio():
    from stepdistill_jax.data.builder import tensorflow

    tensorflow()
    import seqio

    return seqio


def ids_of(store):
    return [
        [rows[side][i].tolist() for rows in store.rows for side in ("inputs", "targets")]
        for i in range(store.num_examples)
    ]


@pytest.mark.parametrize("kind", ["spiece.model", "bytes"])
def test_seqios_ids_are_those_of_our_vocabulary(seqio, delivery_data_dir, kind):
    from stepdistill_jax.tasks.registry import seqio_vocabulary

    path = str(delivery_data_dir / "delivery" / "spiece.model") if kind != "bytes" else "bytes"
    ours = ByteVocabulary() if kind == "bytes" else SentencePieceVocabulary(path)
    theirs = seqio_vocabulary(path)
    for text in HARD_STRINGS:
        assert theirs.encode_tf(text).numpy().tolist() == ours.encode(text), text
        assert theirs.encode(text) == ours.encode(text), text
    assert theirs.vocab_size == ours.size


ROWS_AS_THEY_STAND = [
    {"input": f"{text}?", "label": "a", "rationale": text.strip()} for text in HARD_STRINGS
] + [
    {"input": "a weight", "label": "b", "weight": 0.1},
    {"input": "by the teacher alone", "llm_label": "c", "rationale": "since"},
]


@pytest.mark.parametrize("labelled", [False, True])
@pytest.mark.parametrize("vocabulary", ["spiece.model", "bytes"])
def test_rows_that_are_taken_as_they_stand_have_the_tokens_that_seqio_gives(
    seqio, delivery_data_dir, tmp_path, monkeypatch, vocabulary, labelled
):
    from stepdistill_jax.tasks.prepared_rows import PreparedRows

    # no vocabulary trained on these very rows: two ways to split a text tie, and versions of
    # SentencePiece then differ
    if vocabulary != "bytes":
        vocabulary = delivery_data_dir / "delivery" / vocabulary
    rows = "".join(json.dumps(row) + "\n" for row in ROWS_AS_THEY_STAND)
    (tmp_path / "mine.jsonl").write_text(rows)
    prepare("jsonl", source=tmp_path / "mine.jsonl", new_name="mine", data_dir=tmp_path)
    supervision = Supervision() if labelled else None

    def load():
        return load_task(
            "mine",
            split="train",
            vocabulary=vocabulary,
            data_dir=tmp_path,
            supervision=supervision,
        )

    ours = load()
    shutil.rmtree(tmp_path / "token_store")
    monkeypatch.setattr(PreparedRows, "can_read", lambda supervision: False)
    theirs = load()
    assert ids_of(ours.stores[0]) == ids_of(theirs.stores[0])
    assert ours.stores[0].label_texts == theirs.stores[0].label_texts
    assert ours.stores[0].weights.tolist() == theirs.stores[0].weights.tolist()
    assert ours.fingerprint == theirs.fingerprint
    assert ours.stores[0].num_examples > len(ROWS_AS_THEY_STAND) / 2


@pytest.mark.parametrize("objectives", [step_by_step(), copy_control()], ids=["steps", "copy"])
def test_a_prepared_dataset_is_a_task_without_code(delivery_data_dir, objectives):
    data = load_task("delivery", split="train", objectives=objectives, data_dir=delivery_data_dir)
    dataset = open_prepared("delivery", delivery_data_dir)
    vocabulary = SentencePieceVocabulary(dataset.spiece_model)
    want = []
    for example in dataset.examples("train"):
        rows = [o.render(vars(example)) for o in objectives]
        want.append(
            [[*vocabulary.encode(text), EOS_ID] if text else [] for row in rows for text in row]
        )
    (store,) = data.stores
    assert ids_of(store) == want
    assert store.label_texts == [e.label for e in dataset.examples("train")]
    assert data.labels == ("smooth", "trouble")
    assert data.metric == "text_match"
    assert data.vocab_size == vocabulary.size


def test_rows_with_defects_keep_their_place(tmp_path):
    rows = [
        {"input": "one", "label": "a", "rationale": "first"},
        {"input": "two", "label": "b", "weight": 0.25},
        {"input": "  three\nlines ", "label": "a", "rationale": "ﬁrst “quoted”"},
    ]
    (tmp_path / "mine.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    prepare("jsonl", source=tmp_path / "mine.jsonl", new_name="mine", data_dir=tmp_path)
    (store,) = load_task("mine", split="train", vocabulary="bytes", data_dir=tmp_path).stores
    assert store.rows[1]["targets"].lengths.tolist()[1] == 0
    np.testing.assert_array_equal(store.weights, [1, 0.25, 1])
    encode = ByteVocabulary().encode
    dataset = open_prepared("mine", tmp_path)
    assert [store.rows[1]["targets"][i].tolist() for i in (0, 2)] == [
        [*encode(e.rationale), EOS_ID] for e in dataset.examples("train") if e.rationale
    ]
    # different rows under the same name: the old tokens are not used
    rows[0]["label"] = "c"
    (tmp_path / "mine.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    prepare("jsonl", source=tmp_path / "mine.jsonl", new_name="mine", data_dir=tmp_path)
    again = load_task("mine", split="train", vocabulary="bytes", data_dir=tmp_path)
    assert again.stores[0].label_texts == ["c", "b", "a"]
    assert again.stores[0].fingerprint != store.fingerprint


@pytest.mark.parametrize("first", [True, False], ids=["first", "again"])
def test_a_prepared_dataset_needs_no_tensorflow(delivery_data_dir, tmp_path, first):
    (tmp_path / "delivery").symlink_to(delivery_data_dir / "delivery")
    if not first:
        load_task("delivery", split="train", data_dir=tmp_path)
    code = """
        import sys
        from stepdistill_jax.tasks import load_task
        from stepdistill_jax.batches.batch import Batches
        data = load_task("delivery", split="train", data_dir=sys.argv[1])
        batch = Batches(data, 32, 64, 48, seed=0)(3)
        heavy = {"tensorflow", "tensorflow_datasets", "seqio", "tensorflow_text", "jax"}
        print(len(batch[0]), sorted(heavy & set(sys.modules)))
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.stdout.split(maxsplit=1)[1:] == ["[]\n"], done.stdout + done.stderr


def test_a_damaged_store_is_tokenised_again(delivery_data_dir, tmp_path):
    (tmp_path / "delivery").symlink_to(delivery_data_dir / "delivery")
    first = load_task("delivery", split="test", data_dir=tmp_path).stores[0]
    path = first.directory / "1-inputs.ids"
    whole = path.read_bytes()
    path.write_bytes(whole[:-4])
    again = load_task("delivery", split="test", data_dir=tmp_path).stores[0]
    assert again.fingerprint == first.fingerprint
    assert path.read_bytes() == whole


def test_an_unknown_task_or_split_is_named_with_what_there_is(delivery_data_dir):
    with pytest.raises(InputError) as caught:
        load_task("delivry", split="train", data_dir=delivery_data_dir)
    message = str(caught.value)
    assert "unknown task 'delivry'" in message
    assert "did you mean 'delivery'" in message
    assert "`task_module`" in message
    assert "\n" not in message
    with pytest.raises(InputError, match=r"no split 'dev' \(it has train, validation, test\)"):
        load_task("delivery", split="dev", data_dir=delivery_data_dir)
    assert has_split("delivery", "test", data_dir=delivery_data_dir)
    assert not has_split("delivery", "dev", data_dir=delivery_data_dir)
    assert splits_of("delivery", data_dir=delivery_data_dir) == ("train", "validation", "test")


PLAIN = """
    import functools, os, seqio, tensorflow as tf
    FEATURES = {
        name: seqio.Feature(seqio.ByteVocabulary(), add_eos=True) for name in ("inputs", "targets")
    }
    HERE = os.path.dirname(__file__)

    @seqio.map_over_dataset
    def to_pair(line):
        parts = tf.strings.split(line, "|")
        return {"inputs": parts[0], "targets": parts[1]}

    for name in ("PREFIX_colours", "PREFIX_sums"):
        seqio.TaskRegistry.add(
            name,
            source=seqio.TextLineDataSource(
                {"train": f"{HERE}/{name}.txt", "validation": f"{HERE}/{name}.txt"}
            ),
            preprocessors=[
                to_pair,
                seqio.preprocessors.tokenize,
                seqio.preprocessors.append_eos_after_trim,
            ],
            output_features=FEATURES,
        )
    seqio.MixtureRegistry.add("PREFIX_both", [("PREFIX_colours", 1), ("PREFIX_sums", 3)])
"""


@pytest.fixture
def plain_module(seqio, tmp_path, monkeypatch, request):
    """Writes a user's module with two plain tasks and a mixture; its name is their prefix."""
    name = f"plain_{abs(hash(request.node.nodeid)) % 10**9}"
    (tmp_path / f"{name}.py").write_text(textwrap.dedent(PLAIN).replace("PREFIX", name))
    (tmp_path / f"{name}_colours.txt").write_text("sky|blue\ngrass|green\n")
    (tmp_path / f"{name}_sums.txt").write_text("".join(f"{i}+1|{i + 1}\n" for i in range(9)))
    monkeypatch.syspath_prepend(str(tmp_path))
    return name


def test_a_plain_seqio_task_is_one_objective_on_its_own_inputs(plain_module, tmp_path):
    data = load_task(
        f"{plain_module}_colours", split="train", data_dir=tmp_path, task_module=plain_module
    )
    encode = data.vocabulary.encode
    assert ids_of(data.stores[0]) == [
        [[*encode("sky"), 1], [*encode("blue"), 1]],
        [[*encode("grass"), 1], [*encode("green"), 1]],
    ]
    assert [(o.name, o.input_template, o.weight) for o in data.objectives] == [
        ("label", "{input}", 1.0)
    ]
    assert data.stores[0].label_texts == ["blue", "green"]
    (group,) = Batches(data, 2, 16, 16, seed=0)(0)
    assert set(np.unique(group["decoder_objective_ids"])) == {0, 1}


def test_a_plain_mixture_keeps_its_rates(plain_module, tmp_path):
    data = load_task(
        f"{plain_module}_both",
        split="train",
        data_dir=tmp_path,
        task_module=plain_module,
        task_objectives="single",
    )
    assert data.rates == (1.0, 3.0)
    assert [s.num_examples for s in data.stores] == [2, 9]
    drawn = [Batches(data, 1000, 16, 16, seed=0).examples(k).stores for k in range(10)]
    assert abs(np.mean(drawn) - 0.75) < 0.02
    assert splits_of(f"{plain_module}_both", data_dir=tmp_path) == ("train", "validation")


def test_a_changed_file_is_tokenised_again(plain_module, tmp_path):
    task = {"split": "train", "data_dir": tmp_path, "task_module": plain_module}
    first = load_task(f"{plain_module}_colours", **task)
    assert load_task(f"{plain_module}_colours", **task).fingerprint == first.fingerprint
    path = tmp_path / f"{plain_module}_colours.txt"
    path.write_text("sky|grey\ngrass|green\n")
    os.utime(path, ns=(1, 1))
    second = load_task(f"{plain_module}_colours", **task)
    assert second.stores[0].label_texts == ["grey", "green"]
    assert second.fingerprint != first.fingerprint


def test_a_source_that_changed_behind_a_function_is_noticed(seqio, tmp_path, caplog):
    from stepdistill_jax.tasks.registry import add_task

    labels = ["a", "b"]
    add_task(
        "changing",
        source=lambda split: ({"input": f"row {i}", "label": x} for i, x in enumerate(labels)),
        splits=["train"],
    )
    first = load_task("changing", split="train", data_dir=tmp_path)
    labels[1] = "c"
    with caplog.at_level(logging.WARNING):
        second = load_task("changing", split="train", data_dir=tmp_path)
    assert "'changing'" in caplog.text
    assert (
        "no longer gives the rows that were tokenised (they first differ at row 2)" in caplog.text
    )
    assert second.fingerprint != first.fingerprint
    assert second.stores[0].label_texts == ["a", "c"]


@pytest.fixture(params=["add_task", "FunctionDataSource"])
def changeable(seqio, request):
    """Returns (name of a task, list of the labels of its 60 rows), read by Python or TensorFlow."""
    import tensorflow as tf

    from stepdistill_jax.tasks.registry import add_task

    labels = [f"label {i}" for i in range(60)]
    name = f"changeable_{abs(hash(request.node.nodeid)) % 10**9}"

    def rows(split):
        return [{"input": f"row {i}", "label": label} for i, label in enumerate(labels)]

    def dataset(split, shuffle_files):
        texts = rows(split)
        return tf.data.Dataset.from_tensor_slices({k: [r[k] for r in texts] for k in texts[0]})

    if request.param == "add_task":
        add_task(name, source=rows, splits=["train"])
    else:
        add_task(name, source=seqio.FunctionDataSource(dataset, splits=["train"]))
    return name, labels


def append(labels):
    labels += [f"late {i}" for i in range(30)]


def change_one(labels):
    labels[40] = "changed"


def take_one_away(labels):
    labels.pop(50)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        pytest.param(
            append,
            r"\(they differ after row 32; the source now has 90 rows instead of 60\)",
            marks=pytest.mark.slow,
        ),
        pytest.param(change_one, r"\(they differ after row 32\)", marks=pytest.mark.slow),
        (take_one_away, r"\(they differ after row 32; the source now has 59 rows instead of 60\)"),
    ],
)
def test_a_change_anywhere_in_a_source_is_said_and_tokenised_anew(
    changeable, tmp_path, caplog, change, said
):
    name, labels = changeable
    first = load_task(name, split="train", data_dir=tmp_path)
    with caplog.at_level(logging.WARNING):
        assert load_task(name, split="train", data_dir=tmp_path).fingerprint == first.fingerprint
        assert "no longer gives" not in caplog.text
        change(labels)
        second = load_task(name, split="train", data_dir=tmp_path)
        assert re.search(f"'{name}', split 'train': .*tokenised {said}", caplog.text)
        assert second.stores[0].label_texts == labels
        assert second.fingerprint != first.fingerprint
        caplog.clear()
        assert load_task(name, split="train", data_dir=tmp_path).fingerprint == second.fingerprint
        assert "no longer gives" not in caplog.text


def test_a_source_whose_late_rows_never_repeat_is_refused(changeable, tmp_path, monkeypatch):
    from stepdistill_jax.tasks import tokenizing

    name, _ = changeable
    reads = iter(range(99))
    monkeypatch.setattr(tokenizing, "rows_digest", lambda *_: {"rows": 60, "sha256": next(reads)})
    with pytest.raises(InputError, match=f"{name!r}: the rows of split 'train' differ between"):
        load_task(name, split="train", data_dir=tmp_path)


def test_a_field_that_no_objective_reads_changes_no_tokens(seqio, tmp_path):
    from stepdistill_jax.tasks.registry import add_task

    row = {"input": "a", "label": "b", "llm_label": "c"}
    add_task("unread_field", source=lambda split: [row], splits=["train"])
    first = load_task("unread_field", split="train", data_dir=tmp_path)
    row["llm_label"] = "d"
    second = load_task("unread_field", split="train", data_dir=tmp_path)
    assert second.fingerprint == first.fingerprint
    assert second.stores[0].about != first.stores[0].about


def test_the_files_of_a_source_stand_for_its_rows(seqio, tmp_path, monkeypatch):
    from stepdistill_jax.tasks.sources import files_of

    path = tmp_path / "lines.txt"
    path.write_text("a\nb\n")
    lines = seqio.TextLineDataSource({"train": str(path)})
    before = files_of(lines, "train")
    assert before == [[str(path), 4, path.stat().st_mtime_ns]]
    path.write_text("a\nb\nc\n")
    assert files_of(lines, "train") != before
    path.unlink()
    path.symlink_to(tmp_path / "gone")
    assert files_of(lines, "train") == []
    # a function's splits are not files, even if a file has the same name
    monkeypatch.chdir(tmp_path)
    pathlib.Path("train").touch()
    function = seqio.FunctionDataSource(lambda split, shuffle_files: None, splits=["train"])
    assert files_of(function, "train") == []


def test_parts_of_a_tfds_split_are_told_apart(seqio, delivery_data_dir):
    from stepdistill_jax.tasks.sources import files_of

    def found(part):
        return files_of(
            seqio.TfdsDataSource("delivery:1.0.0", str(delivery_data_dir), {"train": part}), "train"
        )

    assert found("train[:10%]") == found("train[:10%]")
    assert len(found("train")) > 1
    assert found("train[:10%]") != found("train[:20%]")


def test_rows_of_any_structure_have_a_digest_that_tells_them_apart(seqio):
    import tensorflow as tf

    from stepdistill_jax.tasks.sources import rows_digest

    def digest_of(*rows):
        dataset = tf.data.Dataset.from_tensors(rows[0])
        for row in rows[1:]:
            dataset = dataset.concatenate(tf.data.Dataset.from_tensors(row))
        return rows_digest(
            seqio.FunctionDataSource(lambda split, shuffle_files: dataset, splits=["train"]),
            "train",
            None,
        )

    different = [
        ["ab", "c"],
        ["a", "bc"],
        ["a", "b", "c"],
        [("a", "bc")],
        [("ab", "c")],
        [{"x": {"y": 1.0}, "z": "é"}],
        [{"x": {"y": 2.0}, "z": "é"}],
        [tf.ragged.constant([[1], [2, 3]])],
        [tf.ragged.constant([[1, 2], [3]])],
        [tf.sparse.from_dense([0, 1])],
        [tf.sparse.from_dense([1, 0])],
    ]
    digests = [digest_of(*rows) for rows in different]
    assert len({found["sha256"] for found in digests}) == len(different)
    assert [found["rows"] for found in digests[:4]] == [2, 2, 3, 1]
    assert digest_of(*different[0]) == digests[0]


def test_a_split_is_tokenised_by_one_process_while_the_others_wait(tmp_path, monkeypatch):
    from stepdistill_jax.tasks import tokenizing

    readings = []

    def slow(task, split, prefixes):
        readings.append(task)
        time.sleep(0.3)
        yield TokenExample([([5, 1], [6, 1])])

    monkeypatch.setattr(tokenizing, "read_tokens", slow)
    source = types.SimpleNamespace(num_input_examples=lambda split: 1)

    def opened(_):  # a lock is a process's own open file, so threads stand for processes
        return tokenizing.stored_tokens(
            lambda: types.SimpleNamespace(name="t", source=source),
            name="t",
            split="train",
            objectives=["label"],
            prefixes=[""],
            key="k",
            data_dir=tmp_path,
            compare=False,
        )

    with concurrent.futures.ThreadPoolExecutor(3) as pool:
        stores = list(pool.map(opened, range(3)))
    assert len(readings) == 1
    assert {store.fingerprint for store in stores} == {stores[0].fingerprint}


def test_a_tfds_dataset_that_is_not_there_is_named_with_its_task(seqio, tmp_path):
    from stepdistill_jax.tasks.registry import add_task

    source = seqio.TfdsDataSource("no_such_dataset:1.0.0", str(tmp_path), splits=["train"])
    said = r"no_such_dataset:1.0.0 is not downloaded in .*TFDS has no code"
    with pytest.raises(InputError, match=rf"task 'no_tfds': .*{said}"):
        add_task("no_tfds", source=source)
    feature = seqio.Feature(seqio.ByteVocabulary())
    seqio.TaskRegistry.add(
        "no_tfds_plain", source=source, preprocessors=[], output_features=dict.fromkeys(("inputs", "targets"), feature)
    )  # fmt: skip
    with pytest.raises(InputError, match=rf"task 'no_tfds_plain': .*{said}"):
        load_task("no_tfds_plain", split="train", data_dir=tmp_path)


def test_rows_that_are_drawn_at_each_reading_are_refused(seqio, tmp_path):
    """Drawn by a source, or by a preprocessor without a seed. SeqIO's seeds repeat."""
    import tensorflow as tf

    from stepdistill_jax.tasks.registry import add_task

    count = iter(range(10**6))
    add_task(
        "restless",
        source=lambda split: [{"input": f"row {next(count)}", "label": "a"} for _ in range(3)],
        splits=["train"],
    )

    @seqio.map_over_dataset
    def unseeded(row):
        draw = tf.random.uniform([], 0, 10**9, tf.int32)
        return {"inputs": tf.strings.as_string(draw), "targets": row["targets"]}

    @seqio.map_over_dataset(num_seeds=1)
    def seeded(row, seed):
        draw = tf.random.stateless_uniform([], seed, 0, 10**9, tf.int32)
        return {"inputs": tf.strings.as_string(draw), "targets": row["targets"]}

    def rows(split, shuffle_files):
        return tf.data.Dataset.from_tensor_slices({"targets": ["a", "b"]})

    def seeded_rows(split, shuffle_files, seed=None):
        return rows(split, shuffle_files)

    feature = seqio.Feature(seqio.ByteVocabulary())
    for name, function, draws in [
        ("draws_without_seed", seeded_rows, unseeded),
        ("source_without_seed", rows, seeded),
        ("draws_with_seed", seeded_rows, seeded),
    ]:
        seqio.TaskRegistry.add(
            name,
            source=seqio.FunctionDataSource(function, splits=["train"]),
            preprocessors=[draws, seqio.preprocessors.tokenize, seqio.preprocessors.append_eos],
            output_features={"inputs": feature, "targets": feature},
        )
    for name in ("restless", "draws_without_seed", "source_without_seed"):
        with pytest.raises(InputError, match=f"{name!r}: the rows .* differ between two") as caught:
            load_task(name, split="train", data_dir=tmp_path)
        assert "\n" not in str(caught.value) and "num_seeds=1" in str(caught.value)
    first = load_task("draws_with_seed", split="train", data_dir=tmp_path)
    assert len(set(map(bytes, first.stores[0].rows[0]["inputs"]))) == 2
    again = load_task("draws_with_seed", split="train", data_dir=tmp_path / "again")
    assert first.fingerprint == again.fingerprint


def test_a_plain_task_keeps_its_own_vocabulary(plain_module, delivery_data_dir, tmp_path):
    name = f"{plain_module}_colours"
    task = {"split": "train", "data_dir": tmp_path, "task_module": plain_module}
    assert load_task(name, **task, vocabulary="bytes").vocabulary.size == 259
    other = delivery_data_dir / "delivery" / "spiece.model"
    with pytest.raises(InputError, match=r"tokenised with bytes, but .*spiece\.model"):
        load_task(name, **task, vocabulary=other)


def test_a_plain_task_keeps_its_inputs_and_takes_the_framing_of_the_model(
    seqio, gemma_model, tmp_path
):
    import tensorflow as tf

    def rows(split, shuffle_files, seed=None):
        return tf.data.Dataset.from_tensors({"inputs": "a b", "targets": "yes"})

    own, given = gemma_model(), gemma_model(add_bos_token=False)
    feature = seqio.Feature(seqio.SentencePieceVocabulary(str(own), extra_ids=0))
    seqio.TaskRegistry.add(
        "framed_elsewhere",
        source=seqio.FunctionDataSource(rows, splits=["train"]),
        preprocessors=[seqio.preprocessors.tokenize, seqio.preprocessors.append_eos],
        output_features={"inputs": feature, "targets": feature},
    )
    data = load_task("framed_elsewhere", split="train", vocabulary=given, data_dir=tmp_path)
    assert data.vocabulary.source == str(given)
    encode = data.vocabulary.encode
    assert ids_of(data.stores[0]) == [[[*encode("a b"), 1], [*encode("yes"), 1]]]


def test_plain_tasks_that_no_encoder_decoder_can_train_are_named(seqio, tmp_path):
    feature = seqio.Feature(seqio.ByteVocabulary(), add_eos=False)
    path = tmp_path / "lines.txt"
    path.write_text("text\n")
    source = seqio.TextLineDataSource({"train": str(path)})
    empty = seqio.map_over_dataset(lambda line: {"inputs": "", "targets": line})
    columns = seqio.map_over_dataset(lambda line: {"question": line, "targets": line})
    for name, first, features, message in [
        ("load_no_inputs", empty, {"inputs": feature, "targets": feature}, "row 1: 'inputs' is empty"),
        ("load_targets_only", empty, {"targets": feature}, "feature `targets` but not `inputs`, and an encoder-decoder needs both"),
        ("load_columns", columns, {"inputs": feature, "targets": feature}, r"task 'load_columns', split 'train'.*expected output feature.*inputs"),
    ]:  # fmt: skip
        seqio.TaskRegistry.add(
            name,
            source=source,
            preprocessors=[first, seqio.preprocessors.tokenize],
            output_features=features,
        )
        with pytest.raises(InputError, match=message) as caught:
            load_task(name, split="train", data_dir=tmp_path)
        assert "\n" not in str(caught.value)


def test_modules_that_cannot_be_imported_are_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pathlib.Path("broken_tasks.py").write_text("import json\n\nimport no_such_package\n")
    for module, message in [
        ("no_such_tasks", "no module 'no_such_tasks'"),
        ("pkg/tasks.py", "write it as a module, pkg.tasks"),
        ("broken_tasks", r"No module named 'no_such_package' at .*broken_tasks\.py:3"),
    ]:
        with pytest.raises(InputError, match=message) as caught:
            load_task("x", split="train", data_dir=tmp_path, task_module=module)
        assert "\n" not in str(caught.value)
