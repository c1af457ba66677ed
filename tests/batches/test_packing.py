import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given

from stepdistill_jax.batches.packing import Encodings, choose_row_counts, first_fit, most_rows
from stepdistill_jax.batches.sampler import ranges

SIZES = st.lists(st.tuples(st.integers(1, 20), st.integers(1, 12)), min_size=1, max_size=60)


def test_first_fit_docstring():
    packing = first_fit(np.array([(3, 1), (1, 1), (1, 3)]), (4, 4))
    assert packing.row.tolist() == [0, 1, 0]
    assert packing.input_start.tolist() == [0, 0, 3]
    assert packing.target_start.tolist() == [0, 0, 1]
    assert packing.segment.tolist() == [1, 1, 2]
    assert packing.num_rows == 2


def test_encodings_docstring():
    sizes, places = np.array([(3, 2), (3, 3), (3, 4)]), np.zeros(3, int)
    encodings = Encodings.of(sizes, places, 6, shared=True)
    assert encodings.of_row.tolist() == [0, 0, 1]
    assert encodings.offset.tolist() == [0, 2, 0]
    assert encodings.sizes.tolist() == [[3, 5], [3, 4]]


def test_choose_row_counts_docstring():
    assert choose_row_counts([4, 4, 4, 7], bound=20, row_multiple=2) == (4, 8, 10, 20)


@given(SIZES)
def test_packed_rows_never_overlap_and_fit(sizes):
    capacity = (20, 12)
    packing = first_fit(np.array(sizes), capacity)
    for side, start in enumerate((packing.input_start, packing.target_start)):
        used = np.zeros((packing.num_rows, capacity[side]), int)
        for size, row, first in zip(sizes, packing.row, start, strict=True):
            assert first + size[side] <= capacity[side]
            used[row, first : first + size[side]] += 1
        assert used.max() == 1
    for row in range(packing.num_rows):
        mine = np.sort(packing.segment[packing.row == row])
        assert mine.tolist() == list(range(1, len(mine) + 1))


@given(SIZES)
def test_a_packed_row_is_only_opened_when_nothing_fits_into_the_one_before(sizes):
    sizes, capacity = np.array(sizes), np.array([20, 12])
    packing = first_fit(sizes, (20, 12))
    for row in range(packing.num_rows - 1):
        room = capacity - sizes[packing.row == row].sum(0)
        later = sizes[packing.row > row]
        assert not (later <= room).all(1).any()


def test_inputs_and_targets_run_out_together():
    # four long targets alone would fill a row of targets, and leave its inputs half empty
    sizes = [(15, 16)] * 32 + [(15, 2)] * 32
    assert first_fit(np.array(sizes), (120, 72)).num_rows == 8


def test_packed_rows_are_nearly_full():
    # lengths like CommonsenseQA's: label and rationale of 64 questions, a few rows in each
    rng, capacity = np.random.default_rng(0), (256, 96)
    used, least = 0, 0
    for _ in range(20):
        questions = rng.gamma(14, 2.2, (64, 1)).astype(int) + 14  # mean 45, most 33 to 58
        labels, rationales = rng.integers(2, 5, (64, 1)), rng.normal(29, 6, (64, 1)).astype(int)
        rows = [np.hstack([questions, targets]) for targets in (labels, rationales)]
        sizes = np.minimum(np.concatenate(rows), capacity)
        used += first_fit(sizes, capacity).num_rows
        least += np.ceil(sizes.sum(0) / capacity).max()
    assert used <= 1.035 * least  # 1.049 if the last two rows are chosen one by one


def test_a_row_longer_than_the_capacity_is_refused():
    with pytest.raises(ValueError, match="capacity"):
        first_fit(np.array([(5, 1)]), (4, 4))


@given(st.lists(SIZES, min_size=1, max_size=20), st.data())
def test_most_rows_is_a_bound_for_every_batch(examples, data):
    capacity = np.array([20, 12])
    loads = np.array([(np.array(e) / capacity).sum() for e in examples])
    each = np.array([len(e) for e in examples])
    size = data.draw(st.integers(1, len(examples)))
    bound = most_rows(loads, each, size)
    chosen = data.draw(st.permutations(range(len(examples))))[:size]
    sizes = np.concatenate([np.array(examples[i]) for i in chosen])
    assert first_fit(sizes, (20, 12)).num_rows <= bound


def test_most_rows_holds_where_rows_just_do_not_pair():
    sizes = np.array(
        [(11, 1)] * 10
    )  # a little over half a row: ten packed rows with a total load of 6.3
    loads = (sizes / (20, 12)).sum(1)
    assert first_fit(sizes, (20, 12)).num_rows == 10
    assert most_rows(loads, np.ones(10, int), 10) == 10


def test_no_rows_need_no_row():
    assert first_fit(np.zeros((0, 2), int), (4, 4)).num_rows == 0


def test_row_counts_fit_the_probes():
    assert choose_row_counts([5] * 50 + [9] * 50, 40, 1) == (5, 9, 11, 40)
    assert choose_row_counts([5] * 50 + [9] * 50, 40, 8) == (8, 16, 40)
    assert choose_row_counts([1, 1], 1, 4) == (4,)


def test_ranges_docstring():
    assert ranges(np.array([3, 9]), np.array([2, 3])).tolist() == [3, 4, 9, 10, 11]
    assert ranges(np.array([], int), np.array([], int)).tolist() == []


@pytest.mark.parametrize("shared", [True, False])
def test_targets_share_an_encoding_until_they_no_longer_fit(shared):
    """The first example has three targets, two of which fill 7 of 8 tokens; the second has one."""
    sizes, places = np.array([(5, 3), (6, 3), (5, 4), (5, 2)]), np.array([0, 1, 0, 0])
    found = Encodings.of(sizes, places, 8, shared=shared)
    if shared:
        assert found.of_row.tolist() == [0, 1, 0, 2]
        assert found.offset.tolist() == [0, 0, 3, 0]
        assert found.is_first.tolist() == [True, True, False, True]
        assert found.sizes.tolist() == [[5, 7], [6, 3], [5, 2]]
        assert found.places.tolist() == [0, 1, 0]
    else:
        assert found.of_row.tolist() == [0, 1, 2, 3]
        assert found.offset.tolist() == [0] * 4
        assert found.is_first.all()
        np.testing.assert_array_equal(found.sizes, sizes)
        np.testing.assert_array_equal(found.places, places)
