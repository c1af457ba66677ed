"""Objectives that read one encoding: the batches, and that loss and gradient are those of encoding anew."""

import collections
import dataclasses

import hypothesis.strategies as st
import jax
import numpy as np
import optax
import pytest
from hypothesis import HealthCheck, assume, given, settings

from stepdistill_jax.batches.batch import Batches
from stepdistill_jax.data.objectives import Objective, share_encoding, shared_encoder, step_by_step
from stepdistill_jax.data.vocabulary import ByteVocabulary
from stepdistill_jax.errors import InputError
from stepdistill_jax.models.encoder_decoder import EncoderDecoder
from stepdistill_jax.models.families import model_config
from stepdistill_jax.models.sharding import Layout
from stepdistill_jax.runtime.metrics import read_metrics
from stepdistill_jax.tasks.task_data import TaskData
from stepdistill_jax.tasks.token_store import TokenExample, write_store
from stepdistill_jax.training import TrainConfig, train

PROPERTY = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
CROSS = "decoder_encoder_segment_ids"
MODEL = dataclasses.replace(
    model_config("t5_v1_1", "tiny", vocab_size=300),
    emb_dim=16, num_heads=2, head_dim=8, mlp_dim=32, num_encoder_layers=1, dropout_rate=0.0,
)  # fmt: skip
PREFIX = ByteVocabulary().encode("why: ")
SHARED = (
    Objective("label", "{input}", "{label}", 1.0),
    Objective("rationale", "{input}", "{rationale}", 0.7, "why: "),
    Objective("llm", "{input}", "{llm_label}", 0.3, "who"),
)
# the same tokens, but for one more character of the template, which tokens in memory never saw
UNSHARED = (SHARED[0], *(dataclasses.replace(o, input_template="!{input}") for o in SHARED[1:]))


def task(folder, examples, objectives, **changes):
    """`examples`: (inputs, [targets of each column]) of ids."""
    columns = [str(i) for i in range(len(examples[0][1]))]
    rows = [
        TokenExample([(inputs if t else [], t) if i else (inputs, t) for i, t in enumerate(targets)], 1 + n % 3)
        for n, (inputs, targets) in enumerate(examples)
    ]  # fmt: skip
    store = write_store(folder, columns, rows)
    return TaskData.of_store("test", "train", objectives, store, ByteVocabulary(), **changes)


def example(rng, number, columns=3, longest=12):
    """Its inputs and targets begin with ids that say which example and column they are of."""

    def ids(first, most):
        return [*first, *rng.integers(200, 259, rng.integers(0, most)).tolist(), 1]

    targets = [ids([3 + number, 100 + c], longest) for c in range(columns)]
    targets = [t if c == 0 or rng.random() < 0.7 else [] for c, t in enumerate(targets)]
    return ids([3 + number], longest), targets


def read(batch):
    """(inputs, targets, decoder inputs, objective ids, weights) of each target, cell by cell."""
    (group,) = batch
    found = []
    for row in range(len(group["encoder_segment_ids"])):
        own = group["decoder_segment_ids"][row]
        assert sorted(set(own[own > 0])) == list(range(1, own.max() + 1))
        sources = set()
        for segment in range(1, own.max() + 1):
            (source,) = set(group[CROSS][row][own == segment])
            sources.add(source)
            inputs = group["encoder_input_tokens"][row][group["encoder_segment_ids"][row] == source]
            found.append((row, int(source), tuple(inputs.tolist())) + tuple(
                tuple(group[f"decoder_{name}"][row][own == segment].tolist())
                for name in ("target_tokens", "input_tokens", "objective_ids", "loss_weights")
            ))  # fmt: skip
        encoded = group["encoder_segment_ids"][row]
        assert sources == set(encoded[encoded > 0].tolist())  # nothing is encoded in vain
        assert ((own > 0) == (group[CROSS][row] > 0)).all()
    return found


def cut(ids, length):
    return tuple(ids) if len(ids) <= length else (*ids[: length - 1], 1)


@st.composite
def problems(draw):
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    examples = [example(rng, i) for i in range(draw(st.integers(1, 20)))]
    lengths = draw(st.integers(4, 30)), draw(st.integers(8, 40))
    return examples, lengths, draw(st.integers(1, 10)), draw(st.integers(0, 3))


