import collections
import itertools
import pathlib
from unittest import mock

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, assume, given, settings

from stepdistill_jax.batches import batch as batch_module
from stepdistill_jax.batches.batch import Batches
from stepdistill_jax.batches.sampler import MIXTURE_BLOCK
from stepdistill_jax.data.objectives import Objective, step_by_step
from stepdistill_jax.data.vocabulary import ByteVocabulary
from stepdistill_jax.errors import InputError
from stepdistill_jax.models.encoder_decoder import EncoderDecoder
from stepdistill_jax.models.sharding import Layout, blocks_on, make_mesh, place_rows
from stepdistill_jax.models.t5 import T5Config
from stepdistill_jax.tasks.registry import columns_of
from stepdistill_jax.tasks.task_data import Part, TaskData
from stepdistill_jax.tasks.token_store import TokenRows, TokenStore

PROPERTY = settings(suppress_health_check=[HealthCheck.too_slow])


def token_rows(rows):
    ids = np.array([i for row in rows for i in row], np.int32)
    return TokenRows.of_offsets(ids, np.cumsum([0, *map(len, rows)], dtype=np.int64))


def store_of(examples, weights=None):
    """Returns a store in memory; an example is [(inputs, targets), ...] by objective."""
    rows = tuple(
        {
            "inputs": token_rows([i for i, _ in objective]),
            "targets": token_rows([t for _, t in objective]),
        }
        for objective in zip(*examples, strict=True)
    )
    weights = np.asarray([1.0] * len(examples) if weights is None else weights, np.float32)
    names = tuple(str(i) for i in range(len(rows)))
    return TokenStore(pathlib.Path("nowhere"), "in memory", names, rows, weights, {})


def task_of(*stores, rates=None, objectives=None):
    if objectives is None:
        objectives = step_by_step()[: len(stores[0].rows)]
    rates = rates or (1.0,) * len(stores)
    columns = columns_of(objectives)
    parts = tuple(
        Part(f"part {i}", store, columns, rate)
        for i, (store, rate) in enumerate(zip(stores, rates, strict=True))
    )
    return TaskData("test", "train", tuple(objectives), parts, ByteVocabulary())


def cut(ids, length):
    """Returns a row truncated to `length`, by hand."""
    return tuple(ids) if len(ids) <= length else (*ids[: length - 1], 1)


def segments(batch):
    """Returns (inputs, targets, objective, weight) of each segment, read cell by cell."""
    found = []
    for group in batch:
        for row in range(len(group["encoder_segment_ids"])):
            cells = collections.defaultdict(lambda: ([], [], [], set(), set()))
            for token, segment in zip(
                group["encoder_input_tokens"][row], group["encoder_segment_ids"][row], strict=True
            ):
                assert (token > 0) == (segment > 0)
                if segment:
                    cells[segment][0].append(int(token))
            for column, segment in enumerate(group["decoder_segment_ids"][row]):
                target, previous, objective, weight = (
                    group[name][row, column]
                    for name in (
                        "decoder_target_tokens",
                        "decoder_input_tokens",
                        "decoder_objective_ids",
                        "decoder_loss_weights",
                    )
                )
                assert (target > 0) == (objective > 0) == (segment > 0)
                if segment:
                    cells[segment][1].append(int(target))
                    cells[segment][2].append(int(previous))
                    cells[segment][3].add(int(objective))
                    cells[segment][4].add(float(weight))
                else:
                    assert previous == 0
                    assert weight == 0
            assert sorted(cells) == list(range(1, len(cells) + 1))
            for inputs, targets, previous, objectives, weights in cells.values():
                assert inputs  # no segment without inputs, none without targets
                assert targets
                assert previous == [0, *targets[:-1]]
                (objective,), (weight,) = objectives, weights
                found.append((tuple(inputs), tuple(targets), objective, weight))
    return found


def expected(examples, weights, lengths):
    """Returns the segments of examples, by a loop."""
    return [
        (cut(inputs, lengths[0]), cut(targets, lengths[1]), objective, float(np.float32(weight)))
        for example, weight in zip(examples, weights, strict=True)
        for objective, (inputs, targets) in enumerate(example, 1)
        if targets
    ]


