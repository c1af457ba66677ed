"""`add_task` read through SeqIO, which is the oracle for the token store and the packer."""

import collections

import numpy as np
import pytest

from stepdistill_jax.batches.batch import Batches
from stepdistill_jax.data.objectives import Objective, step_by_step
from stepdistill_jax.errors import InputError
from stepdistill_jax.tasks.load import load_task
from stepdistill_jax.tasks.registry import add_task

ROWS = [
    {
        "input": f"with tea {i}, take the {'left' if i % 2 else 'right'} road",
        "label": "left" if i % 3 else "right",
        "rationale": None
        if i % 5 == 0
        else f"since {i} is {'odd' if i % 2 else 'even'} {{braces}}",
        "weight": 1.0 + i % 2,
    }
    for i in range(23)
]


def rows(split):
    yield from ROWS if split == "train" else ROWS[:3]


@pytest.fixture(scope="module")
def seqio():
    from stepdistill_jax.data.builder import tensorflow

    tensorflow()
    import seqio

    return seqio


@pytest.fixture(scope="module")
def roads(seqio):
    add_task("roads_in_code", source=rows, splits=["train", "validation"])
    return "roads_in_code"


def unpacked(seqio, name, lengths):
    """Returns (inputs, targets, decoder inputs) of a task by SeqIO's converter, one example per row."""
    dataset = seqio.get_mixture_or_task(name).get_dataset(
        lengths, "train", shuffle=False, num_epochs=1
    )
    converted = seqio.EncDecFeatureConverter(pack=False)(dataset, lengths)
    found = []
    for row in converted.as_numpy_iterator():
        inputs = row["encoder_input_tokens"]
        targets = row["decoder_target_tokens"]
        count = int((targets > 0).sum())
        assert row["decoder_loss_weights"].sum() == count
        if count:
            found.append(
                (
                    tuple(inputs[inputs > 0].tolist()),
                    tuple(targets[:count].tolist()),
                    tuple(row["decoder_input_tokens"][:count].tolist()),
                )
            )
    return found


def packed(batches, steps):
    found = []
    for step in range(steps):
        (group,) = batches(step)
        for row in range(len(group["encoder_segment_ids"])):
            for segment in range(1, group["encoder_segment_ids"][row].max() + 1):
                inputs = group["encoder_segment_ids"][row] == segment
                targets = group["decoder_segment_ids"][row] == segment
                found.append(
                    (
                        tuple(group["encoder_input_tokens"][row][inputs].tolist()),
                        tuple(group["decoder_target_tokens"][row][targets].tolist()),
                        tuple(group["decoder_input_tokens"][row][targets].tolist()),
                        int(group["decoder_objective_ids"][row][targets][0]),
                    )
                )
    return found


@pytest.mark.parametrize("lengths", [(128, 64), (24, 12)], ids=["whole", "cut"])
def test_packed_rows_are_those_of_seqios_own_converter(seqio, roads, tmp_path, lengths):
    sizes = {"inputs": lengths[0], "targets": lengths[1]}
    want = [
        (*row, objective)
        for objective, task in enumerate(("label", "rationale"), 1)
        for row in unpacked(seqio, f"{roads}_{task}", sizes)
    ]
    assert len(want) == 23 + 18
    data = load_task(roads, split="train", data_dir=tmp_path)
    batches = Batches(data, 5, *lengths, seed=0, shuffle=False)
    assert collections.Counter(packed(batches, batches.num_steps)) == collections.Counter(want)


def test_the_mixture_pairs_label_and_rationale_and_leaves_absent_ones_out(seqio, roads):
    mixture = seqio.get_mixture_or_task(roads)
    dataset = mixture.get_dataset(
        {"inputs": 99, "targets": 99}, "train", shuffle=False, num_epochs=1
    )
    decode = mixture.output_features["inputs"].vocabulary.decode
    texts = [decode(row["inputs"].tolist()) for row in dataset.as_numpy_iterator()]
    want = []
    for row in ROWS:
        want.append(f"predict: {row['input']}")
        if row["rationale"]:
            want.append(f"explain: {row['input']}")
    assert texts == want


