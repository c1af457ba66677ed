"""Measures the cost of rationales in serving: `predict` with models of different arms.

    python benchmarks/serving_cost.py --task cqa --size small --vocab-size 32128 --json

`ours` is the step-by-step arm; its peers are `label_only` and `shared_encoder`. Each is a model directory
with the `stepdistill.json` of its arm. The length of an answer depends only on the weights, so all arms have
the same random weights, whose answers never end: each answer has the mean length of a label in the train
split. Before the timing, the benchmark checks that all arms read the same prompts, compile no new program,
and write the same bytes.

`rationale_first` writes the rationale and then the label, as one answer with the mean length of both. It
shows the cost of serving a model that needs to write its reasons before its label.

Times are from one file of JSON lines to another, including the model's start; `without_start` excludes
the start.
"""

import argparse
import contextlib
import pathlib
import statistics
import tempfile
from collections.abc import Iterator
from typing import Any

import timing

ARMS = {"ours": "step_by_step", "label_only": "label_only", "shared_encoder": "shared_encoder"}
COMPILED = "/jax/core/compile/backend_compile_duration"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--split", default="test", help="split of the dataset")
    parser.add_argument("--size", default="small", help="size of T5 v1.1: tiny, small, base, ...")
    parser.add_argument(
        "--vocab-size", type=int, help="rows of the embedding; default: the vocabulary's size"
    )
    parser.add_argument("--rows", type=int, default=256, help="largest number of rows of the split")
    parser.add_argument("--batch-size", type=int, default=64, help="rows decoded at once")
    parser.add_argument("--seed", type=int, default=0, help="seed of the weights")


def target_lengths(path: pathlib.Path, vocabulary) -> dict[str, list[int]]:
    """Returns the lengths of labels and of rationale-first answers, with end of sequence."""
    from stepdistill_jax.data.rows import BadRow
    from stepdistill_jax.inference.input_rows import read_questions

    lengths: dict[str, list[int]] = {"label": [], "rationale_first": []}
    for row in read_questions(path):
        if not isinstance(row, BadRow) and row.label and row.rationale:
            label, both = row.label, f"{row.rationale} {row.label}"
            for name, text in (("label", label), ("rationale_first", both)):
                lengths[name].append(len(vocabulary.encode(text)) + 1)
    return lengths


def in_batches(lengths: list[int], batch_size: int) -> dict[str, float]:
    """Returns the mean length, and the mean number of steps of a batch: its longest answer."""
    longest = [
        max(lengths[start : start + batch_size]) for start in range(0, len(lengths), batch_size)
    ]
    return {
        "mean": round(statistics.mean(lengths), 2),
        "longest_of_a_batch": round(statistics.mean(longest), 2),
    }


def save_models(scratch: pathlib.Path, args: argparse.Namespace, vocabulary, lengths) -> Any:
    """Writes one directory per arm, all with the same weights; returns their configuration."""
    from models import save_random_model

    from stepdistill_jax.data.objectives import LABEL_INPUT, Objective, resolve
    from stepdistill_jax.formats.directory import TaskInfo, read_model_files

    arms: dict[str, Any] = {name: resolve(arm) for name, arm in ARMS.items()}
    arms["rationale_first"] = (Objective("label", LABEL_INPUT, "{rationale} {label}"),)
    for name, objectives in arms.items():
        kind = "rationale_first" if name == "rationale_first" else "label"
        save_random_model(
            scratch / name,
            vocabulary,
            size=args.size,
            vocab_size=args.vocab_size,
            seed=args.seed,
            ends=0.0,
            task_info=TaskInfo(args.task, objectives, 1024, 256, round(lengths[kind]["mean"])),
        )
    return read_model_files(scratch / "ours").config


@contextlib.contextmanager
def watched() -> Iterator[dict[str, Any]]:
    """Records the tokens that `predict` decodes and the programs that it compiles."""
    import jax

    from stepdistill_jax.inference.engines import JaxEngine

    seen: dict[str, Any] = {"prompts": [], "answers": [], "compiled": 0}
    decode = JaxEngine.decode

    def watched_decode(self, rows, max_decode_len, *args, **kwargs):
        decoded = decode(self, rows, max_decode_len, *args, **kwargs)
        seen["prompts"] += [list(row) for row in rows]
        seen["answers"] += [list(ids) for ids in decoded.ids]
        return decoded

    def count(event: str, _: float, **__) -> None:
        seen["compiled"] += event == COMPILED

    jax.monitoring.register_event_duration_secs_listener(count)
    JaxEngine.decode = watched_decode
    try:
        yield seen
    finally:
        JaxEngine.decode = decode
        jax.monitoring.unregister_event_duration_listener(count)