@st.composite
def problems(draw):
    """Draws (examples, weights, lengths, batch size); the first input id of an example identifies it."""
    count = draw(st.integers(1, 30))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    longest = draw(st.integers(2, 12))

    def ids(first):
        return [*first, *rng.integers(100, 120, rng.integers(0, longest)).tolist(), 1]

    examples = [
        [
            (ids([2 * i + 3]), ids([7])),
            (ids([2 * i + 4]), ids([8]) if rng.random() < 0.7 else []),
        ]
        for i in range(count)
    ]
    weights = rng.choice([1.0, 0.5, 2.0], count)
    lengths = draw(st.integers(3, 20)), draw(st.integers(3, 20))
    return examples, weights, lengths, draw(st.integers(1, 12))


FORMS = st.fixed_dictionaries({"pack": st.booleans(), "pairs": st.booleans()})


def make(problem, **kwargs):
    examples, weights, lengths, batch_size = problem
    assume(not kwargs.get("pairs") or any(e[1][1] for e in examples))
    return Batches(task_of(store_of(examples, weights)), batch_size, *lengths, **kwargs)


def test_the_batch_of_the_docstring():
    examples = [
        [([20, 5, 1], [7, 1]), ([21, 5, 1], [8, 9, 1])],
        [([20, 6, 1], [7, 1]), ([21, 6, 1], [])],
    ]
    (group,) = Batches(task_of(store_of(examples, [1, 0.5])), 2, 10, 8, seed=0, shuffle=False)(0)
    want = {
        "encoder_input_tokens": "20 5 1 21 5 1 20 6 1 0",
        "encoder_segment_ids": "1 1 1 2 2 2 3 3 3 0",
        "decoder_target_tokens": "7 1 8 9 1 7 1 0",
        "decoder_input_tokens": "0 7 0 8 9 0 7 0",
        "decoder_segment_ids": "1 1 2 2 2 3 3 0",
        "decoder_objective_ids": "1 1 2 2 2 1 1 0",
        "decoder_loss_weights": "1 1 1 1 1 .5 .5 0",
    }
    assert set(group) == set(want)
    for name, row in want.items():
        np.testing.assert_array_equal(group[name][0], np.array(row.split(), float), name)
        assert group[name].dtype == (np.float32 if name == "decoder_loss_weights" else np.int32)


@PROPERTY
@given(problems(), FORMS, st.integers(0, 3))
def test_no_token_is_lost_or_doubled(problem, form, seed):
    examples, weights, lengths, batch_size = problem
    batches = make(problem, **form, seed=seed)
    # as many steps as there are examples: batch_size epochs
    got = collections.Counter(s for k in range(len(examples)) for s in segments(batches(k)))
    want = collections.Counter(expected(examples, weights, lengths))
    assert got == {s: batch_size * n for s, n in want.items()}


@PROPERTY
@given(problems(), st.booleans())
def test_label_and_rationale_of_an_example_are_in_one_step(problem, pack):
    examples, weights, lengths, _ = problem
    batches = make(problem, pack=pack, seed=5)
    for step in range(5):
        drawn = batches.examples(step).indices
        want = expected([examples[i] for i in drawn], [weights[i] for i in drawn], lengths)
        assert sorted(segments(batches(step))) == sorted(want)


