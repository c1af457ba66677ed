"""`register_prepared`: compares prepared datasets read through SeqIO with what training reads."""

import collections
import json
import sys
import textwrap

import pytest

from stepdistill_jax.batches.batch import Batches
from stepdistill_jax.data.objectives import step_by_step
from stepdistill_jax.data.prepare import prepare
from stepdistill_jax.data.prepared import PreparedDataset, data_folder, open_prepared
from stepdistill_jax.data.vocabulary import EOS_ID, load_vocabulary
from stepdistill_jax.errors import InputError
from stepdistill_jax.inference.accuracy import AccuracyCounts
from stepdistill_jax.inference.prompting import encode_input
from stepdistill_jax.tasks import add_task, load_task, prepared_tasks, register_prepared, registry
from stepdistill_jax.tasks.lookup import find_task, splits_of

TICKETS = [
    {"input": f"parcel {i} is late", "label": "delivery" if i % 3 else "billing"}
    | ({} if i % 4 == 0 else {"rationale": f"since {i} came by {'road' if i % 2 else 'rail'}"})
    for i in range(22)
]
UNEXPLAINED = [{"input": "a card", "label": "billing"}, {"input": "a van", "label": "delivery"}]
LONG = {"inputs": 512, "targets": 256}


@pytest.fixture(scope="module")
def seqio():
    from stepdistill_jax.data.builder import tensorflow

    tensorflow()
    import seqio

    return seqio


@pytest.fixture(autouse=True)
def registries(seqio, monkeypatch):
    """Gives each test its own registrations, in addition to those of other modules."""
    for kind in (seqio.TaskRegistry, seqio.MixtureRegistry):
        monkeypatch.setattr(kind, "_REGISTRY", dict(kind._REGISTRY))
    monkeypatch.setattr(seqio.utils, "_GLOBAL_CACHE_DIRECTORIES", [])
    monkeypatch.setattr(prepared_tasks, "_REGISTERED", {})
    monkeypatch.setattr(registry, "TAGS", {})


