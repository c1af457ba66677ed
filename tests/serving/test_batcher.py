"""How rows are gathered: batches of like length, no row lost, none held up, one bad row alone."""

import asyncio
import collections
import contextlib
import queue
import threading

import hypothesis
import pytest
from hypothesis import strategies as st

from stepdistill_jax.errors import InputError
from stepdistill_jax.serving.batcher import Batcher, QueueFull, lane_length

SHORT, LONG = [5] * 10, [5] * 200


class Engine:
    """Gives each row back as its answer; a held one decodes a batch when `go` is called."""

    def __init__(self, held=False, fails=lambda rows: None):
        self.batches, self._fails = [], fails
        self._began, self._go = queue.Queue(), threading.Semaphore(0)
        self._held = held

    def __call__(self, rows):
        self.batches.append([list(row) for row in rows])
        self._began.put(None)
        if self._held:
            assert self._go.acquire(timeout=20)
        self._fails(rows)
        return [tuple(row) for row in rows]

    async def begun(self):
        """Waits until it is at work on one batch more."""
        await asyncio.to_thread(self._began.get, timeout=20)

    def go(self, batches=1):
        self._go.release(batches)


@contextlib.asynccontextmanager
async def running(engine, *, batch_size=8, max_wait_secs=0.001, max_queue=1000):
    told = []
    batcher = Batcher(
        engine,
        batch_size=batch_size,
        max_wait_secs=max_wait_secs,
        max_queue=max_queue,
        on_batch=lambda rows, seconds: told.append((rows, seconds)),
    )
    batcher.told = told
    task = asyncio.create_task(batcher.run())
    try:
        yield batcher
    finally:
        engine.go(1000)
        task.cancel()
        batcher.close()


def test_lanes_are_few_and_a_row_is_not_much_shorter_than_its_lane():
    lanes = [lane_length(length) for length in range(1, 1025)]
    assert sorted(set(lanes)) == [32, 64, 96, 128, 192, 256, 384, 512, 768, 1024]
    for length, lane in enumerate(lanes, 1):
        assert length <= lane < 2 * max(length, 32)


def test_rows_that_come_while_a_batch_runs_are_the_next_one():
    async def main():
        engine = Engine(held=True)
        async with running(engine) as batcher:
            first = batcher.submit([[9]])
            await engine.begun()
            others = [batcher.submit([[i, i]])[0] for i in range(20)]
            engine.go(4)
            assert await asyncio.gather(*first, *others) == [(9,), *((i, i) for i in range(20))]
        assert list(map(len, engine.batches)) == [1, 8, 8, 4]
        assert [rows for rows, _ in batcher.told] == [1, 8, 8, 4]
        assert all(seconds > 0 for _, seconds in batcher.told)

    asyncio.run(main())


def test_a_row_alone_waits_for_others_and_a_full_batch_for_nobody():
    async def main():
        engine = Engine()
        async with running(engine, batch_size=3, max_wait_secs=1000) as batcher:
            waits = batcher.submit([[1], [2]])
            await asyncio.sleep(0.05)
            assert engine.batches == []
            assert await asyncio.gather(*waits, *batcher.submit([[3]])) == [(1,), (2,), (3,)]
        async with running(engine, batch_size=3, max_wait_secs=0.01) as batcher:
            assert await batcher.submit([[4]])[0] == (4,)

    asyncio.run(main())


def test_a_short_row_among_hundreds_of_long_ones_waits_for_the_batch_that_runs_alone():
    async def main():
        engine = Engine(held=True)
        async with running(engine) as batcher:
            batcher.submit([LONG] * 300)
            for _ in range(3):
                await engine.begun()
                engine.go()
            await engine.begun()  # the fourth runs
            (short,) = batcher.submit([SHORT])
            engine.go(2)
            assert await short == tuple(SHORT)
        lengths = [len(batch[0]) for batch in engine.batches]
        assert lengths[:5] == [200, 200, 200, 200, 10]

    asyncio.run(main())


def test_long_rows_go_on_beside_an_endless_stream_of_short_ones():
    async def main():
        engine = Engine(held=True)
        async with running(engine) as batcher:
            batcher.submit([SHORT] * 800)
            await engine.begun()
            (long,) = batcher.submit([LONG])
            engine.go(3)
            assert await long == tuple(LONG)

    asyncio.run(main())


def test_a_pause_gives_no_lane_a_claim_to_the_engine():
    """After ten long batches short rows come: they alternate with the long ones, and do not all go first."""

    async def main():
        engine = Engine(held=True)
        async with running(engine) as batcher:
            decoded = batcher._decoded

            async def in_a_second(rows):
                return (await decoded(rows))[0], 1.0

            batcher._decoded = in_a_second
            batcher.submit([LONG] * 160)
            engine.go(10)
            for _ in range(11):
                await engine.begun()
            batcher.submit([SHORT] * 80)
            engine.go(11)
            for _ in range(10):
                await engine.begun()
        assert [len(batch[0]) for batch in engine.batches[11:21]] == [10, 200] * 5

    asyncio.run(main())