@PROPERTY
@given(problems(), st.booleans())
def test_every_target_is_there_once_and_reads_its_own_input(tmp_path_factory, problem, pairs):
    examples, lengths, batch_size, seed = problem
    assume(not pairs or any(targets[1] for _, targets in examples))
    data = task(tmp_path_factory.mktemp("store"), examples, SHARED)
    batches = Batches(data, batch_size, *lengths, seed=seed, pairs=pairs)
    prefixes = [ByteVocabulary().encode(o.decoder_prefix) for o in SHARED]
    for step in range(3):
        got = collections.Counter()
        encodings = collections.defaultdict(set)
        for row, source, inputs, targets, previous, objectives, weights in read(batches(step)):
            assert previous == (0, *targets[:-1])
            number = objectives[-1]
            given = len(prefixes[number - 1])
            assert objectives == (0,) * given + (number,) * (len(targets) - given)
            assert [w > 0 for w in weights] == [o > 0 for o in objectives]
            got[inputs, targets, weights[-1], number] += 1
            encodings[row, source].add(number)
        want = collections.Counter()
        for i in batches.examples(step).indices:
            inputs, targets = examples[i]
            for number, (ids, prefix) in enumerate(zip(targets, prefixes, strict=True), 1):
                if ids:
                    ids = (*prefix, *cut(ids, lengths[1] - len(prefix)))
                    want[cut(inputs, lengths[0]), ids, 1.0 + i % 3, number] += 1
        assert got == want
        if pairs:  # an example has one encoding, however long its targets are together
            assert len(encodings) == len(batches.examples(step).indices)
            (group,) = batches(step)
            for row, numbers in enumerate(group["decoder_example_ids"]):
                sources = set(zip(numbers.tolist(), group[CROSS][row].tolist(), strict=True))
                assert len(sources) == len({n for n, _ in sources}) == len({s for _, s in sources})
        rows = len(batches(step)[0]["encoder_segment_ids"])
        assert rows in batches.row_counts


def test_an_example_is_encoded_once_unless_its_targets_do_not_fit(tmp_path):
    examples = [([5, 1], [[6, 1], [7] * 5 + [1], []]), ([8, 1], [[9, 1], [7] * 9 + [1], [4, 1]])]
    data = task(tmp_path, examples, SHARED)
    roomy = read(Batches(data, 2, 8, 40, seed=0, shuffle=False)(0))
    assert len({entry[:2] for entry in roomy}) == 2  # encodings
    assert len(roomy) == 5
    # 2 and 5 + 10 fit into 18, 3 + 2 more do not
    tight = read(Batches(data, 2, 8, 18, seed=0, shuffle=False)(0))
    assert len({entry[:2] for entry in tight}) == 3
    key = [entry[2:] for entry in roomy]
    assert sorted(key) == sorted(entry[2:] for entry in tight)


def test_the_batch_of_the_docstring(tmp_path):
    nine = dataclasses.replace(shared_encoder()[1], decoder_prefix=chr(9 - 3))
    objectives = (shared_encoder()[0], nine)
    rows = [([20, 5, 1], [[7, 1], [8, 9, 1]]), ([20, 6, 1], [[7, 1], []])]
    (store,) = task(tmp_path, rows, objectives).stores
    store = dataclasses.replace(store, weights=np.array([1, 0.5], np.float32))
    data = TaskData.of_store("test", "train", objectives, store, ByteVocabulary())
    (group,) = Batches(data, 2, 6, 8, seed=0, shuffle=False)(0)
    want = {
        "encoder_input_tokens": "20 5 1 20 6 1",
        "encoder_segment_ids": "1 1 1 2 2 2",
        "decoder_target_tokens": "7 1 9 8 9 1 7 1",
        "decoder_input_tokens": "0 7 0 9 8 9 0 7",
        "decoder_segment_ids": "1 1 2 2 2 2 3 3",
        CROSS: "1 1 1 1 1 1 2 2",
        "decoder_objective_ids": "1 1 0 2 2 2 1 1",
        "decoder_loss_weights": "1 1 0 1 1 1 .5 .5",
    }
    assert set(group) == set(want)
    for name, row in want.items():
        np.testing.assert_array_equal(group[name][0], np.array(row.split(), float), name)


