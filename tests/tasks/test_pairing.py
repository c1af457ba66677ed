"""Rows of several tasks become examples by their ids; the oracle is a dictionary."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stepdistill_jax.tasks.pairing import paired, why_not
from stepdistill_jax.tasks.token_store import TokenExample, write_store

row = st.tuples(
    st.lists(st.integers(3, 50), min_size=1, max_size=4),
    st.lists(st.integers(3, 50), min_size=1, max_size=3),
    st.sampled_from([0.5, 1.0, 2.0]),
)
task = st.dictionaries(st.sampled_from([f"row {i}" for i in range(9)]), row, min_size=1)


def stored(folder, name, rows):
    examples = [
        TokenExample([(inputs, targets)], weight, f"label of {row_id}", row_id)
        for row_id, (inputs, targets, weight) in rows.items()
    ]
    return write_store(folder / name, [name], examples)


@given(label=task, rationale=task)
def test_an_example_has_the_rows_of_its_id(label, rationale, tmp_path_factory):
    folder = tmp_path_factory.mktemp("stores")
    stores = [stored(folder, "label", label), stored(folder, "rationale", rationale)]
    if not label.keys() & rationale.keys():
        assert "has the same id as a row" in why_not(stores, ["label", "rationale"])
        return
    assert why_not(stores, ["label", "rationale"]) is None
    data = paired(stores)
    ids = [*label, *(i for i in rationale if i not in label)]
    assert data.num_examples == len(ids)
    assert data.label_texts == [f"label of {i}" if i in label else "" for i in ids]
    every = [
        i
        for of in (label, rationale)
        for inputs, targets, _ in of.values()
        for i in inputs + targets
    ]
    assert data.max_id == max(every)
    assert data.directories == tuple(store.directory for store in stores)
    for of, rows in zip((label, rationale), data.rows, strict=True):
        for number, row_id in enumerate(ids):
            inputs, targets, weight = of.get(row_id, ([], [], 1.0))
            assert rows["inputs"][number].tolist() == inputs
            assert rows["targets"][number].tolist() == targets
            assert rows["weights"][number] == weight


def test_what_cannot_be_paired_says_why(tmp_path):
    one = ([5], [6], 1.0)
    label = stored(tmp_path, "label", {"a": one, "b": one})
    assert why_not([label, stored(tmp_path, "same", {"b": one, "c": one})], ["l", "r"]) is None
    without = write_store(tmp_path / "no ids", ["r"], [TokenExample([([5], [6])])])
    assert why_not([label, without], ["l", "r"]) == "the rows of r have no feature 'id'"
    examples = [TokenExample([([5], [6])], row_id=i) for i in ("x", "a", "x")]
    again = write_store(tmp_path / "again", ["r"], examples)
    assert why_not([label, again], ["l", "r"]) == "rows 1 and 3 of r have the same id"


@pytest.mark.parametrize("changed", ["order", "ids"])
def test_other_pairs_have_another_fingerprint(changed, tmp_path):
    label = {"a": ([5], [6], 1.0), "b": ([7], [8], 1.0)}
    other = (
        dict(reversed(label.items())) if changed == "order" else {"b": label["a"], "a": label["b"]}
    )
    first = stored(tmp_path, "first", label)
    second = stored(tmp_path, "second", other)
    assert paired([first, first]).fingerprint != paired([first, second]).fingerprint
