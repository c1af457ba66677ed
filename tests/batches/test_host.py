"""The batches of several processes, simulated by threads that share a channel."""

import pathlib
import threading
from unittest import mock

import numpy as np
import pytest

from stepdistill_jax.batches import batch as batch_module
from stepdistill_jax.batches import host
from stepdistill_jax.batches.batch import Batches
from stepdistill_jax.batches.host import AGREED_STEPS, iterate
from stepdistill_jax.data.objectives import step_by_step
from stepdistill_jax.data.vocabulary import ByteVocabulary
from stepdistill_jax.tasks.registry import columns_of
from stepdistill_jax.tasks.task_data import Part, TaskData
from stepdistill_jax.tasks.token_store import TokenRows, TokenStore


@pytest.fixture
def small_shards():
    with mock.patch.object(batch_module, "SHARD_EXAMPLES", 4):
        yield


def batches_of(batch_size=19, **changes):
    """Returns batches of 50 examples, three in four with a rationale, by default in four shards."""
    rng, rows = np.random.default_rng(0), []

    def column(least, most, absent=0.0):
        lengths = rng.integers(least, most, 50) * (rng.random(50) >= absent)
        ends = np.cumsum([0, *lengths], dtype=np.int64)
        return TokenRows.of_offsets(rng.integers(3, 90, ends[-1]).astype(np.int32), ends)

    inputs = column(1, 16)
    rows = tuple({"inputs": inputs, "targets": column(1, 9, absent)} for absent in (0.0, 0.25))
    weights = np.ones(50, np.float32)
    store = TokenStore(pathlib.Path("nowhere"), "in memory", ("0", "1"), rows, weights, {})
    objectives = step_by_step()
    parts = (Part("part", store, columns_of(objectives), 1.0),)
    data = TaskData("test", "train", objectives, parts, ByteVocabulary())
    settings = {"seed": 0, "row_multiple": 4, **changes}
    return Batches(data, batch_size, 16, 16, **settings)


def totals(batch):
    """Returns the totals, counted over the cells of a whole batch."""
    ids = [group["decoder_objective_ids"] for group in batch]
    return {
        "shapes": tuple(
            (*g["encoder_segment_ids"].shape, g["decoder_segment_ids"].shape[1]) for g in batch
        ),
        "input_tokens": sum(int((g["encoder_segment_ids"] > 0).sum()) for g in batch),
        "target_tokens": sum(int((g["decoder_segment_ids"] > 0).sum()) for g in batch),
        "objective_tokens": tuple(sum(int((x == n).sum()) for x in ids) for n in (1, 2)),
    }


class Meeting:
    """Channels for `count` threads, which wait for each other like processes."""

    def __init__(self, count):
        self.rounds, self.heard = 0, [None] * count
        self._barrier = threading.Barrier(count)

    def channel(self, number):
        return mock.Mock(combined=lambda value, combine: self._combined(number, value, combine))

    def _combined(self, number, value, combine):
        self.heard[number] = value
        if self._barrier.wait(30) == 0:
            self.rounds, self.said = self.rounds + 1, combine(list(self.heard))
        self._barrier.wait(30)
        return self.said


def on_processes(batches, shards_of, start, stop):
    """Returns the batches of each process, and the number of exchanges."""
    meeting, made = Meeting(len(shards_of)), [[] for _ in shards_of]

    def run(number):
        own = {"shards": shards_of[number], "channel": meeting.channel(number)}
        made[number] += iterate(batches, start, stop, **own)

    threads = [threading.Thread(target=run, args=(i,)) for i in range(len(shards_of))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return made, meeting.rounds


@pytest.mark.parametrize(
    "form", [{}, {"pack": False}, {"pairs": True}], ids=["packed", "padded", "pairs"]
)
@pytest.mark.parametrize(
    "shards_of",
    [[(0, 1, 2, 3)], [(0, 1), (2, 3)], [(0, 1), (1, 2, 3)], [(3,), (1,), (0,), (2,)]],
    ids=["one process", "two", "two share a shard", "four"],
)
def test_processes_make_the_rows_of_one_batch_and_know_what_it_holds(small_shards, shards_of, form):
    batches, start, stop = batches_of(**form), 5, 5 + 2 * AGREED_STEPS + 1
    made, rounds = on_processes(batches, shards_of, start, stop)
    assert rounds == 3
    for process, shards in zip(made, shards_of, strict=True):
        assert len(process) == stop - start
        for step, got in enumerate(process, start):
            whole = batches(step)
            assert {name: getattr(got, name) for name in totals(whole)} == totals(whole)
            assert (got.shards, got.num_shards) == (shards, 4)
            for group, want in zip(got.groups, whole, strict=True):
                for name, array in want.items():
                    blocks = np.split(array, 4)
                    np.testing.assert_array_equal(
                        group[name], np.concatenate([blocks[i] for i in shards])
                    )


def test_the_rows_of_a_step_are_those_that_its_fullest_shard_needs(small_shards):
    """The number of rows differs between steps, and no process knows it alone."""
    batches, (made, _) = batches_of(), on_processes(batches_of(), [(0, 1), (2, 3)], 0, 40)
    found = set()
    for step, (ours, theirs) in enumerate(zip(*made, strict=True)):
        needed = [batches.shard(step, number)[0].num_rows for number in range(4)]
        assert ours.shapes == theirs.shapes
        rows = ours.shapes[0][0]
        assert rows == min(c for c in batches.row_counts if c >= 4 * max(needed))
        found.add((rows, max(needed[:2]) > max(needed[2:])))
    assert len({rows for rows, _ in found}) > 1 and len({first for _, first in found}) == 2


def test_a_single_shard_is_packed_by_all_and_nothing_is_said():
    silent = mock.Mock(combined=mock.Mock(side_effect=AssertionError))
    batches = batches_of()
    got = list(iterate(batches, 5, 12, shards=(0,), channel=silent))
    assert len(got) == 7
    for step, batch in enumerate(got, 5):
        assert {name: getattr(batch, name) for name in totals(batches(step))} == totals(
            batches(step)
        )
        for name, value in batches(step)[0].items():
            np.testing.assert_array_equal(batch.groups[0][name], value)
    assert list(iterate(batches, 5, 5)) == []


def test_a_reader_that_stops_early_ends_the_waiting_for_others(small_shards):
    """A process that has left no longer answers; the threads of its peers must not wait for it."""
    closed = threading.Event()

    def waits(*_):
        assert closed.wait(30)
        raise RuntimeError

    channel = mock.Mock(combined=mock.Mock(side_effect=[[[2, 9, 9, 9, 9]] * 8, waits]))
    channel.close = closed.set
    with mock.patch.object(host, "_of_batches"):
        source = iterate(batches_of(), 0, 40, shards=(0, 1), channel=channel)
        next(source)
        source.close()
    assert closed.is_set()
