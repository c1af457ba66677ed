import itertools

import pytest

from stepdistill_jax.data.corpora import delivery


@pytest.fixture(scope="module")
def reading():
    return delivery.read()


def _kinds(text):
    """Returns the kinds of the words in an input or a rationale."""
    words = text.split()
    tables = (delivery.WEATHER, delivery.VEHICLE, delivery.ROAD)
    return [
        next(kind for kind, listed in table.items() if {kind, *listed.split()} & set(words))
        for table in tables
    ]


def test_splits_are_disjoint_and_of_the_promised_size(reading):
    inputs = {s: [row.example.input for row in rows] for s, rows in reading.splits.items()}
    assert {s: len(rows) for s, rows in inputs.items()} == {
        "train": 1500,
        "validation": 500,
        "test": 500,
    }
    assert len(set(itertools.chain(*inputs.values()))) == 2500


def test_labels_are_balanced_in_each_split(reading):
    for rows in reading.splits.values():
        assert sum(row.example.label == "smooth" for row in rows) * 2 == len(rows)


def test_a_single_category_says_nothing_about_the_label(reading):
    for rows in reading.splits.values():
        kinds = [(_kinds(row.example.input), row.example.label) for row in rows]
        for category in range(3):
            value = kinds[0][0][category]
            labels = [label for found, label in kinds if found[category] == value]
            share = labels.count("smooth") / len(labels)
            assert 0.4 < share < 0.6


def test_the_rationale_names_the_kinds_and_never_the_label(reading):
    for row in itertools.chain(*reading.splits.values()):
        example = row.example
        assert _kinds(example.rationale) == _kinds(example.input)
        assert not {"smooth", "trouble"} & set(example.rationale.split())


@pytest.mark.parametrize(
    ("weather", "vehicle", "road", "label", "pace"),
    [
        ("wet", "heavy", "wide", "smooth", "fast"),
        ("wet", "heavy", "narrow", "trouble", "fast"),
        ("wet", "light", "wide", "trouble", "slow"),
        ("wet", "light", "narrow", "smooth", "slow"),
        ("dry", "light", "wide", "smooth", "fast"),
        ("dry", "light", "narrow", "trouble", "fast"),
        ("dry", "heavy", "wide", "trouble", "slow"),
        ("dry", "heavy", "narrow", "smooth", "slow"),
    ],
)
def test_the_hidden_rule(weather, vehicle, road, label, pace):
    assert delivery.conclusion(weather, vehicle, road)[0] == label
    assert delivery.conclusion(weather, vehicle, road)[1].startswith(
        f"{pace} pace on a {road} road"
    )


def test_the_texts_are_those_that_the_documents_show(reading):
    example = reading.splits["train"][0].example
    assert example.input == "with showers in the forecast , the scooter takes the bypass ."
    assert example.rationale == (
        "slow pace on a wide road , since a light vehicle hates wet weather ."
    )
    assert example.label == "trouble"


def test_categories_have_twelve_words_each_and_share_none():
    words = [
        word
        for table in (delivery.WEATHER, delivery.VEHICLE, delivery.ROAD)
        for listed in table.values()
        for word in listed.split()
    ]
    assert len(words) == len(set(words)) == 72
