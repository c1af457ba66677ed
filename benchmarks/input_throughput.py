"""Compares rows per second of input: batches from a token store, plain SeqIO, plain SentencePiece.

    python benchmarks/input_throughput.py --json

All read the same examples of a prepared dataset, each with a label row and a rationale row. `ours` draws
shuffled, packed batches from tokens on disk. SeqIO tokenises in TensorFlow, without shuffling and without
its memory cache, and packs with its `EncDecFeatureConverter`. SentencePiece encodes lists of strings, which
NumPy pads to the longest; it neither shuffles nor packs. `ours` uses one thread, and the peers use all
threads that they are given. Each runs in its own process, and they take turns.

`building` is the number of rows per second at which a new token store is made: `as_they_stand` if the
labels and rationales of a prepared dataset are used unchanged, `through_seqio` if some are selected. `cores`
is the mean number of busy cores.
"""

import argparse
import contextlib
import itertools
import pathlib
import tempfile
import time
from collections.abc import Callable, Iterator

import timing
from apart import Apart


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--split", default="train", help="split of the dataset")
    parser.add_argument("--batch-size", type=int, default=64, help="examples per step")
    parser.add_argument("--seconds", type=float, default=2.0, help="least seconds of a timed turn")
    parser.add_argument("--input-length", type=int, help="input tokens of a packed row")
    parser.add_argument("--target-length", type=int, help="target tokens of a packed row")


class Stream:
    """Draws batches, epoch after epoch, for some seconds.

    `make` is one of the functions below; it returns an iterator over the batches' numbers of rows.
    """

    def __init__(self, make: Callable[..., Callable[[], Iterator[int]]], args: argparse.Namespace):
        self._stream, self._seconds = make(args), args.seconds

    def contender(self, number: int) -> Callable[[], int]:
        streams = (self._stream() for _ in itertools.count())
        batches = itertools.chain.from_iterable(streams)
        next(batches)  # exclude the start: a run has thousands of steps

        def work() -> int:
            done, end = 0, time.perf_counter() + self._seconds
            while time.perf_counter() < end:
                done += next(batches)
            return done

        return work


def packed_rows(batch) -> int:
    """Returns the number of rows before packing."""
    return int(batch["encoder_segment_ids"].max(axis=1).sum())


def our_batches(args):
    from stepdistill_jax.batches.batch import Batches
    from stepdistill_jax.tasks.load import load_task

    data = load_task(args.task, split=args.split, data_dir=args.data_dir)
    return Batches(data, args.batch_size, args.input_length, args.target_length, seed=0)


def our_stream(args) -> Callable[[], Iterator[int]]:
    batches = our_batches(args)
    return lambda: (packed_rows(batches(step)[0]) for step in itertools.count())


def seqio_stream(args) -> Callable[[], Iterator[int]]:
    import seqio

    from stepdistill_jax.data.prepared import open_prepared
    from stepdistill_jax.tasks.registry import add_task

    dataset, batch_rows = open_prepared(args.task, args.data_dir), our_batches(args).row_counts[0]
    mixture = add_task(
        "benchmark",
        source=seqio.TfdsDataSource(
            f"{dataset.name}:1.0.0",
            tfds_data_dir=str(dataset.directory.parent),
            splits=list(dataset.splits),
        ),
        vocabulary=dataset.spiece_model,
    )
    lengths = {"inputs": args.input_length, "targets": args.target_length}
    rows = mixture.get_dataset(
        lengths, args.split, shuffle=False, num_epochs=None, try_in_mem_cache=False
    )
    packed = seqio.EncDecFeatureConverter(pack=True)(rows, lengths)
    packed = packed.batch(batch_rows, drop_remainder=True).prefetch(2)
    return lambda: map(packed_rows, packed.as_numpy_iterator())


def sentencepiece_stream(args) -> Callable[[], Iterator[int]]:
    import numpy as np
    import sentencepiece

    from stepdistill_jax.data.prepared import open_prepared

    dataset, objectives = open_prepared(args.task, args.data_dir), our_batches(args).data.objectives
    processor = sentencepiece.SentencePieceProcessor(model_file=str(dataset.spiece_model))
    lengths = (args.input_length, args.target_length)
    fields = [vars(example) for example in dataset.examples(args.split)]
    rows = [o.render(f) for f in fields for o in objectives]
    rows = [row for row in rows if row[1]]
    at_once = args.batch_size * len(objectives)

    def collate(texts: list[str], length: int):
        ids = processor.encode(texts, num_threads=args.threads)
        ids = [[*row[: length - 1], 1] for row in ids]
        padded = np.zeros((len(ids), max(map(len, ids))), np.int32)
        for i, row in enumerate(ids):
            padded[i, : len(row)] = row
        return padded

    def stream() -> Iterator[int]:
        for start in range(0, len(rows), at_once):
            sides = zip(*rows[start : start + at_once], strict=True)
            inputs, _ = (collate(list(t), n) for t, n in zip(sides, lengths, strict=True))
            yield len(inputs)

    return stream


def building(args, dataset) -> dict[str, dict[str, float]]:
    """Returns the rows per second for both ways of making a token store."""
    from stepdistill_jax.tasks.load import load_task
    from stepdistill_jax.tasks.supervision import Supervision

    found = {}
    for name, supervision in (
        ("as_they_stand", Supervision()),
        ("through_seqio", Supervision("gold_else_llm")),
    ):
        with tempfile.TemporaryDirectory() as scratch:
            (pathlib.Path(scratch) / dataset.name).symlink_to(dataset.directory.absolute())
            wall, cpu = time.perf_counter(), time.process_time()
            data = load_task(args.task, split=args.split, data_dir=scratch, supervision=supervision)
            wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
            rows = sum(int((r["targets"].lengths > 0).sum()) for r in data.stores[0].rows)
            found[name] = {
                "rows_per_second": round(rows / wall, 1),
                "cores": round(cpu / wall, 2),
            }
    return found


def main() -> None:
    args = timing.start(__doc__.splitlines()[0], add_arguments, rounds=3)
    from stepdistill_jax.data.prepare import ensure_prepared

    dataset = ensure_prepared(args.task, args.data_dir)
    timing.fill_in_lengths(args)
    makers = {
        "ours": our_stream,
        "seqio": seqio_stream,
        "sentencepiece": sentencepiece_stream,
    }
    with contextlib.ExitStack() as closing:
        apart = {
            name: closing.enter_context(Apart(Stream, make, args)) for name, make in makers.items()
        }
        rates = timing.alternate({n: one.contender for n, one in apart.items()}, args.rounds)
    timing.report(
        args,
        rates,
        unit="rows_per_second",
        examples=our_batches(args).num_examples,
        building=building(args, dataset),
    )


if __name__ == "__main__":
    timing.run(main)