def test_a_store_holds_weights_and_label_texts(roads, tmp_path):
    data = load_task(roads, split="validation", data_dir=tmp_path)
    (store,) = data.stores
    np.testing.assert_array_equal(store.weights, [r["weight"] for r in ROWS[:3]])
    assert store.label_texts == [r["label"] for r in ROWS[:3]]
    decode = data.vocabulary.decode
    assert decode(store.rows[1]["targets"][1].tolist()) == "since 1 is odd {braces}"
    assert store.rows[1]["targets"].lengths[0] == 0


def test_other_objectives_need_no_other_registration(roads, tmp_path):
    objectives = (
        Objective("label", "Q: {input} A:", "{label}"),
        Objective("why", "{input} -> {label}", "{label}: {rationale}", 2.0),
    )
    data = load_task(roads, split="train", objectives=objectives, data_dir=tmp_path)
    assert data.objectives == objectives
    why = data.stores[0].rows[1]
    text = [data.vocabulary.decode(why[side][2].tolist()) for side in ("inputs", "targets")]
    assert text == list(objectives[1].render({k: str(v) for k, v in ROWS[2].items()}))
    assert why["targets"].lengths[5] == 0


@pytest.mark.slow
def test_lists_of_dicts_are_the_rows_that_a_function_would_give(seqio, roads, tmp_path):
    add_task("listed_roads", source={"train": ROWS, "validation": ROWS[:3]})
    listed, given = seqio.get_mixture_or_task("listed_roads"), seqio.get_mixture_or_task(roads)
    assert set(listed.splits) == {"train", "validation"}

    def texts(mixture):
        dataset = mixture.get_dataset(None, "train", shuffle=False, num_epochs=1)
        return [r["inputs"].tolist() for r in dataset.as_numpy_iterator()]

    assert texts(listed) == texts(given)
    add_task("train_roads", source=ROWS)
    assert set(seqio.get_mixture_or_task("train_roads").splits) == {"train"}
    bad = [*ROWS[:2], {"input": "q", "lable": "x"}]
    with pytest.raises(
        InputError, match=r"task 'bad_list', split 'train', row 3: field 'label' is"
    ):
        add_task("bad_list", source=bad)
    with pytest.raises(InputError, match=r"unknown split 'dev'"):
        add_task("bad_list", source={"dev": ROWS})
    with pytest.raises(
        InputError, match=r"a list of dicts, a dict \{split: list of dicts\}, .*got str"
    ):
        add_task("bad_list", source="rows.jsonl")


def test_a_source_of_seqio_is_renamed_by_preprocessors(seqio, tmp_path):
    path = tmp_path / "rows.tsv"
    path.write_text("2 + 2\tfour\n3 + 3\tsix\n")

    @seqio.map_over_dataset
    def split_line(line):
        import tensorflow as tf

        parts = tf.strings.split(line, "\t")
        return {"input": parts[0], "label": parts[1]}

    source = seqio.TextLineDataSource({"train": str(path)})
    add_task("from_lines", source=source, preprocessors=[split_line], objectives="label_only")
    (store,) = load_task(
        "from_lines", split="train", objectives="label_only", data_dir=tmp_path
    ).stores
    assert store.label_texts == ["four", "six"]


