"""The choice of row lengths: by cost, and never shorter than an example."""

import dataclasses
import math
import pathlib

import numpy as np
import pytest

from stepdistill_jax.batches.batch import Batches
from stepdistill_jax.batches.row_lengths import candidates, cheapest
from stepdistill_jax.data.objectives import label_only
from stepdistill_jax.data.vocabulary import ByteVocabulary
from stepdistill_jax.errors import InputError
from stepdistill_jax.tasks.registry import columns_of
from stepdistill_jax.tasks.task_data import Part, TaskData
from stepdistill_jax.tasks.token_store import TokenRows, TokenStore


def cells(input_length, target_length):
    return input_length + target_length


def data_of(pairs, count=40):
    """Returns examples of one objective that cycle through (input, target) lengths; ids do not matter."""

    def rows(side):
        ends = np.cumsum([0, *(pairs[i % len(pairs)][side] for i in range(count))])
        return TokenRows.of_offsets(np.full(ends[-1], 5, np.int32), ends)

    columns = ({"inputs": rows(0), "targets": rows(1)},)
    weights = np.ones(count, np.float32)
    store = TokenStore(pathlib.Path("nowhere"), "in memory", ("0",), columns, weights, {})
    parts = (Part("part", store, columns_of(label_only()), 1.0),)
    return TaskData("test", "train", label_only(), parts, ByteVocabulary())


def batches_of(pairs, *, batch_size=8, row_multiple=1, **more):
    return Batches(data_of(pairs), batch_size, 1024, 256, seed=0, row_multiple=row_multiple, **more)


def test_a_row_is_never_shorter_than_an_example():
    tried = candidates(batches_of([(10, 3), (61, 2), (12, 29)]), cells, None, None)
    assert len(tried) > 3
    assert all(c.input_length >= 61 and c.target_length >= 29 for c in tried)
    assert min(c.input_length for c in tried) == 64 and min(c.target_length for c in tried) == 32


@pytest.mark.parametrize("multiple", [1, 4, 16])
def test_rows_and_cost_are_those_of_the_batches_with_their_padding(multiple):
    """All examples have one size, so that the number that fits into a row is known."""
    pairs, drawn = [(20, 10)], 8
    for c in candidates(batches_of(pairs, row_multiple=multiple), cells, None, None):
        fit = min(c.input_length // 20, c.target_length // 10)
        rows = math.ceil(math.ceil(drawn / fit) / multiple) * multiple
        assert c.rows == rows
        assert c.cost == rows * cells(c.input_length, c.target_length)


def test_what_costs_least_is_chosen_and_of_nearly_equal_ones_the_shortest():
    batches = batches_of([(20, 10)], batch_size=32)
    by_cells = cheapest(candidates(batches, cells, None, None))
    assert by_cells.cost == min(c.cost for c in candidates(batches, cells, None, None))
    each_row = candidates(
        batches, lambda *_: 1.0, None, None
    )  # a row's cost does not depend on its length
    longest = cheapest(each_row)
    assert longest.rows == min(c.rows for c in each_row) < by_cells.rows
    shorter = [c for c in each_row if (c.input_length, c.target_length) < (longest.input_length,)]
    assert shorter and all(c.rows > longest.rows for c in shorter)
    by_square = cheapest(candidates(batches, lambda i, t: float((i + t) ** 4), None, None))
    assert (by_square.input_length, by_square.target_length) == (24, 16)


def test_rows_that_devices_share_out_are_shorter_where_they_would_be_empty():
    """Eight examples in rows of eight would leave 15 of 16 rows empty."""
    pairs = [(20, 10)]
    alone = cheapest(candidates(batches_of(pairs), cells, None, None))
    shared = cheapest(candidates(batches_of(pairs, row_multiple=16), cells, None, None))
    assert shared.rows == 16
    assert (shared.input_length, shared.target_length) == (24, 16)
    assert cells(alone.input_length, alone.target_length) > cells(24, 16)


@pytest.mark.parametrize("given", [(96, None), (None, 48), (96, 48)], ids=str)
def test_a_length_that_is_given_is_kept(given):
    tried = candidates(batches_of([(20, 10), (30, 4)]), cells, *given)
    for side, length in enumerate(given):
        found = {(c.input_length, c.target_length)[side] for c in tried}
        assert found == {length} if length else min(found) >= (30, 10)[side]
    assert len(tried) == 1 if None not in given else tried


def test_a_length_that_an_example_does_not_fit_into_is_refused():
    with pytest.raises(InputError, match=r"`row_input_length=16`: train of test .* 30 tokens"):
        candidates(batches_of([(20, 10), (30, 4)]), cells, 16, None)
    with pytest.raises(InputError, match=r"`row_target_length=9`: .* of 10 tokens; .*\"auto\""):
        batches_of([(20, 10)], row_lengths=(64, 9))


def test_texts_are_truncated_where_rows_are_longer():
    """Inputs of 40 ids are truncated to 12, and three of them share a row of 36."""
    batches = Batches(data_of([(40, 4)]), 6, 12, 8, seed=0, row_lengths=(36, 12))
    (group,) = batches(0)
    assert group["encoder_input_tokens"].shape[1] == 36
    assert group["decoder_target_tokens"].shape[1] == 12
    used = [row for row in group["encoder_segment_ids"] if row.any()]
    assert [np.bincount(row).tolist() for row in used] == [[0, 12, 12, 12]] * 2
    assert batches.cut_counts()["label"] == {"inputs": 40, "targets": 0}


def test_the_choice_does_not_depend_on_the_seed_or_the_share_of_the_data():
    rng = np.random.default_rng(0)
    pairs = [tuple(pair) for pair in rng.integers(1, 60, (40, 2)).tolist()]
    batches = batches_of(pairs)
    others = ({"seed": 3}, {"data_fraction": 0.2}, {"row_lengths": (512, 128)})
    for changes in others:
        other = dataclasses.replace(batches, **changes)
        assert candidates(other, cells, None, None) == candidates(batches, cells, None, None)