def prepare_rows(folder, name, **splits):
    """Prepares rows by split."""
    source = folder / f"{name}_source"
    source.mkdir(exist_ok=True, parents=True)
    for split, rows in splits.items():
        (source / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    prepare("jsonl", source=source, new_name=name, data_dir=folder)


@pytest.fixture(scope="module")
def folder(delivery_data_dir, tmp_path_factory):
    """Prepares `delivery`, `tickets` (some rows and all of validation unexplained), `blind` (no train)."""
    folder = tmp_path_factory.mktemp("prepared")
    (folder / "delivery").symlink_to(delivery_data_dir / "delivery")
    prepare_rows(folder, "tickets", train=TICKETS, validation=UNEXPLAINED)
    prepare_rows(folder, "blind", test=UNEXPLAINED)
    return folder


@pytest.fixture(scope="module")
def real(built_once, paper_data):
    """`real(name)` returns a folder with the paper's CQA or SVAMP."""

    def folder_of(name):
        return built_once(
            f"real_{name}",
            lambda folder: prepare(name, source=paper_data / name, data_dir=folder),
        )

    return folder_of


def rows_of(seqio, name, split="train", **options):
    """Returns (inputs, targets) ids of a task or mixture, not truncated."""
    provider = seqio.get_mixture_or_task(name)
    dataset = provider.get_dataset(None, split, shuffle=False, num_epochs=1, **options)
    return [(r["inputs"].tolist(), r["targets"].tolist()) for r in dataset.as_numpy_iterator()]


def stored(folder, name, split="train", **options):
    """Returns (inputs, targets) ids of each objective in the token store, without absent rows."""
    data = load_task(name, split=split, data_dir=folder, **options)
    (store,) = data.stores
    return [
        [
            (rows["inputs"][i].tolist(), rows["targets"][i].tolist())
            for i in range(store.num_examples)
            if rows["targets"].lengths[i]
        ]
        for rows in store.rows
    ]


def test_each_dataset_is_two_tasks_and_a_mixture(seqio, folder, capsys):
    assert register_prepared(folder) == ("delivery", "tickets")
    assert "blind: not registered with SeqIO: it has no train split" in capsys.readouterr().err
    for name in ("delivery", "tickets"):
        mixture = seqio.get_mixture_or_task(name)
        tasks = {task.name: task for task in seqio.get_subtasks(mixture)}
        assert list(tasks) == [f"{name}_label", f"{name}_rationale"]
        assert [mixture.get_rate(task) for task in tasks.values()] == [1.0, 1.0]
        for objective in ("label", "rationale"):
            task = tasks[f"{name}_{objective}"]
            assert task is seqio.TaskRegistry.get(task.name)
            assert registry.TAGS[task.name] == registry.Tag(name, objective)
            for feature in task.output_features.values():
                file = feature.vocabulary.sentencepiece_model_file
                assert file == str(folder / name / "spiece.model")
    # a task without rows would end a mixture that draws from it
    assert set(seqio.TaskRegistry.get("tickets_label").splits) == {"train", "validation"}
    assert set(seqio.TaskRegistry.get("tickets_rationale").splits) == {"train"}


@pytest.mark.parametrize(
    ("name", "vocabulary"), [("delivery", None), ("tickets", None), ("tickets", "bytes")]
)
def test_the_fast_reader_has_the_tokens_of_the_registered_tasks(seqio, folder, name, vocabulary):
    register_prepared(folder, vocabulary=vocabulary)
    label, rationale = stored(folder, name, vocabulary=vocabulary)
    assert rows_of(seqio, f"{name}_label") == label
    assert rows_of(seqio, f"{name}_rationale") == rationale
    assert len(label) > len(rationale) > 10 or name == "delivery"


@pytest.mark.parametrize(
    "bos, eos",
    [
        (True, False),
        pytest.param(False, False, marks=pytest.mark.slow),
        pytest.param(True, True, marks=pytest.mark.slow),
    ],
)
def test_inputs_are_framed_as_the_vocabulary_says(seqio, folder, gemma_model, bos, eos):
    path = gemma_model(add_bos_token=bos, add_eos_token=eos)
    register_prepared(folder, vocabulary=path)
    label, rationale = stored(folder, "tickets", vocabulary=path)
    assert rows_of(seqio, "tickets_label") == label
    assert rows_of(seqio, "tickets_rationale") == rationale
    encode = load_vocabulary(path).encode
    asked, answer = encode("predict: parcel 0 is late"), encode("billing")
    assert label[0] == ([2] * bos + asked + [1] * eos, [*answer, 1])
    # the reader of rows that a supervision chooses among, and of those of `add_task`
    add_task("parcels_of_seqio", source={"train": TICKETS}, vocabulary=path)
    assert stored(folder, "parcels_of_seqio") == [label, rationale]
    # batches truncate as `predict` does
    data = load_task("tickets", split="train", vocabulary=path, data_dir=folder)
    batches = Batches(data, 5, 9, 9, seed=0, shuffle=False, pack=False)
    (group, *_) = batches(0)
    cut = [encode_input(data.vocabulary, f"predict: {row['input']}", 9)[0] for row in TICKETS[:5]]
    assert all(len(ids) == 9 for ids in cut)
    assert group["encoder_input_tokens"][:5].tolist() == cut


@pytest.mark.slow
@pytest.mark.parametrize("name", ["cqa", "svamp"])
def test_the_fast_reader_has_the_tokens_of_the_registered_tasks_on_real_data(seqio, real, name):
    folder = real(name)
    register_prepared(folder)
    for split in splits_of(name, data_dir=folder):
        for objective, ours in zip(step_by_step(), stored(folder, name, split), strict=True):
            task = seqio.TaskRegistry.get(f"{name}_{objective.name}")
            theirs = rows_of(seqio, task.name, split) if split in task.splits else []
            assert theirs == ours, (split, objective.name)


def converted(seqio, name, *, pack, lengths):
    return list(
        seqio.get_dataset(
            name,
            task_feature_lengths=lengths,
            feature_converter=seqio.EncDecFeatureConverter(pack=pack),
            dataset_split="train",
            shuffle=False,
        ).as_numpy_iterator()
    )


def segments(rows):
    """Returns (inputs, targets, decoder inputs) of each segment of packed rows."""
    found = []
    for row in rows:
        for segment in range(1, max(row[f"{s}_segment_ids"].max() for s in SIDES) + 1):
            inputs, targets = (row[f"{side}_segment_ids"] == segment for side in SIDES)
            found.append(
                (
                    tuple(row["encoder_input_tokens"][inputs].tolist()),
                    tuple(row["decoder_target_tokens"][targets].tolist()),
                    tuple(row["decoder_input_tokens"][targets].tolist()),
                )
            )
    return found


SIDES = ("encoder", "decoder")


def trained_on(data, lengths):
    """Returns the same for an epoch of our batches."""
    batches = Batches(data, 5, lengths["inputs"], lengths["targets"], seed=0, shuffle=False)
    found = []
    for step in range(batches.num_steps):
        (group,) = batches(step)
        rows = [
            {k: v[i] for k, v in group.items()} for i in range(len(group["decoder_segment_ids"]))
        ]
        found += segments(rows)
    return found


WHOLE, CUT = {"inputs": 128, "targets": 64}, {"inputs": 6, "targets": 5}


@pytest.mark.parametrize(
    ("pack", "lengths"),
    [(True, WHOLE), (True, CUT), (False, CUT)],
    ids=["packed-whole", "packed-cut", "padded-cut"],
)
def test_seqios_converter_gives_the_rows_of_our_batches(seqio, folder, lengths, pack):
    register_prepared(folder)
    rows = converted(seqio, "tickets", pack=pack, lengths=lengths)
    if not pack:
        for row in rows:
            row["encoder_segment_ids"] = (row["encoder_input_tokens"] > 0).astype(int)
            row["decoder_segment_ids"] = row["decoder_loss_weights"]
    ours = trained_on(load_task("tickets", split="train", data_dir=folder), lengths)
    theirs = segments(rows)
    assert len(theirs) == 22 + 16
    assert collections.Counter(theirs) == collections.Counter(ours)


def test_the_mixture_pairs_the_rows_of_an_example(seqio, folder):
    register_prepared(folder)
    mixture = seqio.get_mixture_or_task("tickets")
    decode = mixture.output_features["inputs"].vocabulary.decode
    want = []
    for row in TICKETS:
        want.append(f"predict: {row['input']}")
        if "rationale" in row:
            want.append(f"explain: {row['input']}")
    assert [decode(inputs) for inputs, _ in rows_of(seqio, "tickets")] == want
    shuffled = mixture.get_dataset(None, "train", shuffle=True, seed=3, num_epochs=1)
    texts = [decode(row["inputs"].tolist()) for row in shuffled.as_numpy_iterator()]
    assert collections.Counter(texts) == collections.Counter(want) and texts != want
    last = ""
    for text in texts:
        kind, question = text.split(": ")
        assert kind == "predict" or question == last
        last = question


@pytest.mark.slow
@pytest.mark.parametrize("pack", [True, False], ids=["packed", "padded"])
def test_a_users_mixture_of_datasets_has_no_empty_target(seqio, folder, pack):
    register_prepared(folder, vocabulary="bytes")
    seqio.MixtureRegistry.add("both", ["tickets", "delivery"], default_rate=1.0)
    names = [task.name for task in seqio.get_subtasks(seqio.get_mixture_or_task("both"))]
    assert len(names) == 4
    rows = converted(seqio, "both", pack=pack, lengths=LONG)
    assert len(rows) > 10 or pack
    known = {ids for name in names for ids in map(str, rows_of(seqio, name))}
    seen = collections.Counter()
    for row in rows:
        ids = row["decoder_segment_ids"] if pack else row["decoder_loss_weights"]
        sources = row["encoder_segment_ids"] if pack else row["encoder_input_tokens"] > 0
        for segment in range(1, max(ids.max(), sources.max()) + 1):
            inputs = row["encoder_input_tokens"][sources == segment].tolist()
            targets = row["decoder_target_tokens"][ids == segment].tolist()
            assert targets[-1:] == [EOS_ID] and inputs[-1:] == [EOS_ID]
            assert str((inputs, targets)) in known
            seen[bytes(x - 3 for x in inputs[:7])] += 1
    assert set(seen) == {b"predict", b"explain"}


def test_only_a_row_with_a_label_is_a_row_of_the_label_task(seqio, tmp_path):
    rows = [{"input": "a", "llm_label": "x", "label": ""}, {"input": "b", "label": "y"}]
    rows.append({"input": "c", "label": "z", "rationale": "r"})
    prepare_rows(tmp_path, "half", train=rows, validation=UNEXPLAINED)
    register_prepared(tmp_path, vocabulary="bytes")
    encode = load_vocabulary("bytes").encode
    assert [targets for _, targets in rows_of(seqio, "half_label")] == [
        [*encode("y"), EOS_ID],
        [*encode("z"), EOS_ID],
    ]
    assert len(rows_of(seqio, "half")) == 3


def write_cache(seqio, task, folder):
    """Writes the files of `seqio_cache_tasks`, which itself needs apache-beam, last row first."""
    import tensorflow as tf

    out = folder / task.name
    out.mkdir(parents=True)
    for split in task.splits:
        dataset = task.preprocess_precache(task.source.get_dataset(split=split, shuffle=False))
        rows = list(dataset)[::-1]
        path = f"{seqio.get_cached_tfrecord_prefix(out, split)}-00000-of-00001"
        with tf.io.TFRecordWriter(path) as writer:
            for row in rows:
                writer.write(seqio.dict_to_tfexample(row).SerializeToString())
        features = {
            name: {"shape": [None] * spec.shape.rank, "dtype": spec.dtype.name}
            for name, spec in dataset.element_spec.items()
        }
        about = {"num_shards": 1, "features": features, "seqio_version": seqio.__version__}
        with open(seqio.get_cached_info_path(out, split), "w") as f:
            json.dump(about, f)
        with open(seqio.get_cached_stats_path(out, split), "w") as f:
            json.dump({"examples": len(rows)}, f)
    (out / "COMPLETED").touch()


@pytest.mark.slow
def test_a_cached_task_is_read_from_its_cache(seqio, folder, tmp_path, monkeypatch):
    register_prepared(folder)
    tasks = seqio.get_subtasks(seqio.get_mixture_or_task("tickets"))
    fresh = {task.name: rows_of(seqio, task.name) for task in tasks}
    cut = {"inputs": 6, "targets": 4}
    label = seqio.TaskRegistry.get("tickets_label")
    cut_rows = [
        r["targets"].tolist()
        for r in label.get_dataset(cut, "train", shuffle=False).as_numpy_iterator()
    ]
    for task in tasks:
        assert task.supports_caching
        write_cache(seqio, task, tmp_path)
    seqio.add_global_cache_dirs([str(tmp_path)])

    def no_reading(*_, **__):
        raise AssertionError("the source was read")

    monkeypatch.setattr(seqio.TfdsDataSource, "get_dataset", no_reading)
    for task in tasks:
        assert rows_of(seqio, task.name, use_cached=True) == fresh[task.name][::-1]
    # lengths are chosen after the cache
    cached = label.get_dataset(cut, "train", use_cached=True, shuffle=False)
    assert [row["targets"].tolist() for row in cached.as_numpy_iterator()] == cut_rows[::-1]
    both = rows_of(seqio, "tickets", use_cached=True)
    assert collections.Counter(map(str, both)) == collections.Counter(
        str(row) for rows in fresh.values() for row in rows
    )


def evaluated(seqio, name, answers, split):
    """Returns the results of `seqio.Evaluator` for answers (texts) in the order of the rows."""
    evaluator = seqio.Evaluator(
        name, feature_converter=seqio.EncDecFeatureConverter(pack=False), eval_split=split
    )
    (task,) = evaluator.eval_tasks
    encode = task.output_features["targets"].vocabulary.encode

    ids = [[*encode(answer), EOS_ID] for answer in answers]
    longest = max(map(len, ids))

    def predict(dataset):
        padded = [[*row, *[0] * (longest - len(row))] for row in ids]
        return [(i, padded[i]) for i, _ in dataset.as_numpy_iterator()][::-1]

    metrics, _ = evaluator.evaluate(compute_metrics=True, predict_fn=predict)
    return metrics.result()


def test_seqios_evaluator_counts_as_we_do(seqio, folder):
    register_prepared(folder)
    dataset = open_prepared("delivery", folder)
    examples = list(dataset.examples("validation"))
    counted, answers = AccuracyCounts(dataset.metric, dataset.labels), []
    for i, example in enumerate(examples):
        answers.append(example.label if i % 3 else "smooth")
        counted.add(answers[-1], example.label)
    found = evaluated(seqio, "delivery", answers, "validation")
    accuracy = sum(a == e.label for a, e in zip(answers, examples, strict=True)) / len(examples)
    assert 0.5 < accuracy < 1
    assert found == {"delivery_label": {"accuracy": pytest.approx(accuracy)}}
    assert counted.summary()["accuracy"] == pytest.approx(accuracy, abs=1e-6)


def test_seqios_evaluator_compares_equations_by_value(seqio, real):
    register_prepared(real("svamp"))
    dataset = open_prepared("svamp", real("svamp"))
    assert dataset.metric == "value_match"
    labels = [example.label for example in dataset.examples("test")]
    answers = [f"( {label} )" if i % 2 else "0 - 1" for i, label in enumerate(labels)]
    found = evaluated(seqio, "svamp", answers, "test")
    assert found == {"svamp_label": {"accuracy": pytest.approx(len(labels) // 2 / len(labels))}}


def test_the_label_is_parsed_out_of_an_answer_that_has_more(seqio):
    registry.add_task(
        "argued",
        source=lambda split: [{"input": "a", "label": "no", "rationale": "sun"}],
        splits=["train"],
        objectives="single_task",
    )
    task = seqio.TaskRegistry.get("argued_label")
    texts = ["rain so the answer is no", "so the answer is yes", "nothing of the kind"]
    labels = [task.postprocess_fn(text, example={}, is_target=False) for text in texts]
    assert labels == ["no", "yes", ""]
    assert evaluated(seqio, "argued", ["rain so the answer is no"], "train") == {
        "argued_label": {"accuracy": 1.0}
    }
    (metric,) = task.metric_fns
    assert metric(targets=["no", "no", "no"], predictions=labels) == {"accuracy": 1 / 3}


def test_a_registered_dataset_is_still_read_without_seqio(seqio, folder, tmp_path):
    register_prepared(folder)
    assert find_task("tickets", data_dir=folder, task_module=None).name == "tickets"
    # also by its name alone, while tokens go to another folder
    found = find_task("tickets", data_dir=tmp_path, task_module=None)
    assert isinstance(found, PreparedDataset) and found.directory == folder / "tickets"


def write_module(tmp_path, monkeypatch, text):
    """Writes a user's module, which is not imported yet; returns its name."""
    name = f"users_{len(list(tmp_path.iterdir()))}_{tmp_path.name}"
    (tmp_path / f"{name}.py").write_text(textwrap.dedent(text))
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(sys, "modules", dict(sys.modules))
    return name


MIXES = """
    import seqio
    from stepdistill_jax.tasks import register_prepared
    register_prepared()
    seqio.MixtureRegistry.add("mixed", ["tickets", "delivery"], default_rate=1.0)
"""


def test_a_module_registers_what_the_commands_folder_holds(seqio, folder, tmp_path, monkeypatch):
    monkeypatch.setenv("STEPDISTILL_DATA_DIR", str(tmp_path / "empty"))
    module = write_module(tmp_path, monkeypatch, MIXES)
    found = splits_of("mixed", data_dir=folder, task_module=module)
    assert set(found) >= {"train", "validation"}
    assert len(seqio.get_subtasks(seqio.get_mixture_or_task("mixed"))) == 4
    # our registrations do not count as the module's: the dataset is still read without SeqIO
    assert isinstance(find_task("tickets", data_dir=folder, task_module=module), PreparedDataset)
    assert register_prepared() == ()  # outside the import it uses the default folder


def test_a_module_alone_registers_the_default_folder(seqio, folder, tmp_path, monkeypatch):
    monkeypatch.setenv("STEPDISTILL_DATA_DIR", str(folder))
    module = write_module(tmp_path, monkeypatch, MIXES)
    __import__(module)
    assert "mixed" in seqio.MixtureRegistry.names()
    assert isinstance(
        find_task("tickets", data_dir=data_folder(None), task_module=module), PreparedDataset
    )


def test_the_commands_folder_goes_before_the_one_that_a_module_registers(
    folder, tmp_path, monkeypatch
):
    prepare_rows(tmp_path / "own", "tickets", train=TICKETS[:5], validation=UNEXPLAINED)
    text = f"""
        from stepdistill_jax.tasks import register_prepared
        register_prepared({str(folder)!r})
    """
    module = write_module(tmp_path, monkeypatch, text)
    for where in (tmp_path / "own", folder):
        found = find_task("tickets", data_dir=where, task_module=module)
        assert isinstance(found, PreparedDataset) and found.directory == where / "tickets"


def test_a_modules_own_task_goes_before_a_dataset_of_its_name(seqio, folder, tmp_path, monkeypatch):
    text = """
        import seqio
        feature = seqio.Feature(seqio.ByteVocabulary())
        seqio.TaskRegistry.add(
            "tickets",
            source=seqio.TextLineDataSource({"train": __file__}),
            preprocessors=[],
            output_features={"inputs": feature, "targets": feature},
        )
    """
    module = write_module(tmp_path, monkeypatch, text)
    assert isinstance(find_task("tickets", data_dir=folder, task_module=module), seqio.Task)
    with pytest.raises(
        InputError, match=r"dataset 'tickets'.*already has a task or mixture 'tickets'"
    ) as caught:
        register_prepared(folder)
    assert "\n" not in str(caught.value) and "--name" in str(caught.value)


def test_registering_again_keeps_what_has_not_changed(seqio, tmp_path):
    held_out = {"validation": UNEXPLAINED}
    prepare_rows(tmp_path, "mine", train=TICKETS, **held_out)
    prepare_rows(tmp_path, "other", train=TICKETS, **held_out)
    assert register_prepared(tmp_path) == register_prepared(tmp_path) == ("mine", "other")
    before = {name: seqio.MixtureRegistry.get(name) for name in ("mine", "other")}
    register_prepared(tmp_path)
    assert all(seqio.MixtureRegistry.get(name) is mixture for name, mixture in before.items())
    assert seqio.TaskRegistry.get("mine_label").num_input_examples("train") == 22
    prepare_rows(tmp_path, "mine", train=TICKETS[1:4], **held_out)
    register_prepared(tmp_path)
    assert seqio.MixtureRegistry.get("mine") is not before["mine"]
    assert seqio.MixtureRegistry.get("other") is before["other"]
    task = seqio.TaskRegistry.get("mine_label")
    assert task.num_input_examples("train") == len(rows_of(seqio, task.name)) == 3
    prepare_rows(tmp_path / "elsewhere", "mine", train=UNEXPLAINED, **held_out)
    register_prepared(tmp_path / "elsewhere")
    assert len(rows_of(seqio, "mine_label")) == 2
    assert "mine_rationale" not in seqio.TaskRegistry.names()
    assert "mine_rationale" not in registry.TAGS
    assert len(rows_of(seqio, "mine")) == 2


def test_an_empty_folder_and_bad_arguments_are_named(seqio, folder, tmp_path, capsys):
    assert register_prepared(tmp_path) == ()
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and str(tmp_path) in err and "no prepared dataset" in err
    with pytest.raises(InputError, match="no such vocabulary"):
        register_prepared(folder, vocabulary=tmp_path / "no.model")
    assert "delivery" not in seqio.MixtureRegistry.names()
    assert register_prepared(folder, vocabulary="bytes") == ("blind", "delivery", "tickets")
    assert len(rows_of(seqio, "blind_label", "test")) == 2