def test_who_gives_up_leaves_the_queue_and_is_not_decoded():
    async def main():
        engine = Engine(held=True)
        async with running(engine) as batcher:
            running_one = batcher.submit([[1]])[0]
            await engine.begun()
            gone, stays = batcher.submit([[2], [3]])
            running_one.cancel()
            gone.cancel()
            await asyncio.sleep(0)
            assert batcher.rows == 1
            engine.go(2)
            assert await stays == (3,)
            await asyncio.sleep(0)
            assert batcher.rows == 0
        assert engine.batches == [[[1]], [[3]]]

    asyncio.run(main())


@hypothesis.given(st.lists(st.sampled_from([None, 0, 1, 2]), min_size=1, max_size=12))
@hypothesis.example([0, None, None, None])
@hypothesis.example([None, 1, None, None, 1, None])
def test_a_client_that_leaves_while_a_batch_runs_shifts_no_answer(leaves):
    """Client i leaves during batch `leaves[i]`, which may be its own or another."""

    async def main():
        engine, number = Engine(held=True), 0
        async with running(engine, batch_size=4) as batcher:
            answers = batcher.submit([[i] for i in range(len(leaves))])
            while not all(answer.done() for answer in answers):
                await engine.begun()
                for answer, leaves_in in zip(answers, leaves, strict=True):
                    if leaves_in == number:
                        answer.cancel()
                engine.go()
                number += 1
                while len(batcher.told) < number:
                    await asyncio.sleep(0)
                for (i,) in engine.batches[number - 1]:
                    assert answers[i].cancelled() or answers[i].result() == (i,)
        stay = {i for i, leaves_in in enumerate(leaves) if leaves_in is None}
        assert stay <= {i for i, answer in enumerate(answers) if not answer.cancelled()}

    asyncio.run(main())


def test_a_full_queue_takes_all_rows_of_a_request_or_none():
    async def main():
        engine = Engine(held=True)
        async with running(engine, max_queue=10) as batcher:
            first = batcher.submit([[1]] * 8)
            with pytest.raises(QueueFull):
                batcher.submit([[2]] * 3)
            assert batcher.rows == 8
            second = batcher.submit([[3]] * 2)
            engine.go(5)
            await asyncio.gather(*first, *second)
            await asyncio.sleep(0)
            assert batcher.rows == 0
            engine.go(5)
            assert len(await asyncio.gather(*batcher.submit([[4]] * 10))) == 10

    asyncio.run(main())


def test_a_row_that_cannot_be_asked_fails_alone():
    def fails(rows):
        if [66] in rows:
            raise InputError("66 cannot be asked")

    async def main():
        async with running(Engine(fails=fails)) as batcher:
            good, bad, better = await asyncio.gather(*batcher.submit([[1], [66], [2]]))
            assert (good, better) == ((1,), (2,))
            assert isinstance(bad, InputError) and "66" in str(bad)

    asyncio.run(main())


def test_an_engine_that_fails_is_the_answer_and_the_next_batch_is_tried(capsys):
    def fails(rows):
        if [66] in rows:
            raise RuntimeError("out of memory")

    async def main():
        async with running(Engine(fails=fails)) as batcher:
            answers = await asyncio.gather(*batcher.submit([[1], [66]]))
            assert [type(answer) for answer in answers] == [RuntimeError] * 2
            assert await batcher.submit([[1]])[0] == (1,)

    asyncio.run(main())
    err = capsys.readouterr().err
    assert "a batch of 2 rows failed" in err and "Traceback" in err and "out of memory" in err


@hypothesis.given(
    requests=st.lists(
        st.tuples(
            st.lists(st.integers(1, 300), min_size=1, max_size=9),  # lengths
            st.sampled_from(["wait", "give up", "pause"]),
        ),
        max_size=25,
    ),
    batch_size=st.integers(1, 9),
)
def test_every_row_has_its_own_answer_in_batches_of_like_length_in_order(requests, batch_size):
    async def main():
        engine = Engine()
        number, kept, given_up = 2, {}, set()
        async with running(engine, batch_size=batch_size, max_queue=10_000) as batcher:
            for lengths, then in requests:
                rows = []
                for length in lengths:
                    rows.append([number] * length)
                    number += 1
                for row, answer in zip(rows, batcher.submit(rows), strict=True):
                    if then == "give up":
                        answer.cancel()
                        given_up.add(row[0])
                    else:
                        kept[row[0]] = (row, answer)
                await asyncio.sleep(0.002 if then == "pause" else 0)
            async with asyncio.timeout(20):
                for row, answer in kept.values():
                    assert await answer == tuple(row)
            await asyncio.sleep(0)
            assert batcher.rows == 0
        seen = collections.defaultdict(list)
        for batch in engine.batches:
            assert 1 <= len(batch) <= batch_size
            (bucket,) = {lane_length(len(row)) for row in batch}
            seen[bucket] += [row[0] for row in batch]
        for numbers in seen.values():
            assert numbers == sorted(numbers)
        assert {n for numbers in seen.values() for n in numbers} - given_up == set(kept)

    asyncio.run(main())