@PROPERTY
@given(problems(), st.booleans())
def test_paired_targets_share_a_row_and_the_number_of_their_example(problem, pack):
    """The first input id of an example's targets identifies it: 2 i + 3 and 2 i + 4."""
    batches = make(problem, pack=pack, pairs=True, seed=5)
    for step in range(3):
        (group,) = batches(step)
        found = collections.Counter()
        for row, numbers in enumerate(group["decoder_example_ids"]):
            own, first = group["decoder_segment_ids"][row], {}
            for segment in range(1, own.max() + 1):
                (number,) = set(numbers[own == segment])
                inputs = group["encoder_input_tokens"][row]
                begins = inputs[group["encoder_segment_ids"][row] == segment][0]
                first.setdefault(int(number), []).append(int(begins))
            assert ((numbers > 0) == (own > 0)).all()
            assert sorted(first) == list(range(1, len(first) + 1))
            # examples with both targets come first, so that few numbers cover all pairs of a row
            assert sorted((len(first[n]) for n in sorted(first)), reverse=True) == [
                len(first[n]) for n in sorted(first)
            ]
            found.update((begins[0] - 3) // 2 for begins in first.values())
            assert all(b[0] + 1 == b[1] for b in first.values() if len(b) > 1)
            if not pack and first:
                assert list(first) == [1]
        assert found == collections.Counter(batches.examples(step).indices.tolist())


def test_the_example_ids_of_the_docstring():
    examples = [
        [([20, 5, 1], [7, 1]), ([21, 5, 1], [8, 9, 1])],
        [([20, 6, 1], [7, 1]), ([21, 6, 1], [])],
    ]
    data = task_of(store_of(examples))
    (group,) = Batches(data, 2, 10, 8, seed=0, shuffle=False, pairs=True)(0)
    assert group["decoder_target_tokens"][0].tolist() == [7, 1, 7, 1, 8, 9, 1, 0]
    assert group["decoder_example_ids"][0].tolist() == [2, 2, 1, 1, 1, 1, 1, 0]


def test_rows_that_cannot_hold_a_pair_and_data_without_one_are_refused():
    pair = [([20, 5, 1], [7, 1]), ([21, 5, 1], [8, 9, 1])]
    data = task_of(store_of([pair]))
    assert Batches(data, 1, 3, 3, seed=0, pairs=True).row_lengths == (6, 5)
    with pytest.raises(InputError, match=r"`row_target_length=4`: train of test has .* 5 tokens"):
        Batches(data, 1, 3, 3, seed=0, pairs=True, row_lengths=(6, 4))
    alone = task_of(store_of([[pair[0], ([], [])], [([], []), pair[1]]]))
    with pytest.raises(
        InputError,
        match=r"`extra_loss`: it compares label and rationale, but no example in train of test",
    ):
        Batches(alone, 1, 3, 3, seed=0, pairs=True)
    some = task_of(store_of([pair, *[[pair[0], ([], [])]] * 9]))
    kept = {seed: Batches(some, 1, 3, 3, seed, data_fraction=0.5).examples for seed in range(8)}
    has_pair = {
        seed: 0 in {int(f(step).indices[0]) for step in range(5)} for seed, f in kept.items()
    }
    assert set(has_pair.values()) == {True, False}
    for seed, has in has_pair.items():
        if has:
            Batches(some, 1, 3, 3, seed, data_fraction=0.5, pairs=True)
        else:
            with pytest.raises(InputError, match="compares label and rationale"):
                Batches(some, 1, 3, 3, seed, data_fraction=0.5, pairs=True)


@pytest.mark.parametrize("sampled", [False, True])
def test_rows_of_pairs_hold_the_rationales_of_a_step(sampled):
    """Inputs of 3, a label of 2, rationales of 3 and 5 tokens; a step may draw one rationale."""
    question = [20, 5, 1]
    rationales = [(question, [8] * 2 + [1]), (question, [9] * 4 + [1])]
    store = store_of([[(question, [7, 1]), *rationales]] * 3)
    label, rationale = step_by_step()
    columns = columns_of((label, rationale), 2)
    parts = (Part("part", store, columns, 1.0),)
    data = TaskData("test", "train", (label, rationale), parts, ByteVocabulary(), sampled)
    batches = Batches(data, 3, 3, 5, seed=0, pairs=True)
    assert batches.longest() == batches.row_lengths == ((6, 7) if sampled else (9, 10))
    for step in range(6):
        (group,) = batches(step)
        seen = collections.Counter(
            group["decoder_example_ids"][group["decoder_example_ids"] > 0].tolist()
        )
        assert seen.keys() == {1} and len(group["decoder_example_ids"]) >= 3


@PROPERTY
@given(problems(), st.integers(0, 3))
def test_each_example_comes_once_an_epoch(problem, seed):
    examples, _, _, batch_size = problem
    batches = make(problem, seed=seed)
    drawn = np.concatenate([batches.examples(k).indices for k in range(3 * len(examples))])
    for epoch in range(3 * batch_size):
        part = drawn[epoch * len(examples) : (epoch + 1) * len(examples)]
        assert sorted(part) == list(range(len(examples)))


def test_epochs_and_seeds_have_orders_of_their_own():
    examples = [[([3 + i, 1], [7, 1])] for i in range(50)]

    def order(seed):
        batches = Batches(task_of(store_of(examples)), 50, 8, 8, seed=seed)
        return [tuple(batches.examples(k).indices.tolist()) for k in range(3)]

    assert len({*order(0), *order(1)}) == 6
    assert order(0) == order(0)


@PROPERTY
@given(problems(), st.integers(1, 5), st.sampled_from([1, 4, 6]), FORMS)
def test_a_shard_is_a_block_of_rows_with_its_own_examples(problem, shard, row_multiple, form):
    """Every target token lies in the block of its example's shard, once."""
    examples, weights, lengths, batch_size = problem
    with mock.patch.object(batch_module, "SHARD_EXAMPLES", shard):
        batches = make(problem, seed=3, row_multiple=row_multiple, **form)
        count, whole = batches.num_shards, batches(2)
    assert count == max(1, batch_size // shard)
    drawn, ends = batches.examples(2).indices, [i * batch_size // count for i in range(count + 1)]
    for number in range(count):
        rows = len(whole[0]["encoder_segment_ids"])
        assert rows % count == rows % row_multiple == 0
        block = slice(number * rows // count, (number + 1) * rows // count)
        mine = drawn[ends[number] : ends[number + 1]]
        want = expected([examples[i] for i in mine], [weights[i] for i in mine], lengths)
        got = segments([{name: x[block] for name, x in group.items()} for group in whole])
        assert sorted(got) == sorted(want)


@PROPERTY
@given(
    problems(),
    st.integers(1, 5),
    st.sampled_from([Layout(data=8), Layout(data=2, fsdp=2, tensor=2), Layout(tensor=8)]),
    st.permutations(range(8)),
    st.booleans(),
)
def test_devices_get_their_rows_of_the_whole_batch(problem, shard, layout, order, pack):
    """For any assignment of devices to processes, and for shards that do not divide by devices, too."""
    mesh, processes = make_mesh(layout), (order[:1], order[1:4], order[4:])
    with (
        mock.patch.object(batch_module, "SHARD_EXAMPLES", shard),
        # in a real job, a process makes only the rows of its own devices
        mock.patch.object(jax, "make_array_from_callback", lambda *given: given),
    ):
        batches = make(problem, seed=1, row_multiple=8, pack=pack)
        whole = batches(3)
        every = [batches.shard(3, number) for number in range(batches.num_shards)]
        fullest = max(packed[0].num_rows for packed in every)
        for devices in ([jax.devices()[i] for i in process] for process in processes):
            blocks = blocks_on(mesh, batches.num_shards, devices)
            own = batches.arrays([every[number] for number in blocks], fullest)
            placed = place_rows(own, mesh, blocks=blocks, num_blocks=batches.num_shards)
            for group, want in zip(placed, whole, strict=True):
                for name, (shape, sharding, rows) in group.items():
                    assert shape == want[name].shape
                    of = sharding.devices_indices_map(shape)
                    for device in devices:
                        np.testing.assert_array_equal(rows(of[device]), want[name][of[device]])


def test_placed_rows_are_the_batch_and_lie_on_their_devices():
    batch = Batches(task_of(store_of([[([3, 1], [7, 1])]] * 8)), 8, 4, 4, seed=0, row_multiple=8)(0)
    placed = place_rows(batch, make_mesh(Layout(data=2, fsdp=2, tensor=2)))
    for group, expected in zip(placed, batch, strict=True):
        for name, value in group.items():
            np.testing.assert_array_equal(value, expected[name])
            rows = len(expected[name]) // 4  # the two devices of a tensor pair have the same rows
            assert {s.data.shape[0] for s in value.addressable_shards} == {rows}


@PROPERTY
@given(problems(), st.integers(1, 40))
def test_a_batch_does_not_depend_on_those_asked_for_before(problem, step):
    fresh = make(problem, seed=2)(step)
    used = make(problem, seed=2)
    for k in (step + 7, 0, step - 1):
        used(k)
    for a, b in zip(fresh, used(step), strict=True):
        for name in a:
            np.testing.assert_array_equal(a[name], b[name])


@PROPERTY
@given(problems(), st.sampled_from([1, 3, 8]), st.booleans())
def test_rows_have_one_of_at_most_four_counts(problem, row_multiple, pairs):
    batches = make(problem, seed=4, row_multiple=row_multiple, pairs=pairs)
    assert 1 <= len(batches.row_counts) <= 4
    assert all(count % row_multiple == 0 for count in batches.row_counts)
    for step in range(10):
        (group,) = batches(step)
        assert len(group["encoder_segment_ids"]) in batches.row_counts


def test_row_counts_do_not_depend_on_seed_or_fraction():
    rng = np.random.default_rng(0)
    examples = [[([3] * n + [1], [4] * m + [1])] for n, m in rng.integers(1, 20, (100, 2))]
    data = task_of(store_of(examples))
    counts = {
        Batches(data, 16, 32, 32, seed=seed, data_fraction=fraction).row_counts
        for seed in range(3)
        for fraction in (0.16, 0.5, 1.0)
    }
    assert len(counts) == 1
    # 8 examples: a batch of 16 may take one three times
    few = Batches(data, 16, 32, 32, seed=0, data_fraction=0.08)
    assert few.row_counts[:-1] == counts.pop()[:-1]
    assert all(len(few(step)[0]["encoder_segment_ids"]) in few.row_counts for step in range(9))


def test_few_rows_are_empty():
    # CQA's lengths: 80 +- 15 input tokens, labels of 2 to 4, rationales of 40 +- 12
    rng = np.random.default_rng(0)
    ids = [[3] * int(n) + [1] for n in rng.normal(80, 15, 2000).clip(20)]
    labels = [[4] * int(n) + [1] for n in rng.integers(1, 4, 2000)]
    rationales = [[5] * int(n) + [1] for n in rng.normal(40, 12, 2000).clip(5)]
    examples = [[(i, a), (i, r)] for i, a, r in zip(ids, labels, rationales, strict=True)]
    batches = Batches(task_of(store_of(examples)), 64, 512, 144, seed=0)
    fills = [np.mean(batches(k)[0]["encoder_segment_ids"] > 0) for k in range(30)]
    assert np.mean(fills) > 0.85  # measured: 0.91


@PROPERTY
@given(problems())
def test_without_packing_row_i_is_example_i(problem):
    examples, _, lengths, batch_size = problem
    batches = make(problem, seed=3, pack=False)
    drawn = batches.examples(2).indices
    groups = batches(2)
    assert len(groups) == 2
    for objective, group in enumerate(groups):
        longest = [
            max([min(len(e[objective][side]), lengths[side]) for e in examples] + [1])
            for side in (0, 1)
        ]
        assert group["encoder_input_tokens"].shape == (batch_size, longest[0])
        assert group["decoder_target_tokens"].shape == (batch_size, longest[1])
        for row, i in enumerate(drawn):
            inputs, targets = examples[i][objective]
            got = group["decoder_target_tokens"][row]
            assert tuple(got[got > 0]) == cut(targets, lengths[1])
            got = group["encoder_input_tokens"][row]
            assert tuple(got[got > 0]) == (cut(inputs, lengths[0]) if targets else ())


def test_a_smaller_fraction_is_a_subset_of_a_larger():
    examples = [[([3, 1], [7, 1])] for _ in range(80)]
    used = []
    for fraction in (0.125, 0.25, 0.5, 1.0):
        batches = Batches(task_of(store_of(examples)), 10, 8, 8, seed=1, data_fraction=fraction)
        assert batches.num_examples == 80 * fraction
        drawn = [batches.examples(k).indices for k in range(batches.num_steps)]
        used.append(set(np.concatenate(drawn)[: batches.num_examples].tolist()))
    assert used[0] < used[1] < used[2] < used[3]
    assert len(used[0]) == 10


def test_the_seed_decides_which_examples_a_fraction_keeps():
    """So runs of one fraction with several seeds also measure the choice of examples."""
    examples = [[([3 + i, 1], [7, 1])] for i in range(80)]

    def kept(seed):
        data = task_of(store_of(examples))
        batches = Batches(data, 10, 8, 8, seed=seed, data_fraction=0.25)
        return {s[0][0] - 3 for k in range(2) for s in segments(batches(k))}

    chosen = [kept(seed) for seed in range(3)]
    assert [len(k) for k in chosen] == [20] * 3
    assert chosen[0] == kept(0)
    # 20 of 80 drawn twice have 5 in common on average
    common = [len(a & b) for a, b in itertools.combinations(chosen, 2)]
    assert max(common) < 15, common


@pytest.mark.parametrize("pack", [True, False])
def test_evaluation_reads_each_example_once_in_order(pack):
    examples = [[([3 + i, 1], [7, 1])] for i in range(11)]
    batches = Batches(
        task_of(store_of(examples)), 4, 8, 8, seed=0, shuffle=False, pack=pack, row_multiple=2
    )
    assert batches.num_steps == 3
    drawn = [batches.examples(k).indices.tolist() for k in range(3)]
    assert drawn == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10]]
    read = [s[0][0] - 3 for k in range(3) for s in sorted(segments(batches(k)))]
    assert read == list(range(11))


@pytest.mark.parametrize("rates", [(1.0, 3.0), (0.001, 0.999), (1, 10**-9)])
def test_a_mixture_keeps_its_rates_and_reads_each_store_by_epochs(rates):
    sizes = (7, 100)
    stores = [store_of([[([3 + i, 1], [7, 1])] for i in range(n)]) for n in sizes]
    batches = Batches(
        task_of(*stores, rates=rates, objectives=(Objective("label", "{input}", "{label}"),)),
        1000,
        8,
        8,
        seed=0,
    )
    steps = [batches.examples(k) for k in range(2 * MIXTURE_BLOCK // 1000 + 1)]
    stores_drawn = np.concatenate([s.stores for s in steps])[: 2 * MIXTURE_BLOCK]
    indices = np.concatenate([s.indices for s in steps])[: 2 * MIXTURE_BLOCK]
    for block in (stores_drawn[:MIXTURE_BLOCK], stores_drawn[MIXTURE_BLOCK:]):
        share = np.mean(block == 0)
        assert abs(share - rates[0] / sum(rates)) <= 1 / MIXTURE_BLOCK + 1e-12
    for store, size in enumerate(sizes):
        mine = indices[stores_drawn == store]
        for epoch in range(len(mine) // size):
            assert sorted(mine[epoch * size : (epoch + 1) * size]) == list(range(size))
    again = Batches(batches.data, 1000, 8, 8, seed=0).examples(70)
    np.testing.assert_array_equal(again.indices, steps[70].indices)


@PROPERTY
@given(problems())
def test_cut_rows_are_counted(problem):
    examples, _, lengths, _ = problem
    counted = make(problem, seed=0).cut_counts()
    for objective, name in enumerate(("label", "rationale")):
        rows = [e[objective] for e in examples if e[objective][1]]
        assert counted[name] == {
            "inputs": sum(len(i) > lengths[0] for i, _ in rows),
            "targets": sum(len(t) > lengths[1] for _, t in rows),
        }


def test_a_row_without_an_end_of_sequence_is_cut_without_one():
    (group,) = Batches(task_of(store_of([[([3, 4, 5, 6], [7, 8, 9, 1])]])), 1, 3, 3, seed=0)(0)
    assert group["encoder_input_tokens"][0].tolist() == [3, 4, 5]
    assert group["decoder_target_tokens"][0].tolist() == [7, 8, 1]


def test_examples_without_any_target_are_never_drawn():
    examples = [[([3 + i, 1], [7, 1] if i % 2 else [])] for i in range(6)]
    batches = Batches(task_of(store_of(examples)), 3, 8, 8, seed=0)
    assert batches.num_examples == 3
    assert sorted(batches.examples(0).indices) == [1, 3, 5]
    with pytest.raises(InputError, match="no example with a target"):
        Batches(task_of(store_of(examples[:1])), 3, 8, 8, seed=0)


MODEL = T5Config(
    vocab_size=128, emb_dim=16, num_heads=2, head_dim=8, mlp_dim=32,
    num_encoder_layers=2, num_decoder_layers=2, dropout_rate=0.0,
)  # fmt: skip


@pytest.fixture(scope="module")
def six_segments(params):
    """(a packed row of six segments, gradient of each segment's logits in the embedding)."""
    examples = [
        [([20 + i, 40 + i, 1], [60 + i, 80 + i, 1]), ([30 + i, 50 + i, 1], [70 + i, 90 + i, 1])]
        for i in range(3)
    ]
    (group,) = Batches(task_of(store_of(examples)), 3, 18, 18, seed=0)(0)
    batch = {name: jnp.asarray(value[:1]) for name, value in group.items()}
    assert int(batch["encoder_segment_ids"].max()) == 6
    # each position has a different id, so that each embedding row belongs to one position
    ids = jnp.arange(18)[None] + 3
    batch |= {"encoder_input_tokens": ids, "decoder_input_tokens": ids + 18}

    def segment_logits(embedder, segment):
        logits = EncoderDecoder(MODEL).apply(
            {"params": {**params, "token_embedder": embedder}}, batch
        )
        mine = (batch["decoder_segment_ids"] == segment)[..., None]
        noise = jax.random.normal(jax.random.key(1), logits.shape)  # a plain sum could cancel
        return jnp.sum(jnp.where(mine, logits * noise, 0.0))

    gradient = jax.jit(jax.grad(segment_logits))
    return batch, [np.asarray(gradient(params["token_embedder"], s)) for s in range(1, 7)]


@pytest.mark.parametrize("side", ["encoder", "decoder"])
def test_no_gradient_crosses_a_segment(six_segments, side):
    batch, gradients = six_segments
    for segment, gradient in enumerate(gradients, 1):
        reach = np.abs(gradient[batch[f"{side}_input_tokens"][0]]).max(axis=-1)
        own = np.asarray(batch[f"{side}_segment_ids"][0] == segment)
        assert own.sum() == 3
        assert (reach[~own] == 0).all() and (reach[own] > 0).all()
