"""Compares rows per second of `--choices`, which scores every allowed label, with greedy decoding.

    python benchmarks/choices_throughput.py --task cqa --size small --vocab-size 32128 --json
    python benchmarks/choices_throughput.py --task cqa --model runs/cqa --json

Both use the same model and prompts. The allowed labels are a row's choices, or else the task's labels.
The weights are random, and the answers meaningless, unless `--model` names a workdir or model directory. The
result also has both accuracies and the numbers of invalid answers.
"""

import argparse
import tempfile

import timing


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--split", default="test", help="split of the dataset")
    parser.add_argument("--model", help="workdir or model directory; default: random weights")
    parser.add_argument("--size", default="small", help="size of T5 v1.1, for random weights")
    parser.add_argument(
        "--vocab-size", type=int, help="rows of the embedding; default: the vocabulary's size"
    )
    parser.add_argument("--rows", type=int, default=256, help="largest number of rows of the split")
    parser.add_argument("--batch-size", type=int, default=64, help="rows per batch")
    parser.add_argument(
        "--max-decode-len", type=int, help="most tokens of a greedy answer; default: the model's"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of the weights")


def model_of(args: argparse.Namespace, dataset, scratch: str) -> str:
    from models import save_random_model

    from stepdistill_jax.data.vocabulary import load_vocabulary

    if args.model:
        return args.model
    vocabulary = load_vocabulary(dataset.spiece_model)
    settings = {"size": args.size, "vocab_size": args.vocab_size, "seed": args.seed}
    save_random_model(f"{scratch}/model", vocabulary, **settings)
    return f"{scratch}/model"


def main() -> None:
    args = timing.start(__doc__.splitlines()[0], add_arguments, rounds=3)
    import itertools
    import statistics

    from stepdistill_jax.data.prepare import ensure_prepared
    from stepdistill_jax.data.rows import BadRow
    from stepdistill_jax.errors import InputError
    from stepdistill_jax.inference.accuracy import AccuracyCounts
    from stepdistill_jax.inference.allowed_answers import allow
    from stepdistill_jax.inference.engines import open_engine
    from stepdistill_jax.inference.input_rows import read_questions
    from stepdistill_jax.inference.labels import label_rows
    from stepdistill_jax.inference.options import DecodeOptions
    from stepdistill_jax.inference.prompting import encode_input, prompting_for

    dataset = ensure_prepared(args.task, args.data_dir)
    rows = [
        row
        for row in itertools.islice(read_questions(dataset.file(args.split)), args.rows)
        if not isinstance(row, BadRow)
    ]
    if not rows:
        raise InputError(f"{args.task}: {args.split} has no rows")
    with tempfile.TemporaryDirectory() as scratch:
        decode = DecodeOptions(batch_size=args.batch_size, max_decode_len=args.max_decode_len)
        of_rows = DecodeOptions(choices="row" if rows[0].choices else "labels")
        engine = open_engine(model_of(args, dataset, scratch), decode)
        prompting = prompting_for(engine, decode, task=args.task, data_dir=args.data_dir)
        allowed = allow(of_rows, prompting, engine)
        prompts = [
            encode_input(engine.vocabulary, prompting.prompts(row)[0], prompting.input_length)[0]
            for row in rows
        ]

        def choices():
            return label_rows(engine, prompting, allowed, rows, prompts).answers

        def greedy():
            decoded = engine.decode(prompts, prompting.decode_lengths[0])
            return [{"label": engine.vocabulary.decode(ids)} for ids in decoded.ids]

        found = {}
        for name, answer in (("choices", choices), ("greedy", greedy)):
            counted = AccuracyCounts(prompting.metric, prompting.labels)
            for row, got in zip(rows, answer(), strict=True):
                counted.add(got["label"], row.label, row.choices, got.get("choices"))
            found[name] = counted.summary()

        def contender(answer) -> timing.Contender:
            return lambda number: lambda: len(answer())

        rates = timing.alternate(
            {"ours": contender(choices), "greedy": contender(greedy)}, args.rounds
        )
    counts = [[len(ids) for ids in allowed.ids(row)] for row in rows]
    timing.report(
        args,
        rates,
        unit="rows_per_second",
        accuracy={name: result["accuracy"] for name, result in found.items()},
        invalid_labels={name: result["invalid_labels"] for name, result in found.items()},
        expected_calibration_error=found["choices"]["expected_calibration_error"],
        choices_per_row=round(statistics.mean(map(len, counts)), 2),
        tokens_of_choices_per_row=round(statistics.mean(map(sum, counts)), 2),
    )


if __name__ == "__main__":
    timing.run(main)
