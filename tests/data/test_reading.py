from stepdistill_jax.data.defects import Defect
from stepdistill_jax.data.reading import (
    in_order,
    split_of,
    tenth,
)


def _parts(ids):
    parts = {"train": [], "validation": []}
    for i in ids:
        parts[split_of(tenth(i), "train", {"train"})].append(i)
    return parts["train"], parts["validation"]


def test_the_part_of_an_id_never_changes():
    # another hash would move rows between train and validation of every prepared dataset
    assert [tenth(str(i)) for i in range(1, 13)] == [3, 6, 3, 4, 3, 9, 0, 5, 0, 0, 8, 2]


def test_parts_are_about_equal():
    counts = [0] * 10
    for i in range(10_000):
        counts[tenth(f"row {i}")] += 1
    assert min(counts) > 900  # 3.3 standard deviations below 1,000


def test_an_added_row_moves_no_other_row():
    ids = [str(i) for i in range(300)]
    train, validation = _parts(ids)
    train_2, validation_2 = _parts(["one more", *ids])
    assert set(train) <= set(train_2) and set(validation) <= set(validation_2)
    assert len(train) + len(validation) == 300
    assert validation == [i for i in ids if tenth(i) == 0]


def test_no_row_changes_its_split_but_those_of_train_without_a_validation_file():
    assert split_of(0, "train", {"train", "validation"}) == "train"
    assert split_of(0, "test", {"train", "test"}) == "test"


def test_splits_come_train_first_and_those_without_labels_last():
    assert in_order({"unlabelled": 1, "test": 1, "train": 1}) == ["train", "test", "unlabelled"]


def test_the_text_of_a_defect_is_cut():
    assert len(Defect("empty", "f", 1, "x" * 1000).text) == 200