@pytest.fixture(scope="module")
def update(take_steps):
    """`update(batch, ...)`: (loss, loss and count of each objective, gradient)."""
    given = {"tx": optax.sgd(1e-2, momentum=0.9), "weights": tuple(o.weight for o in SHARED)}

    def updated(batch, *layout, **settings):
        state, (metrics,) = take_steps(MODEL, [batch], *layout, **given, **settings)
        gradient = jax.tree.map(np.array, state.opt_state[0].trace)
        sums = np.array([metrics["sums"].loss, metrics["sums"].count])
        return float(metrics["loss"]), sums, gradient

    return updated


def largest_gap(gradient, expected):
    gaps = jax.tree.map(lambda a, b: np.linalg.norm(a - b) / np.linalg.norm(b), gradient, expected)
    return max(jax.tree.leaves(gaps))


@pytest.fixture(scope="module")
def examples():
    rng = np.random.default_rng(0)
    return [example(rng, i) for i in range(24)]


@pytest.fixture(scope="module")
def packed(examples, update, tmp_path_factory):
    """The batch of 16 examples, one encoding for each, and its update on one device."""
    data = task(tmp_path_factory.mktemp("shared"), examples, SHARED)
    batch = Batches(data, 16, 30, 70, seed=0, row_multiple=8)(0)
    assert batch[0]["decoder_segment_ids"].max() > batch[0]["encoder_segment_ids"].max() > 1
    return batch, update(batch)


def assert_same_update(got, expected):
    assert got[0] == pytest.approx(expected[0], rel=1e-6)  # measured 2e-7
    np.testing.assert_allclose(got[1], expected[1], rtol=1e-6)
    assert largest_gap(got[2], expected[2]) < 1e-5  # measured 1e-6


@pytest.mark.slow
@pytest.mark.parametrize(
    ("objectives", "pack"),
    [(UNSHARED, True), pytest.param(SHARED, False, marks=pytest.mark.slow)],
    ids=["packed", "PACK=False"],
)
def test_loss_and_gradient_are_those_of_encoding_the_input_for_each_target(
    examples, packed, update, objectives, pack, tmp_path
):
    """The oracle has a row of its own for every target: ordinary batches, ordinary masks."""
    data = task(tmp_path, examples, objectives)
    batch = Batches(data, 16, 30, 70, seed=0, pack=pack, row_multiple=8)(0)
    assert len(batch) == (1 if pack else 3)
    assert all(CROSS not in group for group in batch)
    assert_same_update(update(batch), packed[1])


@pytest.mark.parametrize(
    ("layout", "devices", "slices"),
    [
        pytest.param(Layout(data=2, fsdp=2, tensor=2), 8, 1, marks=pytest.mark.slow),
        pytest.param(Layout(), 1, 4, marks=pytest.mark.slow),
    ],
    ids=["8 devices", "4 slices"],
)
def test_devices_and_slices_change_nothing(packed, update, layout, devices, slices):
    assert_same_update(update(packed[0], layout, devices, num_microbatches=slices), packed[1])


def test_another_examples_input_moves_no_other_loss(packed, params):
    """Whatever shares the packed row: only the targets of the encoding that changed see it."""
    (group,), _ = packed
    states = jax.jit(lambda g: EncoderDecoder(MODEL).apply({"params": params}, g, method="states"))
    before, moved = np.asarray(states(group)), 0
    for segment in range(1, int(group["encoder_segment_ids"].max()) + 1):
        ids = group["encoder_input_tokens"]
        changed = np.where((group["encoder_segment_ids"] == segment) & (ids > 3), ids - 1, ids)
        after = np.asarray(states({**group, "encoder_input_tokens": changed}))
        gap, reads = np.abs(after - before).max(-1), group[CROSS] == segment
        assert gap[~reads & (group[CROSS] > 0)].max(initial=0) == 0
        assert gap[reads].min(initial=1) > 0
        moved += reads.sum()
    assert moved == (group["decoder_segment_ids"] > 0).sum()


