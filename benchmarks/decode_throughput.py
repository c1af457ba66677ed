"""Compares rows per second of label decoding: our engines, transformers' `generate`, CTranslate2.

    python benchmarks/decode_throughput.py --size small --vocab-size 32128 --json

All use the same random float32 weights, from a directory in Hugging Face's layout, and the same prompts of a
split's label objective. Random weights never end an answer, so the output row of the end of sequence is
scaled up until some answers end. All form batches of similar length, the longest first; the peer's batches
are padded only to their longest row, without padding rows. All labels must be equal. Each contender runs in
its own process (benchmarks/apart.py), and they take turns.

`ours` and `transformers` turn ids into ids. `ours_ctranslate2` is `predict` on a directory of
`export --format ctranslate2`, and `ctranslate2` is the plain script that a user would write. Both turn a
file of JSON lines into another, including the model's start, with one single-threaded worker per core. The
`_int8` contenders have int8 weights. CTranslate2's contenders run only for the T5 families.
"""

import argparse
import contextlib
import json
import os
import pathlib
import statistics
import tempfile
from collections.abc import Callable
from typing import Any

import timing
from apart import TORCH, Apart


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--split", default="test", help="split of the dataset")
    parser.add_argument(
        "--family", default="t5_v1_1", help="family of the model: t5_v1_1, t5gemma, ..."
    )
    parser.add_argument("--size", default="small", help="size of the model: tiny, small, base, ...")
    parser.add_argument(
        "--vocab-size", type=int, help="rows of the embedding; default: the vocabulary's size"
    )
    parser.add_argument("--rows", type=int, default=256, help="largest number of prompts")
    parser.add_argument("--batch-size", type=int, default=64, help="rows decoded at once")
    parser.add_argument(
        "--max-decode-len", type=int, default=8, help="largest number of tokens in a label"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of the weights")


def our_decoder(directory: str, args: argparse.Namespace, rows: list[list[int]]):
    """Returns a function that decodes the rows with our engine and returns the answers' ids."""
    from stepdistill_jax.decoding.greedy import LabelDecoder
    from stepdistill_jax.inference.model import load_model

    model = load_model(directory)
    decoder = LabelDecoder(
        model.config, max_decode_len=args.max_decode_len, batch_size=args.batch_size
    )
    return lambda: decoder(model.params, rows).ids


def peer_decoder(directory: str, args: argparse.Namespace, rows: list[list[int]]):
    """Returns a function that decodes the rows with transformers and returns the answers' ids."""
    torch = timing.peer_module("torch", args.threads)
    transformers = timing.peer_module("transformers")
    transformers.logging.set_verbosity_error()
    model = transformers.AutoModelForSeq2SeqLM.from_pretrained(directory).eval()
    # transformers 5 ties the output layer if it can, which would be another model
    own_head = model.get_output_embeddings().weight is not model.get_decoder().embed_tokens.weight
    # read from the file, since transformers sets its own field for a T5
    stated = json.loads((pathlib.Path(directory) / "config.json").read_text())
    assert own_head is not stated["tie_word_embeddings"]
    pad, end = model.config.pad_token_id, model.config.eos_token_id
    order = sorted(range(len(rows)), key=lambda i: -len(rows[i]))

    def decode() -> list[list[int]]:
        answers: list[list[int]] = [[] for _ in rows]
        for start in range(0, len(order), args.batch_size):
            places = order[start : start + args.batch_size]
            inputs = torch.full((len(places), len(rows[places[0]])), pad)
            for i, place in enumerate(places):
                inputs[i, : len(rows[place])] = torch.tensor(rows[place])
            with torch.inference_mode():
                outputs = model.generate(
                    inputs,
                    attention_mask=(inputs != pad).long(),
                    do_sample=False,
                    num_beams=1,
                    max_new_tokens=args.max_decode_len,
                )
            for place, answer in zip(places, outputs[:, 1:].tolist(), strict=True):
                answers[place] = answer[: answer.index(end) + 1] if end in answer else answer
        return answers

    return decode


def our_predict(directory: str, args: argparse.Namespace, source: pathlib.Path):
    """Returns a function that runs `predict` from file to file and returns its labels."""
    from stepdistill_jax.inference import predict

    def decode() -> list[str]:
        out = source.with_name("ours.jsonl")
        batch_size = args.batch_size * args.threads  # for all workers together
        settings = {"max_decode_len": args.max_decode_len, "batch_size": batch_size}
        predict(directory, source, out, engine="ctranslate2", **settings)
        return [json.loads(line)["label"] for line in out.read_text().splitlines()]

    return decode


def peer_predict(directory: str, args: argparse.Namespace, source: pathlib.Path):
    """Returns a function that does the same with only CTranslate2 and SentencePiece."""
    import sentencepiece

    ctranslate2 = timing.peer_module("ctranslate2")
    processor = sentencepiece.SentencePieceProcessor(model_file=f"{directory}/spiece.model")

    def decode() -> list[str]:
        translator = ctranslate2.Translator(
            directory, device="cpu", inter_threads=args.threads, intra_threads=1
        )
        rows = [json.loads(line) for line in source.read_text().splitlines()]
        prompts = processor.encode(["predict: " + row["input"] for row in rows], out_type=str)
        results = translator.translate_batch(
            [[*tokens, "</s>"] for tokens in prompts],
            max_batch_size=args.batch_size,
            beam_size=1,
            max_input_length=0,
            min_decoding_length=0,
            max_decoding_length=args.max_decode_len,
            length_penalty=0,
            return_scores=True,
        )
        size = processor.get_piece_size()
        labels = []
        with open(source.with_name("peer.jsonl"), "w") as f:
            for number, result in enumerate(results, 1):
                ids = processor.piece_to_id(result.hypotheses[0])
                # a name that is not a piece has the unknown id
                pieces = zip(ids, result.hypotheses[0], strict=True)
                known = [
                    i for i, name in pieces if 0 < i < size and processor.id_to_piece(i) == name
                ]
                labels.append(processor.decode(known))
                answer = {"id": str(number), "label": labels[-1], "score": result.scores[0]}
                f.write(json.dumps(answer) + "\n")
            os.fsync(f.fileno())
        return labels

    return decode


def compare_labels(labels: dict[str, list[str]]) -> dict[str, str]:
    """Returns how many labels of each engine equal `ours`; all float32 labels must be equal."""
    equal = {}
    for name, answers in labels.items():
        same = sum(a == b for a, b in zip(answers, labels["ours"], strict=True))
        if not name.endswith("int8"):
            assert same == len(answers), f"{name}: {len(answers) - same} labels differ"
        equal[name] = f"{same} of {len(answers)}"
    return equal


class Decoder:
    """A contender; `make` is one of the functions above."""

    def __init__(self, make: Callable[..., Callable[[], list]], *args: Any):
        self._decode = make(*args)

    def answers(self) -> list:
        return self._decode()

    def contender(self, number: int) -> Callable[[], int]:
        return lambda: len(self._decode())


def main() -> None:
    args = timing.start(__doc__.splitlines()[0], add_arguments, rounds=3)
    timing.peer_module("torch")
    from models import save_random_model

    from stepdistill_jax.data.prepared import open_prepared
    from stepdistill_jax.inference import export
    from stepdistill_jax.models.t5 import T5_FAMILIES
    from stepdistill_jax.tasks.load import load_task

    quantizations = {}
    if args.family in T5_FAMILIES:  # we export no other family to CTranslate2
        timing.peer_module("ctranslate2")
        quantizations = {"": "float32", "_int8": "int8"}

    data = load_task(args.task, split=args.split, data_dir=args.data_dir)
    prompts = data.stores[0].rows[0]["inputs"]
    rows = [prompts[i].tolist() for i in range(min(args.rows, len(prompts)))]
    with contextlib.ExitStack() as closing:
        scratch = closing.enter_context(tempfile.TemporaryDirectory())
        directory = f"{scratch}/model"
        vocab_size = max(data.vocab_size, args.vocab_size or 0)
        settings = {"family": args.family, "size": args.size, "seed": args.seed}
        save_random_model(directory, data.vocabulary, vocab_size=vocab_size, **settings)
        makers: dict[str, tuple] = {
            "ours": (our_decoder, directory, args, rows),
            "transformers": (peer_decoder, directory, args, rows),
        }
        source = pathlib.Path(scratch) / "in.jsonl"
        lines = open_prepared(args.task, args.data_dir).file(args.split).read_text().splitlines()
        source.write_text("".join(line + "\n" for line in lines[: len(rows)]))
        for suffix, quantization in quantizations.items():
            converted = f"{scratch}/{quantization}"
            export(directory, converted, format="ctranslate2", quantization=quantization)
            makers[f"ours_ctranslate2{suffix}"] = (our_predict, converted, args, source)
            makers[f"ctranslate2{suffix}"] = (peer_predict, converted, args, source)
        apart = {
            name: closing.enter_context(
                Apart(Decoder, *make, environment=TORCH if name == "transformers" else None)
            )
            for name, make in makers.items()
        }
        answers = {name: one.call("answers") for name, one in apart.items()}
        ours = answers["ours"]
        assert answers["transformers"] == ours, "transformers answers with different ids"
        for name in ("ours", "transformers"):
            answers[name] = list(map(data.vocabulary.decode, answers[name]))
        equal = compare_labels(answers)
        rates = timing.alternate({n: one.contender for n, one in apart.items()}, args.rounds)
    pairs = [
        ("ours_ctranslate2", "ctranslate2"),
        ("ours_ctranslate2_int8", "ctranslate2_int8"),
        ("ours_ctranslate2", "transformers"),
        ("ours_ctranslate2_int8", "transformers"),
    ]
    timing.report(
        args,
        rates,
        unit="rows_per_second",
        environments={name: one.environment for name, one in apart.items()},
        equal_labels=equal,
        ended=sum(row[-1] == 1 for row in ours),
        tokens=sum(map(len, ours)),
        further_ratios={
            f"{a} / {b}": round(statistics.median(timing.in_pairs(rates[a], rates[b])), 3)
            for a, b in pairs
            if a in rates
        },
    )


if __name__ == "__main__":
    timing.run(main)
