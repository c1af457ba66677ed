"""Which labels and rationales of an example reach the batches."""

import collections
import dataclasses
import itertools
import json

import numpy as np
import pytest

from stepdistill_jax.batches.batch import Batches
from stepdistill_jax.data.objectives import step_by_step
from stepdistill_jax.data.prepare import prepare
from stepdistill_jax.data.vocabulary import ByteVocabulary
from stepdistill_jax.errors import InputError
from stepdistill_jax.tasks.load import load_task
from stepdistill_jax.tasks.supervision import Supervision

ROWS = [
    {
        "input": "agrees",
        "label": "yes",
        "llm_label": "yes",
        "rationales": [
            {"text": "by a model", "source": "palm", "label": "yes"},
            {"text": "against it", "source": "palm", "label": "no"},
            {"text": "by a person", "source": "human"},
        ],
    },
    {"input": "differs", "label": "yes", "llm_label": "no", "rationale": "alone", "weight": 0.5},
    {"input": "no teacher", "label": "no"},
    {"input": "by the teacher alone", "llm_label": "yes"},
]


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("supervision")
    (folder / "mine.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    prepare("jsonl", source=folder / "mine.jsonl", new_name="mine", data_dir=folder)
    return folder


def load(data_dir, *, task="mine", **supervision):
    return load_task(
        task,
        split="train",
        objectives=step_by_step(),
        vocabulary="bytes",
        data_dir=data_dir,
        supervision=Supervision(**supervision),
    )


def texts(data):
    """Returns the label, weight and rationales of each example, as they are trained on."""
    decode, store = ByteVocabulary().decode, data.stores[0]
    rows = []
    for i in range(store.num_examples):
        targets = [decode(column["targets"][i].tolist()) for column in store.rows]
        rows.append((targets[0], float(store.weights[i]), [t for t in targets[1:] if t]))
    return rows


@pytest.mark.parametrize(
    ("supervision", "want"),
    [
        ({}, [("yes", 1), ("yes", 0.5), ("no", 1)]),
        ({"label_source": "llm"}, [("yes", 1), ("no", 0.5), ("yes", 1)]),
        (
            {"label_source": "gold_else_llm"},
            [("yes", 1), ("yes", 0.5), ("no", 1), ("yes", 1)],
        ),
        ({"label_source": "agree"}, [("yes", 1)]),
        (
            {"label_source": "agree", "disagree_weight": 0.25},
            [("yes", 1), ("yes", 0.125), ("no", 0.25)],
        ),
    ],
    ids=str,
)
def test_a_label_source_decides_labels_rows_and_weights(data_dir, supervision, want):
    data = load(data_dir, **supervision)
    assert [(label, weight) for label, weight, _ in texts(data)] == want
    assert data.stores[0].label_texts == [label for label, _ in want]


def test_a_split_without_the_selected_label_is_refused_with_the_setting_to_use(tmp_path):
    rows = [{"input": f"parcel {i}", "llm_label": "late"} for i in range(3)]
    prepare("jsonl", source={"train": rows}, new_name="mine", data_dir=tmp_path)
    says = r"no row of train has a gold label, but \d have `llm_label`: set `label_source=gold_else_llm`"
    with pytest.raises(InputError, match=f"^dataset 'mine': {says}$"):
        load(tmp_path)
    with pytest.raises(
        InputError, match=r"no row of train has the label that `label_source=agree`"
    ):
        load(tmp_path, label_source="agree")


@pytest.mark.parametrize(
    ("supervision", "want"),
    [
        ({"rationales": "all"}, [["by a model", "against it", "by a person"], ["alone"], []]),
        ({"rationales": "all", "rationale_source": "human"}, [["by a person"], [], []]),
        ({"rationale_source": "human"}, [["by a person"], [], []]),
        ({"rationales": "all", "label_source": "agree"}, [["by a model", "by a person"]]),
    ],
    ids=str,
)
def test_rationales_are_chosen_by_source_and_under_agree_by_their_label(
    data_dir, supervision, want
):
    assert [found for _, _, found in texts(load(data_dir, **supervision))] == want


def test_a_source_that_no_rationale_has_is_refused_with_those_there_are(data_dir, capsys):
    with pytest.raises(InputError) as error:
        load(data_dir, rationale_source="humam")
    assert "no training row of mine has a rationale from source 'humam'" in str(error.value)
    assert "rows per source: palm in 1, human in 1" in str(error.value)
    assert "did you mean 'human'" in str(error.value)
    load(data_dir, rationale_source="human")
    assert "mine: 1 of 3 examples have a rationale from source 'human'" in capsys.readouterr().err


def test_a_rationale_without_a_list_is_the_teachers(data_dir):
    found = [rationales for _, _, rationales in texts(load(data_dir, rationale_source="llm"))]
    assert found == [[], ["alone"], []]


def targets_of(batches, step):
    """Returns the decoded targets of a step by objective."""
    found = collections.defaultdict(list)
    for group in batches(step):
        for row in range(len(group["decoder_segment_ids"])):
            for segment in range(1, int(group["decoder_segment_ids"][row].max(initial=0)) + 1):
                at = group["decoder_segment_ids"][row] == segment
                text = ByteVocabulary().decode(group["decoder_target_tokens"][row][at].tolist())
                found[int(group["decoder_objective_ids"][row][at][0])].append(text)
    return found


@pytest.mark.parametrize("pack", [True, False])
def test_all_rationales_of_an_example_are_rows_of_its_step(data_dir, pack):
    batches = Batches(load(data_dir, rationales="all"), 3, 64, 64, seed=0, pack=pack)
    found = targets_of(batches, 4)
    assert sorted(found[1]) == ["no", "yes", "yes"]
    assert sorted(found[2]) == ["against it", "alone", "by a model", "by a person"]


@pytest.mark.parametrize("pack", [True, False])
def test_a_sample_is_one_rationale_an_epoch_the_same_for_a_seed(data_dir, pack):
    data = load(data_dir, rationales="sample")
    batches = Batches(data, 3, 64, 64, seed=3, pack=pack)
    epochs = [targets_of(batches, step) for step in range(90)]
    counts = collections.Counter()
    for found in epochs:
        assert len(found[1]) == 3 and len(found[2]) == 2 and "alone" in found[2]
        counts.update(set(found[2]) - {"alone"})
    assert set(counts) == {"by a model", "against it", "by a person"}
    assert min(counts.values()) > 15, "each of three is drawn about 30 times in 90 epochs"
    again = Batches(data, 3, 64, 64, seed=3, pack=pack)
    assert [targets_of(again, step) for step in (70, 5)] == [epochs[70], epochs[5]]
    # the draw depends on the example and its epoch, not on the step
    single = Batches(data, 1, 64, 64, seed=3, pack=pack)
    for epoch in (0, 7):
        one_by_one = [targets_of(single, 3 * epoch + i)[2] for i in range(3)]
        assert sorted(text for found in one_by_one for text in found) == sorted(epochs[epoch][2])
    other = Batches(data, 3, 64, 64, seed=4, pack=pack)
    assert any(set(targets_of(other, e)[2]) != set(epochs[e][2]) for e in range(20))


def test_the_split_without_gold_labels_adds_to_train_where_the_teachers_are_asked_for(tmp_path):
    source = tmp_path / "raw"
    for folder, name, texts_of_rows in (
        (source, "svamp", ["Add. The answer is (1 + 2)."]),
        (source / "asdiv", "asdiv", ["Take. The answer is (5 - 2).", "No answer here."]),
    ):
        (folder / "llm").mkdir(parents=True)
        rows = [
            {"input": f"How many {name} {i}?", "label": "( 1.0 + 2.0 )"}
            for i in range(len(texts_of_rows))
        ]
        (folder / f"{name}_train.json").write_text("".join(json.dumps(r) + "\n" for r in rows))
        (folder / "llm" / "train_CoT_0.json").write_text(json.dumps(texts_of_rows))
    prepare("svamp", source=source, data_dir=tmp_path)
    counts = {
        label_source: load(tmp_path, task="svamp", label_source=label_source).stores[0].num_examples
        for label_source in ("gold", "llm", "gold_else_llm", "agree")
    }
    assert counts == {"gold": 1, "llm": 2, "gold_else_llm": 2, "agree": 1}


def test_a_function_of_rows_has_label_sources_and_one_rationale(tmp_path):
    from stepdistill_jax.tasks import add_task

    rows = [{k: v for k, v in row.items() if isinstance(v, str)} for row in ROWS]
    rows = [{"llm_label": "", "rationale": "", **row} for row in rows[:3]]
    rows.append({"input": "unlabelled", "label": "", "llm_label": "no", "rationale": "so"})
    add_task("supervised", source=lambda split: iter(rows), splits=["train"])
    labels = [label for label, _, _ in texts(load(tmp_path, task="supervised"))]
    assert labels == ["yes", "yes", "no"], "a row without a gold label is left out"
    found = texts(load(tmp_path, task="supervised", label_source="llm"))
    assert [label for label, _, _ in found] == ["yes", "no", "no"]
    found = texts(load(tmp_path, task="supervised", label_source="gold_else_llm"))
    assert [label for label, _, _ in found] == ["yes", "yes", "no", "no"]
    with pytest.raises(InputError, match=r"'supervised': `rationales=all` .* needs the list"):
        load(tmp_path, task="supervised", rationales="all")


def test_validation_compares_with_gold_and_with_the_teacher_only_where_there_is_none():
    assert Supervision().held_out() == Supervision()
    for source in ("llm", "gold_else_llm", "agree"):
        held_out = Supervision(source, rationales="all").held_out()
        assert held_out == Supervision("gold_else_llm")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"label_source": "teacher"},
            "`label_source` must be one of gold, llm, gold_else_llm, agree",
        ),
        ({"rationales": "any"}, "`rationales` must be one of first, all, sample"),
        (
            {"label_source": "agree", "disagree_weight": 2.0},
            "`disagree_weight` must be a number of at least 0 and at most 1",
        ),
        ({"disagree_weight": 0.5}, "`disagree_weight` needs `label_source=agree`"),
    ],
    ids=str,
)
def test_a_wrong_value_names_its_field(values, message):
    with pytest.raises(InputError, match=message):
        Supervision(**values)


def test_a_smaller_fraction_is_a_subset_of_a_larger_one(data_dir):
    data = load(data_dir, label_source="gold_else_llm")
    store = data.stores[0]
    many = dataclasses.replace(
        store,
        rows=tuple({k: _repeated(v, 40) for k, v in c.items()} for c in store.rows),
        weights=np.tile(store.weights, 40),
    )
    part = dataclasses.replace(data.parts[0], store=many)
    data = dataclasses.replace(data, parts=(part,))
    pools = []
    for fraction in (0.125, 0.25, 0.5, 1.0):
        batches = Batches(data, 4, 64, 64, seed=1, data_fraction=fraction)
        steps = range(int(np.ceil(batches.steps_per_epoch)))
        pools.append({int(i) for k in steps for i in batches.examples(k).indices})
        assert abs(len(pools[-1]) - 160 * fraction) <= 4
    assert all(small < large for small, large in itertools.pairwise(pools))


def _repeated(rows, times):
    lengths = np.tile(rows.lengths, times)
    return type(rows).of_offsets(
        np.tile(rows.ids, times), np.concatenate([[0], np.cumsum(lengths)])
    )