@pytest.mark.parametrize("sample", [False, True], ids=["all", "sample"])
def test_several_rationales_read_one_encoding(tmp_path, sample):
    objectives = shared_encoder()
    rng = np.random.default_rng(1)
    examples = []
    for i in range(12):
        inputs, targets = example(rng, i, columns=4)
        examples.append((inputs, targets[: 2 + i % 3] + [[]] * (2 - i % 3)))
    for _, targets in examples:  # rationales fill their columns from the first on
        targets[1:] = sorted(targets[1:], key=lambda t: not t)
    data = task(tmp_path, examples, objectives, most_rationales=3, sample_rationales=sample)
    batches = Batches(data, 12, 32, 128, seed=0)
    shown = set()
    for step in range(20):
        found = read(batches(step))
        assert len({entry[:2] for entry in found}) == 12
        labels = [entry for entry in found if entry[5][-1] == 1]
        assert len(labels) == 12
        rationales = [entry for entry in found if entry[5][-1] == 2]
        of = collections.Counter(entry[2] for entry in rationales)
        for inputs, targets in examples:
            there = sum(map(bool, targets[1:]))
            assert of[tuple(inputs)] == (min(there, 1) if sample else there)
        shown |= {entry[3] for entry in rationales}
    assert len(shown) == sum(bool(t) for _, targets in examples for t in targets[1:])


@pytest.mark.parametrize(
    ("objectives", "expected"),
    [
        (shared_encoder(), True),
        (step_by_step(), False),
        (shared_encoder()[:1], False),
        ((*shared_encoder(), Objective("copy", "copy: {input}", "{input}")), False),
        (tuple(dataclasses.replace(o, input_template="{rationale}") for o in SHARED), False),
    ],
    ids=["one input", "two inputs", "one objective", "one of three", "a rationale as input"],
)
def test_an_encoding_is_shared_where_all_ask_with_one_input(objectives, expected):
    assert share_encoding(objectives) is expected


def test_a_prefix_that_leaves_no_room_for_a_target_is_refused(tmp_path):
    data = task(tmp_path, [([5, 1], [[6, 1], [7, 1], [8, 1]])], SHARED)
    with pytest.raises(
        InputError, match=r"`target_length=5`: .* of rationale after .* of 5 tokens"
    ):
        Batches(data, 1, 8, len(PREFIX), seed=0)


def test_a_prefix_is_part_of_the_datas_fingerprint(tmp_path):
    data = task(tmp_path, [([5, 1], [[6, 1], [7, 1], [8, 1]])], SHARED)
    without = tuple(dataclasses.replace(o, decoder_prefix="") for o in SHARED)
    prints = {dataclasses.replace(data, objectives=o).fingerprint for o in (SHARED, without)}
    assert len(prints) == 2


@pytest.mark.slow
def test_a_run_and_its_validation_are_those_of_encoding_anew(tmp_path, delivery_data_dir):
    settings = {
        "task": "delivery",
        "objectives": "shared_encoder",
        "batch_size": 16,
        "input_length": 64,
        "target_length": 90,
        "train_steps": 2,
        "eval_every": 2,
        "checkpoint_every": 2,
        "dropout_rate": 0.0,
    }
    runs = []
    for pack in (True, False):
        workdir = tmp_path / f"pack_{pack}"
        train(TrainConfig(**settings, pack=pack), workdir=workdir, data_dir=delivery_data_dir)
        runs.append(read_metrics(workdir))
    for shared, anew in zip(*runs, strict=True):
        assert shared.keys() == anew.keys()
        compared = [k for k in shared if "timing" not in k and "non_padding" not in k]
        assert [k for k in compared if shared[k] != pytest.approx(anew[k], rel=1e-5)] == []
    counted = [{k: x[k] for k in x if "target_tokens/" in k} for x in runs[0][:2]]
    # 16 labels and rationales, the two tokens of "explain: " are in neither count
    assert counted[0] == {"target_tokens/label": 32, "target_tokens/rationale": 256}
    assert "eval/validation/loss/rationale" in runs[0][-1]
