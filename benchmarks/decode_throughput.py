"""Rows per second of label decoding: our `LabelDecoder`, and `generate` of transformers.

    python benchmarks/decode_throughput.py --size small --vocab-size 32128 --json

The same random weights, in float32, through the directory that `stepdistill export` writes; the
same prompts, those of a split's label objective. Random weights never end an answer, so the output
row of the end of sequence is made longer until some do. Both sides go by batches of like length,
the longest first; the peer's are padded to their longest row only and are not filled up. All labels
must be equal.
"""

import argparse
import tempfile

import timing


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--split", default="test", help="of the dataset")
    parser.add_argument("--size", default="small", help="of T5 v1.1: tiny, small, base, ...")
    parser.add_argument("--vocab-size", type=int, help="rows of the embedding; default: the task's")
    parser.add_argument("--rows", type=int, default=256, help="prompts, at most")
    parser.add_argument("--batch-size", type=int, default=64, help="rows decoded at once")
    parser.add_argument("--max-decode-len", type=int, default=8, help="most tokens of a label")
    parser.add_argument("--seed", type=int, default=0, help="of the weights")


def save_random_model(directory: str, args: argparse.Namespace, data) -> None:
    import jax

    from stepdistill_jax.formats.directory import write_model_files
    from stepdistill_jax.formats.hf import save_params
    from stepdistill_jax.models.config import t5_config
    from stepdistill_jax.models.t5 import init_params
    from stepdistill_jax.text.vocabulary import EOS_ID

    config = t5_config("t5_v1_1", args.size, vocab_size=max(data.vocab_size, args.vocab_size or 0))
    params = jax.jit(init_params, static_argnums=0)(config, jax.random.key(args.seed))
    head = params["logits_dense"]["kernel"]  # [emb_dim, vocab_size]
    params["logits_dense"]["kernel"] = head.at[:, EOS_ID].multiply(3.0)
    write_model_files(directory, config, data.vocabulary, None)
    save_params(directory, params, config)


def our_decoder(directory: str, args: argparse.Namespace, rows: list[list[int]]):
    """A function without arguments that gives the answers' ids."""
    from stepdistill_jax.inference.decode import LabelDecoder
    from stepdistill_jax.inference.model import load_model

    model = load_model(directory)
    decoder = LabelDecoder(
        model.config, max_decode_len=args.max_decode_len, batch_size=args.batch_size
    )
    return lambda: decoder(model.params, rows).ids


def peer_decoder(directory: str, args: argparse.Namespace, rows: list[list[int]]):
    """The same with transformers."""
    torch = timing.peer_module("torch", args.threads)
    transformers = timing.peer_module("transformers")
    transformers.logging.set_verbosity_error()
    model = transformers.T5ForConditionalGeneration.from_pretrained(directory).eval()
    assert model.lm_head.weight is not model.shared.weight  # transformers 5 ties where it can
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
                    # transformers 5 makes a cache as deep as the encoder
                    use_cache=model.config.num_decoder_layers <= model.config.num_layers,
                )
            for place, answer in zip(places, outputs[:, 1:].tolist(), strict=True):
                answers[place] = answer[: answer.index(end) + 1] if end in answer else answer
        return answers

    return decode


def contender(decode, count: int) -> timing.Contender:
    def work() -> int:
        decode()
        return count

    return lambda number: work


def main() -> None:
    args = timing.start(__doc__.splitlines()[0], add_arguments, rounds=3)
    timing.peer_module("torch", args.threads)
    from stepdistill_jax.tasks.load import load_task

    data = load_task(args.task, split=args.split, data_dir=args.data_dir)
    prompts = data.stores[0].rows[0]["inputs"]
    rows = [prompts[i].tolist() for i in range(min(args.rows, len(prompts)))]
    with tempfile.TemporaryDirectory() as directory:
        save_random_model(directory, args, data)
        decoders = {
            "ours": our_decoder(directory, args, rows),
            "transformers": peer_decoder(directory, args, rows),
        }
    ours, theirs = (decode() for decode in decoders.values())
    equal = sum(a == b for a, b in zip(ours, theirs, strict=True))
    assert equal == len(rows), f"{len(rows) - equal} of {len(rows)} labels differ"
    rates = timing.alternate(
        {name: contender(decode, len(rows)) for name, decode in decoders.items()}, args.rounds
    )
    timing.report(
        args,
        rates,
        unit="rows_per_second",
        equal_labels=f"{equal} of {len(rows)}",
        ended=sum(row[-1] == 1 for row in ours),
        tokens=sum(map(len, ours)),
    )


if __name__ == "__main__":
    timing.run(main)
