# ruff: noqa: RUF001 (hard strings are meant to look alike)
import json
import logging
import os
import pathlib
import subprocess
import sys
import textwrap

import numpy as np
import pytest

from stepdistill_jax.data.prepare import prepare
from stepdistill_jax.data.prepared import open_prepared
from stepdistill_jax.errors import InputError
from stepdistill_jax.objectives import copy_control, step_by_step
from stepdistill_jax.tasks.load import has_split, load_task, splits_of
from stepdistill_jax.text.vocabulary import EOS_ID, ByteVocabulary, SentencePieceVocabulary
from stepdistill_jax.training.batches import Batches

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
    # other rows under the same name: the old tokens are not used
    rows[0]["label"] = "c"
    (tmp_path / "mine.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    prepare("jsonl", source=tmp_path / "mine.jsonl", new_name="mine", data_dir=tmp_path)
    again = load_task("mine", split="train", vocabulary="bytes", data_dir=tmp_path)
    assert again.stores[0].label_texts == ["c", "b", "a"]
    assert again.stores[0].fingerprint != store.fingerprint


def test_a_second_run_imports_no_tensorflow(delivery_data_dir):
    load_task("delivery", split="train", data_dir=delivery_data_dir)
    code = """
        import sys
        from stepdistill_jax.tasks import load_task
        from stepdistill_jax.training.batches import Batches
        data = load_task("delivery", split="train", data_dir=sys.argv[1])
        batch = Batches(data, 32, 64, 48, seed=0)(3)
        heavy = {"tensorflow", "tensorflow_datasets", "seqio", "tensorflow_text", "jax"}
        print(len(batch[0]), sorted(heavy & set(sys.modules)))
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), str(delivery_data_dir)],
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
    assert "--module" in message
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
    """A user's module with two plain tasks and a mixture; its name is also their prefix."""
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
        f"{plain_module}_both", split="train", data_dir=tmp_path, task_module=plain_module
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
    assert "other rows than when it was tokenised (first at row 2)" in caplog.text
    assert second.fingerprint != first.fingerprint
    assert second.stores[0].label_texts == ["a", "c"]


def test_a_source_that_never_repeats_is_named_and_its_rows_kept(seqio, tmp_path, caplog):
    from stepdistill_jax.tasks.registry import add_task

    count = iter(range(10**6))
    add_task(
        "restless",
        source=lambda split: [{"input": f"row {next(count)}", "label": "a"} for _ in range(3)],
        splits=["train"],
    )
    with caplog.at_level(logging.WARNING):
        first = load_task("restless", split="train", data_dir=tmp_path)
        assert "'restless'" in caplog.text
        assert "other rows each time" in caplog.text
        again = load_task("restless", split="train", data_dir=tmp_path)
    assert again.fingerprint == first.fingerprint


def test_a_plain_task_keeps_its_own_vocabulary(plain_module, delivery_data_dir, tmp_path):
    name = f"{plain_module}_colours"
    task = {"split": "train", "data_dir": tmp_path, "task_module": plain_module}
    assert load_task(name, **task, vocabulary="bytes").vocabulary.size == 259
    other = delivery_data_dir / "delivery" / "spiece.model"
    with pytest.raises(InputError, match=r"tokenised with bytes, but .*spiece\.model"):
        load_task(name, **task, vocabulary=other)


def test_plain_tasks_that_no_encoder_decoder_can_train_are_named(seqio, tmp_path):
    feature = seqio.Feature(seqio.ByteVocabulary(), add_eos=False)
    path = tmp_path / "lines.txt"
    path.write_text("text\n")
    source = seqio.TextLineDataSource({"train": str(path)})
    empty = seqio.map_over_dataset(lambda line: {"inputs": "", "targets": line})
    columns = seqio.map_over_dataset(lambda line: {"question": line, "targets": line})
    for name, first, features, message in [
        ("load_no_inputs", empty, {"inputs": feature, "targets": feature}, "row 1: 'inputs' is empty"),
        ("load_targets_only", empty, {"targets": feature}, "needs the features inputs and targets"),
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
