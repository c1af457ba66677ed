"""Reading several rows at once from TensorFlow gives the same tokens as reading one by one."""

import numpy as np
import pytest

from stepdistill_jax.errors import InputError
from stepdistill_jax.tasks.tokenizing import COMPARED_ROWS, read_tokens

COUNT = 2 * COMPARED_ROWS + 5  # two whole batches and a part of one


@pytest.fixture(scope="module")
def seqio():
    from stepdistill_jax.data.builder import tensorflow

    tensorflow()
    import seqio

    return seqio


def task_of(seqio, dataset, inputs_rank=1):
    """Returns a SeqIO task with the rows of a dataset, unchanged."""
    vocabulary = seqio.ByteVocabulary()
    return seqio.Task(
        "as_they_are",
        source=seqio.FunctionDataSource(lambda split, shuffle_files: dataset, splits=["train"]),
        preprocessors=[],
        output_features={
            "inputs": seqio.Feature(vocabulary, add_eos=False, rank=inputs_rank),
            "targets": seqio.Feature(vocabulary, add_eos=False),
        },
    )


def ids_from(start):
    """Returns [start % 5 + 1] ids, different for each start; some are 0, like padding."""
    import tensorflow as tf

    return tf.range(start % 5 + 1) * start


def rows_of(seqio, **more):
    """Returns a dataset of ids of many lengths, with further features made from the row's number."""
    import tensorflow as tf

    def row(i):
        made = {"inputs": ids_from(i), "targets": ids_from(i)[1:]}
        return made | {name: make(i) for name, make in more.items()}

    return tf.data.Dataset.range(COUNT, output_type=tf.int32).map(row)


def test_ids_weights_and_texts_are_those_of_the_rows_one_by_one(seqio):
    import tensorflow as tf

    dataset = rows_of(
        seqio,
        weight=lambda i: tf.cast(i + 1, tf.float32) / 8,
        targets_pretokenized=lambda i: tf.strings.as_string(i),
        # features that are not requested, with shapes that cannot be padded blindly
        ragged=lambda i: tf.RaggedTensor.from_row_lengths(tf.range(i), [i]),
        matrix=lambda i: tf.zeros([i % 3, 2]),
    )
    found = list(read_tokens(task_of(seqio, dataset), "train", [""]))
    want = list(dataset.as_numpy_iterator())
    assert len(found) == COUNT
    for example, row in zip(found, want, strict=True):
        ((inputs, targets),) = example.rows
        np.testing.assert_array_equal(inputs, row["inputs"])
        np.testing.assert_array_equal(targets, row["targets"])
        assert example.weight == row["weight"]
        assert example.label_text == row["targets_pretokenized"].decode()


def test_without_weights_and_texts_a_row_weighs_1_and_its_ids_are_decoded(seqio):
    found = list(read_tokens(task_of(seqio, rows_of(seqio)), "train", [""]))
    assert {example.weight for example in found} == {1.0}
    decode = seqio.ByteVocabulary().decode
    want = [decode(row["targets"].tolist()) for row in rows_of(seqio).as_numpy_iterator()]
    assert [example.label_text for example in found] == want
    assert len(set(want)) > COUNT / 2


def test_ids_of_two_axes_are_refused_and_the_row_named(seqio):
    dataset = rows_of(seqio).map(lambda row: row | {"inputs": row["inputs"][None]})
    with pytest.raises(InputError, match=r"row 1: 'inputs' must be ids \[length\], got int32 \(1,"):
        list(read_tokens(task_of(seqio, dataset, inputs_rank=2), "train", [""]))


def test_a_bad_row_is_named_by_its_number_wherever_it_stands(seqio):
    import tensorflow as tf

    for bad in (1, COMPARED_ROWS + 2, COUNT):
        dataset = rows_of(seqio, weight=lambda i, bad=bad: tf.where(i == bad - 1, -1.0, 1.0))
        with pytest.raises(InputError, match=f"row {bad}: the field 'weight' must be above 0"):
            list(read_tokens(task_of(seqio, dataset), "train", [""]))