BAD_ROWS = {
    "missing": ([{"input": "a", "lable": "b"}], r"row 1: field 'label' is missing.*input, lable.*did you mean 'lable'"),
    "number": ([{"input": "a", "label": "b"}, {"input": "a", "label": 3}], "row 2: field 'label' must be text, got int"),
    "negative": ([{"input": "a", "label": "b", "weight": -2.0}], "row 1: the field 'weight' must be above 0, got -2.0"),
    "nan": ([{"input": "a", "label": "b"}, {"input": "a", "label": "b", "weight": float("nan")}], "row 2: the field 'weight' must be above 0, got nan"),
    "numpy": ([{"input": "a", "label": "b", "weight": np.float32(0)}], "row 1: the field 'weight' must be above 0, got 0.0"),
    "words": ([{"input": "a", "label": "b", "weight": "2"}], "row 1: the field 'weight' must be a number, got text"),
    "empty": ([{"input": "a", "label": ""}], "row 1: field 'label' is empty"),
    "list": (["a"], "row 1: expected a dict, got str"),
    "nothing": ([], "no row with a target in split 'train'"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_ROWS)
def test_a_bad_row_is_named_and_nothing_stays_registered(seqio, case):
    bad, message = BAD_ROWS[case]
    with pytest.raises(InputError, match=message) as caught:
        add_task("bad_rows", source=lambda split: bad, splits=["train"])
    assert "\n" not in str(caught.value)
    assert "bad_rows" in str(caught.value)
    assert not {"bad_rows", "bad_rows_label", "bad_rows_rationale"} & {
        *seqio.TaskRegistry.names(),
        *seqio.MixtureRegistry.names(),
    }


def test_a_bad_weight_beyond_the_first_rows_is_named_with_its_row(seqio, tmp_path):
    bad = [{"input": f"{i}", "label": "b", "weight": 1.0 - (i == 40)} for i in range(60)]
    add_task("late_weight", source=lambda split: bad, splits=["train"])
    want = r"task 'late_weight', split 'train', row 41: the field 'weight' must be above 0, got 0.0"
    with pytest.raises(InputError, match=want):
        load_task("late_weight", split="train", data_dir=tmp_path)


@pytest.mark.parametrize("weight", [-2.0, float("nan"), float("inf")])
def test_a_bad_weight_of_a_source_of_seqio_is_named_with_its_row(seqio, tmp_path, weight):
    import tensorflow as tf

    columns = {"input": ["a", "b"], "label": ["c", "d"], "weight": [0.5, weight]}
    source = seqio.FunctionDataSource(
        lambda split, shuffle_files: tf.data.Dataset.from_tensor_slices(columns), splits=["train"]
    )
    name = f"weighed_{'infinite' if weight > 0 else 'negative' if weight < 0 else 'nan'}"
    add_task(name, source=source)
    with pytest.raises(InputError, match=f"'{name}', split 'train', row 2: the field 'weight'"):
        load_task(name, split="train", data_dir=tmp_path)


def test_a_function_that_fails_is_named_with_its_row(seqio):
    def broken(split):
        yield {"input": "a", "label": "b"}
        raise KeyError("question")

    with pytest.raises(InputError, match=r"broken failed after row 1 \(KeyError: 'question'\)"):
        add_task("broken_rows", source=broken, splits=["train"])


def test_a_field_that_a_source_lacks_is_named_with_task_and_source(seqio, tmp_path):
    import tensorflow as tf

    path = tmp_path / "rows.txt"
    path.write_text("a\n")
    source = seqio.TextLineDataSource({"train": str(path)})
    with pytest.raises(InputError, match=r"task 'lines_label': field 'input' is missing.*TextLine"):
        add_task("lines", source=source)
    numbers = seqio.map_over_dataset(lambda line: {"input": line, "label": tf.constant(3)})
    with pytest.raises(InputError, match=r"field 'label' of source TextLine.* must be text.*int32"):
        add_task("lines", source=source, preprocessors=[numbers])
    same = seqio.map_over_dataset(lambda line: {"input": line, "label": line})
    gone = seqio.TextLineDataSource({"train": str(tmp_path / "gone.txt")})
    with pytest.raises(InputError, match=r"task 'lines_label', split 'train'.*gone\.txt"):
        add_task("lines", source=gone, preprocessors=[same])


def test_bad_arguments_are_named(roads, tmp_path):
    with pytest.raises(InputError, match="already has a task or mixture 'roads_in_code_label'"):
        add_task("roads_in_code", source=rows, splits=["train"])
    with pytest.raises(InputError, match=r"name its splits with splits="):
        add_task("other", source=rows)
    with pytest.raises(InputError, match="did you mean 'text_match'"):
        add_task("other", source=rows, splits=["train"], metric="text_mach")
    with pytest.raises(InputError, match="no such vocabulary"):
        add_task("other", source=rows, splits=["train"], vocabulary=tmp_path / "no.model")
    with pytest.raises(InputError, match="a function that takes the split's name"):
        add_task("other", source=7)
    with pytest.raises(InputError, match="pass `splits` only if the source is a function"):
        add_task("other", source=[1, 2], splits=["train"])


def test_the_registered_tasks_carry_the_metric(seqio, roads):
    (metric,) = seqio.TaskRegistry.get(f"{roads}_label").metric_fns
    assert metric(targets=["left", "right"], predictions=["left ", "left"]) == {"accuracy": 0.5}
    assert [o.name for o in step_by_step()] == ["label", "rationale"]
