"""Ids of datasets of `prepare --paper-exact`, and the shares that a run draws."""

import dataclasses
import json
import types

import numpy as np
import pytest

from stepdistill_jax.commands.gin_config import load_config
from stepdistill_jax.data.example import Example
from stepdistill_jax.data.objectives import label_only, step_by_step, step_by_step_llm
from stepdistill_jax.data.prepare import prepare
from stepdistill_jax.data.prepared import open_prepared
from stepdistill_jax.data.vocabulary import load_vocabulary
from stepdistill_jax.errors import InputError
from stepdistill_jax.formats.directory import TaskInfo, write_model_files
from stepdistill_jax.inference.evaluate import evaluate
from stepdistill_jax.inference.input_rows import read_questions
from stepdistill_jax.inference.prompting import encode_input, prompting_for
from stepdistill_jax.tasks import load_task, register_prepared
from stepdistill_jax.tasks.supervision import Supervision
from stepdistill_jax.training.provenance import describe, task_info
from stepdistill_jax.training.run import assemble

ROWS = 40


def write(path, rows, texts):
    path.parent.mkdir(parents=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    for split in ("test", "valid"):
        path.with_name(path.name.replace("train", split)).write_text(path.read_text())
    (path.parent / "llm").mkdir()
    for split in ("train", "test", "valid"):
        (path.parent / "llm" / f"{split}_CoT_0.json").write_text(json.dumps(texts))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Prepares `svamp_paper` and `anli_paper`; rows 3 and 0 have a teacher's text without an answer."""
    folder = tmp_path_factory.mktemp("published")
    rows = [{"input": f"{i} eggs and 2?", "label": f"( {i}.0 + 2.0 )"} for i in range(ROWS)]
    texts = [f"Sum of {i}. The answer is ({i} + 2)." if i != 3 else "Sum and" for i in range(ROWS)]
    write(folder / "svamp" / "svamp_train.json", rows, texts)
    rows = [
        {"uid": f"u{i}", "premise": f"It rains {i}. ", "hypothesis": f"Wet {i} it is.", "label": i % 3}
        for i in range(ROWS)
    ]  # fmt: skip
    texts = [f"Rain {i}. So the answer is neutral." if i else "Rain and" for i in range(ROWS)]
    write(folder / "anli1" / "anli1_train.json", rows, texts)
    for name in ("svamp", "anli"):
        prepare(name, source=folder, data_dir=folder / "data", paper_exact=True)
    return folder / "data"


def ids_of(data, column, side, example):
    return data.stores[0].rows[column][side][example].tolist()


def test_the_ids_of_a_pair_have_an_end_of_sequence_between_two_texts(folder):
    dataset = open_prepared("anli_paper", folder)
    encode = load_vocabulary(dataset.spiece_model).encode
    data = load_task("anli_paper", split="train", objectives=step_by_step(), data_dir=folder)
    for i in range(ROWS):
        for column, prefix in enumerate(("predict: ", "explain: ")):
            expected = [*encode(f"{prefix}It rains {i}."), 1, *encode(f"Wet {i} it is."), 1]
            assert ids_of(data, column, "inputs", i) == expected
    assert ids_of(data, 0, "targets", 1) == [*encode("neutral"), 1]
    # as published: a text that cannot be read is an empty rationale, and is trained on
    assert ids_of(data, 1, "targets", 0) == [1]
    assert ids_of(data, 1, "targets", 1) == [*encode("Rain 1."), 1]
    # the prompts of `predict` and `evaluate` have the same ids
    info = TaskInfo("anli_paper", step_by_step(), 64, 64, 63, input_pair=data.input_pair)
    prompting = prompting_for(types.SimpleNamespace(path=folder, task_info=info))
    assert prompting.reads == ("input_pair",)
    for i, row in enumerate(read_questions(dataset.file("train"), more=prompting.reads)):
        prompt = step_by_step()[0].render(row.texts)[0]
        ids, cut = encode_input(data.vocabulary, prompt, 1024, prompting.input_pair_of(row))
        assert (ids, cut) == (ids_of(data, 0, "inputs", i), False)
        assert not prompting.lacks(row)
    assert prompting.lacks(Example("1", "It rains.")) == ("input_pair",)


@pytest.mark.parametrize(
    ("objectives", "supervision"),
    [(step_by_step_llm(), Supervision()), (label_only(), Supervision("llm"))],
    ids=["arm", "label_source"],
)
def test_the_teachers_labels_keep_every_row(folder, objectives, supervision):
    where = {"objectives": objectives, "supervision": supervision, "data_dir": folder}
    data = load_task("svamp_paper", split="train", **where)
    rows = list(open_prepared("svamp_paper", folder).examples("train"))
    assert data.stores[0].num_examples == len(rows) == 36
    encode = data.vocabulary.encode
    blank = [row.id for row in rows].index("4")
    assert ids_of(data, 0, "targets", blank) == [1]
    for i, row in enumerate(rows):
        assert ids_of(data, 0, "targets", i) == [*encode(row.llm_label.strip()), 1]
    where["supervision"] = Supervision("llm").held_out()
    held_out = load_task("svamp_paper", split="validation", **where | {"objectives": label_only()})
    gold = list(open_prepared("svamp_paper", folder).examples("validation"))
    assert [ids_of(held_out, 0, "targets", i) for i in range(4)] == [
        [*encode(row.label), 1] for row in gold
    ]


def published_share(fraction, seed):
    """Returns the rows of train and validation that run.py draws with `datasets`."""
    order = np.random.default_rng(seed).permutation(ROWS)[int(np.ceil((1 - fraction) * ROWS)) :]
    again = np.random.default_rng(0).permutation(len(order))
    held_out = int(np.ceil(0.1 * len(order)))
    return order[again[held_out:]], order[again[:held_out]]


@pytest.mark.parametrize(("fraction", "seed"), [(0.25, 0), (0.25, 3), (0.7, 1)])
def test_a_share_is_drawn_of_all_rows_before_validation(folder, fraction, seed):
    for split, numbers in zip(
        ("train", "validation"), published_share(fraction, seed), strict=True
    ):
        data = load_task("svamp_paper", split=split, data_dir=folder, share=(fraction, seed))
        assert sorted(data.stores[0].label_texts) == sorted(f"( {i}.0 + 2.0 )" for i in numbers)
    whole = load_task("svamp_paper", split="test", data_dir=folder, share=(fraction, seed))
    assert whole.stores[0].num_examples == ROWS


def test_validation_with_a_file_of_its_own_stays_whole(folder):
    share = {"data_dir": folder, "share": (0.25, 5)}
    train = load_task("anli_paper", split="train", **share)
    numbers = np.sort(np.random.default_rng(5).permutation(ROWS)[30:])
    encode = train.vocabulary.encode
    expected = [
        [*encode(f"predict: It rains {i}."), 1, *encode(f"Wet {i} it is."), 1] for i in numbers
    ]
    assert [ids_of(train, 0, "inputs", i) for i in range(10)] == expected
    assert load_task("anli_paper", split="validation", **share).stores[0].num_examples == ROWS


def test_a_cell_runs_to_the_letter(folder, tmp_path):
    """`paper/exact.gin` with a paper's config: the published share, no prefix, answers of 63 tokens."""
    settings = ["TASK=svamp_paper", "INIT_FROM=None", "DATA_FRACTION=0.25", "SEED=3"]
    settings += ["MODEL_SIZE=tiny", "OBJECTIVES=label_only_llm"]
    config, _ = load_config("paper_svamp", settings, ["paper/exact.gin"])
    run = assemble(config, tmp_path, folder)
    train, validation = published_share(0.25, 3)
    assert run.batches.num_examples == len(train) == 9
    assert sorted(run.data.stores[0].label_texts) == sorted(f"( {i}.0 + 2.0 )" for i in train)
    held_out = run.validator.data
    assert sorted(held_out.stores[0].label_texts) == sorted(f"( {i}.0 + 2.0 )" for i in validation)
    rows = {
        row.label: row
        for split in ("train", "validation")
        for row in open_prepared("svamp_paper", folder).examples(split)
    }
    encode = held_out.vocabulary.encode
    for i, label in enumerate(held_out.stores[0].label_texts):
        assert ids_of(held_out, 0, "inputs", i) == [*encode(rows[label].input), 1]
        assert ids_of(held_out, 0, "targets", i) == [*encode(label), 1]  # gold, not the teacher's
    assert run.validator.decoder.max_decode_len == 63
    info = task_info(run, describe(run))
    assert (info.max_decode_len, info.input_pair) == (63, False)
    # rows that this run drew for training are in the dataset's own validation
    write_model_files(tmp_path / "model", run.model, held_out.vocabulary, info)
    with pytest.raises(
        InputError,
        match=r"trained on 0\.25 of svamp_paper with a different validation split, so it has seen some of these validation rows",
    ):
        evaluate(tmp_path / "model", task="svamp_paper", split="validation", data_dir=folder)
    # the choice of our own reading: 8 for labels of 7 tokens
    ours = dataclasses.replace(config, max_decode_len=None)
    assert assemble(ours, tmp_path, folder).validator.decoder.max_decode_len % 8 == 0


def test_the_whole_is_tokenised_once_whatever_the_seed(folder, tmp_path):
    (tmp_path / "svamp_paper").symlink_to(folder / "svamp_paper")
    where = {"data_dir": tmp_path, "objectives": label_only()}
    for split in ("train", "test"):
        found = [load_task("svamp_paper", split=split, share=(1.0, s), **where) for s in (0, 1)]
        assert found[0].fingerprint == found[1].fingerprint
    load_task("svamp_paper", split="test", share=(0.5, 1), **where)
    assert len([d for d in (tmp_path / "token_store").iterdir() if d.is_dir()]) == 2


def test_a_share_without_rows_is_refused(folder):
    with pytest.raises(
        InputError, match=r"`data_fraction=0\.01`, split 'train' has no rows; use a larger"
    ):
        load_task("svamp_paper", split="train", data_dir=folder, share=(0.01, 0))


def test_a_choice_that_the_published_code_lacks_is_refused(folder):
    for supervision in (Supervision("agree"), Supervision(rationales="all")):
        with pytest.raises(
            InputError, match="dataset 'svamp_paper': the paper's published code uses gold"
        ):
            load_task("svamp_paper", split="train", data_dir=folder, supervision=supervision)


def test_seqio_does_not_get_rows_whose_ids_it_cannot_make(folder, capfd):
    assert register_prepared(folder) == ()
    assert "anli_paper: not registered with SeqIO" in capfd.readouterr().err