class Served:
    """Runs `predict` of each model on the same rows."""

    def __init__(self, scratch: pathlib.Path, args: argparse.Namespace, lines: list[str]):
        self._scratch, self._batch_size, self._count = scratch, args.batch_size, len(lines)
        self.source = scratch / "in.jsonl"
        self.source.write_text("".join(line + "\n" for line in lines))
        self.without_start: dict[str, list[float]] = {}

    def predict(self, name: str) -> float:
        """Returns the rows per second of decoding; writes the answers to `answers(name)`."""
        from stepdistill_jax.inference import predict

        output = self._scratch / f"{name}.jsonl"
        options = {"batch_size": self._batch_size}
        return predict(self._scratch / name, self.source, output, **options)["rows_per_second"]

    def answers(self, name: str) -> bytes:
        """Returns the file that `predict` wrote."""
        return (self._scratch / f"{name}.jsonl").read_bytes()

    def contender(self, name: str) -> timing.Contender:
        """Returns the contender of a model for `timing.alternate`; it does not count round 0, either."""

        def of_round(number):
            def work() -> int:
                rate = self.predict(name)
                if number:
                    self.without_start.setdefault(name, []).append(rate)
                return self._count

            return work

        return of_round


def look(served: Served, names: list[str]) -> dict[str, dict[str, Any]]:
    """Returns each model's tokens and compilations; raises AssertionError if the arms' work differs."""
    found = {}
    for name in names:
        with watched() as seen:
            served.predict(name)
        found[name] = seen
    first = found["label_only"]
    for name in ARMS:
        for what in ("prompts", "answers"):
            assert found[name][what] == first[what], f"{name}: {what} differ from label_only's"
        if name != "label_only":
            assert not found[name]["compiled"], f"{name}: compiled programs that label_only lacks"
        assert served.answers(name) == served.answers("label_only"), f"{name}: answers differ"
    assert found["rationale_first"]["prompts"] == first["prompts"], (
        "rationale_first: prompts differ"
    )
    return {
        name: {
            "prompt_tokens_per_row": round(statistics.mean(map(len, seen["prompts"])), 2),
            "decoded_tokens_per_row": round(statistics.mean(map(len, seen["answers"])), 2),
            "compilations": seen["compiled"],
        }
        for name, seen in found.items()
    }


def main() -> None:
    args = timing.start(__doc__.splitlines()[0], add_arguments, rounds=3)
    from stepdistill_jax.data.prepare import ensure_prepared
    from stepdistill_jax.data.vocabulary import load_vocabulary
    from stepdistill_jax.errors import InputError
    from stepdistill_jax.models.flops import train_flops

    dataset = ensure_prepared(args.task, args.data_dir)
    vocabulary = load_vocabulary(dataset.spiece_model)
    lengths = target_lengths(dataset.file("train"), vocabulary)
    if not lengths["label"]:
        raise InputError(f"{args.task}: no row of train has a label and a rationale")
    lengths = {name: in_batches(found, args.batch_size) for name, found in lengths.items()}
    lines = dataset.file(args.split).read_text(encoding="utf-8").splitlines()[: args.rows]
    with tempfile.TemporaryDirectory() as folder:
        scratch = pathlib.Path(folder)
        config = save_models(scratch, args, vocabulary, lengths)
        served = Served(scratch, args, lines)
        names = ["label_only", "ours", "shared_encoder", "rationale_first"]
        work = look(served, names)
        rates = timing.alternate({name: served.contender(name) for name in names}, args.rounds)
    for cost in work.values():  # a forward pass is a third of a step
        tokens = (cost["prompt_tokens_per_row"], cost["decoded_tokens_per_row"])
        shape = {"rows": 1, "input_length": tokens[0], "target_length": tokens[1]}
        cost["gflop_per_row"] = round(train_flops(config, **shape) / 3e9, 3)
    middle = {name: statistics.median(rate) for name, rate in served.without_start.items()}
    timing.report(
        args,
        rates,
        unit="rows_per_second",
        work=work,
        target_tokens=lengths,
        without_start={name: round(rate, 2) for name, rate in middle.items()},
        times_dearer={
            name: {
                "rows_per_second": round(middle["ours"] / middle[name], 3),
                **{
                    what: round(work[name][what] / work["ours"][what], 3)
                    for what in ("gflop_per_row", "decoded_tokens_per_row")
                },
            }
            for name in names
            if name != "ours"
        },
    )


if __name__ == "__main__":
    timing.run(main)
