"""Span corruption: equal masks to the package `t5`, and a task that loses no text."""

import json

import numpy as np
import pytest

from stepdistill_jax.data.vocabulary import EOS_ID, load_vocabulary
from stepdistill_jax.errors import InputError
from stepdistill_jax.tasks import add_span_corruption, load_task
from stepdistill_jax.tasks.span_corruption import (
    SENTINELS,
    noise_span_to_unique_sentinel,
    random_spans_helper,
    random_spans_noise_mask,
)

TEXTS = [
    f"the {kind} takes the {road} ." * 9
    for kind in ("truck", "bike")
    for road in ("lane", "bridge")
]


SENTINEL_IDS = range(259, 259 + SENTINELS)  # after the bytes


@pytest.fixture(scope="module")
def seqio():
    from stepdistill_jax.data.builder import tensorflow

    tensorflow()
    import seqio

    return seqio


@pytest.fixture(scope="module")
def corpus(seqio, tmp_path_factory):
    """Registers a task on a new file, and loads it."""
    names, folder = [], tmp_path_factory.mktemp("corpus")

    def make(name, lines=None, **options):
        lines = lines or [json.dumps({"text": text}) for text in TEXTS]
        (folder / f"{name}.jsonl").write_text("\n\n".join(lines))
        files = {"train": folder / f"{name}.jsonl"}
        add_span_corruption(name, files=files, **{"inputs_length": 40, **options})
        names.append(name)
        return load_task(name, split="train", data_dir=folder / "data")

    yield make
    for name in names:
        seqio.TaskRegistry.remove(name)


@pytest.fixture(scope="module")
def twice(corpus):
    """Loads a task with two masks for each segment."""
    return corpus("twice", masks=2)


def pairs(data):
    (store,), (rows,) = data.stores, data.stores[0].rows
    return [
        (rows["inputs"][i].tolist(), rows["targets"][i].tolist()) for i in range(store.num_examples)
    ]


def restored(inputs, targets, sentinels):
    """Returns the text: replaces each sentinel of the inputs by the ids after it in the targets."""
    spans, ids = {}, []
    for i in targets[:-1]:
        if i in sentinels:
            spans[i] = ids = []
        else:
            ids.append(i)
    return [j for i in inputs[:-1] for j in spans.pop(i, [i])], spans


def test_masks_are_those_of_t5(seqio):
    # t5/data/preprocessors_test.py, test_random_spans_noise_mask
    mask = random_spans_noise_mask(32, 0.25, [(1, 2), (3, 4)], mean_noise_span_length=2.0)
    assert "".join(map(str, mask.numpy().astype(int))) == "00000011101110000000000000001001"


def test_sentinels_are_those_of_t5(seqio):
    # t5/data/preprocessors_test.py, test_noise_span_to_unique_sentinel and its counterpart
    ids, noise = np.arange(10, 16, dtype=np.int32), np.array([1, 1, 0, 0, 1, 0], bool)
    assert noise_span_to_unique_sentinel(ids, noise, 1000).numpy().tolist() == [
        999,
        12,
        13,
        998,
        15,
    ]
    kept = noise_span_to_unique_sentinel(ids, ~noise, 1000).numpy().tolist()
    assert kept == [10, 11, 999, 14, 998]


def test_lengths_are_those_of_t5():
    assert random_spans_helper(512, 0.15, 3.0) == (568, 114)
    assert random_spans_helper(64, 0.15, 2.0) == (68, 16)


@pytest.mark.parametrize("length", [1, 2, 3, 7, 100])
@pytest.mark.parametrize("density", [0.15, 0.5, 0.9])
def test_every_length_has_noise_and_something_beside_it(seqio, length, density):
    mask = random_spans_noise_mask(length, density, [(1, 2), (3, 4)], mean_noise_span_length=1.0)
    assert mask.shape == (length,) and not mask[0]
    if length > 1:
        assert mask[-1] and int(mask.numpy().sum()) == min(
            max(round(length * density), 1), length - 1
        )


def test_nothing_of_the_text_is_lost(twice):
    vocabulary = load_vocabulary("bytes")
    size = vocabulary.size + SENTINELS
    assert twice.vocab_size == size
    found, longest = "", random_spans_helper(40, 0.15, 3.0)[1]
    for inputs, targets in pairs(twice)[::2]:
        assert inputs[-1] == targets[-1] == EOS_ID
        assert len(inputs) <= 40 and len(targets) <= longest
        assert targets[0] == size - 1
        text, unused = restored(inputs, targets, SENTINEL_IDS)
        assert not unused
        found += vocabulary.decode(text)
    assert found == "".join(TEXTS)
    assert max(len(inputs) for inputs, _ in pairs(twice)) == 40


def test_a_segment_has_masks_that_differ_over_the_same_text(twice):
    rows = pairs(twice)
    longest = [pair for pair in rows if len(pair[0]) == 40]  # a single span is always the end
    assert len(longest) > 10 and len(set(map(str, longest))) > 0.9 * len(longest)
    for first, second in zip(rows[::2], rows[1::2], strict=True):
        assert restored(*first, SENTINEL_IDS) == restored(*second, SENTINEL_IDS)


@pytest.mark.slow
def test_a_row_keeps_its_mask(corpus, twice):
    assert pairs(corpus("again", masks=2)) == pairs(twice)


@pytest.mark.slow
def test_a_vocabulary_of_pieces_gets_sentinels_behind_its_end(corpus, delivery_data_dir):
    spiece = delivery_data_dir / "delivery" / "spiece.model"
    data = corpus("pieces", vocabulary=spiece)
    size = load_vocabulary(spiece).size
    assert data.vocab_size == size + SENTINELS
    assert all(targets[0] == size + SENTINELS - 1 for _, targets in pairs(data))


@pytest.mark.parametrize(
    ("options", "part"),
    [
        ({"files": {"train": "nowhere.jsonl"}}, "no file .*nowhere.jsonl for the split train"),
        ({"noise_density": 1.0}, "`noise_density` must be a number above 0 and below 1"),
        ({"masks": 0}, "`masks` must be a whole number of at least 1"),
        ({"inputs_length": 4096}, "but there are 100 sentinels"),
        ({"vocabulary": "none.model"}, "none.model: no such vocabulary"),
    ],
)
def test_what_cannot_be_a_task_is_refused(seqio, tmp_path, options, part):
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n')
    with pytest.raises(InputError, match=part):
        add_span_corruption("refused", **{"files": {"train": tmp_path / "a.jsonl"}, **options})
    assert "refused" not in seqio.TaskRegistry.names()


def test_a_name_is_taken_once(twice, tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n')
    with pytest.raises(InputError, match="already has a task"):
        add_span_corruption("twice", files={"train": tmp_path / "a.jsonl"})


@pytest.mark.parametrize(
    "line",
    [
        '{"txt": "a"}',
        *(pytest.param(x, marks=pytest.mark.slow) for x in ('{"text": 3}', "text", "[1]")),
    ],
)
def test_a_row_without_a_text_is_named(corpus, line):
    name = f"bad{abs(hash(line))}"
    with pytest.raises(InputError, match=rf"task '{name}'.*expected a row .*, got"):
        corpus(name, ['{"text": "a b c"}', line])
